"""Bytes of the states of an optimizer, for a model that is trained as a whole or through adapters."""

from __future__ import annotations

from model_args import ModelArgs
from optim.args import GALORE

SMALLEST_IN_8 = 4096  # numbers; bitsandbytes keeps the moments of smaller tensors in float32
BLOCK = 256  # moments that share a scale


def in_8_bits(n: int) -> int:
    """Return the bytes of both moments of a tensor of n numbers in bitsandbytes' AdamW."""
    return 2 * n + 2 * 4 * -(-n // BLOCK) if n >= SMALLEST_IN_8 else 8 * n


def of_matrix(optimizer: str, rows: int, columns: int, rank: int = 0) -> int:
    """Return the bytes of the states of a matrix; rank: of GaLore."""
    if optimizer in GALORE:
        rank = min(rank, rows, columns)
        short, long = sorted((rows, columns))
        inner = {"galore_adamw": 8 * long * rank, "galore_adamw8bit": in_8_bits(long * rank)}
        return 4 * short * rank + inner.get(optimizer, 4 * (long + rank))  # the projection, then what is inside
    if optimizer == "adafactor":
        return 4 * (rows + columns)
    if optimizer == "adamw8bit":
        return in_8_bits(rows * columns)
    return {"muon": 4, "lion": 4}.get(optimizer, 8) * rows * columns


def states(
    args: ModelArgs, linears: dict[str, tuple[int, int]], optimizer: str, rank: int, adapter_rank: int | None
) -> int:
    """Return the bytes of the states of an optimizer.

    linears: (inputs, outputs) of each linear layer of a block; rank: of GaLore; adapter_rank: of adapters, None where
    the whole model trains.
    """
    if adapter_rank is not None:
        kind = optimizer if optimizer in ("lion", "adafactor", "adamw8bit") else "adamw"  # Muon leaves them to AdamW
        both = (of_matrix(kind, adapter_rank, n) for shape in linears.values() for n in shape)
        return args.n_layers * sum(both)
    blocks = args.n_layers * sum(of_matrix(optimizer, *shape, rank) for shape in linears.values())
    tables = 1 if args.tie_embeddings else 2
    outer = tables * args.vocab_size * args.dim
    n_vectors = args.n_parameters() - outer - args.n_layers * sum(rows * columns for rows, columns in linears.values())
    if optimizer in ("adafactor", "galore_adafactor"):
        return blocks + 4 * (tables * (args.vocab_size + args.dim) + n_vectors)
    return blocks + (4 if optimizer == "lion" else 8) * (outer + n_vectors)
