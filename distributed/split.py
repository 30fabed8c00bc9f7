"""How a model is divided over processes that work on the same rows, and which models can be. Free of torch.

Tensor parallel (`--train.tp`): each process has some heads, some columns of the feed-forward, some rows of embedding
and head, and between the blocks some tokens of each row. Pipeline parallel (`--train.pp`): each has some layers.
"""

from __future__ import annotations

from typing import Any

STEP = 16  # rows of conversations that are padded have a multiple of so many tokens; see dataset_sft.WIDTH_STEP


def layers_of(n_layers: int, n_stages: int) -> list[range]:
    """Return the layers of each stage, as even as can be; the first ones have the rest, since the last has the head."""
    size, rest = divmod(n_layers, n_stages)
    ends = [(stage + 1) * size + min(stage + 1, rest) for stage in range(n_stages)]
    return [range(first, end) for first, end in zip([0, *ends], ends)]


def stage_of(name: str, n_layers: int, n_stages: int) -> int:
    """Return the stage that has the parameter of this name; a tied head counts as the embedding."""
    if name.startswith("model.layers."):
        layer = int(name.split(".")[2])
        return next(stage for stage, layers in enumerate(layers_of(n_layers, n_stages)) if layer in layers)
    return 0 if name.startswith("model.embed_tokens.") else n_stages - 1


def check_shape(shape: Any, tp: int, pp: int) -> None:
    """Raise ValueError for a model (`ModelArgs`) that cannot be divided so."""
    parts = {"n_heads": "query heads", "n_kv_heads": "key/value heads", "hidden_dim": "columns of the feed-forward"}
    for field, what in (parts | {"vocab_size": "rows of the embedding"}).items():
        if (found := getattr(shape, field)) % tp:
            raise ValueError(f"--train.tp {tp} does not divide the model's {found} {what} ({field}): choose another")
    if shape.n_layers < pp:
        raise ValueError(f"--train.pp {pp} is more than the model's {shape.n_layers} layers: each stage needs one")
    if (shape.rope_scaling or {}).get("rope_type") == "clex" and max(tp, pp) > 1:
        raise ValueError("--train.tp and --train.pp do not divide the weights of CLEX's positions: remove them")


def check_rows(tp: int, pp: int, seq_len: int, padded: bool, rows: int, micro_batch_size: int) -> None:
    """Raise ValueError for rows that cannot be divided so.

    seq_len: tokens of a row; padded: whether rows may be shorter, a multiple of `STEP`. rows: of a step, that the
    processes of one pipeline share.
    """
    if seq_len % tp or (padded and STEP % tp):
        tokens = f"{seq_len} tokens" if seq_len % tp else f"a multiple of {STEP} tokens (--data.packing)"
        raise ValueError(f"--train.tp {tp} divides each row between the blocks, and does not divide {tokens}")
    n_micro = -(-rows // (micro_batch_size or rows))
    if n_micro < pp:
        most = rows // pp
        advice = f"--train.micro_batch_size {most} or less" if most else f"a --data.batch_size of {pp} rows for each"
        raise ValueError(
            f"--train.pp {pp} keeps {pp} stages busy with {pp} or more micro-batches a step, found {n_micro} "
            f"of the {rows} rows that a pipeline has: use {advice}"
        )
