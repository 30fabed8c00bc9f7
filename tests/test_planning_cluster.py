"""Strategies for many GPUs against the published formulas, and a count that is made in another way."""

import dataclasses
import math

import pytest

from model_args import ModelArgs
from planning import cluster, devices, memory, scaling
from planning.cluster import Cluster, Strategy
from planning.devices import GIB, GPUS
from planning.memory import Step
from planning.shapes import PUBLISHED
from training.flops import train_flops_per_token

TINY, SEVENTY = PUBLISHED["tinyllama"], PUBLISHED["llama2-70b"]
H100S = Cluster(GPUS["h100"], gpus=24, per_node=4, node_link=50e9, efficiency=0.45, seq_len=4096, batch_size=480)


def test_states_of_3d_by_hand():
    """Of p parameters of a GPU's part: 16 p bytes alone; FSDP2 divides all; under a pipeline, gradients and
    gathered weights stay whole until the last micro-batch."""
    for t, p, n, expected in [(2, 2, 1, 16), (4, 1, 2, 8), (1, 2, 4, 3 + 8), (2, 11, 4, 3 + 8)]:
        strategy = Strategy("3D", t, p, n)
        kept = cluster.states(TINY, strategy, Step(optimizer="adamw"))
        if p == 1:
            kept.pop("gathered")
        assert sum(kept.values()) / cluster.share(TINY, strategy) == pytest.approx(expected, rel=1e-4)


def test_3d_of_one_process_keeps_what_one_process_does():
    for dtype, again in (("fp32", False), ("bf16", False), ("bf16", True)):
        step = Step(2, 512, dtype, checkpointing=again)
        alone = memory.training(TINY, step)
        for part in ("weights", "gradients", "optimizer"):
            alone.pop(part)
        found = cluster.activations(TINY, Strategy("3D"), step, 4)
        assert sum(found.values()) == pytest.approx(sum(alone.values()), rel=1e-3)  # but for the angles


@pytest.mark.parametrize("tied", [True, False])
def test_the_fullest_stage_is_found_by_putting_every_part_on_its_stage(tied):
    shape = ModelArgs(dim=64, n_layers=6, n_heads=4, vocab_size=1000, tie_embeddings=tied)
    block = (shape.n_parameters() - 64 - 64_000 * (1 if tied else 2)) / 6
    for pipeline in (1, 2, 3, 6):
        stages = [block * 6 / pipeline] * pipeline
        stages[0] += 64_000  # the embedding
        if not tied or pipeline > 1:  # the last stage needs a copy of a tied head
            stages[-1] += 64_000
        for tensor in (1, 2, 4):
            expected = max(stages) / tensor + 64  # every GPU has the last norm, at most
            assert cluster.share(shape, Strategy("3D", tensor, pipeline)) == pytest.approx(expected)


def test_sizes_of_a_strategy_divide_the_model_and_use_every_gpu():
    found = list(cluster.strategies(SEVENTY, H100S))
    assert len({each.label for each in found}) == len(found)
    for each in found:
        assert each.tensor * each.pipeline * each.data == 24
        assert math.gcd(64, 8, 28672, 4) % each.tensor == 0 and 80 % each.pipeline == 0
    sizes = {(each.tensor, each.pipeline) for each in found if each.name == "3D"}
    assert sizes == {(t, p) for t in (1, 2, 4) for p in (1, 2, 4, 8) if t * p > 1 and 24 % (t * p) == 0}


def test_a_step_takes_its_operations_the_bubble_and_what_is_not_hidden():
    step = Step(1, 4096, checkpointing=True)
    found = cluster.predict(SEVENTY, Strategy("3D", 4, 2, 3), step, H100S)
    micro_batches = 480 // 3
    operations = train_flops_per_token(SEVENTY, 4096) * 480 * 4096
    compute = operations * 4 / 3 / (24 * 989e12 * 0.45)
    hidden = 2 * 4096 * 8192  # bytes of a row between two blocks
    tensor = 40 * 6 * micro_batches * 2 * 3 / 4 * hidden
    stages = 2 * hidden / 4 * micro_batches
    part = 2 / 3 * 4 * cluster.share(SEVENTY, Strategy("3D", 4, 2, 3)) / 50e9  # seconds
    gathers = max(0, 2 * micro_batches * part - compute)  # for forward and backward of each micro-batch
    waiting = tensor / 450e9 + stages / 50e9 + gathers + part  # gradients are sent behind the last backward pass
    assert found.bubble == pytest.approx(1 / (micro_batches + 1))
    assert found.waiting == pytest.approx(waiting)
    assert found.seconds == pytest.approx(compute * (micro_batches + 1) / micro_batches + waiting)
    assert found.mfu == pytest.approx(operations / found.seconds / (24 * 989e12))


def test_ddp_sends_the_gradients_once_and_zero_3_three_times_a_micro_batch():
    here = dataclasses.replace(H100S, gpus=8, per_node=8, batch_size=64)
    step = Step(2, 4096)
    total = TINY.n_parameters()
    ddp = cluster.predict(TINY, Strategy("DDP", data=8), step, here)
    assert ddp.volume == pytest.approx(2 * 7 / 8 * 4 * total)  # float32 gradients, as this repository has
    sharded = cluster.predict(TINY, Strategy("ZeRO-3", data=8), step, here)
    assert sharded.volume == pytest.approx(4 * 3 * 7 / 8 * 4 * total)  # 4 micro-batches


def test_states_that_are_divided_by_hand():
    """Bytes for a parameter: FSDP2 4 + 4 + 8 over n; DeepSpeed keeps a float32 copy of its part beside the moments."""
    here = dataclasses.replace(H100S, gpus=8, per_node=8, batch_size=64)
    total = TINY.n_parameters()
    parts = {"FSDP2": (0.5, 0.5, 1), "ZeRO-1": (4, 4, 1.5), "ZeRO-2": (4, 0.5, 1.5), "ZeRO-3": (0.5, 0.5, 1.5)}
    for name, expected in parts.items():
        found = cluster.predict(TINY, Strategy(name, data=8), Step(2, 4096), here)
        kept = [found.memory[part] / total for part in ("weights", "gradients", "optimizer")]
        assert kept == pytest.approx(expected)
        assert found.start == (0 if name == "FSDP2" else 4 * total)
        assert ("gathered" in found.memory) == (name in ("FSDP2", "ZeRO-3"))


def test_a_model_that_does_not_fit_before_it_is_divided_does_not_fit():
    step, many = Step(1, 4096, checkpointing=True), dataclasses.replace(H100S, gpus=240)
    new = cluster.predict(SEVENTY, Strategy("FSDP2", data=240), step, many)
    assert new.start == 0 and new.size == "25.7 GiB"  # each process makes its part only
    found = cluster.predict(SEVENTY, Strategy("ZeRO-3", data=240), step, many)
    loaded = cluster.predict(SEVENTY, Strategy("FSDP2", data=240), step, dataclasses.replace(many, loaded=True))
    assert loaded.start == found.start
    assert sum(found.memory.values()) < devices.usable(GPUS["h100"]) < found.total == 4 * 68_976_648_192
    assert found.size == "257.0 GiB at the start, when every GPU holds the whole model"


def test_rows_that_do_not_divide_and_too_few_micro_batches_are_no_option():
    assert cluster.predict(SEVENTY, Strategy("DDP", data=24), Step(7, 4096), H100S) is None
    assert cluster.predict(SEVENTY, Strategy("3D", 1, 8, 3), Step(32, 4096), H100S) is None  # 5 for 8 stages
    with pytest.raises(ValueError, match=r"--batch_size 7 does not divide into --gpus 24 .* such as 24"):
        cluster.rank(SEVENTY, Step(1, 4096), dataclasses.replace(H100S, batch_size=7))


def test_what_fits_is_ranked_by_time_and_the_rest_by_size():
    fits, others = cluster.rank(SEVENTY, Step(1, 4096), H100S)
    limit = devices.usable(GPUS["h100"])
    assert fits and all(each.total <= limit for each in fits)
    assert [each.seconds for each in fits] == sorted(each.seconds for each in fits)
    assert [each.total for each in others] == sorted(each.total for each in others)
    assert "DDP" in {each.strategy.name for each in others}  # 16 bytes for each of 69 B parameters


# ---- devices


def test_a_gpu_is_found_by_its_name_and_by_what_the_system_calls_it():
    assert devices.find("H100") is GPUS["h100"]
    with pytest.raises(ValueError, match=r"--gpu h1000 is not in the table; known are .*h100, .*--gpu_tflops"):
        devices.find("h1000")
    for said, known in [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("Tesla V100", "v100")]:
        assert devices.named_by_system(said, 5 * GIB).peak == GPUS[known].peak
    assert devices.named_by_system("NVIDIA GeForce RTX 4090", 1).bandwidth == 1008e9
    assert devices.named_by_system("a GPU of tomorrow", 1).peak is None


def test_peaks_are_those_that_a_run_measures_itself_by():
    import hardware

    assert {name: GPUS[name.lower()].peak for name in hardware.PEAKS} == hardware.PEAKS


# ---- the law


@pytest.mark.parametrize("n, d, nats", [(10e6, 0.2e9, 5.51), (50e6, 1e9, 3.89), (124e6, 10e9, 3.01), (7e9, 2e12, 2.07)])
def test_losses_of_the_corrected_law(n, d, nats):
    assert scaling.loss(n, d) == pytest.approx(nats, abs=0.006)
    low, high = scaling.interval(n, d)
    assert low < scaling.loss(n, d) < high and high - low > 4 * 0.03 * 0.98


@pytest.mark.parametrize("flops", [1e18, 5.8e23])
def test_the_best_size_is_the_lowest_of_all_sizes(flops):
    sizes = [10 ** (6 + i / 1000) for i in range(6000)]
    best = min(sizes, key=lambda n: scaling.loss(n, flops / 6 / n))
    n, d = scaling.optimal(flops)
    assert n == pytest.approx(best, rel=3e-3) and 6 * n * d == pytest.approx(flops)
    least, most = scaling.optimal_range(flops)
    assert least < n < most


def test_chinchilla_had_about_twenty_tokens_for_a_parameter():
    n, d = scaling.optimal(5.8e23)
    of_rounded_fit = scaling.Law(1.69, 406.4, 410.7, 0.34, 0.28)  # which Hoffmann et al. printed
    other_n, other_d = scaling.optimal(5.8e23, of_rounded_fit)
    assert d / n == pytest.approx(18, abs=0.5) and other_d / other_n == pytest.approx(93, abs=1)
