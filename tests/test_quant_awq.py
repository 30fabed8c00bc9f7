"""AWQ: folds that change nothing, searches that never lose to plain rounding, clipping against a search by hand."""

import copy

import pytest
import torch
from helpers.small_model import small_model

from quant.awq import CLIPS, Fold, apply_scale, rounded, search_scale, solve_clipped, to_inputs
from quant.gptq import solve_nearest
from quant.grid import GridOptions

GRID = GridOptions(3, 8, search=False)


def folds(model, layer: int = 0) -> dict[str, Fold]:
    block, args = model.model.layers[layer], model.args
    attention, mlp = block.self_attn, block.mlp
    return {
        "attention": Fold(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        "values": Fold(attention.v_proj, [attention.o_proj], args.n_heads // args.n_kv_heads, args.head_dim),
        "mlp": Fold(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        "down": Fold(mlp.up_proj, [mlp.down_proj]),
    }


@pytest.mark.parametrize("shape", [{}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"attention_bias": True, "head_dim": 6}])
@pytest.mark.parametrize("name", ["attention", "values", "mlp", "down"])
def test_a_fold_leaves_the_logits_as_they_are(shape, name):
    model = small_model(**shape)
    tokens = torch.randint(61, (2, 11))
    before = model(tokens)
    for layer in range(2):
        fold = folds(model, layer)[name]
        scale = torch.rand(len(fold.before.weight), dtype=torch.float64) * 5 + 0.05
        apply_scale(fold, scale)
    torch.testing.assert_close(model(tokens), before, atol=1e-12, rtol=1e-9)


def outliers(n: int, width: int, seed: int = 0) -> torch.Tensor:
    """Inputs (n, width) float64, of which every eighth channel is twelve times as large."""
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, ::8] *= 12
    return x


@pytest.mark.parametrize("name", ["attention", "values", "mlp", "down"])
def test_the_search_lowers_the_error_where_channels_are_large(name):
    model = small_model()
    fold = folds(model)[name]
    x = outliers(64, fold.after[0].in_features)
    layers = copy.deepcopy(list(fold.after))

    def run() -> torch.Tensor:
        return torch.cat([layer(x) for layer in fold.after], dim=-1)

    wanted = run()
    scale, exponent = search_scale(fold, x, run, GRID)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(layers, fold.after)), "the search changes no weight"

    def error(scale: torch.Tensor) -> float:
        wide = to_inputs(scale, fold)
        parts = [x @ (rounded(layer.weight * wide, GRID) / wide).T for layer in layers]
        return float((torch.cat(parts, dim=-1) - wanted).square().mean().detach())

    assert exponent > 0
    assert error(scale.double()) < 0.8 * error(torch.ones_like(scale).double())


def test_where_no_scale_helps_there_is_none():
    """The identity is tried, too: the result is never worse than rounding alone."""
    model = small_model()
    fold = folds(model)["mlp"]
    x = torch.eye(fold.after[0].in_features, dtype=torch.float64)
    scale, _ = search_scale(fold, x, lambda: torch.cat([layer(x) for layer in fold.after], dim=-1), GRID)
    assert torch.equal(scale, torch.ones_like(scale))


def test_the_scale_of_key_value_heads_is_shared_by_their_query_heads():
    model = small_model()  # 4 query heads, 2 key/value heads of 8
    fold = folds(model)["values"]
    scale = torch.arange(16.0)
    wide = to_inputs(scale, fold).view(4, 8)
    assert torch.equal(wide[0], wide[1]) and torch.equal(wide[2], wide[3])
    assert torch.equal(torch.cat([wide[0], wide[2]]), scale)


def test_activations_that_are_not_finite_are_refused():
    model = small_model()
    fold = folds(model)["mlp"]
    x = torch.full((4, fold.after[0].in_features), torch.inf, dtype=torch.float64)
    with pytest.raises(ValueError, match="not finite"):
        search_scale(fold, x, lambda: fold.after[0](x), GRID)


@pytest.mark.parametrize("group_size", [4, 5, -1])
def test_clipping_takes_the_range_of_least_output_error(group_size):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(5, 20, generator=generator) ** 3
    x = outliers(40, 20).float()
    options = GridOptions(3, group_size, search=False)
    quantized = solve_clipped(weight, x.T @ x, options)
    size = 20 if group_size == -1 else group_size
    for g, (part, inputs) in enumerate(zip(weight.split(size, 1), x.split(size, 1))):
        for row in range(5):
            w, errors = part[row], []
            for step in range(CLIPS):
                share = 1 - step / (2 * CLIPS)
                limit = share * w.abs().max()
                low, high = w.min().clamp(max=0), w.max().clamp(min=0)
                for lo, hi in ((low.clamp(min=-limit), high.clamp(max=limit)), (share * low, share * high)):
                    scale = (hi - lo) / 7
                    zero = (-lo / scale).round().clamp(0, 7)
                    codes = ((w / scale).round() + zero).clamp(0, 7)
                    errors.append(float((inputs @ (scale * (codes - zero) - w)).square().sum()))
            ours = quantized.dequantize()[row, g * size : (g + 1) * size] - w
            assert float((inputs @ ours).square().sum()) == pytest.approx(min(errors), rel=1e-4)


def test_clipping_never_loses_to_rounding():
    for seed in range(3):
        weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
        x = outliers(100, 32, seed).float()
        for bits in (2, 3, 4):
            options = GridOptions(bits, 32, search=False)
            clipped, nearest = solve_clipped(weight, x.T @ x, options), solve_nearest(weight, options)
            miss = [(x @ (each.dequantize() - weight).T).square().sum() for each in (clipped, nearest)]
            assert miss[0] <= miss[1] * (1 + 1e-6)
