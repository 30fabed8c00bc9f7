"""Optimizers against torch's own, schedules against transformers' and closed forms."""

import copy
import math
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora import adapters
from model import Transformer
from model_args import ModelArgs
from optim import muon
from optim.args import OptimArgs
from optim.muon import Muon, orthogonalize
from optim.optimizers import OPTIMIZERS, build_optimizer
from optim.schedule import lr_factor

transformers = pytest.importorskip("transformers")


def tiny_model(**changes) -> Transformer:
    return Transformer(
        ModelArgs(**{"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 11, "multiple_of": 8} | changes)
    )


def set_random_grads(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


# ---- Muon


def exactly_orthogonal(matrices: torch.Tensor, *_) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    return (u @ vh).to(matrices.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("exact", [True, False])
def test_muon_equals_torchs_step_by_step(weight_decay, exact, monkeypatch):
    if exact:
        monkeypatch.setattr(muon, "orthogonalize", exactly_orthogonal)
        monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", exactly_orthogonal)
    shapes = [(16, 16), (24, 16), (16, 24), (16, 16), (1, 8), (40, 3)]
    ours = [nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = copy.deepcopy(ours)
    optimizers = (
        Muon(ours, lr=0.02, weight_decay=weight_decay, momentum=0.9),
        torch.optim.Muon(
            theirs, lr=0.02, weight_decay=weight_decay, momentum=0.9, adjust_lr_fn="match_rms_adamw", eps=1e-7
        ),
    )
    for step in range(8):
        before = [p.detach().clone() for p in ours]
        for params, optimizer in zip((ours, theirs), optimizers):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (step + 1)
            set_random_grads(params, step)
            optimizer.step()
        for p, q, old in zip(ours, theirs, before):
            # both iterate in bfloat16, products in another order; the quintic turns the rounding of a singular value
            # near 1 into some percent
            assert (p - q).norm() < (1e-5 if exact else 0.15) * (p - old).norm()
        with torch.no_grad():  # so that differences do not add up
            for p, q in zip(ours, theirs):
                q.copy_(p)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 32), (2, 32, 96), (1, 1, 7)])
def test_orthogonalised_singular_values_are_near_one(shape):
    u, values, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrices = u * values.clamp(min=0.02 * values.norm(dim=-1).max())[:, None] @ vh  # smaller ones take more iterations
    out = orthogonalize(matrices).double()
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.6
    assert values.max() < 1.3
    # the singular vectors stay: U^T out V is diagonal, up to bfloat16
    inside = u.mT @ out @ vh.mT
    off = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off.norm() < 0.05 * inside.norm()


def test_orthogonalise_each_alone_and_zero():
    matrices = torch.randn(4, 12, 20) * torch.tensor([1e-3, 1.0, 100.0, 0.0])[:, None, None]
    together = orthogonalize(matrices)
    for i in range(4):
        assert (together[i] - orthogonalize(matrices[i : i + 1])[0]).float().norm() <= 0.02 * together[i].float().norm()
    assert (together[3] == 0).all()


def test_muons_update_has_the_size_of_adamws():
    parameter = nn.Parameter(torch.zeros(64, 160))
    optimizer = Muon([parameter], lr=1.0, weight_decay=0.0)
    set_random_grads([parameter], 0)
    optimizer.step()
    assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


def test_muon_leaves_alone_what_has_no_gradient_and_refuses_vectors():
    parameters = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))]
    optimizer = Muon(parameters, lr=0.1)
    set_random_grads(parameters[:1], 0)
    optimizer.step()
    assert (parameters[1] == 1).all()
    assert (parameters[0] != 1).any()
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        Muon([nn.Parameter(torch.ones(4))], lr=0.1)


# ---- parameter groups


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"attention_bias": True}, {"qk_norm": True}])
def test_every_trainable_parameter_is_in_one_group(optimizer, changes):
    model = tiny_model(**changes)
    frozen = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"}
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    built = build_optimizer(model, OptimArgs(optimizer=optimizer, lr=1e-3, muon_lr=2e-3, weight_decay=0.3))
    seen = [id(p) for p in built.parameters]
    assert len(seen) == len(set(seen))
    assert set(seen) == {id(p) for p in model.parameters() if p.requires_grad}
    where = {id(p): (type(part), group) for part in built.parts for group in part.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if name in frozen:
            continue
        kind, group = where[id(p)]
        hidden_matrix = name.endswith("proj.weight")
        assert (kind is Muon) == (hidden_matrix and optimizer == "muon")
        assert group["weight_decay"] == (0.3 if p.dim() == 2 else 0.0)
        assert group["lr"] == (2e-3 if kind is Muon else 1e-3)


def test_adamw_equals_a_plain_one():
    ours, theirs = tiny_model(), tiny_model()
    theirs.load_state_dict(ours.state_dict())
    args = OptimArgs(optimizer="adamw", lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    built = build_optimizer(ours, args)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() == 2], "weight_decay": 0.2},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6, foreach=False)
    for step in range(5):
        for model, optimizer in ((ours, built), (theirs, plain)):
            set_random_grads(model.parameters(), step)
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(tiny_model().requires_grad_(False), OptimArgs())


def test_only_matrices_to_train():
    model = tiny_model().requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    assert [type(part) for part in build_optimizer(model, OptimArgs()).parts] == [Muon]


def test_the_flag_offers_what_is_registered():
    assert get_args(get_type_hints(OptimArgs)["optimizer"]) == tuple(OPTIMIZERS)


def test_set_lr_scales_every_peak():
    built = build_optimizer(tiny_model(), OptimArgs(lr=0.1, muon_lr=0.3))
    for factor in (0.5, 0.25):  # of the peak, not of the last one
        built.set_lr(factor)
        assert {group["lr"] for group in built.param_groups} == {0.1 * factor, 0.3 * factor}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_state_goes_on_exactly(optimizer):
    model = tiny_model()
    built = build_optimizer(model, OptimArgs(optimizer=optimizer, lr=0.01, muon_lr=0.01))
    for step in range(3):
        set_random_grads(built.parameters, step)
        built.step()
    copied = copy.deepcopy(model)
    again = build_optimizer(copied, OptimArgs(optimizer=optimizer, lr=0.01, muon_lr=0.01))
    again.load_state_dict(copy.deepcopy(built.state_dict()))
    for each in (built, again):
        each.set_lr(0.5)
        set_random_grads(each.parameters, 9)
        each.step()
        each.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copied.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_a_state_brings_moments_and_not_settings():
    built = build_optimizer(tiny_model(), OptimArgs(lr=0.01, muon_lr=0.02, weight_decay=0.1))
    again = build_optimizer(tiny_model(), OptimArgs(lr=0.03, muon_lr=0.04, weight_decay=0.2, momentum=0.5))
    settings = [{key: value for key, value in group.items() if key != "params"} for group in again.param_groups]
    again.load_state_dict(copy.deepcopy(built.state_dict()))
    assert settings == [{key: v for key, v in group.items() if key != "params"} for group in again.param_groups]
    again.set_lr(0.5)
    assert {group["lr"] for group in again.param_groups} == {0.015, 0.02}


def test_state_of_another_optimizer_is_refused():
    muon, adamw = (build_optimizer(tiny_model(), OptimArgs(optimizer=name)) for name in ("muon", "adamw"))
    with pytest.raises(ValueError, match=r"has 2 parts, --optim\.optimizer makes 1: resume with the optimizer"):
        adamw.load_state_dict(muon.state_dict())


# ---- schedules


def factors_of(scheduler_of, total: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler_of(optimizer)
    factors = []
    for _ in range(total):
        factors.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return factors


@settings(deadline=None)  # the first example imports what transformers' schedules need
@given(warmup=st.integers(0, 9), rest=st.integers(1, 40), floor=st.sampled_from([0.0, 0.1]))
def test_schedules_equal_transformers_after_warmup(warmup, rest, floor):
    total = warmup + rest
    peers = {
        "cosine": lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(
            o, warmup, total, min_lr_rate=floor
        ),
        "wsd": lambda o: transformers.get_wsd_schedule(
            o, warmup, rest - rest // 2, num_training_steps=total, decay_type="linear", min_lr_ratio=floor
        ),
        "constant": lambda o: transformers.get_constant_schedule_with_warmup(o, warmup),
        "inverse_sqrt": lambda o: transformers.get_inverse_sqrt_schedule(o, warmup, timescale=max(1, warmup)),
    }
    if floor == 0:
        peers["linear"] = lambda o: transformers.get_linear_schedule_with_warmup(o, warmup, total)
    for name, peer in peers.items():
        args = OptimArgs(schedule=name, warmup_steps=warmup, min_lr_ratio=floor, decay_share=(rest - rest // 2) / total)
        ours = [lr_factor(step, total, args) for step in range(total)]
        assert ours[warmup:] == pytest.approx(factors_of(peer, total)[warmup:], abs=1e-9), name
        # theirs begins with a step at learning rate 0; ours reaches the peak with the last step of the warm-up
        assert ours[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])


@given(
    schedule=st.sampled_from(["wsd", "cosine", "linear", "constant"]),
    total=st.integers(1, 60),
    warmup=st.integers(0, 80),
    share=st.floats(0, 1),
    floor=st.floats(0, 1),
)
def test_schedules_stay_within_bounds_and_fall_after_warmup(schedule, total, warmup, share, floor):
    args = OptimArgs(schedule=schedule, warmup_steps=warmup, decay_share=share, min_lr_ratio=floor)
    factors = [lr_factor(step, total, args) for step in range(total + 3)]
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    falling = factors[warmup:]
    assert falling == sorted(falling, reverse=True)
    decay_steps = total - max(warmup, total * (1 - share) if schedule == "wsd" else 0)
    if schedule != "constant" and decay_steps >= 1:
        assert lr_factor(total, total, args) == pytest.approx(floor)


def test_wsd_by_hand():
    args = OptimArgs(schedule="wsd", warmup_steps=2, decay_share=0.4, min_lr_ratio=0.5)
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.875, 0.75, 0.625]  # flat until 6 of 10, then to 0.5 over 4 steps
    assert [lr_factor(step, 10, args) for step in range(10)] == pytest.approx(expected)
    cosine = OptimArgs(schedule="cosine", warmup_steps=0)
    assert lr_factor(1, 4, cosine) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": math.nan},
        {"muon_lr": -1.0},
        {"warmup_steps": -1},
        {"momentum": 1.5},
        {"betas": (0.9, -0.1)},
        {"eps": math.inf},
    ],
)
def test_a_number_that_makes_no_sense_is_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimArgs(**wrong)


# ---- adapters


def adapted_model(**args) -> Transformer:
    model = tiny_model()
    adapters.apply(model, adapters.LoraArgs(**{"method": "dora", "r": 2, "train_embed_norm": True} | args))
    return model


def test_adapters_and_what_trains_with_them_belong_to_adamw():
    model = adapted_model()
    optimizer = build_optimizer(model, OptimArgs(optimizer="muon", lr=0.01))
    assert [type(part).__name__ for part in optimizer.parts] == ["AdamW"]
    held = {id(p) for p in optimizer.parameters}
    assert held == {id(p) for p in model.parameters() if p.requires_grad} and len(held) == len(optimizer.parameters)


def test_lora_plus_is_a_learning_rate_of_its_own_for_lora_b():
    model = adapted_model()
    optimizer = build_optimizer(model, OptimArgs(lr=0.01, lora_lr_ratio=16))
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer.set_lr(0.5)
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["lr"] == pytest.approx(0.01 * 0.5 * (16 if names[id(p)].endswith("lora_B") else 1))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    loss, count = model(torch.arange(6)[None], torch.arange(6)[None])
    (loss / count).backward()
    optimizer.step()
    moved = {name: (p - before[name]).abs().max() for name, p in model.named_parameters() if name in before}
    assert all(torch.isclose(m, torch.tensor(0.08), rtol=1e-2) for n, m in moved.items() if n.endswith("lora_B"))


def test_lora_plus_without_an_adapter_is_refused():
    with pytest.raises(ValueError, match="lora_lr_ratio 16 needs an adapter, found no trainable lora_B"):
        build_optimizer(tiny_model(), OptimArgs(lora_lr_ratio=16))
