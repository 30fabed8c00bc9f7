"""The reference's log-probabilities of a preference run, computed once and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from checkpoint.transformers_model import TransformersModel
from cli.progress import say, track
from dataset_sft import PairData
from distributed.single import SingleProcess
from model import Transformer
from tuning.preference_model import PreferenceModel


def reference(
    tuned: PreferenceModel, sources: Sequence[PairData], backend: SingleProcess, cache: Path, micro_batch_size: int = 0
) -> torch.Tensor:
    """Return the log-probability that the model gives each text of `sources` now, by doc_id: (texts,) on its device.

    All ranks share the work, `micro_batch_size` rows at once (0: all rows of a rank). The file `cache` keeps the
    result; it is computed again when the weights, shape or dtype of the model or the texts have changed since.
    """
    key = digest(tuned.model, sources)
    known = [read_cache(cache, key)]
    if not all(backend.gather(known[0] is not None)):  # a rank without the file needs the others to compute with it
        known = backend.gather(_log_probs(tuned, sources, backend, micro_batch_size))
        if backend.main:
            write_cache(cache, key, np.fmax.reduce(known))  # fmax ignores the NaN of texts that another rank computed
    wide = torch.float32 if backend.device.type == "mps" else torch.float64
    return torch.from_numpy(np.fmax.reduce(known)).to(backend.device, wide)


@torch.no_grad()
def _log_probs(
    tuned: PreferenceModel, sources: Sequence[PairData], backend: SingleProcess, micro_batch_size: int
) -> np.ndarray:
    """Return the log-probabilities of the texts in this rank's rows, (texts,); NaN for the others."""
    log_probs = np.full(2 * sum(source.n_pairs for source in sources), np.nan)
    was_training = tuned.training
    tuned.eval()
    steps = [(source, step) for source in sources for step in range(source.steps_per_epoch)]
    for source, step in track(steps, "computing the reference", "batches", len(steps), active=backend.main):
        for part in source.batch(step, backend.data_rank, backend.data_world).split(micro_batch_size):
            micro = part.to(backend.device)
            texts, log_p, _ = tuned.text_log_probs(micro.tokens, micro.targets, micro.positions, micro.doc_ids)
            log_probs[texts.cpu().numpy()] = log_p.cpu().numpy()
    tuned.train(was_training)
    return log_probs


def digest(model: Transformer | TransformersModel, sources: Sequence[PairData]) -> str:
    """Return a hex SHA-256 of all that the reference's log-probabilities depend on."""
    sha256 = hashlib.sha256(f"{model.args} {model.compute_dtype}".encode())
    for name, tensor in model.state_dict().items():
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha256.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for source in sources:
        sha256.update(f"pairs from {source.first}".encode())
        for array in (source.samples.ids, source.samples.mask, source.samples.offsets):
            sha256.update(np.ascontiguousarray(array))
    return sha256.hexdigest()


def read_cache(path: Path, key: str) -> np.ndarray | None:
    """Return the array that `write_cache` wrote with the same key; None where there is none, or it is damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as stored:
            return stored["log_probs"] if str(stored["key"]) == key else None
    except Exception:  # numpy, zipfile and zlib each have errors of their own for a damaged file
        say(f"{path} is damaged: the reference is computed again")
        return None


def write_cache(path: Path, key: str, log_probs: np.ndarray) -> None:
    """Write the array and its key to a file that appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("wb") as file:
        np.savez(file, key=key, log_probs=log_probs)
    aside.replace(path)
