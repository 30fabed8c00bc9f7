"""The modules of a tree that an adapter is for, chosen by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

from quant.linear import QuantizedLinear
from quant.replace import is_head

GROUPS = {  # words for --lora.targets -> names of such modules in LLaMA-like models, then in GPT-NeoX and Phi
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj", "query_key_value", "dense"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "dense_h_to_4h", "dense_4h_to_h", "fc1", "fc2"),
    "embedding": ("embed_tokens", "embed_in"),
    "head": ("lm_head", "embed_out"),
}


def parse_targets(model: nn.Module, text: str) -> str | tuple[str, ...]:
    """Return the `targets` of a LoraSpec for --lora.targets: words, ends of names, or one regular expression.

    Raises ValueError for an empty text, a broken expression, and for linear when the model has no linear layer.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ValueError("--lora.targets should name layers, such as attention,mlp, found none")
    if not all(re.fullmatch(r"\w+(\.\w+)*", word) for word in words):
        try:
            re.compile(text)
        except re.error as error:
            raise ValueError(f"--lora.targets {text!r} is neither names nor a regular expression: {error}") from None
        return text
    ends: list[str] = []
    for word in words:
        linear = (path for path, module in layers(model) if not isinstance(module, nn.Embedding) and not is_head(path))
        if word in GROUPS:
            # the names that the model has; when it has none, all of them, for the message of `matching`
            existing = {path.rpartition(".")[2] for path, _ in layers(model)}
            ends += [end for end in GROUPS[word] if end in existing] or GROUPS[word]
        else:
            ends += linear if word == "linear" else [word]
    if not ends:
        raise ValueError("no layer matches the target 'linear': this model's weights are not in Linear layers")
    # without repetitions, in order
    return tuple(dict.fromkeys(ends))


def matching(model: nn.Module, targets: str | tuple[str, ...], excluded: Iterable[str] = ()) -> list[str]:
    """Return the names of the layers that match `targets`, except `excluded`, in the order of the tree.

    Raises ValueError when an end of a name or the regular expression matches no layer, and for a matrix in a module
    that is neither Linear nor Embedding (GPT-2's Conv1D).
    """
    excluded = set(excluded)
    # each target with its test of a whole name
    if isinstance(targets, str):
        tests: dict[str, Callable[[str], object]] = {targets: lambda path: re.fullmatch(targets, path)}
    else:
        tests = {end: lambda path, end=end: path == end or path.endswith(f".{end}") for end in targets}
    known = {path for path, _ in layers(model)}
    names = [path for path, _ in model.named_modules() if path]
    layer_names = set()
    for text, test in tests.items():
        matches = {path for path in names if test(path)}
        # a module without a matrix, such as a whole block, may match an expression
        for path in sorted(matches - known):
            module = model.get_submodule(path)
            if getattr(module, "weight", None) is not None and module.weight.dim() == 2:
                raise ValueError(
                    f"{path} is a {type(module).__name__}; adapters are made for Linear and Embedding layers only"
                )
        if not matches & known:
            ends = sorted({path.rpartition(".")[2] for path in known})
            raise ValueError(
                f"no layer matches the target {text!r}; this model's layers are called {', '.join(ends)}; "
                "--lora.targets linear takes all except the head"
            )
        layer_names |= matches & known
    return [path for path in names if path in layer_names - excluded]


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return names and modules of the layers that can have an adapter."""
    kinds = (nn.Linear, QuantizedLinear, nn.Embedding)
    return [(path, module) for path, module in model.named_modules() if isinstance(module, kinds)]


def embeddings_and_norms(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that LongLoRA trains in full: those with "embed" or "norm" in their names, and
    every module that shares a parameter with one of them (a tied head)."""
    # named_parameters() would list a tied parameter once only
    own = {path: list(module.parameters(recurse=False)) for path, module in model.named_modules()}
    paths = [path for path in own if own[path] and ("embed" in path.lower() or "norm" in path.lower())]
    ids = {id(p) for path in paths for p in own[path]}
    return tuple(path for path, params in own.items() if any(id(p) in ids for p in params))


def shortest(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return `paths` with each shortened to its last name, if PEFT, which uses `endswith`, then matches the same
    modules."""
    paths = set(paths)
    names = [path for path, _ in model.named_modules()]
    short = set()
    for path in paths:
        end = path.rpartition(".")[2]
        short.add(end if all(name in paths for name in names if name.endswith(end)) else path)
    return sorted(short)
