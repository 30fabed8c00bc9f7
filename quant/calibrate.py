"""Quantize a stack of blocks one after another, each on what the quantized blocks below it put out.

Only the hidden states of the calibration text and one block's statistics are kept: memory does not grow with the depth
of the model. Within a block the layers follow each other, too (true-sequential): the inputs of `o_proj` are measured
when q, k and v are quantized already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quant.linear import QuantizedLinear
from quant.replace import replace
from quant.statistics import InputStatistics

# Layers of a LLaMA block that share their inputs, in the order in which data passes through them.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)

Solve = Callable[[str, nn.Linear, InputStatistics], tuple[QuantizedLinear, dict[str, Any]]]


@dataclass
class Stream:
    """The calibration text on its way through the blocks, batch by batch.

    call(block, hidden, batch) runs one block on the hidden states (B, T, dim) of a batch and returns the same shape.
    """

    call: Callable[[nn.Module, torch.Tensor, int], torch.Tensor]
    hidden: list[torch.Tensor]
    """of each batch, as the quantized blocks below leave them"""
    full: list[torch.Tensor] | None = None
    """the same of the unquantized model; None: not needed"""

    def through(self, block: nn.Module, original: nn.Module | None) -> None:
        """Pass on to what `block`, and of the unquantized model `original`, put out."""
        self.hidden = [self.call(block, x, n) for n, x in enumerate(self.hidden)]
        if self.full is not None:
            self.full = [self.call(original, x, n) for n, x in enumerate(self.full)]


@torch.no_grad()
def quantize_block(
    block: nn.Module, stream: Stream, solve: Solve, prefix: str = "", stages: Sequence[Sequence[str]] = STAGES
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Put a quantized layer in the place of every layer of `stages`, and move the stream past the block.

    solve(name, layer, statistics of its inputs) returns the quantized layer and a report; names begin with `prefix`.
    Yields the name and the report of each layer when it is done. Raises ValueError that begins with a layer's name.
    """
    original = copy.deepcopy(block) if stream.full is not None else None
    for names in stages:
        with named(prefix + names[0]):
            statistics = measure(block, original, stream, names[0])
        for name in names:
            layer = block.get_submodule(name)
            with named(prefix + name):
                quantized, report = solve(prefix + name, layer, statistics)
            replace(block, name, quantized)
            yield prefix + name, report
    stream.through(block, original)


@contextmanager
def named(what: str) -> Iterator[None]:
    """Let a ValueError of the block begin with the name of the layer or block that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def measure(block: nn.Module, original: nn.Module | None, stream: Stream, name: str) -> InputStatistics:
    """Return the statistics of what goes into the layer `name` of a block over the whole stream."""
    layer = block.get_submodule(name)
    statistics = InputStatistics(layer.in_features, layer.weight.device)
    for number, hidden in enumerate(stream.hidden):
        x = inputs_of(block, name, lambda block, h=hidden, n=number: stream.call(block, h, n))
        x_full = None
        if original is not None:
            full = stream.full[number]
            x_full = inputs_of(original, name, lambda block, h=full, n=number: stream.call(block, h, n))
        statistics.add(x, x_full)
    return statistics


class _InputsSeen(Exception):
    """Ends a pass through a block as soon as the inputs that are asked for are there."""


def inputs_of(block: nn.Module, name: str, run: Callable[[nn.Module], Any]) -> torch.Tensor:
    """Return what goes into the layer `name` when `run(block)` runs; what comes behind that layer is not computed."""
    inputs: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs.append(args[0].detach())
        raise _InputsSeen

    handle = block.get_submodule(name).register_forward_pre_hook(keep)
    try:
        with suppress(_InputsSeen):
            run(block)
    finally:
        handle.remove()
    return inputs[0]
