"""CoBa against its formulas written out time by time, and against what it is for."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuning.balance import CoBa


class Weights:
    """All that CoBa knows of the batches."""

    def __init__(self, n: int) -> None:
        self.weights = np.ones(n)


def run(curves: np.ndarray, **options) -> tuple[list[np.ndarray], CoBa]:
    """The weights after each measure of `curves` (measures, tasks)."""
    weighted = Weights(curves.shape[1])
    names = [f"t{k}" for k in range(curves.shape[1])]
    coba = CoBa(weighted, lambda number: curves[number], names, **{"warmup": 3, "history": 5} | options)
    found = []
    for step in range(1, len(curves) + 1):
        logged = coba.after_step(step)
        assert logged == {f"weight/{name}": w for name, w in zip(names, weighted.weights)}
        found.append(weighted.weights.copy())
    return found, coba


def fit(values: list[float]) -> float:
    points = [(x, y) for x, y in enumerate(values) if not math.isnan(y)]
    return np.polyfit(*zip(*points), 1)[0] if len(points) > 1 else 0.0


def exp_shares(logits: list[float]) -> list[float]:
    return [math.exp(a) / sum(math.exp(b) for b in logits) for a in logits]


def share(a: float, of: list[float]) -> float:
    return a / sum(abs(b) for b in of) if any(of) else 0.0


def brute_force(curves: np.ndarray, warmup: int, history: int, tau: float) -> list[list[float]]:
    n = curves.shape[1]
    first = [next((x for x in column if not math.isnan(x)), math.nan) for column in curves.T]
    ratios = [[x / f for x, f in zip(row, first)] for row in curves]
    weights, slopes, steepest = [], [], []
    for now in range(len(curves)):
        if now + 1 < warmup:
            weights.append([1.0] * n)
            continue
        window = ratios[max(0, now + 1 - history) : now + 1]
        slopes.append([fit([row[k] for row in window]) for k in range(n)])
        steepest.append(fit([max(x for x in row if not math.isnan(x)) for row in window]))
        recent = slopes[-history:]
        relative = exp_shares([n * share(a, slopes[-1]) for a in slopes[-1]])
        absolute = exp_shares([-len(recent) * share(slopes[-1][k], [a[k] for a in recent]) for k in range(n)])
        t = len(steepest)
        in_time = exp_shares([-tau * t * share(a, steepest) for a in steepest])
        df = min(1.0, t * in_time[-1])
        w = exp_shares([n * (df * r + (1 - df) * a) for r, a in zip(relative, absolute)])
        least = 1 / (10 * n)
        weights.append([x * (1 - n * least) + least for x in w] if min(w) < least else w)
    return weights


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(2, 4),
    history=st.integers(2, 8),
    tau=st.sampled_from([0.0, 1.0, 5.0]),
    gaps=st.booleans(),
)
def test_equals_the_formulas_written_out(seed, n, history, tau, gaps):
    rng = np.random.default_rng(seed)
    curves = 3 + rng.normal(0, 0.3, (14, n)).cumsum(0) * 0.2
    if gaps:
        curves[1:, 0][rng.random(13) < 0.3] = math.nan  # batches without a sample of the first task
    found, _ = run(curves, warmup=4, history=history, tau=tau)
    for got, expected in zip(found, brute_force(curves, 4, history, tau), strict=True):
        assert got.tolist() == pytest.approx(expected, rel=1e-9)
        assert got.sum() in (pytest.approx(1), n)


def test_while_all_converge_the_slow_task_counts_more_and_one_that_diverges_counts_less():
    t = np.arange(40)[:, None]
    falling = 3 - t * np.array([[0.05, 0.01]])  # the first falls five times as fast
    found, _ = run(falling, warmup=10, history=20)
    assert np.array_equal(found[8], [1, 1])
    assert found[12][1] > 0.6
    turning = np.where(t < 25, falling, falling[25] + (t - 25) * np.array([[-0.05, 0.2]]))  # the second turns upwards
    found, _ = run(turning, warmup=10, history=20)
    assert found[-1][1] < 0.4 < found[20][1]


def test_goes_on_with_the_very_same_weights():
    curves = 3 + np.random.default_rng(0).normal(0, 0.1, (20, 3)).cumsum(0)
    whole, _ = run(curves)
    for cut in (1, 2, 3, 9):
        _, coba = run(curves[:cut])
        again = CoBa(Weights(3), lambda number: curves[number], coba.names, warmup=3, history=5)
        again.load_state_dict(coba.state_dict())
        for step in range(cut + 1, 21):
            again.after_step(step)
            assert np.array_equal(again.weighted.weights, whole[step - 1])


def test_measures_every_interval_only():
    asked = []
    coba = CoBa(Weights(2), lambda number: asked.append(number) or [1.0, 1.0], ["a", "b"], interval=3)
    assert [bool(coba.after_step(step)) for step in range(1, 8)] == [False, False, True, False, False, True, False]
    assert asked == [0, 1]


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"warmup": 1}, {"history": 1}, {"tau": -1.0}, {"tau": math.nan}])
def test_numbers_without_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="CoBa takes an interval of 1 or more"):
        run(np.ones((1, 2)), **wrong)
