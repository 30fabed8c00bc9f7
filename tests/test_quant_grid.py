"""Grids against a search over all of them by hand, and the traps of other packages."""

import numpy as np
import pytest
import torch

from quant.grid import EXPONENT, GridOptions, find_grid, find_grids, group_index, round_to_grid


def rounded(weight: torch.Tensor, options: GridOptions) -> torch.Tensor:
    scale, zero = find_grid(weight, options)
    return scale * (round_to_grid(weight, scale, zero, options) - zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_takes_the_best_of_eighty_ranges(bits, symmetric):
    generator = np.random.default_rng(bits)
    weight = generator.standard_t(3, size=(6, 20))
    options = GridOptions(bits, -1, symmetric)
    scale, zero = (x.numpy() for x in find_grid(torch.from_numpy(weight), options))
    for row in range(6):
        low, high = min(weight[row].min(), 0), max(weight[row].max(), 0)
        errors = []
        for step in range(80):
            share = 1 - step / 100
            if symmetric:
                s, z = 2 * max(-low, high) * share / (2**bits - 1), 2 ** (bits - 1)
            else:
                s = share * (high - low) / (2**bits - 1)
                z = min(max(round(-share * low / s), 0), 2**bits - 1)
            codes = np.clip(np.round(weight[row] / s) + z, 0, 2**bits - 1)
            errors.append(((np.abs(s * (codes - z) - weight[row]) ** EXPONENT).sum(), s, z))
        best = min(errors)
        codes = np.clip(np.round(weight[row] / scale[row]) + zero[row], 0, 2**bits - 1)
        assert (np.abs(scale[row] * (codes - zero[row]) - weight[row]) ** EXPONENT).sum() == pytest.approx(best[0])


def test_zero_is_a_point_of_every_grid_and_nothing_of_one_sign_is_clipped():
    positive = torch.linspace(0.5, 0.6, 16, dtype=torch.float64)[None]
    for symmetric in (False, True):
        options = GridOptions(4, -1, symmetric, search=False)
        scale, zero = find_grid(positive, options)
        assert round_to_grid(torch.zeros(1, 1, dtype=torch.float64), scale, zero, options) == zero
        assert (rounded(positive, options) - positive).abs().max() <= 0.6 / 15 + 1e-9


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_misses_by_half_a_step_at_most(bits):
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale, _ = find_grid(weight, GridOptions(bits, -1, search=False))
    assert ((rounded(weight, GridOptions(bits, -1, search=False)) - weight).abs() <= scale * (1 + 1e-9)).all()
    wide = GridOptions(bits, -1, symmetric=True, search=False)
    half, _ = find_grid(weight, wide)
    assert ((rounded(weight, wide) - weight).abs() <= half / 2 * (1 + 1e-9) + half * (bits == 2)).all()


def test_a_row_of_zeros_stays_zero():
    assert not rounded(torch.zeros(2, 5), GridOptions(4, -1)).any()


def test_the_least_zero_point_can_be_one():
    positive = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) + 0.1
    assert (find_grid(positive, GridOptions(4, -1))[1] == 0).all()
    assert (find_grid(positive, GridOptions(4, -1, least_zero=1))[1] == 1).all()


def test_the_last_group_may_be_shorter():
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    options = GridOptions(4, 4)
    scales, zeros = find_grids(weight, options)
    assert scales.shape == zeros.shape == (3, 3)
    for g, part in enumerate(weight.split(4, dim=1)):
        scale, zero = find_grid(part, options)
        assert torch.equal(scales[:, g : g + 1], scale) and torch.equal(zeros[:, g : g + 1], zero)
    assert group_index(10, 4).tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2] and not group_index(10, -1).any()


@pytest.mark.parametrize("settings", [{"bits": 5}, {"group_size": 0}, {"group_size": -2}])
def test_impossible_grids_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} should be"):
        GridOptions(**settings)
