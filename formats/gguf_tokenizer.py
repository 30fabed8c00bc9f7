"""Tokenizers in GGUF files: SentencePiece's BPE (`llama`) and unigram (`t5`), and byte-level BPE (`gpt2`)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from cli.progress import say
from formats.gguf_settings import Field
from formats.vocabulary import new_model, normalises, proto_of
from tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

KEY = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types, in SentencePiece's numbers
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # llama.cpp's name of a way to cut a text into words -> the expression that tokenizer.json has for it
    "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST,
    "qwen2": _WORDS + r"\p{N}" + _REST,
}
OPEN, CLOSE = re.compile(r"(\{%[-+]?\s*)generation\b"), re.compile(r"(\{%[-+]?\s*)endgeneration\b")

# ---- writing


def write(tokenizer: Tokenizer | None, vocab_size: int, stop_ids: list[int] | None, where: Path) -> dict[str, Field]:
    """Return the metadata of a tokenizer.

    vocab_size: rows of the embedding; those beyond the tokenizer become unused tokens. Raises ValueError for a
    tokenizer that llama.cpp does not have.
    """
    if tokenizer is None:
        say(f"{where} has no tokenizer: the file is written without one, and programs can use it with ids only")
        return {f"{KEY}model": Field("string", "none")}
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{where}: the tokenizer has {tokenizer.vocab_size} ids, and the model {vocab_size}")
    proto = proto_of(tokenizer)
    if proto is not None:
        fields = write_pieces(proto, vocab_size)
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        fields = write_byte_level(tokenizer, vocab_size, where)
    else:
        raise ValueError(f"{where}: its tokenizer is none that GGUF holds")
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": tokenizer.unk_id, "padding": tokenizer.pad_id}
    others = [i for i in stop_ids or () if i != tokenizer.eos_id]
    ids["eot"] = others[0] if others else None  # another id that ends an answer; llama.cpp stops at both
    fields |= {f"{KEY}{name}_token_id": Field("uint32", i) for name, i in ids.items() if i is not None}
    fields[f"{KEY}add_bos_token"] = Field("bool", bool(tokenizer.begins))
    fields[f"{KEY}add_eos_token"] = Field("bool", False)
    return fields | write_template(tokenizer.chat_template)


def write_pieces(proto: ModelProto, vocab_size: int) -> dict[str, Field]:
    """Return the table of a SentencePiece model."""
    norm, unigram = proto.normalizer_spec, proto.trainer_spec.model_type == TrainerSpec.UNIGRAM
    if not unigram and normalises(proto):
        say("the tokenizer normalises texts, and llama.cpp's of SentencePiece BPE does not: ids of such texts differ")
    if unigram and proto.trainer_spec.byte_fallback:
        say("llama.cpp's unigram tokenizer has <unk> for unknown characters, and that of the model their bytes")
    n_more = vocab_size - len(proto.pieces)
    fields = {
        "model": Field("string", "t5" if unigram else "llama"),
        "pre": Field("string", "default"),
        "tokens": Field("array", [p.piece for p in proto.pieces] + padding(len(proto.pieces), vocab_size)),
        "scores": Field("array", [float(p.score) for p in proto.pieces] + [0.0] * n_more),
        "token_type": Field("array", [int(p.type) for p in proto.pieces] + [UNUSED] * n_more),
        "add_space_prefix": Field("bool", norm.add_dummy_prefix),
        "remove_extra_whitespaces": Field("bool", norm.remove_extra_whitespaces),
    }
    if unigram and norm.precompiled_charsmap:
        fields["precompiled_charsmap"] = Field("array", norm.precompiled_charsmap)
    return {f"{KEY}{name}": field for name, field in fields.items()}


def padding(start: int, stop: int) -> list[str]:
    """Return names for the rows of an embedding behind those of the tokenizer."""
    return [f"[PAD{i}]" for i in range(start, stop)]


def write_byte_level(tokenizer: HuggingFaceTokenizer, vocab_size: int, where: Path) -> dict[str, Field]:
    """Return the table of a byte-level BPE; ValueError for another kind, or another way to cut a text into words."""
    settings = json.loads(tokenizer.text)
    model = settings["model"]
    steps = (settings.get("pre_tokenizer") or {}).get("pretokenizers", [settings.get("pre_tokenizer") or {}])
    if not any(step.get("type") == "ByteLevel" for step in steps) or not isinstance(model["vocab"], dict):
        raise ValueError(
            f"{where}: its tokenizer.json is no byte-level BPE and has no tokenizer.model beside it, which GGUF needs "
            "for SentencePiece vocabularies: put the tokenizer.model into the directory"
        )
    tokens, kinds = padding(0, vocab_size), [UNUSED] * vocab_size
    for piece, i in model["vocab"].items():
        tokens[i], kinds[i] = piece, NORMAL
    for token in settings.get("added_tokens") or ():
        special = token["special"] or token["content"] in tokenizer.special
        tokens[token["id"]], kinds[token["id"]] = token["content"], CONTROL if special else USER_DEFINED
    if normalizer := settings.get("normalizer"):
        kind = normalizer.get("type")
        say(f"the tokenizer normalises texts ({kind}), and llama.cpp does not: ids of such texts differ")
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    return {
        f"{KEY}model": Field("string", "gpt2"),
        f"{KEY}pre": Field("string", split_name(steps, where)),
        f"{KEY}tokens": Field("array", tokens),
        f"{KEY}token_type": Field("array", kinds),
        f"{KEY}merges": Field("array", merges),
        f"{KEY}add_space_prefix": Field("bool", False),
    }


def split_name(steps: list[dict[str, Any]], where: Path) -> str:
    """Return llama.cpp's name of the way in which a tokenizer.json cuts a text into words."""
    regexes = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    own = [step for step in steps if step["type"] == "ByteLevel"]
    prefix = any(step.get("add_prefix_space") for step in own)
    if len(steps) == 1 and own[0].get("use_regex", True) and not prefix:
        return "gpt-2"
    if len(steps) == 2 and not own[0].get("use_regex", True) and not prefix:
        for name, regex in SPLITS.items():
            if regexes == [regex]:
                return name
    raise ValueError(
        f"{where}: its tokenizer.json cuts texts in a way that has no name in llama.cpp here (known: gpt-2, "
        f"{', '.join(SPLITS)}); found {json.dumps(regexes or [step['type'] for step in steps])}"
    )


def write_template(template: str | dict[str, str] | None) -> dict[str, Field]:
    """Return the metadata of chat templates, without the tags that say which part is trained."""
    if not template:
        return {}
    named = template if isinstance(template, dict) else {"default": template}
    fields = {}
    for name, text in named.items():
        key = TEMPLATE if name == "default" else f"{TEMPLATE}.{name}"
        # a block that is always there has the same white space around it
        fields[key] = Field("string", CLOSE.sub(r"\1endif", OPEN.sub(r"\1if true", text)))
    if others := [name for name in named if name != "default"]:
        fields[f"{TEMPLATE}s"] = Field("array", others)
    return fields


# ---- reading


def read(fields: dict[str, Any], where: Path) -> tuple[Tokenizer | None, list[int] | None]:
    """Return the tokenizer in the metadata of a file and the ids that end an answer; (None, None) where it has none."""
    kind = fields.get(f"{KEY}model", "none")
    if kind in ("none", "no_vocab"):
        return None, None
    readers = {"llama": read_pieces, "t5": read_pieces, "gpt2": read_byte_level}
    if kind not in readers:
        say(f"{where} has a tokenizer of the kind {kind!r}, which is not read here: name one with --tokenizer")
        return None, None
    try:
        tokenizer = readers[kind](fields, where)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: the tokenizer in its metadata is damaged: {error!r}") from None
    names = [key.removeprefix(f"{TEMPLATE}.") for key in fields if key.startswith(f"{TEMPLATE}.")]
    texts = {name: fields[f"{TEMPLATE}.{name}"] for name in names}
    if TEMPLATE in fields:
        texts = {"default": fields[TEMPLATE]} | texts
    if texts:
        tokenizer.chat_template = texts["default"] if texts.keys() == {"default"} else texts
    stop = [fields.get(f"{KEY}{name}_token_id") for name in ("eos", "eot")]
    return tokenizer, list(dict.fromkeys(int(i) for i in stop if i is not None)) or None


def names_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a tokenizer_config.json."""
    tokens = fields[f"{KEY}tokens"]
    ids = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found = {key: fields.get(f"{KEY}{name}_token_id") for key, name in ids.items()}
    return {f"{key}_token": tokens[i] for key, i in found.items() if i is not None}


def read_pieces(fields: dict[str, Any], where: Path) -> Tokenizer:
    """Return the tokenizer of a table of pieces with scores."""
    tokens, scores, kinds = (fields[f"{KEY}{name}"] for name in ("tokens", "scores", "token_type"))
    names = names_of(fields)
    ids = {key.removesuffix("_token"): tokens.index(name) for key, name in names.items()}
    if UNKNOWN not in kinds:
        raise ValueError(f"{where}: the tokenizer in its metadata has no unknown token")
    ids.setdefault("unk", kinds.index(UNKNOWN))
    while tokens[-1] == f"[PAD{len(tokens) - 1}]" and kinds[-1] == UNUSED:  # rows behind those of the tokenizer
        tokens, scores, kinds = tokens[:-1], scores[:-1], kinds[:-1]
    unigram = fields[f"{KEY}model"] == "t5"
    proto = new_model(tokens, scores, kinds, ids, bool(fields.get(f"{KEY}add_space_prefix", True)))
    proto.normalizer_spec.remove_extra_whitespaces = bool(fields.get(f"{KEY}remove_extra_whitespaces", unigram))
    if unigram:
        proto.trainer_spec.model_type = TrainerSpec.UNIGRAM
        proto.normalizer_spec.precompiled_charsmap = bytes(fields.get(f"{KEY}precompiled_charsmap", b""))
    names["add_bos_token"] = bool(fields.get(f"{KEY}add_bos_token", not unigram))
    return SentencePieceTokenizer(proto.SerializeToString(), where, names)


def read_byte_level(fields: dict[str, Any], where: Path) -> Tokenizer:
    """Return the tokenizer of a byte-level BPE."""
    tokens, kinds = fields[f"{KEY}tokens"], fields[f"{KEY}token_type"]
    split = fields.get(f"{KEY}pre", "gpt-2")
    if split not in ("gpt-2", "default", *SPLITS):
        raise ValueError(f"{where}: its tokenizer cuts texts as {split!r}, which is not read here")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split not in SPLITS}
    cut = {"type": "Split", "pattern": {"Regex": SPLITS.get(split)}, "behavior": "Isolated", "invert": False}
    steps = [cut, level] if split in SPLITS else [level]
    added = [
        {"id": i, "content": token, "special": kind == CONTROL, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for i, (token, kind) in enumerate(zip(tokens, kinds))
        if kind in (CONTROL, USER_DEFINED)
    ]
    others = {each["content"] for each in added}
    vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, kinds)) if kind in (NORMAL, BYTE) and t not in others}
    settings: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": level | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocab | {each["content"]: each["id"] for each in added}}
        | {"merges": [merge.split(" ") for merge in fields[f"{KEY}merges"]], "ignore_merges": split == "llama-bpe"},
    }
    names = names_of(fields)
    if fields.get(f"{KEY}add_bos_token") and "bos_token" in names:
        bos = names["bos_token"]
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        known = {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}}
        settings["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": known,
        }
    with TemporaryDirectory() as folder:
        Path(folder, "tokenizer.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf8")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | names
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf8")
        return HuggingFaceTokenizer(Path(folder, "tokenizer.json"))
