"""The weights of a model directory: whole, finite, alive, and worth more than chance on its own text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from checkpoint.directory import load_model
from checkpoint.locate import is_adapter, read_config
from checks.check import FAULT, OK, WARNING, Check, attempt, judged
from dataset import BatchSource
from model import Transformer
from training.checksums import SUMS, damage, has_sums, names
from training.heldout import evaluate

AGAIN = "copy the model again, or take an older checkpoint"
MOST_STD = 2.0  # of a weight matrix; trained LLaMAs have 0.01 to 0.3
GAIN = 0.02  # nats a token by which another rope_theta has to be better
THETAS = (1e4, 1e5, 5e5, 1e6)


def model_directory(directory: Path) -> tuple[list[Check], Transformer | None]:
    """Return the checks of a model or adapter directory, and the model in float32; None where it cannot be loaded."""
    found = hashes(directory)
    loaded: list[Transformer] = []
    expected = "a model whose files fit its config.json"
    found += attempt("model", expected, AGAIN, lambda: _load(directory, loaded))
    if not loaded:
        return found, None
    found += tensors(loaded[0])
    if isinstance(loaded[0], Transformer) and not is_adapter(directory):
        found += tied(loaded[0], directory)
    return found, loaded[0]


def _load(directory: Path, into: list) -> Iterator[Check]:
    model = load_model(directory)
    into.append(model)
    what = "adapter merged into its base" if is_adapter(directory) else type(model).__name__
    yield Check(OK, "model", "a model that can be loaded", f"{model.n_parameters():,} parameters, {what}")


def hashes(directory: Path) -> list[Check]:
    """Compare the files of a checkpoint with their SHA-256, where it has them."""
    if not has_sums(directory):
        return []
    try:
        sums = dict(json.loads((directory / SUMS).read_text(encoding="utf8")))
    except (ValueError, TypeError):
        sums = {}
    wrong = damage(directory) if sums else f"{SUMS} is damaged"
    more = [] if wrong else sorted(set(names(directory)) - sums.keys())
    found = wrong or f"{len(sums)} files{f', and {len(more)} without a sum: {more[0]}' if more else ''}"
    return [judged("hashes", "files with the SHA-256 that was saved", found, AGAIN, bool(wrong))]


def tensors(model: torch.nn.Module) -> list[Check]:
    """Return whether all weights are finite, and none is all zeros or far too large."""
    bad: dict[str, list[str]] = {"not finite": [], "all zeros": [], "too large": [], "rows alike": []}
    with torch.no_grad():
        for name, p in model.named_parameters():
            x = p.float()
            if not x.isfinite().all():
                bad["not finite"].append(name)
            elif not x.any() and not name.endswith("bias"):
                bad["all zeros"].append(name)
            elif x.dim() == 2 and min(x.shape) > 1 and x.std() > MOST_STD:
                bad["too large"].append(name)
            elif x.dim() == 2 and len(x) > 1 and bool((x == x[0]).all()):
                bad["rows alike"].append(name)
    advice = "take an older checkpoint; docs/training.md says how a run guards against it"
    n = sum(1 for _ in model.parameters())
    return [
        judged(
            f"weights {what}",
            "none",
            f"{len(those)} of {n} tensors{': ' * bool(those)}{', '.join(those[:3])}",
            advice,
            bool(those),
        )
        for what, those in bad.items()
    ]


def tied(model: Transformer, directory: Path) -> list[Check]:
    """Return whether embedding and head are one matrix exactly where config.json says so."""
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    says, same = bool(read_config(directory).get("tie_word_embeddings", False)), torch.equal(embedding, head)
    words = f"config.json says {'tied' if says else 'not tied'}, the matrices are {'the same' if same else 'different'}"
    advice = "set tie_word_embeddings in config.json to what the model was trained with"
    return [judged("tied embeddings", "what config.json says", words, advice, says != same, FAULT if says else WARNING)]


def on_text(model: Transformer, source: BatchSource) -> list[Check]:
    """Return whether a model is better than chance on some batches, and whether another rope_theta would be better."""
    chance = math.log(model.args.vocab_size)
    loss = loss_of(model, source)
    found = f"{loss:.2f} nats a token; chance: {chance:.2f}"
    advice = "the tokenizer may be that of another model, the layers may be in a wrong order, or it was never trained"
    bad = not loss < 0.9 * chance
    checks = [judged("loss on the text", "well below chance, ln(vocabulary)", found, advice, bad)]
    if bad or not isinstance(model, Transformer) or model.args.rope_scaling:
        return checks
    own = model.args.rope_theta
    losses = {theta: loss_of(with_theta(model, theta), source) for theta in THETAS if theta != own}
    best = min(losses, key=losses.__getitem__)
    found = f"{own:g}: {loss:.3f} nats; {best:g}: {losses[best]:.3f}"
    advice = f"set rope_theta in config.json to {best:g}"
    bad = losses[best] < loss - GAIN
    return [*checks, judged("rope_theta on the text", "no other base with a lower loss", found, advice, bad)]


def with_theta(model: Transformer, theta: float) -> Transformer:
    """Return a model of the same weights whose rotary encoding has another base."""
    other = Transformer(model.args.replace(rope_theta=theta), initialize=False)
    other.load_state_dict(model.state_dict(), assign=True)
    other.compute_dtype = model.compute_dtype
    return other


def loss_of(model: Transformer, source: BatchSource, n_batches: int = 2) -> float:
    """Return the mean loss of the first batches."""
    return evaluate(model, source, max_batches=n_batches)["loss"]
