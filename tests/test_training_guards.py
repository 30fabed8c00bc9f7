"""Guards of the loop: what is told of a step that is not finite, jumps of the loss, going back; and norms by layer."""

import json
import math
import random

import pytest
import torch
from helpers.tiny_training_run import Changed, losses, quick, rows, toy_data, toy_trainer, weighted  # noqa: F401
from torch import nn

from checkpoint.directory import load_model
from optim.args import OptimArgs
from training import guards
from training.guards import RECENT, spike
from training.log import read_metrics
from training.norms import Norms, activations, place_of
from training.state import load_state

# ---- which tensor, which batch, which documents


def test_a_step_that_is_not_finite_is_explained(tmp_path):
    data = toy_data(tmp_path)
    ours = toy_trainer(tmp_path / "run", Changed(data, weighted({3})), max_steps=6, micro_batch_size=4)
    ours.fit()
    (path,) = (tmp_path / "run/guards").iterdir()
    told = json.loads(path.read_text())
    assert path.name == "not_finite_step_00000004.json" and told["step"] == 4
    (rank,) = told["ranks"]
    assert rank["rows"] == data.origins(3) and len(rank["rows"]) == 6
    assert rank["weights"] == rank["outputs"] == [] and len(rank["gradients"]) == 10  # only the loss was weighted
    assert all(math.isinf(x) for x in rank["loss_of_rows"]) and len(rank["loss_of_rows"]) == 6


def test_the_first_tensor_that_is_not_finite_is_named():
    torch.manual_seed(0)
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    found = guards.culprits(model, [some_batch()])
    assert found["weights"] == ["model.layers.1.mlp.up_proj.weight"]
    assert found["outputs"][:2] == ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]
    assert "model.embed_tokens.weight" in found["gradients"] and all(p.grad is None for p in model.parameters())


def test_the_row_that_is_not_finite_is_named_and_no_random_number_is_drawn():
    model, batch = tiny_model(), some_batch()
    model.lm_head.weight.data[7] = 1e38  # a target of the second row only
    before = torch.get_rng_state()
    found = guards.culprits(nn.Module.train(model), [batch])
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found["loss_of_rows"]) == 2


def tiny_model():
    from model import Transformer
    from model_args import ModelArgs

    shape = {"dim": 16, "n_layers": 2, "n_heads": 2, "multiple_of": 8, "vocab_size": 11, "tie_embeddings": False}
    return Transformer(ModelArgs(**shape))


def some_batch():
    from dataset import Batch

    ids = torch.randint(0, 7, (2, 9), generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1], ids[:, 1:])


@pytest.mark.parametrize("world", [1, 2])
def test_rows_are_where_they_are_said_to_be(tmp_path, world):
    data = toy_data(tmp_path)
    (bin,) = data.bins
    for step in (0, 3, data.steps_per_epoch + 1):
        for rank in range(world):
            batch = data.batch(step, rank, world)
            for told, targets in zip(data.origins(step, rank, world), batch.targets, strict=True):
                if told == "a row that fills the last step":
                    assert (targets == -100).all()
                    continue
                words = told.replace(",", "").split()
                first, last, a, b = (int(words[i]) for i in (2, 4, 6, 8))
                assert targets[: last - first + 1].tolist() == bin.tokens[first : last + 1].tolist()
                assert bin.offsets[a] <= first < bin.offsets[a + 1] and bin.offsets[b] <= last < bin.offsets[b + 1]


# ---- jumps of the loss


def test_a_jump_is_seen_and_noise_is_not():
    rng = random.Random(0)
    noise = [3 + rng.gauss(0, 0.1) for _ in range(RECENT)]
    assert spike(noise, 3.4) is None and spike(noise[:10], 9.0) is None and spike(noise, math.nan) is None
    assert spike(noise, 5.0) == pytest.approx(3, abs=0.1)
    loud = [3 + rng.gauss(0, 0.5) for _ in range(RECENT)]
    assert spike(loud, 4.5) is None and spike(loud, 9.0) is not None


def test_a_jump_is_logged_and_its_rows_are_written(tmp_path, capsys):
    def change(step, batch):
        if step == 40:
            batch.targets[:] = (batch.targets + 11) % 29  # nothing that it has learnt
        return batch

    data = toy_data(tmp_path)
    ours = toy_trainer(tmp_path / "run", Changed(data, change), max_steps=44)
    ours.fit()
    (jump,) = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "spike" in row]
    assert jump["step"] == 41 and jump["spike"] > 0.5
    told = json.loads((tmp_path / "run/guards/spike_step_00000041.json").read_text())
    assert told["ranks"] == [{"rank": 0, "rows": data.origins(40)}]
    assert "step 41: the loss jumps to" in capsys.readouterr().err
    assert len(ours.state.recent) == RECENT


# ---- going back


def poisoned(tmp_path, until: int = 40):
    """A run in which one step breaks the weights: every later gradient is infinite, until the batches get better."""
    return Changed(toy_data(tmp_path), weighted(set(range(13, until))))


def test_a_run_goes_back_leaves_batches_out_and_ends(tmp_path, capsys):
    ours = toy_trainer(tmp_path / "run", poisoned(tmp_path, 33), max_steps=40, save_interval=10, log_interval=1)
    ours.fit()
    err = capsys.readouterr().err
    assert (
        "back to step 10, with half the learning rate" in err and "steps 11 to 33 are left out (1 of at most 2" in err
    )
    assert (ours.state.rollbacks, ours.state.avoid) == (1, list(range(10, 33)))
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log if "loss" in row] == list(range(1, 41))  # each step once, though some ran twice
    rates = {row["step"]: row["lr"] for row in log if "lr" in row}
    assert rates[34] < 0.6 * rates[10]
    assert all(p.isfinite().all() for p in load_model(tmp_path / "run/last").parameters())


def test_a_run_that_is_killed_after_it_went_back_does_the_same(tmp_path):
    data = poisoned(tmp_path, 33)
    how = {"max_steps": 40, "save_interval": 10}
    torch.manual_seed(0)
    toy_trainer(tmp_path / "whole", data, **how).fit()
    torch.manual_seed(0)
    killed = toy_trainer(tmp_path / "run", data, **how)

    def kill(step, batch):
        if step == 35:
            raise KeyboardInterrupt
        return data.change(step, batch)

    killed.data = Changed(data.source, kill)
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    toy_trainer(tmp_path / "run", data, **how).fit()
    # as text, where NaN equals NaN
    assert json.dumps(rows(tmp_path / "run")) == json.dumps(rows(tmp_path / "whole"))
    a, b = (load_model(tmp_path / name / "last").state_dict() for name in ("run", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_goes_back_only_so_often(tmp_path):
    ours = toy_trainer(tmp_path / "run", poisoned(tmp_path, 200), max_steps=120, save_interval=10, log_interval=0)
    with pytest.raises(ValueError, match="20 steps in a row had no finite gradient"):
        ours.fit()
    assert ours.state.rollbacks == 2
    assert len(list((tmp_path / "run/guards").iterdir())) == guards.MOST_DUMPS


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    data = Changed(toy_data(tmp_path), weighted(set(range(30))))
    ours = toy_trainer(tmp_path / "run", data, max_steps=40, log_interval=0)
    with pytest.raises(ValueError, match="20 steps in a row"):
        ours.fit()
    assert not (tmp_path / "run/last").exists()


def test_guards_change_no_number_where_nothing_goes_wrong(tmp_path):
    data = toy_data(tmp_path)
    for name, more in (("plain", {"rollbacks": 0}), ("watched", {"log_norms": 3})):
        torch.manual_seed(0)
        toy_trainer(tmp_path / name, data, max_steps=12, **more).fit()
    plain, watched = (rows(tmp_path / name) for name in ("plain", "watched"))
    assert plain == [row for row in watched if "grad_norm/00" not in row]
    assert not (tmp_path / "plain/guards").exists()
    progress = load_state(tmp_path / "plain/last")["progress"]
    assert progress["avoid"] == [] and progress["rollbacks"] == 0


# ---- norms


@pytest.mark.parametrize("optimizer, clip", [("muon", 0.05), ("adamw", 0.0), ("lion", 1.0)])
def test_norms_of_layers_are_those_of_the_gradient_before_clipping(tmp_path, optimizer, clip):
    optim = OptimArgs(optimizer, lr=1e-4, muon_lr=1e-4)
    ours = toy_trainer(tmp_path / "run", toy_data(tmp_path), optim, max_steps=1, log_norms=1, grad_clip=clip)
    batch, model = ours.data.batch(0), ours.model
    loss, n = model(batch.tokens, batch.targets)
    (loss / n).backward()
    expected = {}
    for name, p in model.named_parameters():
        place = place_of(name)
        expected[place] = math.hypot(expected.get(place, 0.0), p.grad.norm().item())
        p.grad = None
    ours.fit()
    (row,) = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if "grad_norm/00" in row]
    assert set(expected) == {"embed", "00", "01", "other"}
    for place, value in expected.items():
        assert row[f"grad_norm/{place}"] == pytest.approx(value, rel=1e-4)
    total = math.hypot(*(row[f"grad_norm/{place}"] for place in expected))
    assert total == pytest.approx(next(each["grad_norm"] for each in rows(tmp_path / "run") if "grad_norm" in each))
    assert {"activation/00", "activation/01"} <= row.keys()


def test_activations_are_those_of_the_blocks():
    model, tokens = tiny_model(), torch.tensor([[1, 2, 3]])
    found = activations(model, {"tokens": tokens, "targets": tokens})
    x = model.model.embed_tokens(tokens)
    context = model.context_for_rows(tokens)
    for number, block in enumerate(model.model.layers):
        x = block(x, *context, None)
        assert found[f"activation/{number:02d}"] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-5)
    assert not model.model.layers[0]._forward_hooks and model.training and Norms


@pytest.mark.parametrize(
    "name, place",
    [
        ("model.layers.12.mlp.up_proj.weight", "12"),
        ("inner.transformer.h.3.attn.c_attn.weight", "03"),
        ("lm_head.weight", "head"),
        ("model.norm.weight", "other"),
    ],
)
def test_places(name, place):
    assert place_of(name) == place
