"""The tables of `python -m tests.conversions`, in short: pairs in float32 are exact, and dashes are dashes."""

import conversions as tables
import pytest

EXACT = ["huggingface, shards", "meta, 2 ranks", "gguf F32", "llama2c_v1"]


def test_every_pair_of_exact_formats_changes_no_bit(tmp_path):
    pytest.importorskip("gguf")
    found = list(tables.pairs(EXACT, tmp_path))
    assert len(found) == len(EXACT) ** 2 * len(tables.MODELS)
    assert [each for each in found if isinstance(each[3], float) and each[3] != 0] == []
    refused = {(first, kind) for first, second, kind, error in found if isinstance(error, str) and first == second}
    only_llama = {kind for kind in tables.MODELS if "Qwen" in kind}
    assert refused == {("meta, 2 ranks", kind) for kind in only_llama} | {
        ("llama2c_v1", kind) for kind in [*only_llama, "stretched (Llama 3.1)"]
    }
