"""The cache of the reference's log-probabilities: whatever happens to its file, the numbers are those of the model."""

import numpy as np
import pytest

from tuning.reference import read_cache, write_cache

NUMBERS = np.linspace(-9.0, 0.0, 500)


@pytest.mark.parametrize("where", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_flipped_bit_gives_nothing_or_the_same_numbers(tmp_path, where):
    path = tmp_path / "reference.npz"
    write_cache(path, "key", NUMBERS)
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 4
    path.write_bytes(data)
    found = read_cache(path, "key")
    assert found is None or np.array_equal(found, NUMBERS)


@pytest.mark.parametrize("content", [b"", b"PK", b"not an archive", bytes(4096)])
def test_a_file_that_is_no_cache_is_told_and_made_anew(tmp_path, capsys, content):
    path = tmp_path / "reference.npz"
    path.write_bytes(content)
    assert read_cache(path, "key") is None
    assert "reference.npz is damaged: the reference is computed again" in capsys.readouterr().err
    write_cache(path, "key", NUMBERS)
    assert np.array_equal(read_cache(path, "key"), NUMBERS) and read_cache(path, "other key") is None
