"""Weights of tasks that change in the course of a run (CoBa)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from dataset import BatchSource
from distributed.single import SingleProcess
from training.heldout import evaluate
from tuning.args import DataArgs
from tuning.mixture import Weighted


class CoBa:
    """Convergence balancer (Gong et al. 2024, arXiv:2410.06741): tasks that converge fast, or diverge, count less.

    Every `interval` steps the held-out loss of each task is measured, as a ratio to the first one measured. The slope
    a_k of a task is that of a straight line through its last `history` ratios, a_max that of a line through the
    largest ratio of each time; n is the number of tasks. From the `warmup`-th measure on:

        RCS_k = softmax_k(n a_k / sum_k |a_k|)                             relative convergence: the slow count more
        ACS_k = softmax_k(-N a_k / sum over the last N times of |a_k|)     absolute: those that diverge count less
        DF    = min(1, t softmax_t(-tau t a_max / sum over all t times |a_max|) now)    little when the worst diverges
        w     = softmax_k(n (DF RCS_k + (1 - DF) ACS_k)), raised to at least 1 / (10 n) where it is below

    as in MFTCoder's loss_utils.py, with three differences: DF does not exceed 1, because ACS would then count against
    itself; the N times of ACS are the last `history` ones; and where a measure lacks a task, that time is left out of
    the task's line instead of moving the later ones.

    Args:
        weighted: batch source whose `.weights` are changed.
        measure: function from the number of a measure to the held-out loss of each task, NaN where there is none.
        names: names of the tasks, for the log.
    """

    def __init__(
        self,
        weighted: Weighted,
        measure: Callable[[int], Sequence[float]],
        names: Sequence[str],
        interval: int = 1,
        warmup: int = 100,
        history: int = 200,
        tau: float = 5.0,
    ) -> None:
        if interval < 1 or warmup < 2 or history < 2 or not 0 <= tau < math.inf:
            raise ValueError(
                "CoBa takes an interval of 1 or more (--data.coba_interval), a warm-up and a history of 2 or more "
                f"and tau of 0 or more, found {interval}, {warmup}, {history} and {tau}"
            )
        self.weighted, self.measure, self.names = weighted, measure, list(names)
        self.interval, self.warmup, self.history, self.tau = interval, warmup, history, tau
        n = len(self.names)
        self.first = np.full(n, math.nan)  # the first measure of each task
        self.n_measures = 0
        self.ratios = np.empty((0, n))  # the last `history` measures
        self.slopes = np.empty((0, n))  # likewise, since the warm-up
        self.steepest: list[float] = []  # a_max, since the warm-up

    def after_step(self, step: int) -> dict[str, float]:
        """Measure the losses every `interval` steps and set the weights; return these for the log."""
        if step % self.interval:
            return {}
        losses = np.array(self.measure(self.n_measures), np.float64)
        self.first = np.where(np.isnan(self.first), losses, self.first)
        self.ratios = np.vstack([self.ratios, losses / self.first])[-self.history :]  # (measures, n)
        self.n_measures += 1
        if self.n_measures >= self.warmup:
            self.slopes = np.vstack([self.slopes, [slope(column) for column in self.ratios.T]])[-self.history :]
            # fmax passes over NaN: the largest ratio of each time among the tasks that were measured
            self.steepest.append(slope(np.fmax.reduce(self.ratios, axis=1)))
            self.weighted.weights = self._balance()
        return {f"weight/{name}": float(w) for name, w in zip(self.names, self.weighted.weights)}

    def _balance(self) -> np.ndarray:
        """Return the weights of the tasks from the slopes so far, (n_tasks,), with sum 1."""
        n, now, t = len(self.names), self.slopes[-1], len(self.steepest)
        # 1e-300 instead of 0: where all slopes are 0, the weights are equal
        relative = softmax(n * now / max(np.abs(now).sum(), 1e-300))
        absolute = softmax(-len(self.slopes) * now / np.abs(self.slopes).sum(0).clip(1e-300))
        worst = np.array(self.steepest)  # (t,) a_max of each time; a softmax over times, of which the last is now
        divergence = min(1.0, t * softmax(-self.tau * t * worst / max(np.abs(worst).sum(), 1e-300))[-1])
        # a task whose weight is 0 would never be seen to recover: 1 / (10 n) at least, and the sum stays 1
        weights = softmax(n * (divergence * relative + (1 - divergence) * absolute))
        least = 1 / (10 * n)
        return weights * (1 - least * n) + least if weights.min() < least else weights

    def state_dict(self) -> dict[str, Any]:
        """Return all that the weights of later steps depend on, in plain containers."""
        arrays = {"first": self.first, "ratios": self.ratios, "slopes": self.slopes, "weights": self.weighted.weights}
        plain = {name: array.tolist() for name, array in arrays.items()}
        return plain | {"steepest": list(self.steepest), "n_measures": self.n_measures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        n = len(self.names)
        self.first, self.weighted.weights = np.array(state["first"]), np.array(state["weights"])
        self.ratios, self.slopes = (np.array(state[name]).reshape(-1, n) for name in ("ratios", "slopes"))
        self.steepest, self.n_measures = list(state["steepest"]), state["n_measures"]


def slope(values: np.ndarray) -> float:
    """Return the slope of the least-squares line through `values` at 0, 1, 2, ..., leaving out those that are NaN."""
    x = np.flatnonzero(~np.isnan(values)).astype(np.float64)
    if len(x) < 2:
        return 0.0
    x, y = x - x.mean(), values[x.astype(int)]  # the right side is evaluated first: y at the places before centring
    return float((x * (y - y.mean())).sum() / (x * x).sum())


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return exp(logits) / sum exp(logits)."""
    e = np.exp(logits - logits.max())
    return e / e.sum()


def make_coba(
    data: DataArgs,
    weighted: BatchSource,
    heldout: BatchSource | None,
    model: nn.Module,
    backend: SingleProcess,
    micro_batch_size: int,
) -> CoBa | None:
    """Return a balancer that measures one batch of `heldout` after another; None unless --data.loss is coba."""
    if data.loss != "coba":
        return None
    names = [task.name for task in data.tasks]

    def measure(number: int) -> list[float]:
        measures = evaluate(model, heldout, None, 1, backend, micro_batch_size, names, first=number)
        return [measures.get(f"loss/{name}", math.nan) for name in names]

    return CoBa(weighted, measure, names, data.coba_interval, data.coba_warmup, data.coba_history, data.coba_tau)
