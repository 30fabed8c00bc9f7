"""A full disk is called so, whatever the library says that met it, and nothing is left behind."""

from types import SimpleNamespace

import pytest

from files import files_aside, written_aside


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("9 requested and 5 written")])
@pytest.mark.parametrize("aside", [written_aside, files_aside])
def test_a_full_disk_is_called_so(aside, error, tmp_path, monkeypatch):
    for free, says in ((0, True), (2**30, False)):
        monkeypatch.setattr("files.shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(OSError, match="could not write") as caught, aside(tmp_path / "x"):
            raise error
        assert ("the disk is full" in str(caught.value)) is says and str(error) in str(caught.value)
    assert not list(tmp_path.iterdir())
