"""Continue from a checkpoint with a longer context, other positions or new tokens.

A property of the checkpoint changes only when a flag asks for it; a flag that contradicts the checkpoint is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn

import rope
from checkpoint.transformers_model import TransformersModel
from model import Transformer
from model_args import ModelArgs, RopeArgs
from rope.keys import WINDOW
from tokenizer import Tokenizer
from tokenizer.added import with_tokens

FILES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".list", ".tokens", ".vocab")  # how names of files end

# ---- the shape


def changed_fields(model: ModelArgs) -> dict[str, Any]:
    """Return the fields of `model` that differ from its defaults, those it computes included."""
    defaults = vars(type(model)())
    derived = {"n_kv_heads": model.n_heads, "head_dim": model.dim // model.n_heads}
    derived["hidden_dim"] = model.replace(hidden_dim=None).hidden_dim
    return {name: value for name, value in vars(model).items() if value != derived.get(name, defaults[name])}


def check_shape(model: ModelArgs, changes: dict[str, Any], directory: Path) -> None:
    """Raise ValueError where a field that flags have set (`changes`) has another value in the checkpoint's model."""
    special = {
        "vocab_size": "it is the tokenizer's; add tokens with --add_tokens",
        "rope_scaling": "change positions with --rope.type and --rope.factor",
        "rope_theta": "change positions with --rope.type and --rope.factor",
    }
    width = ("multiple_of", "ffn_dim_multiplier")  # they only determine hidden_dim
    for name, value in changes.items():
        own = getattr(model, name)
        if name not in ("max_seq_len", *width) and own != value:
            advice = special.get(name, "leave the flag out, or train a new model without --init_from")
            raise ValueError(f"--model.{name} is {value}, and the model in {directory} has {own}: {advice}")


def stretch_positions(model: Transformer, positions: RopeArgs, max_seq_len: int | None = None) -> str:
    """Change in place how many tokens `model` reaches, and by which encoding; return a sentence that states it.

    max_seq_len: length of the longest text; None: the old one times positions.factor. Returns "" where nothing changes.
    Raises ValueError as `rope.extend` does, and for a length below the model's.
    """
    args = model.args
    old = args.max_seq_len
    if positions == RopeArgs() and max_seq_len in (None, old):
        return ""
    if max_seq_len is None:
        max_seq_len = old if positions.factor is None else round(old * positions.factor)
    if max_seq_len < old:
        raise ValueError(
            f"--model.max_seq_len {max_seq_len} is shorter than the checkpoint's {old}: remove it; shorter rows work"
        )
    scaling = rope.extend(args.rope_scaling, old, max_seq_len, positions.type, positions.factor)
    model.args = args.replace(max_seq_len=max_seq_len, rope_scaling=scaling)
    before = model.rope
    model.rope = rope.make(args.head_dim, args.rope_theta, scaling, max_seq_len)
    if isinstance(model.rope, rope.Clex):  # the one encoding with weights: keep those that were trained
        if isinstance(before, rope.Clex):
            model.rope.load_state_dict(before.state_dict())
        else:
            model.rope.reset_parameters()
        model.rope.to(model.device)
    numbers = ", ".join(f"{key} {value:g}" for key, value in scaling.items() if isinstance(value, (int, float)))
    return f"positions: {scaling['rope_type']} ({numbers}), from {old} to {max_seq_len} tokens"


def set_length(model: Transformer | TransformersModel, max_seq_len: int) -> None:
    """Let `model` take texts of `max_seq_len` tokens, whatever its config.json says; its frequencies stay.

    Raises ValueError where its scaling does not reach so far.
    """
    changes: dict[str, Any] = {"max_seq_len": max_seq_len}
    if isinstance(model, Transformer) and WINDOW in rope.FAMILIES[rope.rope_type(model.args.rope_scaling)].optional:
        # its window is the old length where the entry has none
        changes["rope_scaling"] = {WINDOW: model.args.max_seq_len} | model.args.rope_scaling
    model.args = args = dataclasses.replace(model.args, **changes)
    if isinstance(model, Transformer) and not isinstance(model.rope, rope.Clex):  # which has weights
        model.rope = rope.make(args.head_dim, args.rope_theta, args.rope_scaling, max_seq_len)


# ---- the vocabulary


def check_tokenizer(own: Tokenizer, tokenizer: Tokenizer, directory: Path, where: Path) -> None:
    """Raise ValueError unless the data's tokenizer begins with all ids of the model's own; it may have more after them.

    own: tokenizer of the model in `directory`; tokenizer: of the data in `where`.
    """
    ours, theirs = meanings(own), meanings(tokenizer)
    for i, piece in enumerate(ours):
        other = theirs[i] if i < len(theirs) else "nothing"
        if piece != other:
            raise ValueError(
                f"the tokenizer of {where} differs from that of the model in {directory}: id {i} is {other} there and "
                f"{piece} here; make the data with the model's (--tokenizer {directory})"
            )


def meanings(tokenizer: Tokenizer) -> list[str | bytes]:
    """Return what each id stands for: the name of a special token, or bytes."""
    names = {i: piece for piece, i in tokenizer.special.items()}
    return [names.get(i) or tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size)]


def read_tokens(flag: Sequence[str]) -> list[str]:
    """Return the tokens that a flag names: one by one, or by a file with one a line."""
    if len(flag) == 1 and Path(flag[0]).is_file():
        return [line for line in Path(flag[0]).read_text(encoding="utf8").splitlines() if line]
    if named := [each for each in flag if Path(each).suffix in FILES]:
        what = "should be the only value, since it names a file" if len(flag) > 1 else "does not exist"
        raise FileNotFoundError(
            f"--add_tokens, --add_special_tokens: {named[0]} {what}; a token of such a name can stand in a file"
        )
    return list(flag)


def add_tokens(tokenizer: Tokenizer, texts: Sequence[str], special: Sequence[str] = ()) -> Tokenizer:
    """Return a copy of a tokenizer with more tokens after its own, which is saved as a tokenizer.json.

    Each of `texts` becomes one id wherever it stands in a text, before any merge; `special` tokens never come from a
    text. The ids of other texts stay the same, except for spaces at their ends: a vocabulary that puts a space before
    every text (LLaMA's) puts none before a text that begins with a space, once `texts` are added. Raises ValueError for
    a token that is empty, repeated or in the vocabulary.
    """
    known = set(meanings(tokenizer))
    new = [*special, *texts]
    if refused := [each for n, each in enumerate(new) if known & {each, each.encode()} or not each or each in new[:n]]:
        raise ValueError(
            "--add_tokens, --add_special_tokens: expected texts that the tokenizer does not have as tokens, and no two "
            f"alike, found {refused[0]!r}"
        )
    more = [AddedToken(each, special=True, normalized=False) for each in special]
    return with_tokens(tokenizer, [*more, *(AddedToken(each, special=False, normalized=False) for each in texts)])


def spellings(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """Return, for each token that `new` has after those of `old`, the ids by which `old` spells it."""
    pieces = meanings(new)[old.vocab_size :]
    return [old.encode(piece if isinstance(piece, str) else piece.decode("utf8", "replace")) for piece in pieces]


@torch.no_grad()
def resize(
    model: Transformer | TransformersModel, first: int, spelled: Sequence[Sequence[int]], multiple_of: int = 1
) -> None:
    """Give `model` a row for each new id: the mean of the rows of the ids that spelled its token so far.

    first: the first new id. spelled: for each new id, the old ids. The vocabulary grows to a multiple of `multiple_of`;
    rows without an id are the mean of all. Build the optimizer afterwards: the parameters are new tensors.
    """
    if multiple_of < 1:
        raise ValueError(f"--vocab_multiple_of should be at least 1, found {multiple_of}")
    size = max(first + len(spelled), model.args.vocab_size)
    size = multiple_of * -(-size // multiple_of)  # rounded up

    def rows(old: torch.Tensor) -> torch.Tensor:
        """Return (size, dim) for (V, dim), or (size,) for a bias (V,)."""
        # Rows at and above `first` in the old table had no token: padding of the vocabulary. They do not count.
        new = torch.cat([old, old[:first].mean(0).expand(size - len(old), *old.shape[1:])])
        for i, ids in enumerate(spelled, start=first):
            if ids:
                new[i] = old[list(ids)].mean(0)
        return new

    if isinstance(model, TransformersModel):
        model.resize(size, rows)
        return
    for module in [model.lm_head] if model.args.tie_embeddings else [model.lm_head, model.embedding]:
        module.weight = nn.Parameter(rows(module.weight))
    if model.args.tie_embeddings:
        model.embedding.weight = model.lm_head.weight
    model.embedding.num_embeddings = model.lm_head.out_features = size
    model.args = model.args.replace(vocab_size=size)


def untie(model: Transformer | TransformersModel) -> None:
    """Give the head a matrix of its own, where it is the embedding."""
    ours = isinstance(model, Transformer)
    head = model.lm_head if ours else model.inner.get_output_embeddings()
    if head.weight is not model.embedding.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    if ours:
        model.args = model.args.replace(tie_embeddings=False)
    else:
        for config in (model.inner.config, model.inner.config.get_text_config()):
            config.tie_word_embeddings = False


def fit_vocabulary(
    model: Transformer | TransformersModel,
    own: Tokenizer | None,
    tokenizer: Tokenizer,
    where: Path,
    multiple_of: int = 1,
) -> str:
    """Give `model` a row for each token that `tokenizer` has after those of `own`; return a sentence, "" for no change.

    own: tokenizer that the model was trained with; None: unknown. Then the model cannot grow, and ValueError is raised
    if it has fewer rows than `tokenizer` has ids.
    """
    if own is not None and tokenizer.vocab_size > own.vocab_size:
        before = model.args.vocab_size
        resize(model, own.vocab_size, spellings(own, tokenizer), multiple_of)
        added = tokenizer.vocab_size - own.vocab_size
        return f"{added} new tokens start as the mean of their spelling; rows: {before} -> {model.args.vocab_size}"
    if model.args.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"{where} has {model.args.vocab_size} embeddings, the data's tokenizer {tokenizer.vocab_size} ids; "
            "make the data with the model's own tokenizer"
        )
    if multiple_of != 1:
        raise ValueError(
            f"--vocab_multiple_of {multiple_of} is for a vocabulary that grows, and no token is new: remove it"
        )
    return ""


def grow_vocabulary(
    model: Transformer | TransformersModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    special: Sequence[str],
    where: Path,
    multiple_of: int = 1,
) -> tuple[Tokenizer, str]:
    """Add the tokens that flags name (see `read_tokens`, `add_tokens`) to the tokenizer and to the model in `where`.

    Returns the tokenizer and a sentence that states what was done, "" where the flags name no tokens.
    """
    if not texts and not special:
        return tokenizer, ""
    larger = add_tokens(tokenizer, read_tokens(texts), read_tokens(special))
    return larger, fit_vocabulary(model, tokenizer, larger, where, multiple_of)
