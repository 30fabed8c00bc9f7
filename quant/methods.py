"""The methods of quantize.py: a layer and the statistics of its inputs to a quantized layer and a report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from quant import awq, qat, smooth
from quant.bitnet import PackedBitLinear
from quant.calibrate import Solve, Stream, inputs_of
from quant.four_bit import FourBitLinear
from quant.gptq import GPTQOptions, relative_error, solve, solve_nearest
from quant.grid import GridOptions, Quantized
from quant.grouped import GroupedLinear
from quant.int8 import W8A8Linear, solve_rows
from quant.linear import QuantizedLinear
from quant.llm_int8 import LLMInt8Linear
from quant.statistics import InputStatistics

Solved = tuple[QuantizedLinear, dict[str, Any]]


def make_solver(args: Any, grid_of: Callable[[str], GridOptions]) -> Solve:
    """Return the function that quantizes one layer. args: settings with the names of the flags of quantize.py; grid_of:
    a layer's name -> its grid.

    A report has weight_error, the squared error of the weight as a share of it; where there is text also error_before
    and error_after, the same of the layer's output, rounded to nearest and as the method does it.
    """

    def by_gptq(name: str, layer: nn.Linear, statistics: InputStatistics) -> Solved:
        options = GPTQOptions(grid_of(name), args.damping, args.act_order, propagation=args.propagation)
        solution, report = solve(layer.weight.detach(), statistics, options)
        return GroupedLinear(layer, solution, options.grid.bits), report

    def by_awq(name: str, layer: nn.Linear, statistics: InputStatistics) -> Solved:
        weight, grid = layer.weight.detach(), grid_of(name)
        nearest, solution = solve_nearest(weight, grid), awq.solve_clipped(weight, statistics.gram, grid)
        before, after = (relative_error(weight, each.dequantize(), statistics.gram) for each in (nearest, solution))
        return GroupedLinear(layer, solution, grid.bits), {"error_before": before, "error_after": after}

    def by_smoothing(name: str, layer: nn.Linear, statistics: InputStatistics) -> Solved:
        quantized, x = W8A8Linear(layer), statistics.sample
        wanted = nn.functional.linear(x, layer.weight)  # (n, out)
        error = (quantized.product(x) - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)
        return quantized, {"error_after": float(error)}

    def rounded(solve: Callable[[torch.Tensor, GridOptions], Quantized]) -> Callable[[str, nn.Linear], QuantizedLinear]:
        return lambda name, layer: GroupedLinear(layer, solve(layer.weight.detach(), grid_of(name)), grid_of(name).bits)

    without_text: dict[str, Callable[[str, nn.Linear], QuantizedLinear]] = {
        "rtn": rounded(solve_nearest),
        "int8": lambda _, layer: GroupedLinear(layer, solve_rows(layer.weight.detach().float()), 8),
        "qat": lambda _, layer: GroupedLinear(layer, qat.nearest_grid(layer), layer.grid.bits),
        "bitnet": lambda _, layer: PackedBitLinear(layer, layer.kind),
        "llm_int8": lambda _, layer: LLMInt8Linear(layer, args.threshold),
        "nf4": lambda _, layer: FourBitLinear(layer, "nf4", args.double_quant),
        "fp4": lambda _, layer: FourBitLinear(layer, "fp4", args.double_quant),
    }
    by_text = {"gptq": by_gptq, "awq": by_awq, "smoothquant": by_smoothing}

    def solver(name: str, layer: nn.Linear, statistics: InputStatistics) -> Solved:
        if args.method in by_text:
            quantized, report = by_text[args.method](name, layer, statistics)
        else:
            quantized, report = without_text[args.method](name, layer), {}
        weight = layer.weight.detach().float()
        miss = (quantized.dequantize() - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
        return quantized, {"weight_error": float(miss)} | report

    return solver


def make_scaling(args: Any, grid: GridOptions) -> Callable[[nn.Module, nn.Module, Stream], None]:
    """Return what is done to the scales of a block before it is quantized: scaling(model, block, stream)."""
    if args.method == "awq":
        return partial(scale_block, partial(awq.search_scale, options=grid))
    if args.method == "smoothquant":
        return partial(scale_block, partial(smooth.search_scale, alpha=args.alpha))
    return lambda model, block, stream: None


def scale_block(
    search: Callable[..., tuple[torch.Tensor, float | None]], model: nn.Module, block: nn.Module, stream: Stream
) -> None:
    """Enlarge the columns of a block's weights that carry the largest activations; search(fold, inputs, run): a scale.

    The scales of all folds are found on the weights as they are, and applied together, by the error of the block's
    output. What a layer of the feed-forward part changes in it comes from that part, or from the last layer, alone.
    """
    attention, mlp = block.self_attn, block.mlp
    repeats = model.args.n_heads // model.args.n_kv_heads
    folds = {
        "self_attn.q_proj": awq.Fold(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        "self_attn.o_proj": awq.Fold(attention.v_proj, [attention.o_proj], repeats, model.args.head_dim),
        "mlp.gate_proj": awq.Fold(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
        "mlp.down_proj": awq.Fold(mlp.up_proj, [mlp.down_proj]),
    }
    first = partial(stream.call, block, stream.hidden[0], 0)
    scales = {}
    for name, fold in folds.items():
        x = inputs_of(block, name, lambda _: first())
        parts = {"mlp.gate_proj": partial(mlp, x), "mlp.down_proj": partial(mlp.down_proj, x)}
        scales[name], _ = search(fold, x, parts.get(name, first))
    for name, fold in folds.items():
        awq.apply_scale(fold, scales[name])


def pad_feed_forward(model: nn.Module, multiple: int) -> int:
    """Widen the feed-forward layers to a multiple of `multiple` with rows and columns of zeros, and return their
    number: nothing changes.

    Readers of GPTQ files cut layers whose sides are no multiple of 32, and bitsandbytes' CPU kernel misreads rows that
    are no multiple of 64.
    """
    missing = -model.args.hidden_dim % multiple
    for block in model.model.layers if missing else ():
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            layer.weight = nn.Parameter(nn.functional.pad(layer.weight.detach(), (0, 0, 0, missing)))  # (F, dim)
        down = block.mlp.down_proj
        down.weight = nn.Parameter(nn.functional.pad(down.weight.detach(), (0, missing)))  # (dim, F)
        block.mlp.gate_proj.out_features = block.mlp.up_proj.out_features = down.in_features = down.weight.shape[1]
    model.args = model.args.replace(hidden_dim=model.args.hidden_dim + missing)
    return missing
