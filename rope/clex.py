"""CLEX (Chen et al. 2023, arXiv:2310.16450): how frequencies change with the context's growth is learned, as an
ordinary differential equation in t, the ratio of the text's length to the original window.

    z(t) = ln theta(t),  z(1) = ln theta,  dz/dt = d/dt ln theta_ntk(t) + act((z + ln theta_ntk(t)) W_up) W_down

where theta_ntk(t) are the NTK-aware frequencies of alpha = 2t - 1. We integrate w = z - ln theta_ntk instead, of which
only the learned part is left: dw/dt = act((2 ln theta_ntk(t) + w) W_up) W_down, w(1) = 0. So with W_down = 0, as it
starts, the encoding is NTK-aware exactly, whatever the solver's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hardware import for_compiler
from rope.base import Frequencies, by_length, ntk_theta, register

ACTIVATIONS: dict[str, Callable] = {"tanh": torch.tanh, "silu": F.silu, "relu": F.relu}


@register(
    "clex",
    required=["max_factor", "original_max_position_embeddings"],
    optional=["param_factor", "act", "time_dt"],
)
class Clex(nn.Module):
    """The encoding and its two trained matrices, proj_up (D/2, p D) and proj_down (p D, D/2).

    They stay float32 (or wider) when the model is cast: what they make are logarithms of frequencies, and half a
    per cent of those turns far positions by radians. Every key turns with the present t: keys are cached unrotated.
    """

    cache_rotated = False

    def __init__(self, head_dim: int, theta: float, scaling: dict, max_seq_len: int) -> None:
        """scaling: max_factor, the largest t (int); param_factor, p (int, 1); act (tanh); time_dt, RK4's step (0.1)."""
        super().__init__()
        ntk_theta(head_dim, theta, 1)  # refuses a head too small
        self.head_dim, self.theta = head_dim, theta
        self.max_factor, self.window = scaling["max_factor"], scaling["original_max_position_embeddings"]
        self.limit = self.max_factor * self.window
        if max_seq_len > self.limit:
            raise ValueError(
                f"clex's max_factor {self.max_factor} on a window of {self.window} covers {self.limit} positions, "
                f"max_seq_len is {max_seq_len}; raise max_factor to {-(-max_seq_len // self.window)}"
            )
        if scaling.get("act", "tanh") not in ACTIVATIONS:
            raise ValueError(f"clex knows the act {', '.join(ACTIVATIONS)}, found {scaling['act']!r}")
        self.act = ACTIVATIONS[scaling.get("act", "tanh")]
        self.steps = round(1 / min(scaling.get("time_dt", 0.1), 1))  # of the solver, for a unit of t
        width = scaling.get("param_factor", 1) * head_dim
        self.proj_up = nn.Parameter(torch.empty(head_dim // 2, width, dtype=torch.float32))
        self.proj_down = nn.Parameter(torch.empty(width, head_dim // 2, dtype=torch.float32))
        self._solved: tuple[list[torch.Tensor], list[list[float]]] | None = None  # weights, and what they gave

    def reset_parameters(self) -> None:
        """proj_up as a linear layer starts; proj_down zero, so that training starts from the NTK-aware encoding."""
        nn.init.kaiming_uniform_(self.proj_up, a=math.sqrt(5))
        nn.init.zeros_(self.proj_down)

    def _apply(self, fn: Callable, recurse: bool = True) -> Clex:
        def keep_wide(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        return super()._apply(keep_wide, recurse)

    def log_frequencies(self, t: int) -> torch.Tensor:
        """ln theta at 1, 2, .., t: (t, D/2) float64, differentiable. RK4 with a fixed step."""
        up, down = self.proj_up.double(), self.proj_down.double()
        exponents = -torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=up.device) / self.head_dim

        def ntk(time: float) -> torch.Tensor:
            return exponents * math.log(ntk_theta(self.head_dim, self.theta, 2 * time - 1))

        def slope(time: float, w: torch.Tensor) -> torch.Tensor:
            return self.act((2 * ntk(time) + w) @ up) @ down

        w = 0 * (up.sum() + down.sum()) + torch.zeros_like(exponents)  # at t = 1 gradients are zero and not missing
        found, h = [ntk(1) + w], 1 / self.steps
        for step in range((t - 1) * self.steps):
            at = 1 + step * h
            k1 = slope(at, w)
            k2 = slope(at + h / 2, w + h / 2 * k1)
            k3 = slope(at + h / 2, w + h / 2 * k2)
            k4 = slope(at + h, w + h * k3)
            w = w + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            if (step + 1) % self.steps == 0:
                found.append(ntk(1 + (step + 1) // self.steps) + w)
        return torch.stack(found)

    def frequencies(self, length: int) -> Frequencies:
        """Those of t = ceil(length / window), at least 1; ValueError beyond max_factor."""
        if length > self.limit:
            raise ValueError(
                f"clex is made for texts of {self.limit} tokens ({self.max_factor} times {self.window}), "
                f"asked for {length}"
            )
        weights = [self.proj_up.detach(), self.proj_down.detach()]
        if self._solved is None or not all(torch.equal(a, b) for a, b in zip(weights, self._solved[0])):
            with torch.no_grad():
                solved = self.log_frequencies(self.max_factor).exp().tolist()
            self._solved = [w.clone() for w in weights], solved
        return self._solved[1][max(1, -(-length // self.window)) - 1], 1.0

    @for_compiler("disable")
    def prepare(
        self, positions: torch.Tensor, length: int | torch.Tensor, training: bool = False
    ) -> tuple[torch.Tensor, list[float] | torch.Tensor, float | torch.Tensor]:
        """As `Rope.prepare`. In training: t is drawn from 1..max_factor, and the places 0, 1, 2 .. of the text move to
        a sorted random choice of the positions below window * t, so that a short text trains long distances."""
        if training:
            t = int(torch.randint(1, self.max_factor + 1, ()))
            drawn = self.draw_positions(positions.shape[-1], t).to(positions.device)
            return drawn[positions], self.log_frequencies(t)[-1].exp(), 1.0
        if isinstance(length, int):
            return positions, *self.frequencies(length)
        return positions, *by_length(self.frequencies, length)

    def draw_positions(self, T: int, t: int) -> torch.Tensor:
        """T ascending, possibly fractional positions from 0 to about window * t, float32 on the CPU, by torch's RNG."""
        if T < 3:
            return torch.tensor([0.0, T * t - 1.0])[:T]
        squeeze = max(T // self.window, 1)  # a text longer than the window is brought back into it
        inner = torch.randperm(T * t - 2)[: T - 2].sort().values + 1
        return torch.cat((torch.zeros(1), inner / squeeze, torch.tensor([T * t // squeeze - 1.0])))
