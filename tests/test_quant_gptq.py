"""GPTQ against least squares solved anew after every column, in float64; and what it must equal or not exceed."""

import pytest
import torch

from quant.gptq import GPTQOptions, propagate_error, solve, solve_nearest
from quant.grid import GridOptions, find_grid, find_grids, group_index, round_to_grid
from quant.statistics import InputStatistics


def correlated(n_tokens: int, n_inputs: int, seed: int = 0) -> torch.Tensor:
    """Inputs (n_tokens, n_inputs) float64 whose channels depend on each other and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_inputs, n_inputs, generator=generator, dtype=torch.float64)
    sizes = torch.rand(n_inputs, generator=generator, dtype=torch.float64) * 3 + 0.1
    return torch.randn(n_tokens, n_inputs, generator=generator, dtype=torch.float64) @ mix * sizes


def statistics_of(x: torch.Tensor, x_full: torch.Tensor | None = None) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], dtype=torch.float64)
    statistics.add(x, x_full)
    return statistics


def some_weight(n_outputs: int, n_inputs: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n_outputs, n_inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_least_squares(weight: torch.Tensor, x: torch.Tensor, options: GPTQOptions) -> torch.Tensor:
    """Codes by the definition: after each column the free ones are set to what minimises the output's error."""
    gram = 2 / len(x) * x.T @ x
    gram = gram + options.damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    n = weight.shape[1]
    order = (
        (2 / len(x) * x.square().sum(0)).argsort(descending=True, stable=True) if options.act_order else torch.arange(n)
    )
    groups = group_index(n, options.grid.group_size)
    scales, zeros = find_grids(weight, options.grid)
    codes, rounded, now = torch.zeros_like(weight), weight.clone(), weight.clone()
    for i, column in enumerate(order.tolist()):
        g = groups[column]
        if not options.static_groups and (i == 0 or groups[order[i - 1]] != g):
            scales[:, g : g + 1], zeros[:, g : g + 1] = find_grid(now[:, groups == g], options.grid)
        codes[:, column] = round_to_grid(now[:, column], scales[:, g], zeros[:, g], options.grid)
        rounded[:, column] = scales[:, g] * (codes[:, column] - zeros[:, g])
        done, free = order[: i + 1], order[i + 1 :]
        error = rounded[:, done] - weight[:, done]
        now[:, free] = weight[:, free] - error @ gram[done][:, free] @ torch.linalg.inv(gram[free][:, free])
    return codes.to(torch.uint8)


OPTIONS = {
    "act-order": GPTQOptions(GridOptions(4, 8)),
    "act-order, no search": GPTQOptions(GridOptions(4, 8, search=False)),
    "in order": GPTQOptions(GridOptions(3, 8), act_order=False),
    "groups on the way": GPTQOptions(GridOptions(4, 8), act_order=False, static_groups=False),
    "groups on the way, across blocks": GPTQOptions(
        GridOptions(4, 6), act_order=False, static_groups=False, block_size=4
    ),
    "symmetric, whole rows": GPTQOptions(GridOptions(4, -1, symmetric=True)),
    "2 bits, small blocks": GPTQOptions(GridOptions(2, 16), block_size=3),
    "8 bits, ragged groups": GPTQOptions(GridOptions(8, 10), damping=0.05),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(5, 24), (1, 7), (9, 33)])
def test_equals_least_squares_after_each_column(name, shape):
    weight, x = some_weight(*shape), correlated(80, shape[1])
    quantized, _ = solve(weight, statistics_of(x), OPTIONS[name])
    assert torch.equal(quantized.codes, by_least_squares(weight, x, OPTIONS[name]))


@pytest.mark.parametrize("options", [GPTQOptions(), GPTQOptions(GridOptions(3, 16, symmetric=True), act_order=False)])
def test_independent_inputs_give_the_nearest_points(options):
    weight = some_weight(6, 48)
    x = torch.eye(48, dtype=torch.float64)
    quantized, _ = solve(weight, statistics_of(x), options)
    nearest = solve_nearest(weight, options.grid)
    assert all(torch.equal(a, b) for a, b in zip(quantized, nearest))


@pytest.mark.parametrize("size", [1, 5, 16, 128])
def test_the_size_of_a_block_changes_nothing(size):
    weight, statistics = some_weight(7, 40), statistics_of(correlated(100, 40))
    one, _ = solve(weight, statistics, GPTQOptions(GridOptions(4, 8), block_size=40))
    other, _ = solve(weight, statistics, GPTQOptions(GridOptions(4, 8), block_size=size))
    assert torch.equal(one.codes, other.codes)


def test_neither_the_scale_of_the_moments_nor_the_order_of_inputs_matters():
    weight, x = some_weight(7, 40), correlated(100, 40)
    options = GPTQOptions(GridOptions(4, -1))
    codes = solve(weight, statistics_of(x), options)[0].codes
    larger = statistics_of(x)
    larger.gram *= 7
    assert torch.equal(solve(weight, larger, options)[0].codes, codes)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(solve(weight[:, order], statistics_of(x[:, order]), options)[0].codes, codes[:, order])


def output_error(weight: torch.Tensor, other: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum())


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_outputs_error_is_smaller_than_by_rounding(bits):
    for seed in range(3):
        weight, x = some_weight(32, 64, seed), correlated(300, 64, seed)
        options = GPTQOptions(GridOptions(bits, 32))
        quantized, report = solve(weight, statistics_of(x), options)
        error = output_error(weight, quantized.dequantize(), x)
        assert error < 0.7 * output_error(weight, solve_nearest(weight, options.grid).dequantize(), x)
        assert report["error_after"] == pytest.approx(error) and report["error_after"] < report["error_before"]


def test_propagation_brings_the_output_nearer_to_the_unquantized_models():
    weight, x_full = some_weight(16, 48), correlated(400, 48)
    generator = torch.Generator().manual_seed(5)
    x = x_full + 0.3 * x_full.roll(1, dims=1) + torch.randn(x_full.shape, generator=generator, dtype=torch.float64)
    wanted, statistics = x_full @ weight.T, statistics_of(x, x_full)

    def miss(propagation: float) -> float:
        quantized, _ = solve(weight, statistics, GPTQOptions(GridOptions(4, 16), propagation=propagation))
        return float((x @ quantized.dequantize().T - wanted).square().mean())

    assert miss(1.0) < miss(0.5) < miss(0.0)


def test_propagation_is_the_least_squares_solution_at_full_strength():
    weight, x_full = some_weight(3, 6), correlated(50, 6)
    x = x_full + 0.1 * correlated(50, 6, seed=9)
    corrected = propagate_error(weight, statistics_of(x, x_full), GPTQOptions(damping=1e-12, propagation=1.0))
    solution = torch.linalg.lstsq(x, x_full @ weight.T).solution.T
    torch.testing.assert_close(corrected, solution, atol=1e-6, rtol=1e-6)


def test_dead_inputs_and_rows_of_zeros():
    weight, x = some_weight(4, 12), correlated(60, 12)
    x[:, 3], weight[2] = 0, 0
    quantized, report = solve(weight, statistics_of(x), GPTQOptions(GridOptions(4, 4)))
    values = quantized.dequantize()
    assert report["dead"] == 1 and values.isfinite().all()
    assert not values[2].any() and not values[:, 3].any()


def test_inputs_that_are_always_0_leave_nothing_to_propagate():
    weight, x = some_weight(4, 12), torch.zeros(60, 12, dtype=torch.float64)
    quantized, report = solve(weight, statistics_of(x, x), GPTQOptions(GridOptions(4, 4), propagation=0.5))
    assert report["dead"] == 12 and not quantized.dequantize().any()


def test_statistics_in_parts_are_those_of_the_whole():
    x, other = correlated(90, 7), correlated(90, 7, seed=4)
    whole, parts = statistics_of(x, other), InputStatistics(7, dtype=torch.float64)
    for at in range(0, 90, 11):
        parts.add(x[at : at + 11].view(-1, 1, 7), other[at : at + 11].view(-1, 1, 7))
    torch.testing.assert_close(parts.gram, 2 / 90 * x.T @ x)
    torch.testing.assert_close(parts.cross, 2 / 90 * (other - x).T @ x)
    assert len(parts.sample) == 90 and torch.equal(parts.sample, x)
    assert parts.n_tokens == 90
    torch.testing.assert_close(whole.gram, parts.gram)


def test_the_sample_is_bounded_and_spread_over_the_whole_text():
    statistics = InputStatistics(1)
    for batch in torch.arange(100_000.0).split(1000):
        statistics.add(batch[:, None])
    sample = statistics.sample.flatten()
    assert 256 < len(sample) <= 1024 and sample.min() < 5000 and sample.max() > 95_000


def test_what_cannot_be_quantized_is_refused():
    weight, x = some_weight(2, 5), correlated(9, 5)
    with pytest.raises(ValueError, match="not finite"):
        statistics_of(x.index_fill(0, torch.tensor([1]), torch.inf))
    broken = statistics_of(x)
    broken.gram[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        solve(weight, broken, GPTQOptions())
    with pytest.raises(ValueError, match="unquantized model's inputs"):
        solve(weight, statistics_of(x), GPTQOptions(propagation=0.5))
    for options in ({"damping": 0.0}, {"propagation": 2.0}, {"static_groups": False}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GPTQOptions(**options)


def test_fewer_tokens_than_inputs_are_enough():
    """H is singular then, and damping makes it invertible."""
    weight, x = some_weight(4, 32).float(), correlated(5, 32).float()
    statistics = InputStatistics(32)
    statistics.add(x)
    quantized, _ = solve(weight, statistics, GPTQOptions())
    assert output_error(weight, quantized.dequantize(), x) < 0.01
