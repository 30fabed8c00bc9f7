"""Lion, Adafactor, AdamW in 8 bits and GaLore, each against an independent implementation."""

import copy
import io

import pytest
import torch
from test_optim_optimizers import set_random_grads, tiny_model
from torch import nn

from optim.adafactor import Adafactor
from optim.args import GALORE, OptimArgs
from optim.galore import GaLore, leading
from optim.lion import Lion
from optim.optimizers import build_optimizer

bitsandbytes = pytest.importorskip("bitsandbytes")
galore_torch = pytest.importorskip("galore_torch")
SHAPES = [(16, 16), (24, 16), (16, 40), (1, 8), (40, 3), (7,)]
SMALL = ("adamw8bit", "lion", "adafactor", *GALORE)


def parameters(shapes=SHAPES, dtype=torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def follow(ours, theirs, optimizers, steps: int = 6, tolerance: float = 1e-5) -> None:
    """Let two optimizers do the same steps, at a rate that changes; all parameters stay equal."""
    for step in range(steps):
        for params, optimizer in zip((ours, theirs), optimizers):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (step + 1)
            set_random_grads(params, step)
            optimizer.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, atol=tolerance, rtol=tolerance)


# ---- Lion


def test_lion_equals_that_of_bitsandbytes():
    ours = parameters()
    theirs = copy.deepcopy(ours)
    how = {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.2}
    follow(ours, theirs, (Lion(ours, **how), bitsandbytes.optim.Lion32bit(theirs, **how)))


def test_lion_equals_the_paper():
    """Algorithm 2, number by number in Python's floats."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    optimizer = Lion([p], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    weights, momenta = p.tolist(), [0.0] * 3
    for grads in ([0.3, -0.1, 0.0], [-0.002, -0.1, 1.0], [0.5, 0.4, -0.2]):
        p.grad = torch.tensor(grads, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(grads):
            c = 0.9 * momenta[i] + 0.1 * g
            weights[i] -= 0.1 * ((c > 0) - (c < 0) + 0.5 * weights[i])
            momenta[i] = 0.99 * momenta[i] + 0.01 * g
    assert p.tolist() == pytest.approx(weights, abs=1e-12)


# ---- Adafactor


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adafactor_equals_torchs(weight_decay):
    """At rates below 1/sqrt(step), which torch's takes as their bound, and far from its larger epsilon."""
    ours = parameters()
    theirs = copy.deepcopy(ours)
    how = {"lr": 0.02, "weight_decay": weight_decay}
    follow(ours, theirs, (Adafactor(ours, **how), torch.optim.Adafactor(theirs, **how)))


def test_adafactor_of_zeros_and_of_a_row_that_is_never_seen():
    p = nn.Parameter(torch.zeros(3, 4))
    optimizer = Adafactor([p], lr=0.1, weight_decay=0.0)
    p.grad = torch.zeros(3, 4)
    optimizer.step()
    assert (p == 0).all()
    p.grad[1] = torch.tensor([1.0, -2.0, 0.0, 1e-20])
    optimizer.step()
    assert p.isfinite().all() and (p[[0, 2]] == 0).all()
    # weights of zero move by epsilon 2; 2^-0.8 is the share of the second of two squares, the first of which was 0
    assert p[1].abs().max().item() == pytest.approx(0.1 * 1e-3 / (2**-0.8) ** 0.5, rel=0.01)


# ---- GaLore


def inner_of(kind: str):
    if kind == "adafactor":
        return lambda low: Adafactor(low, 0.02, weight_decay=0.0, relative=False)
    if kind == "adamw8bit":
        return lambda low: bitsandbytes.optim.AdamW8bit(low, 0.02, betas=(0.9, 0.95), weight_decay=0.0)
    return lambda low: torch.optim.AdamW(low, 0.02, (0.9, 0.95), weight_decay=0.0)


def galore_peer(kind: str, params: list, **how):
    groups = [{"params": params, "rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}]
    if kind == "adafactor":
        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "eps": (1e-30, 1e-3)}
        return galore_torch.GaLoreAdafactor(groups, lr=0.02, **fixed, **how)
    return galore_torch.GaLoreAdamW(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8, no_deprecation_warning=True, **how)


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_galore_equals_that_of_its_authors(kind):
    ours = parameters(SHAPES[:3])
    theirs = copy.deepcopy(ours)
    how = {"rank": 4, "every": 3, "scale": 0.25}
    optimizers = GaLore(ours, inner_of(kind), 0.02, 0.0, **how), galore_peer(kind, theirs)
    follow(ours, theirs, optimizers, steps=8, tolerance=2e-5)  # epsilon comes before the correction of the bias there


def test_galore_in_8_bits_stays_close_to_32():
    """The moments of a low-rank gradient of more than 4096 numbers have 8 bits."""
    ours = parameters([(64, 2048)])
    theirs = copy.deepcopy(ours)
    how = {"rank": 8, "every": 100, "scale": 1.0}
    eight, full = (GaLore(each, inner_of(kind), 0.01, 0.1, **how) for each, kind in ((ours, "adamw8bit"), (theirs, "")))
    start = ours[0].detach().clone()
    for step in range(5):
        for params, optimizer in ((ours, eight), (theirs, full)):
            set_random_grads(params, step)
            optimizer.step()
    assert {x.dtype for x in eight.state[ours[0]]["inner"].values() if torch.is_tensor(x)} >= {torch.uint8}
    assert (ours[0] - theirs[0]).norm() < 0.05 * (theirs[0] - start).norm()  # moments are rounded to about 1 %


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (6, 6)])
def test_galore_of_full_rank_sees_the_whole_gradient(shape):
    """P of all singular vectors is orthogonal: the gradient goes through both projections unchanged."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = GaLore([p], lambda low: torch.optim.SGD(low, 0.5), 0.5, 0.0, rank=99, scale=2.0)
    gradient = torch.randn(shape, dtype=torch.float64)
    p.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(p.data, -gradient, atol=1e-5, rtol=0)  # singular vectors are found in float32


def test_leading_directions_are_those_of_the_gradient():
    torch.manual_seed(0)
    low = torch.randn(12, 3) @ torch.randn(3, 30)
    for gradient in (low, low.T):
        base = leading(gradient, 3)
        again = gradient @ base @ base.T if gradient.shape[0] > 12 else base @ base.T @ gradient
        torch.testing.assert_close(again, gradient, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(base.T @ base, torch.eye(3), atol=1e-5, rtol=0)


def test_galore_of_another_rank_is_not_resumed():
    first, second = (build_optimizer(tiny_model(), OptimArgs("galore_adamw", galore_rank=rank)) for rank in (4, 6))
    set_random_grads(first.parameters, 0)
    first.step()
    with pytest.raises(ValueError, match=r"projections to rank 4, --optim\.galore_rank is 6: resume"):
        second.load_state_dict(first.state_dict())


def test_galore_of_an_adapter_is_refused():
    model = tiny_model().requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match="galore_adamw needs matrices to train"):
        build_optimizer(model, OptimArgs("galore_adamw"))


# ---- all of them


def wide_model():
    return tiny_model(dim=64, vocab_size=80, n_heads=4)  # matrices of 4096 numbers and more have 8 bits


@pytest.mark.parametrize("optimizer", SMALL)
def test_a_state_that_went_through_a_file_goes_on_exactly(optimizer):
    args = OptimArgs(optimizer, lr=0.01, galore_rank=64, galore_every=2)  # full rank: low-rank gradients of 4096
    model = wide_model()
    built = build_optimizer(model, args)
    for step in range(3):
        set_random_grads(built.parameters, step)
        built.step()
    file = io.BytesIO()
    torch.save(built.state_dict(), file)
    file.seek(0)
    copied = copy.deepcopy(model)
    again = build_optimizer(copied, args)
    again.load_state_dict(torch.load(file, weights_only=True))
    for step in (7, 8, 9):
        for each in (built, again):
            each.set_lr(0.5)
            set_random_grads(each.parameters, step)
            each.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copied.parameters()))


@pytest.mark.parametrize("optimizer", SMALL)
def test_a_loss_falls(optimizer):
    torch.manual_seed(0)
    model = wide_model()
    rate = {"lion": 3e-3, "adafactor": 0.1}.get(optimizer, 0.02)
    built = build_optimizer(model, OptimArgs(optimizer, lr=rate, galore_rank=16))
    tokens = torch.randint(80, (4, 17))
    losses = []
    for _ in range(30):
        loss, count = model(tokens[:, :-1], tokens[:, 1:])
        (loss / count).backward()
        built.step()
        built.zero_grad()
        losses.append((loss / count).item())
    assert losses[-1] < 0.4 * losses[0]


def test_rates_of_groups():
    model = wide_model()
    for optimizer in SMALL:
        args = OptimArgs(optimizer, lr=0.1, embed_lr_ratio=3, norm_lr_ratio=0.5)
        built = build_optimizer(model, args)
        names = {id(p): name for name, p in model.named_parameters()}
        rates = {names[id(p)]: group["lr"] for group in built.param_groups for p in group["params"]}
        assert len(rates) == len(list(model.parameters()))
        for name, rate in rates.items():
            assert rate == pytest.approx(0.1 * (3 if "embed" in name else 0.5 if "norm" in name else 1)), name
            decayed = next(g for g in built.param_groups if any(names[id(p)] == name for p in g["params"]))
            assert decayed["weight_decay"] == (0 if "norm" in name else 0.1)


def test_a_rate_of_nothing_is_refused():
    model = tiny_model().requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match="embed_lr_ratio 2 needs an embedding or a head to train, found none"):
        build_optimizer(model, OptimArgs("adamw", embed_lr_ratio=2))


def test_without_the_package_8_bits_are_refused_by_name(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"adamw8bit needs the package bitsandbytes.*setup\.sh --extra bnb"):
        build_optimizer(tiny_model(), OptimArgs("adamw8bit"))
