"""Going on from a checkpoint with a longer context, other positions or new tokens, whatever stage goes on.

What a checkpoint is stays as it is unless it is asked to change, and what contradicts it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken
from torch import nn

import rope
from checkpoint.transformers_model import TransformersModel
from model import Transformer
from model_args import ModelArgs, RopeArgs
from tokenizer import SPACE, Tokenizer, load_tokenizer

# ---- the shape


def given(model: ModelArgs) -> dict[str, Any]:
    """The fields of `model` that somebody has set: those that are not what ModelArgs takes by itself."""
    usual = vars(ModelArgs())
    derived = {"n_kv_heads": model.n_heads, "head_dim": model.dim // model.n_heads}
    derived["hidden_dim"] = model.replace(hidden_dim=None).hidden_dim
    return {name: value for name, value in vars(model).items() if value != derived.get(name, usual[name])}


def check_shape(model: ModelArgs, asked: dict[str, Any], directory: Path) -> None:
    """Raise ValueError where `asked`, what somebody has set of a ModelArgs, is not what the checkpoint's model is."""
    how = {
        "vocab_size": "it is the tokenizer's; new tokens come by --add_tokens",
        "rope_scaling": "say --rope.type and --rope.factor",
        "rope_theta": "say --rope.type and --rope.factor",
    }
    width = ("multiple_of", "ffn_dim_multiplier")  # which say nothing but hidden_dim
    for name, value in asked.items():
        own = getattr(model, name)
        if name not in ("max_seq_len", *width) and own != value:
            advice = how.get(name, "leave the flag out, or train a new model without --init_from")
            raise ValueError(f"--model.{name} is {value}, and the model in {directory} has {own}: {advice}")


def stretch(model: Transformer, positions: RopeArgs, max_seq_len: int | None = None) -> str:
    """Change in place how far `model` reaches, and how; says in a sentence what was chosen, "" where nothing was asked.

    max_seq_len: the new longest text; None: what positions.factor makes of the old one. Raises ValueError as
    `rope.extend` does, and where the length asked for is shorter than the model's.
    """
    args = model.args
    old = args.max_seq_len
    if positions == RopeArgs() and max_seq_len in (None, old):
        return ""
    if max_seq_len is None:
        max_seq_len = old if positions.factor is None else round(old * positions.factor)
    if max_seq_len < old:
        raise ValueError(
            f"--model.max_seq_len {max_seq_len} is shorter than the checkpoint's {old}; shorter rows need no such flag"
        )
    scaling = rope.extend(args.rope_scaling, old, max_seq_len, positions.type, positions.factor)
    model.args = args.replace(max_seq_len=max_seq_len, rope_scaling=scaling)
    device, before = model.model.embed_tokens.weight.device, model.rope
    model.rope = rope.make(args.head_dim, args.rope_theta, scaling, max_seq_len)
    if isinstance(model.rope, rope.Clex):
        if isinstance(before, rope.Clex):
            model.rope.load_state_dict(before.state_dict())
        else:
            model.rope.reset_parameters()
        model.rope.to(device)
    numbers = ", ".join(f"{key} {value:g}" for key, value in scaling.items() if isinstance(value, (int, float)))
    return f"positions: {scaling['rope_type']} ({numbers}), from {old} to {max_seq_len} tokens"


# ---- the vocabulary


def check_tokenizer(own: Tokenizer, tokenizer: Tokenizer, directory: Path, where: Path) -> None:
    """Raise ValueError unless `tokenizer`, of the data in `where`, gives the ids of `own`, of the model in `directory`,
    for all of its pieces; it may have more behind them."""
    ours, theirs = meanings(own), meanings(tokenizer)
    for i, piece in enumerate(ours):
        other = theirs[i] if i < len(theirs) else "nothing"
        if piece != other:
            raise ValueError(
                f"the tokenizer of {where} is another than that of the model in {directory}: id {i} is {other} and "
                f"{piece}; make the data with the model's (--tokenizer {directory})"
            )


def meanings(tokenizer: Tokenizer) -> list[str | bytes]:
    """What each id stands for: the name of a special token, or bytes."""
    names = {i: piece for piece, i in tokenizer.special.items()}
    return [names.get(i) or tokenizer.id_to_bytes(i) for i in range(tokenizer.vocab_size)]


def read_tokens(given: Sequence[str]) -> list[str]:
    """Tokens as a flag names them: one by one, or as a file of one a line."""
    if len(given) == 1 and Path(given[0]).is_file():
        return [line for line in Path(given[0]).read_text(encoding="utf8").splitlines() if line]
    if missing := [each for each in given if "/" in each and each.endswith(".txt")]:
        raise FileNotFoundError(f"there is no file of tokens {missing[0]}")
    return list(given)


def add_tokens(tokenizer: Tokenizer, texts: Sequence[str], special: Sequence[str] = ()) -> Tokenizer:
    """The same tokenizer with more tokens behind its own: `texts` are found in any text before anything else is,
    `special` ones never. It is saved, and read by transformers, as a tokenizer.json with added tokens.

    Other texts keep their ids, up to spaces at their ends: a vocabulary that puts a space before every text (LLaMA's)
    puts none before a text that begins with one, once `texts` are added. Raises ValueError for a token that is there.
    """
    known = set(meanings(tokenizer))
    wanted = [*special, *texts]
    if there := [
        each for n, each in enumerate(wanted) if known & {each, each.encode()} or not each or each in wanted[:n]
    ]:
        raise ValueError(f"the tokenizer has {there[0]!r} already; tokens to add should be new, and no two alike")
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        path, config_path = Path(folder, "tokenizer.json"), Path(folder, "tokenizer_config.json")
        settings = json.loads(path.read_text(encoding="utf8"))
        if texts:
            prefix_once(settings)
        backend = tokenizers.Tokenizer.from_str(json.dumps(settings))
        backend.add_special_tokens([AddedToken(each, special=True, normalized=False) for each in special])
        backend.add_tokens([AddedToken(each, special=False, normalized=False) for each in texts])
        path.write_text(backend.to_str(), encoding="utf8")
        config = json.loads(config_path.read_text(encoding="utf8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        config.pop("tokenizer_model_of", None)  # tokenizer.json is no more the same as the .model beside it
        config_path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf8")
        return load_tokenizer(path)


def prefix_once(settings: dict[str, Any]) -> None:
    """Change a tokenizer.json that cuts spaces from the ends of every part of a text, or puts one before it: added
    tokens cut texts into parts, and the spaces beside them are to stay as they are."""
    steps = (settings["normalizer"] or {}).get("normalizers", [])
    prefix = any(step["type"] == "Prepend" for step in steps)
    kept = [
        step for step in steps if step["type"] != "Replace" or not step["pattern"].get("Regex", "").startswith("\\A")
    ]
    if prefix:
        kept = [step for step in kept if step["type"] != "Prepend" and step.get("content") != SPACE]
        first = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
        settings["pre_tokenizer"] = first
    if steps:
        settings["normalizer"]["normalizers"] = kept


def spellings(old: Tokenizer, new: Tokenizer) -> list[list[int]]:
    """For each token that `new` has behind those of `old`: the ids by which `old` spells it."""
    pieces = meanings(new)[old.vocab_size :]
    return [old.encode(piece if isinstance(piece, str) else piece.decode("utf8", "replace")) for piece in pieces]


@torch.no_grad()
def resize(
    model: Transformer | TransformersModel, first: int, spelled: Sequence[Sequence[int]], multiple_of: int = 1
) -> None:
    """Give `model` rows for ids `first`, `first` + 1, ..: the mean of the rows of the ids that spelled each so far.

    Its vocabulary grows to hold them, up to a multiple of `multiple_of`; rows that no id has are the mean of all.
    The parameters are new ones: an optimizer is to be built afterwards.
    """
    if multiple_of < 1:
        raise ValueError(f"--vocab_multiple_of should be at least 1, found {multiple_of}")
    size = max(first + len(spelled), model.args.vocab_size)
    size = multiple_of * -(-size // multiple_of)

    def rows(old: torch.Tensor) -> torch.Tensor:  # (V, dim), or a bias (V,)
        new = torch.cat([old, old[:first].mean(0).expand(size - len(old), *old.shape[1:])])
        for i, ids in enumerate(spelled, start=first):
            if ids:
                new[i] = old[list(ids)].mean(0)
        return new

    if isinstance(model, TransformersModel):
        model.resize(size, rows)
        return
    for module in [model.lm_head] if model.args.tie_embeddings else [model.lm_head, model.model.embed_tokens]:
        module.weight = nn.Parameter(rows(module.weight))
    if model.args.tie_embeddings:
        model.model.embed_tokens.weight = model.lm_head.weight
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = size
    model.args = model.args.replace(vocab_size=size)


def fit_vocabulary(
    model: Transformer | TransformersModel,
    own: Tokenizer | None,
    tokenizer: Tokenizer,
    where: Path,
    multiple_of: int = 1,
) -> str:
    """Give `model` rows for what `tokenizer` has behind `own` (None: unknown), and say so; "" where there is nothing.

    Raises ValueError for a model that has no room, and cannot grow.
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
    return ""


def grow(
    model: Transformer | TransformersModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    special: Sequence[str],
    where: Path,
    multiple_of: int = 1,
) -> tuple[Tokenizer, str]:
    """`tokenizer` of the model in `where` with the tokens that flags name (see `read_tokens`, `add_tokens`) behind its
    own, for which `model` gets rows, and what was done; without such tokens all stays as it is."""
    if not texts and not special:
        return tokenizer, ""
    grown = add_tokens(tokenizer, read_tokens(texts), read_tokens(special))
    return grown, fit_vocabulary(model, tokenizer, grown, where, multiple_of)
