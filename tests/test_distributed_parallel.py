"""Tensor and pipeline parallel over DDP and FSDP2 against one process, in float64; a run that goes on from mesh to
mesh; and what cannot be divided. The four processes are started once."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.processes import finish
from helpers.thread_ranks import on_every_rank
from test_distributed_backends import LONG, difference, start, weights_apart

import loss
from cli.flags import check_flags
from distributed.backend import Options, make_backend
from distributed.fsdp import FullyShard
from distributed.split import check_rows, check_shape, layers_of, stage_of
from loss import linear_cross_entropy
from model import Transformer
from model_args import ModelArgs
from optim.args import OptimArgs
from training.args import NEEDS, TrainArgs

GQA = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 30}
SMALL = {"wide": True, "steps": 4, "data": "ragged", "count": 28}  # an epoch, whose last step has half of its rows
# one process: name -> fields of helpers.backend_run.Case. GQA; both optimizers; tied and not; norms of heads, biases
CASES = {
    "gqa": SMALL | {"micro": 2, "optimizer": "muon", "shape": GQA},
    "untied": SMALL
    | {
        "micro": 3,
        "grouped": True,
        "shape": {"n_kv_heads": 2, "vocab_size": 32, "tie_embeddings": False, "qk_norm": True},
    },
    "narrow": SMALL | {"wide": False, "micro": 2, "shape": GQA},
    "deep": SMALL | {"data": "bin", "micro": 1, "shape": {"n_layers": 5, "n_kv_heads": 2, "attention_bias": True}},
}
# four processes: name -> case, backend, its flags; the tied matrix of `deep` is on the first and the last of its stages
MESHES = {
    "tp 2 pp 2": ("gqa", "ddp", {"tp": 2, "pp": 2}),
    "tp 2 fsdp": ("untied", "fsdp", {"tp": 2, "z_loss": 0.01}),
    "pp 2 ddp": ("untied", "ddp", {"pp": 2, "pp_schedule": "gpipe", "z_loss": 0.01}),
    "pp 4": ("deep", "ddp", {"pp": 4}),
    "tp 2 ddp, drawn in parts": ("narrow", "ddp", {"tp": 2}),
    "pp 2 fsdp, drawn in parts": ("narrow", "fsdp", {"pp": 2}),
}

CONTEXT = {"original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, environment) -> Path:
    """A folder with the cases on one process and on four, and `chain`, which went from one process to two meshes of
    four and back."""
    folder = tmp_path_factory.mktemp("parallel")
    chain = CASES["gqa"] | {"steps": 8}
    one = CASES | {"whole": chain, "chain": chain | {"stop": 1}}
    one["untied"] = one["untied"] | {"train": {"z_loss": 0.01}}
    status, err = finish(start(folder, environment, "single", one), LONG)
    assert status == 0, err
    four = {name: CASES[case] | {"backend": backend, "train": flags} for name, (case, backend, flags) in MESHES.items()}
    words = [{"name": name, "empty": name.endswith("parts")} | case for name, case in four.items()]
    parts = {"save": "sharded"}  # each process writes its own
    stops = (
        {"stop": 3, "train": {"tp": 2, "pp": 2} | parts},
        {"stop": 5, "train": {"tp": 2} | parts, "backend": "fsdp"},
    )
    words += [chain | {"name": "chain", "backend": "ddp"} | more for more in stops]
    status, err = finish(start(folder, environment, "ddp", dict(enumerate(words)), 4), LONG)
    assert status == 0, err
    assert "going on from step 2" in err and "going on from step 4" in err
    status, err = finish(start(folder, environment, "single", {"chain": chain}), LONG)
    assert status == 0 and "going on from step 6" in err, err
    return folder


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_equals_one_process(mesh, runs):
    loss, norm, weights = difference(runs, MESHES[mesh][0], mesh)
    # float64 keeps 16 digits; float32 has 7, and sums in another order
    small, close = (1e-13, 1e-14) if CASES[MESHES[mesh][0]]["wide"] else (1e-6, 1e-6)
    assert loss < small and norm < 10 * small and weights < close


def test_a_run_goes_on_from_mesh_to_mesh(runs):
    assert weights_apart(runs, "whole", "chain") < 1e-14


@pytest.mark.parametrize("shape", [GQA, GQA | {"tie_embeddings": False, "attention_bias": True, "qk_norm": False}])
def test_weights_drawn_one_by_one_have_the_same_bits(shape):
    torch.manual_seed(0)
    ordinary = Transformer(ModelArgs(dim=32, **shape))
    after = torch.rand(3)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Transformer(ModelArgs(dim=32, **shape), initialize=False)
    model.to_empty(device="cpu")
    if model.args.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    FullyShard.draw(SimpleNamespace(part=lambda _, whole: whole), model)
    assert torch.equal(torch.rand(3), after)
    for name, p in model.named_parameters():
        assert torch.equal(p, ordinary.get_parameter(name)), name


class Group:
    """Stands in for a process group of threads."""

    def __init__(self, rank, exchange):
        self.rank, self.size, self.exchange = (lambda: rank), (lambda: len(exchange.slots)), exchange


@pytest.mark.parametrize("ranks, z_loss", [(2, 0.0), (3, 0.1)])
def test_loss_of_a_divided_vocabulary_equals_the_whole(ranks, z_loss, monkeypatch):
    def all_gather(parts, own, group):
        for part, value in zip(parts, group.exchange.gather(group.rank(), own)):
            part.copy_(value)

    monkeypatch.setattr(loss.dist, "all_gather", all_gather)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 7, 5, dtype=torch.float64), torch.randn(6 * ranks, 5, dtype=torch.float64)
    targets = torch.randint(0, len(weight), (2, 7))
    targets[0, :3] = loss.IGNORE
    options = {"loss_weights": torch.rand(2, 7), "block_rows": 4, "token_losses": True, "z_loss": z_loss}

    def work(rank, exchange):
        h = hidden.clone().requires_grad_()
        group = None if exchange is None else Group(rank, exchange)
        w = weight.chunk(1 if group is None else ranks)[rank].clone().requires_grad_()
        total, each = linear_cross_entropy(h, w, targets, group=group, **options)
        (3 * total).backward()
        return total.detach(), each, h.grad, w.grad

    total, each, of_hidden, of_weight = work(0, None)
    found = on_every_rank(work, ranks)
    for result in found:
        torch.testing.assert_close(result[:2], (total, each))
    torch.testing.assert_close(sum(result[2] for result in found), of_hidden)
    torch.testing.assert_close(torch.cat([result[3] for result in found]), of_weight)


def test_layers_are_divided_evenly():
    for n_layers, pp in ((5, 4), (6, 3), (7, 7), (32, 5)):
        stages = layers_of(n_layers, pp)
        assert [layer for stage in stages for layer in stage] == list(range(n_layers))
        assert {len(stage) for stage in stages} <= {n_layers // pp, n_layers // pp + 1}
        for stage, layers in enumerate(stages):
            assert all(stage_of(f"model.layers.{layer}.mlp.up_proj.weight", n_layers, pp) == stage for layer in layers)


@pytest.mark.parametrize(
    "tp, pp, shape, message",
    [
        (3, 1, {"n_heads": 4}, r"--train.tp 3 does not divide the model's 4 query heads \(n_heads\)"),
        (2, 1, {"n_heads": 4, "n_kv_heads": 1}, r"--train.tp 2 does not divide the model's 1 key/value heads"),
        (4, 1, {"n_heads": 4, "hidden_dim": 42}, r"--train.tp 4 does not divide the model's 42 columns"),
        (2, 1, {"n_heads": 4, "vocab_size": 29}, r"--train.tp 2 does not divide the model's 29 rows of the embedding"),
        (1, 3, {"n_heads": 4, "n_layers": 2}, r"--train.pp 3 is more than the model's 2 layers"),
        (1, 2, {"n_heads": 4, "rope_scaling": {"rope_type": "clex", "max_factor": 8} | CONTEXT}, "CLEX"),
    ],
)
def test_shapes_that_cannot_be_divided(tp, pp, shape, message):
    with pytest.raises(ValueError, match=message):
        check_shape(ModelArgs(**{"dim": 32, "vocab_size": 64} | shape), tp, pp)


def test_rows_that_cannot_be_divided():
    check_rows(2, 4, seq_len=40, padded=True, rows=8, micro_batch_size=2)
    with pytest.raises(ValueError, match="does not divide 41 tokens"):
        check_rows(2, 1, seq_len=41, padded=False, rows=8, micro_batch_size=0)
    with pytest.raises(ValueError, match=r"a multiple of 16 tokens \(--data.packing\)"):
        check_rows(3, 1, seq_len=48, padded=True, rows=8, micro_batch_size=0)
    for rows, pp, size in ((8, 2, 4), (8, 4, 2), (9, 4, 2), (7, 3, 2)):
        with pytest.raises(ValueError, match=f"--train.micro_batch_size {size} or less"):
            check_rows(1, pp, seq_len=41, padded=False, rows=rows, micro_batch_size=0)
        check_rows(1, pp, seq_len=41, padded=False, rows=rows, micro_batch_size=size)
    with pytest.raises(ValueError, match=r"a --data\.batch_size of 4 rows"):
        check_rows(1, 4, seq_len=41, padded=False, rows=3, micro_batch_size=1)


def test_processes_that_cannot_be_divided(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="need a multiple of 4 processes, and torchrun started 6"):
        make_backend("fsdp", "cpu", Options(tp=2, pp=2))


@pytest.mark.parametrize(
    "flags, optim, message",
    [
        ({"tp": 2, "backend": "single"}, {}, "--train.tp 2 needs --train.backend ddp or fsdp, found single"),
        ({"pp": 2, "backend": "deepspeed"}, {}, "--train.pp 2 needs --train.backend ddp or fsdp, found deepspeed"),
        ({"tp": 2, "compile": "on"}, {}, "a divided model is not compiled"),
        ({"pp": 2, "dtype": "fp16"}, {}, "use bf16"),
        ({"tp": 2}, {"optimizer": "galore_adamw"}, "the others need whole matrices"),
        ({"pp_schedule": "gpipe"}, {}, "--train.pp_schedule gpipe needs --train.pp above 1"),
    ],
)
def test_flags_that_do_not_go_together(flags, optim, message):
    @dataclasses.dataclass
    class Args:
        train: TrainArgs = dataclasses.field(default_factory=TrainArgs)
        optim: OptimArgs = dataclasses.field(default_factory=OptimArgs)

    with pytest.raises(ValueError, match=message):
        check_flags(Args(TrainArgs(**{"backend": "ddp"} | flags), OptimArgs(**optim)), NEEDS)
