"""Let a model whose parameters are divided over ranks hold whole ones, for what reads or writes its files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def whole_parameters(
    model: nn.Module, gather: Callable[[nn.Parameter], torch.Tensor], main: bool
) -> Iterator[list[tuple[nn.Parameter, torch.Tensor]]]:
    """Within the block the model of the main rank holds whole parameters, on the CPU; every rank calls it.

    gather: function from this rank's part of a parameter to the whole of it, collective. Yield each parameter's part
    with its whole, which is empty on the other ranks.
    """
    wholes: dict[nn.Parameter, nn.Parameter] = {}
    for p in model.parameters():  # one by one, so that the other ranks never hold more than one
        value = gather(p)
        wholes[p] = nn.Parameter(value.cpu() if main else torch.empty(0), requires_grad=p.requires_grad)
    # a parameter with two names, such as a tied one, has one whole under both
    places = [(m, key, p) for m in model.modules() for key, p in m._parameters.items() if p is not None]
    try:
        for module, key, p in places if main else ():
            module._parameters[key] = wholes[p]
        yield [(p, whole.data) for p, whole in wholes.items()]
    finally:
        for module, key, p in places:
            module._parameters[key] = p
