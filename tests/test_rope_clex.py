"""CLEX: NTK-aware at its start, the equation's solution after it, trained through the ordinary loop, kept exact."""

import math

import pytest
import torch
from helpers.tiny_training_run import toy_data, toy_trainer

import rope
from checkpoint.directory import load_model, save_model
from model import Transformer
from model_args import ModelArgs
from optim.args import OptimArgs
from optim.optimizers import build_optimizer
from training.trainer import Trainer

SCALING = {"rope_type": "clex", "max_factor": 4, "original_max_position_embeddings": 16}
SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 29, "multiple_of": 8, "max_seq_len": 64}


def made(head_dim: int = 16, theta: float = 10000.0, std: float = 0.0, **changes) -> rope.Clex:
    """An encoding whose proj_down is zero, or drawn."""
    encoding = rope.make(head_dim, theta, SCALING | changes, 64)
    encoding.reset_parameters()
    if std:
        torch.nn.init.normal_(encoding.proj_down, std=std)
    return encoding


def error_against_ntk(head_dim: int, theta: float) -> float:
    """Largest relative difference, before any training, from NTK-aware frequencies of alpha = 2t - 1."""
    encoding, worst = made(head_dim, theta), 0.0
    for t in range(1, 5):
        expected = rope.make(head_dim, theta, {"type": "ntk", "factor": 2.0 * t - 1}, 64).frequencies(1)[0]
        for length in (16 * t - 15, 16 * t):
            found = encoding.frequencies(length)[0]
            worst = max(worst, *(abs(a / b - 1) for a, b in zip(found, expected)))
    return worst


def error_against_fine_steps(encoding: rope.Clex, steps: int = 2000) -> float:
    """Largest difference in ln theta at t = 4 from the equation as the paper has it, solved in float64 by the midpoint
    rule in steps of 3/2000: of z itself, the derivative of the NTK-aware frequencies included."""
    D, h = encoding.head_dim, 3 / steps
    up, down = encoding.proj_up.detach().double(), encoding.proj_down.detach().double()
    i = torch.arange(0, D, 2).double()

    def log_ntk(t: float) -> torch.Tensor:
        return -i / D * math.log(encoding.theta * (2 * t - 1) ** (D / (D - 2)))

    def slope(t: float, z: torch.Tensor) -> torch.Tensor:
        return encoding.act((z + log_ntk(t)) @ up) @ down - 2 * i / ((D - 2) * (2 * t - 1))

    z = log_ntk(1)
    for step in range(steps):
        t = 1 + step * h
        z = z + h * slope(t + h / 2, z + h / 2 * slope(t, z))
    return (encoding.log_frequencies(4)[-1].detach() - z).abs().max().item()


@pytest.mark.parametrize("head_dim, theta", [(4, 10000.0), (16, 10000.0), (16, 500.0), (64, 5e5)])
def test_starts_as_ntk_for_every_t(head_dim, theta):
    assert error_against_ntk(head_dim, theta) < 1e-12


@pytest.mark.parametrize("changes", [{}, {"act": "silu"}, {"param_factor": 2}, {"time_dt": 0.05}])
def test_solves_the_equation(changes):
    encoding = made(std=0.02, **changes)
    moved = (encoding.log_frequencies(4)[-1] - made().log_frequencies(4)[-1]).abs().max()
    assert moved > 0.05
    # what is left is the midpoint rule's own error, h^2 = 2e-6 times derivatives of the order of one
    assert error_against_fine_steps(encoding) < 5e-6


def test_halving_the_step_changes_next_to_nothing():
    a, b = made(std=0.02), made(time_dt=0.05)
    b.load_state_dict(a.state_dict())
    assert 0 < (a.log_frequencies(4) - b.log_frequencies(4)).abs().max() < 1e-5


def test_t_follows_the_length_and_ends():
    encoding = made(std=0.02)
    table = encoding.log_frequencies(4).exp().tolist()
    for length, t in ((0, 1), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3), (64, 4)):
        assert encoding.frequencies(length) == (table[t - 1], 1.0)
    assert encoding.limit == 64
    with pytest.raises(ValueError, match=r"texts of 64 tokens \(max_factor 4 times 16\), found a text of 65"):
        encoding.frequencies(65)
    model = Transformer(ModelArgs(**SHAPE, rope_scaling=SCALING)).eval()
    with pytest.raises(ValueError, match="found a text of 65"):
        model(torch.zeros(1, 65, dtype=torch.long))


def test_solved_anew_when_the_weights_change():
    encoding = made(std=0.02)
    before = encoding.frequencies(64)
    assert encoding.frequencies(64) is not None and encoding.frequencies(64) == before
    with torch.no_grad():
        encoding.proj_down += 0.01
    assert encoding.frequencies(64) != before
    encoding.proj_down.data.zero_()  # which no version counter sees
    assert encoding.frequencies(64)[0] == pytest.approx(made().frequencies(64)[0], rel=1e-12)


@pytest.mark.parametrize("T, t", [(16, 1), (16, 4), (12, 3), (40, 1), (40, 3), (1, 3), (2, 3), (3, 1)])
def test_drawn_positions_cover_t_windows(T, t):
    places = made().draw_positions(T, t)
    assert places.shape == (T,)
    assert places[0] == 0
    assert (places.diff() >= 0).all()
    squeeze = max(T // 16, 1)
    assert T == 1 or places[-1] == T * t // squeeze - 1
    if t == 1 and squeeze == 1:
        assert torch.equal(places, torch.arange(T).float())


def test_training_draws_from_torchs_generator():
    model = Transformer(ModelArgs(**SHAPE, rope_scaling=SCALING)).train()
    tokens = torch.randint(29, (2, 16))
    state = torch.get_rng_state()
    first, second = model(tokens), model(tokens)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(model(tokens), first)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_every_parameter_has_a_gradient_whatever_t():
    model = Transformer(ModelArgs(**SHAPE, rope_scaling=SCALING | {"max_factor": 4})).train()
    torch.nn.init.normal_(model.rope.proj_down, std=0.02)
    tokens, moved = torch.randint(29, (2, 16)), set()
    for seed in range(12):
        torch.manual_seed(seed)
        model.zero_grad()
        model(tokens, tokens)[0].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        moved.add(bool(model.rope.proj_up.grad.any()))
    assert moved == {False, True}  # t = 1 is the plain encoding


def test_gradient_equals_finite_differences():
    encoding = made(8, std=0.1).double()
    weights = [p.detach().clone().requires_grad_() for p in encoding.parameters()]

    def solved(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(Solver(encoding), {"of.proj_up": up, "of.proj_down": down}, ())

    torch.autograd.gradcheck(solved, weights)


class Solver(torch.nn.Module):
    """`log_frequencies` as a forward pass."""

    def __init__(self, of: rope.Clex) -> None:
        super().__init__()
        self.of = of

    def forward(self) -> torch.Tensor:
        return self.of.log_frequencies(2)


def test_weights_stay_wide_when_the_model_is_cast():
    model = Transformer(ModelArgs(**SHAPE, rope_scaling=SCALING))
    kept = model.rope.proj_up.detach().clone()
    assert model.bfloat16().model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.rope.proj_up.dtype == model.rope.proj_down.dtype == torch.float32
    assert torch.equal(model.rope.proj_up, kept)
    assert model.double().rope.proj_up.dtype == torch.float64


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matrices_of_the_equation_are_adamws(optimizer):
    model = Transformer(ModelArgs(**SHAPE, rope_scaling=SCALING))
    owners = {}
    for part in build_optimizer(model, OptimArgs(optimizer=optimizer)).parts:
        owners |= {id(p): type(part).__name__ for group in part.param_groups for p in group["params"]}
    assert [owners[id(p)] for p in model.rope.parameters()] == ["AdamW", "AdamW"]


def test_trains_saves_and_resumes_through_the_ordinary_loop(tmp_path, monkeypatch):
    data = toy_data(tmp_path)

    def run(name: str) -> Trainer:
        torch.manual_seed(0)
        shape = {"max_seq_len": 64, "rope_scaling": SCALING}
        return toy_trainer(tmp_path / name, data, shape=shape, max_steps=6, save_interval=2)

    whole = run("whole")
    start = {name: p.detach().clone() for name, p in whole.model.rope.named_parameters()}
    whole.fit()
    assert all((p != start[name]).any() for name, p in whole.model.rope.named_parameters())

    batch = data.batch
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(data, "batch", lambda step, *ranks: batch(step, *ranks) if step < 3 else 1 / 0)
        run("parts").fit()
    rest = run("parts")
    rest.fit()
    for (name, a), b in zip(whole.model.named_parameters(), rest.model.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survives_a_model_directory(tmp_path, dtype):
    model = Transformer(ModelArgs(**SHAPE, rope_scaling=SCALING)).to(dtype).eval()
    torch.nn.init.normal_(model.rope.proj_down, std=0.02)
    save_model(tmp_path / "model", model)
    again = load_model(tmp_path / "model", dtype=dtype).eval()
    assert again.args == model.args
    assert again.rope.proj_up.dtype == torch.float32
    tokens = torch.randint(29, (2, 40))
    assert torch.equal(again(tokens), model(tokens))
