"""files.alone_in: one process at a time in a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

import files
from files import alone_in


def test_a_folder_is_closed_to_others_until_the_work_ends_however_it_ends(tmp_path):
    out = tmp_path / "not" / "yet"
    locked = pytest.raises(ValueError, match=f"another process is at work in {out}")
    with alone_in(out), locked, alone_in(out):
        pass
    script = "import files, pathlib, sys, time\nwith files.alone_in(pathlib.Path(sys.argv[1])):"
    script += " print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", script, out]
    with subprocess.Popen(command, cwd=Path(files.__file__).parent, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another process"), alone_in(out):
            pass
        other.kill()
    with alone_in(out):
        assert list(out.iterdir()) == []
