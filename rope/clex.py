"""CLEX (Chen et al. 2023, arXiv:2310.16450) learns how frequencies change as the context grows: by an ordinary
differential equation in t, the ratio of the text's length to the original window.

    z(t) = ln theta(t),  z(1) = ln theta,  dz/dt = d/dt ln theta_ntk(t) + act((z + ln theta_ntk(t)) W_up) W_down

where theta_ntk(t) are the NTK-aware frequencies of alpha = 2t - 1. We integrate the learned part alone,
w = z - ln theta_ntk: dw/dt = act((2 ln theta_ntk(t) + w) W_up) W_down, w(1) = 0. So with W_down = 0, its initial value,
the encoding is exactly NTK-aware, whatever the solver's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hardware import for_compiler
from rope.base import Frequencies, by_length, ntk_theta, register
from rope.keys import COUNT, POSITIVE, WINDOW, WORD

ACTIVATIONS: dict[str, Callable] = {"tanh": torch.tanh, "silu": F.silu, "relu": F.relu}


@register(
    "clex",
    required={"max_factor": COUNT, WINDOW: COUNT},
    optional={"param_factor": COUNT, "act": WORD, "time_dt": POSITIVE},
)
class Clex(nn.Module):
    """The encoding and its two trained matrices, proj_up (D/2, p D) and proj_down (p D, D/2).

    The matrices stay float32 (or wider) when the model is cast: they produce logarithms of frequencies, and an error of
    half a per cent there rotates far positions by radians. All keys depend on the present t: a cache holds them
    unrotated.
    """

    cache_rotated = False

    def __init__(self, head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> None:
        """Read `scaling`: max_factor, the largest t; param_factor, p (default 1); act (tanh); time_dt, the step (0.1).

        Raises ValueError when max_factor windows are shorter than max_seq_len, act is unknown, or D is below 4.
        """
        super().__init__()
        ntk_theta(head_dim, theta, 1)  # raises ValueError for a head of one pair
        self.head_dim, self.theta = head_dim, theta
        self.max_factor, self.window = scaling["max_factor"], scaling[WINDOW]
        self.limit = self.max_factor * self.window
        if max_seq_len > self.limit:
            raise ValueError(
                f"clex's max_factor {self.max_factor} on a window of {self.window} covers {self.limit} positions, "
                f"max_seq_len is {max_seq_len}; raise max_factor to {math.ceil(max_seq_len / self.window)}"
            )
        if scaling.get("act", "tanh") not in ACTIVATIONS:
            raise ValueError(f"clex's act should be one of {', '.join(ACTIVATIONS)}, found {scaling['act']!r}")
        self.act = ACTIVATIONS[scaling.get("act", "tanh")]
        self.steps = round(1 / min(scaling.get("time_dt", 0.1), 1))  # solver steps for each unit of t
        width = scaling.get("param_factor", 1) * head_dim
        self.proj_up = nn.Parameter(torch.empty(head_dim // 2, width, dtype=torch.float32))
        self.proj_down = nn.Parameter(torch.empty(width, head_dim // 2, dtype=torch.float32))
        # the weights of the last solution, and its inverse frequencies, (max_factor, D/2)
        self._solution: tuple[list[torch.Tensor], list[list[float]]] | None = None

    def reset_parameters(self) -> None:
        """Initialize proj_up like a linear layer, proj_down to zero: training starts at the NTK-aware encoding."""
        nn.init.kaiming_uniform_(self.proj_up, a=math.sqrt(5))
        nn.init.zeros_(self.proj_down)

    def _apply(self, fn: Callable, recurse: bool = True) -> Clex:
        """Apply what `Module.to` and its like do, except a cast to fewer than 32 bits."""

        def keep_wide(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        return super()._apply(keep_wide, recurse)

    def log_frequencies(self, t: int) -> torch.Tensor:
        """Return ln theta at 1, 2, .., t: (t, D/2) float64, differentiable; by Runge-Kutta 4 with a fixed step."""
        up, down = self.proj_up.double(), self.proj_down.double()  # (D/2, p D), (p D, D/2)
        # ln theta_ntk = exponents * ln(base of the NTK-aware encoding): -2i/D, (D/2,)
        exponents = -torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=up.device) / self.head_dim

        def ntk(time: float) -> torch.Tensor:
            return exponents * math.log(ntk_theta(self.head_dim, self.theta, 2 * time - 1))

        def slope(time: float, w: torch.Tensor) -> torch.Tensor:
            return self.act((2 * ntk(time) + w) @ up) @ down

        # w(1) = 0, connected to the weights: at t = 1 their gradients are zero, not None
        w = 0 * (up.sum() + down.sum()) + torch.zeros_like(exponents)  # (D/2,)
        solution, h = [ntk(1) + w], 1 / self.steps
        for step in range((t - 1) * self.steps):
            at = 1 + step * h
            # four slopes: at the start, twice in the middle, at the end; weighted 1, 2, 2, 1
            k1 = slope(at, w)
            k2 = slope(at + h / 2, w + h / 2 * k1)
            k3 = slope(at + h / 2, w + h / 2 * k2)
            k4 = slope(at + h, w + h * k3)
            w = w + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            if (step + 1) % self.steps == 0:  # a whole t: back from w to z
                solution.append(ntk(1 + (step + 1) // self.steps) + w)
        return torch.stack(solution)

    def frequencies(self, length: int) -> Frequencies:
        """Return the frequencies at t = ceil(length / window), at least 1. Raises ValueError beyond max_factor."""
        if length > self.limit:
            raise ValueError(
                f"clex covers texts of {self.limit} tokens (max_factor {self.max_factor} times {self.window}), "
                f"found a text of {length}"
            )
        # solve again only after the weights have changed
        weights = [self.proj_up.detach(), self.proj_down.detach()]
        if self._solution is None or not all(torch.equal(a, b) for a, b in zip(weights, self._solution[0])):
            with torch.no_grad():
                inv_freq = self.log_frequencies(self.max_factor).exp().tolist()
            self._solution = [w.clone() for w in weights], inv_freq
        return self._solution[1][max(1, -(-length // self.window)) - 1], 1.0

    @for_compiler("disable")
    def prepare(
        self, positions: torch.Tensor, length: int | torch.Tensor, training: bool = False
    ) -> tuple[torch.Tensor, list[float] | torch.Tensor, float | torch.Tensor]:
        """Return the same as `Rope.prepare`. In training, draw t from 1..max_factor and replace the positions 0, 1, 2..
        by a sorted random choice of positions below window * t, so that a short text trains long distances."""
        if training:
            t = int(torch.randint(1, self.max_factor + 1, ()))
            random_positions = self.draw_positions(positions.shape[-1], t).to(positions.device)
            # random_positions (T,), gathered by positions (B or 1, T)
            return random_positions[positions], self.log_frequencies(t)[-1].exp(), 1.0
        if isinstance(length, int):
            return positions, *self.frequencies(length)
        return positions, *by_length(self.frequencies, length)

    def draw_positions(self, T: int, t: int) -> torch.Tensor:
        """Return T ascending, possibly fractional positions from 0 to about window * t, float32 on the CPU.

        The random numbers are those of torch's global generator.
        """
        if T < 3:  # the two ends, or the first alone
            return torch.tensor([0.0, T * t - 1.0])[:T]
        squeeze = max(T // self.window, 1)  # a text longer than the window is scaled down into it
        # the ends are fixed, T - 2 distinct positions lie between them
        inner = torch.randperm(T * t - 2)[: T - 2].sort().values + 1
        return torch.cat((torch.zeros(1), inner / squeeze, torch.tensor([T * t // squeeze - 1.0])))
