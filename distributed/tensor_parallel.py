"""Tensor, sequence and vocabulary parallel: matrices of one model divided over processes, with DTensor.

Columns (Shoeybi et al. 2019, arXiv:1909.08053): q, k, v, gate and up have some of their outputs on each process, whole
heads; o and down the matching inputs, and their outputs are summed. Sequence (Korthikanti et al. 2022,
arXiv:2205.05198): between them each process has some tokens of each row, so that the sum is a reduce-scatter and norms
and residuals are divided, too. Vocabulary: each has some rows of embedding and head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from loss import linear_cross_entropy

TOKENS, WHOLE = Shard(1), Replicate()  # of activations (B, T, dim): divided by tokens, or not


def plan_of_block() -> dict[str, ParallelStyle]:
    """Return how the modules of a block are divided."""
    return {
        "input_layernorm": SequenceParallel(),
        # x, and what is not divided: two pairs of angles, the mask, no cache
        "self_attn": PrepareModuleInput(
            input_layouts=(TOKENS, None, None, None, None), desired_input_layouts=(WHOLE, None, None, None, None)
        ),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.q_norm": SequenceParallel(sequence_dim=2, use_local_output=True),  # (B, T, H, D): by heads
        "self_attn.k_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "self_attn.o_proj": RowwiseParallel(output_layouts=TOKENS),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(TOKENS,), desired_input_layouts=(WHOLE,)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=TOKENS),
    }


def divide(model: Any, mesh: DeviceMesh) -> None:
    """Divide the weights of a `Transformer`, or of a stage of it, over a mesh of one dimension. All processes have the
    same weights before, and nothing is exchanged. A tied head has to be tied again."""
    plan = {
        "model.embed_tokens": RowwiseParallel(input_layouts=WHOLE, output_layouts=TOKENS),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(),
    }
    for name in model.model.layers._modules:
        plan |= {f"model.layers.{name}.{key}": style for key, style in plan_of_block().items()}
    there = {name for name, module in model.named_modules() if next(module.parameters(), None) is not None}
    parallelize_module(model, mesh, {key: plan[key] for key in plan.keys() & there}, src_data_rank=None)


def loss_of(
    model: Any,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    loss_weights: torch.Tensor | None = None,
    token_losses: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the forward pass of a `Transformer` does with targets, from hidden states and a head that may be
    divided: each process has the logits of its rows of the vocabulary only."""
    weight, group = model.lm_head.weight, None
    if isinstance(hidden, DTensor):  # every process gets all tokens; their gradients are summed
        hidden = hidden.redistribute(placements=[WHOLE]).to_local(grad_placements=[Partial()])
        weight, group = weight.to_local(), weight.device_mesh.get_group()
    how = {"token_losses": token_losses, "z_loss": model.z_loss, "group": group}
    return linear_cross_entropy(hidden, weight, targets, loss_weights, **how)


def as_placed(parameter: nn.Parameter) -> None:
    """Let the gradient lie as its parameter does: that of a norm is a sum over the tokens of all processes, which
    autograd leaves undone."""
    grad = parameter.grad
    if isinstance(grad, DTensor) and grad.placements != parameter.placements:
        parameter.grad = grad.redistribute(placements=parameter.placements)
