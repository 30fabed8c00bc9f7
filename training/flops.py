"""Count the floating-point operations of a model, for model flops utilisation (MFU).

Convention: a multiply-add is two operations; a training step is three forward passes; recomputation does not count;
attention counts every pair of positions, as PaLM (Chowdhery et al. 2022, appendix B) and nanoGPT do, causal or not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from model_args import ModelArgs
from training.args import TrainArgs

if TYPE_CHECKING:  # it loads torch, and a plan needs none
    from dataset import BatchSource


def train_flops_per_token(args: ModelArgs, seq_len: int) -> float:
    """Return the operations of forward and backward for one token: 6 N + 12 L H D T, with N weights in matrix products
    (the head included, the embedding not: it is looked up)."""
    # query and output, key and value, and the three matrices of the feed-forward network
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    block = 2 * args.dim * q_dim + 2 * args.dim * kv_dim + 3 * args.dim * args.hidden_dim
    weights = args.n_layers * block + args.dim * args.vocab_size
    return 6 * weights + 12 * args.n_layers * q_dim * seq_len


def run_flops(model: ModelArgs, data: BatchSource, args: TrainArgs) -> float:
    """Return the operations of a whole run."""
    tokens = args.steps(data.steps_per_epoch) * data.batch_size * data.seq_len
    return tokens * train_flops_per_token(model, data.seq_len)
