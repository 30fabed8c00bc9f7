"""Intervals of scores against their definitions, and against what they promise in simulation."""

import numpy as np
import pytest

from evaluation.estimate import difference, estimate
from evaluation.task import Share


def test_counted_items_have_wilsons_interval():
    found = estimate([(1, 1)] * 7 + [(0, 1)] * 3)
    assert (found.value, found.low, found.high, found.items) == (0.7, *Share(7, 10).interval(), 10)


def test_a_score_of_unequal_items_is_the_ratio_of_sums():
    """Two documents: 6 nats of 2 tokens, 3 nats of 4; influence on 1.5 is (6 - 3) / 6 and (3 - 6) / 6."""
    found = estimate([(6, 2), (3, 4)])
    assert found.value == pytest.approx(1.5)
    error = 1.959964 * np.sqrt((0.5**2 + 0.5**2) * 2)
    assert (found.low, found.high) == pytest.approx((1.5 - error, 1.5 + error))


def test_one_item_says_nothing_about_its_error():
    found = estimate([(6, 2)])
    assert (found.value, found.low, found.high) == (3, -np.inf, np.inf)


def test_intervals_hold_the_truth_in_95_of_100_samples():
    rng = np.random.default_rng(0)
    of = rng.integers(1, 100, (2000, 60)).astype(float)
    noise = rng.normal(size=(2000, 60))
    ours = of * (2 + 0.1 * noise) + rng.normal(size=of.shape)
    theirs = of * (1.9 + 0.1 * noise) + rng.normal(size=of.shape)  # hard for both
    single = [estimate(np.stack(pair, 1)) for pair in zip(ours, of)]
    paired = [difference(np.stack([a, n], 1), np.stack([b, n], 1)) for a, b, n in zip(ours, theirs, of)]
    assert np.mean([each.low <= 2 <= each.high for each in single]) == pytest.approx(0.95, abs=0.025)
    assert np.mean([each.low <= 0.1 <= each.high for each in paired]) == pytest.approx(0.95, abs=0.025)
    widths = [np.mean([each.high - each.low for each in group]) for group in (paired, single)]
    assert widths[0] < 0.7 * widths[1]
