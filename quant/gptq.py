"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): round one input's weights after another, and let the inputs that are
not rounded yet make up for the error.

With H = 2/n sum of x xᵀ over calibration inputs x and U the upper Cholesky factor of H^-1, for each input i in order:

    q = nearest grid point of w_i;   e = (w_i - q) / U_ii;   w_j -= e U_ij  for j > i

The order is by falling H_ii (act-order), the grids are found before on the whole weight (static groups): codes lie in
their old places, so that nothing has to be sorted when the layer runs. Before that the weight may be corrected for the
error that the quantized layers below have left in the inputs: QEP (Arai and Ichikawa 2025, arXiv:2504.09629).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from quant.grid import GridOptions, Quantized, find_grid, find_grids, group_index, round_to_grid
from quant.statistics import InputStatistics


@dataclass(frozen=True)
class GPTQOptions:
    """How GPTQ goes over a weight."""

    grid: GridOptions = field(default_factory=GridOptions)
    damping: float = 0.01
    """share of the mean of H's diagonal that is added to it, so that H can be inverted"""
    act_order: bool = True
    """round the inputs of largest second moment first"""
    static_groups: bool = True
    """find the grids before on the whole weight; False: when the first input of a group is reached, which needs
    act_order False (else a file would have to keep the order)"""
    block_size: int = 128
    """inputs whose errors are spread at once; changes time, not results"""
    propagation: float = 0.0
    """strength of QEP from 0 (off) to 1; needs the cross moments of InputStatistics"""

    def __post_init__(self) -> None:
        """Raise ValueError for settings that contradict each other."""
        if not 0 < self.damping < 1:
            raise ValueError(f"damping should be above 0 and below 1, found {self.damping}")
        if self.act_order and not self.static_groups:
            raise ValueError(
                "act_order needs static_groups: otherwise a file would have to keep the order of the inputs"
            )
        if not 0 <= self.propagation <= 1:
            raise ValueError(f"propagation should be from 0 to 1, found {self.propagation}")


@torch.no_grad()
def solve(
    weight: torch.Tensor, statistics: InputStatistics, options: GPTQOptions
) -> tuple[Quantized, dict[str, float]]:
    """Return the quantized weight (out, in), and a report: error_before and error_after (the layer's squared output
    error for RTN and for GPTQ, as a share of its output; with propagation, against the corrected weight), damping (the
    share that H needed), dead (inputs that are always 0).

    The arithmetic is in the dtype of `statistics.gram`. Raises ValueError where H cannot be inverted.
    """
    gram = statistics.gram  # H, (in, in)
    original = weight.to(gram.dtype)
    target = propagate_error(original, statistics, options) if options.propagation else original
    w = target.clone()
    dead = gram.diagonal() == 0  # (in,)
    w[:, dead] = 0  # an input that is always 0: its weights change nothing
    order = torch.arange(w.shape[1], device=w.device)  # (in,) inputs in the order of rounding
    if options.act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
    factor, damping = inverse_factor(gram[order][:, order], options.damping)
    groups = group_index(w.shape[1], options.grid.group_size, w.device)
    scales, zeros = find_grids(w, options.grid)  # (out, groups) each, over neighbouring inputs
    codes = round_in_order(w[:, order].clone(), factor, groups[order], (scales, zeros), options)
    back = order.argsort()  # the inverse permutation: columns of codes return to their old places
    quantized = Quantized(codes[:, back].to(torch.uint8), scales, zeros.to(torch.uint8), groups)
    nearest = round_to_grid(target, scales[:, groups], zeros[:, groups], options.grid)
    rtn = Quantized(nearest.to(torch.uint8), scales, zeros.to(torch.uint8), groups)
    report = {
        "error_before": relative_error(target, rtn.dequantize(), gram),
        "error_after": relative_error(target, quantized.dequantize(), gram),
        "damping": damping,
        "dead": int(dead.sum()),
    }
    return quantized, report


def round_in_order(
    w: torch.Tensor,
    factor: torch.Tensor,
    groups: torch.Tensor,
    grids: tuple[torch.Tensor, torch.Tensor],
    options: GPTQOptions,
) -> torch.Tensor:
    """Return the codes (out, in) of a weight whose columns stand in the order of rounding; `w` is used up.

    factor (in, in): U. groups (in,): the group of each column. grids: scales and zero points (out, groups), which are
    written anew on the way unless groups are static.
    """
    scales, zeros = grids
    codes = torch.empty_like(w)
    n_inputs = w.shape[1]
    for start in range(0, n_inputs, options.block_size):
        stop = min(start + options.block_size, n_inputs)
        block, corner = w[:, start:stop], factor[start:stop, start:stop]  # views: (out, b), (b, b)
        errors = torch.empty_like(block)
        for i in range(stop - start):
            column, g = start + i, int(groups[start + i])
            if not options.static_groups and (column == 0 or groups[column] != groups[column - 1]):
                # Columns of the group beyond this block have not seen the block's errors yet.
                members = w[:, groups == g].clone()
                inside = (groups == g).nonzero().flatten()
                late = inside >= stop
                if late.any() and i:
                    members[:, late] -= errors[:, :i] @ factor[start:column, inside[late]]
                scales[:, g : g + 1], zeros[:, g : g + 1] = find_grid(members, options.grid)
            scale, zero = scales[:, g], zeros[:, g]
            code = round_to_grid(block[:, i], scale, zero, options.grid)  # (out,)
            codes[:, column] = code
            errors[:, i] = (block[:, i] - scale * (code - zero)) / corner[i, i]
            block[:, i + 1 :] -= errors[:, i : i + 1] * corner[i, i + 1 :]  # (out, 1) (b - i - 1,)
        w[:, stop:] -= errors @ factor[start:stop, stop:]  # (out, b) (b, rest)
    return codes


def inverse_factor(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, float]:
    """Return the upper Cholesky factor U of H^-1 (H^-1 = Uᵀ U), and the damping that H needed: ten times as much is
    tried where H cannot be inverted with the least. Raises ValueError where a fifth of the mean is not enough."""
    gram = gram.clone()
    diagonal = gram.diagonal()  # a view
    diagonal[diagonal == 0] = 1
    if not gram.isfinite().all():
        raise ValueError("the second moments of a layer's inputs are not finite")
    mean = float(diagonal.mean())
    for more in (damping, 10 * damping, 0.2):
        damped = gram + more * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper, more
    raise ValueError(
        "the second moments of a layer's inputs cannot be inverted, even damped: more calibration text helps"
    )


def propagate_error(weight: torch.Tensor, statistics: InputStatistics, options: GPTQOptions) -> torch.Tensor:
    """Return the weight (out, in) whose output on the quantized model's inputs is nearest to that of `weight` on the
    unquantized model's: W + b W C (H + damping)^-1 with C = 2/n sum of (x_full - x) xᵀ (QEP)."""
    if statistics.cross is None:
        raise ValueError("propagation needs the unquantized model's inputs, and none were given")
    gram = statistics.gram
    if not gram.diagonal().any():  # inputs that are always 0: there is nothing to correct, and no inverse
        return weight
    ridge = options.damping * float(gram.diagonal().mean())
    damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # X (H + ridge) = W C for X: transposed, because `solve` has the unknown on the right
    step = torch.linalg.solve(damped, (weight @ statistics.cross).T).T  # (out, in); H is symmetric
    return weight + options.propagation * step


def relative_error(weight: torch.Tensor, other: torch.Tensor, gram: torch.Tensor) -> float:
    """Return the squared error of the layer's output with `other` in place of `weight`, as a share of its output."""
    # sum over inputs x of |D x|² = trace(D H Dᵀ) up to the factor of H, which the ratio cancels
    difference = weight - other  # D, (out, in)
    total = ((weight @ gram) * weight).sum()
    return float(((difference @ gram) * difference).sum() / total.clamp(min=torch.finfo(gram.dtype).tiny))


def solve_nearest(weight: torch.Tensor, options: GridOptions) -> Quantized:
    """Return the weight (out, in) rounded to the nearest grid points (RTN), without any calibration."""
    scales, zeros = find_grids(weight, options)
    groups = group_index(weight.shape[1], options.group_size, weight.device)
    codes = round_to_grid(weight, scales[:, groups], zeros[:, groups], options)
    return Quantized(codes.to(torch.uint8), scales, zeros.to(torch.uint8), groups)
