"""The compiled step in its forms for other processors, as far as this one can run them."""

import shutil

import pytest
import torch

from decoding import cpu_step
from tests import test_decoding_cpu_step as full
from tests import test_decoding_cpu_step_quantized as quantized

WIDE = "avx2 fma avx512f avx512bw avx512vl avx512dq"
FORMS = {  # the instructions that the compiler may use, besides those of every processor
    "no more": "",
    "AVX2": "avx2 fma",
    "AVX and VNNI": "avx2 fma avx_vnni",
    "AVX-512": WIDE,
    "AVX-512 and VNNI": f"{WIDE} avx512_vnni",
}


@pytest.fixture(scope="module", params=FORMS.values(), ids=FORMS.keys(), autouse=True)
def form(request, tmp_path_factory):
    instructions = request.param.split()
    if missing := {*instructions} - {*cpu_step._processor().split()}:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    if not shutil.which("g++"):
        pytest.skip("there is no g++")
    options = [f"-m{name.replace('_', '')}" for name in instructions]
    with pytest.MonkeyPatch.context() as patch:
        # -O1 compiles in a third of the time
        flags = ["-O1" if flag == "-O3" else flag for flag in cpu_step.FLAGS if flag != "-march=native"]
        patch.setattr(cpu_step, "FLAGS", (*flags, *options))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("form")))
        cpu_step.compiled_step.cache_clear()
        assert cpu_step.compiled_step() is not None
        yield
    cpu_step.compiled_step.cache_clear()


@pytest.mark.parametrize("shape", ["grouped, all options", "one key head, window, odd widths", "wide"])
def test_full_weights(shape):
    assert full.walk(full.make(**full.SHAPES[shape]), [3, 1, 2], steps=3, most=3) < 1e-12
    full.test_it_rounds_no_more_than_the_model_does(torch.float32, 1.5)
    full.test_it_rounds_no_more_than_the_model_does(torch.bfloat16, 1.0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_in_groups(bits):
    for group_size in (32, 64, -1):
        quantized.test_a_step_is_the_forward_pass_of_what_the_codes_stand_for(bits, group_size, torch.float32, 4e-4)
    if bits > 2:
        odd = {"dim": 75, "n_heads": 3, "n_kv_heads": 1, "head_dim": 26, "hidden_dim": 101}
        quantized.test_rows_that_end_inside_of_a_group(bits, -1, odd)
        quantized.test_rows_that_end_inside_of_a_group(bits, 96, {})


@pytest.mark.parametrize("kind", ["nf4", "fp4", "w8a8", "b158"])
def test_layers_of_other_kinds(kind):
    quantized.test_layers_of_other_kinds(kind, odd=True)


def test_a_row_is_the_same_bits_beside_any_others_and_for_any_number_of_threads():
    full.test_the_number_of_threads_changes_nothing()
    full.test_runs_may_go_to_some_rows_of_the_cache_and_be_cut_anywhere()
    for bits in (4, 8):
        quantized.test_a_row_is_the_same_bits_beside_any_others_and_for_any_number_of_threads(bits)
    for kind in ("nf4", "w8a8"):
        quantized.test_a_row_of_another_kind_is_the_same_bits_beside_any_others(kind)
