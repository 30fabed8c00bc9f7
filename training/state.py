"""The state of a run and its checkpoints: what they hold, which are kept, and how training resumes from one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from cli.progress import say
from distributed.single import SingleProcess
from files import explained, place_aside, point, write_json, written_aside
from optim.optimizers import Optimizers
from training.checksums import STATE, damage, has_sums, read_progress, write_progress
from training.generators import rng_state, set_rng_state
from training.identity import begin_from, check_identity, check_unchanged, resolved
from training.pending import Pending
from training.protocols import Adaptive, Shards, Share, TrainableModel

IN_PARTS = "models of the LLaMA family that are trained in full, found an adapter or another model"
MOST_SKIPPED = 20  # steps in a row


class Diverged(ValueError):
    """A run whose numbers are no longer finite."""


@dataclass
class TrainState:
    """Progress of a run and the sums for the next line of its log; saved with the weights."""

    step: int = 0
    tokens: int = 0
    metric: str = "loss"  # the held-out metric that the best checkpoint is chosen by
    best: float = math.inf  # its least value so far
    evals_since_best: int = 0
    evaluated: int = -1  # step of the last evaluation
    skipped: int = 0  # steps in a row, up to the last one, whose gradient was not finite
    recent: list[float] = field(default_factory=list)  # losses of the last steps, for `guards.spike`
    rollbacks: int = 0  # times that the run went back to a checkpoint; the rates are halved by each
    avoid: list[int] = field(default_factory=list)  # numbers of the batches that are left out
    seconds: float = 0.0  # of the loop so far, for --train.max_minutes
    first_step_seconds: float = 0.0  # of these, until the first step was done: it compiles the model
    log: list | None = None  # number of rows of metrics.jsonl so far, and their SHA-256; older states have none
    # sums since the last reset
    loss_sum: float = 0.0
    targets: int = 0
    group_losses: list[float] = field(default_factory=list)
    group_targets: list[float] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)  # the model's metrics; old states have this name

    def add(
        self, norm: float, n_tokens: int, n_targets: int, loss: float, groups: list[list], metrics: dict[str, float]
    ) -> None:
        """Count a step; all values but `norm`, the gradient norm, are sums over all ranks.

        groups: the losses, and the targets, of each group. A step whose norm is not finite was skipped: its sums are
        left out. Raises Diverged at the twentieth such step in a row.
        """
        if math.isfinite(norm):
            self.loss_sum, self.targets, self.skipped = self.loss_sum + loss, self.targets + n_targets, 0
            self.group_losses = [a + b for a, b in zip_longest(self.group_losses, groups[0], fillvalue=0.0)]
            self.group_targets = [a + b for a, b in zip_longest(self.group_targets, groups[1], fillvalue=0.0)]
            self.measures = {name: self.measures.get(name, 0.0) + value for name, value in metrics.items()}
        else:
            self.skipped += 1
            if self.skipped >= MOST_SKIPPED:
                raise Diverged(
                    f"{MOST_SKIPPED} steps in a row had no finite gradient: lower the learning rate (--optim.lr, "
                    "--optim.muon_lr), or use --train.dtype bf16"
                )
        self.step += 1
        self.tokens += n_tokens
        self.first_step_seconds = self.first_step_seconds or self.seconds

    def averages(self, group_names: Sequence[str]) -> dict[str, float]:
        """Return the means over the targets since the last reset: loss, loss/NAME of each group, and metrics."""
        groups = zip(group_names, self.group_losses, self.group_targets)
        return (
            {"loss": self.loss_sum / self.targets if self.targets else math.nan}
            | {f"loss/{name}": nats / n for name, nats, n in groups if n}
            | {name: value / self.targets for name, value in self.measures.items() if self.targets}
        )

    def reset(self) -> None:
        """Set the sums to zero."""
        self.loss_sum, self.targets, self.group_losses, self.group_targets, self.measures = 0.0, 0, [], [], {}

    def judge(self, value: float) -> bool:
        """Record an evaluation after this step; return whether `value` is the best so far."""
        self.evaluated, is_best = self.step, value < self.best
        self.best, self.evals_since_best = (value, 0) if is_best else (self.best, self.evals_since_best + 1)
        return is_best

    def forget_best(self, metric: str) -> None:
        """Let the next evaluation be the best, by `metric`."""
        self.best, self.evals_since_best, self.evaluated, self.metric = math.inf, 0, -1, metric


@dataclass
class Checkpoints:
    """The checkpoints of a run: directories `step_N` in `run`, and the links `last` and `best` to two of them.

    All ranks call each method at the same point of the run; the main rank writes. `write(directory)` writes the trained
    weights, `read(directory)` copies them back. `identity` names what determines the order of the losses. `keep`
    checkpoints are kept, beside those that the links lead to. With `sharded` every rank writes a part, by `shards`.

    `save` returns when steps may go on; the checkpoint appears when `settle` or `wait` finds that it is on the disk.
    """

    run: Path
    keep: int
    backend: SingleProcess
    model: TrainableModel
    optimizer: Optimizers
    write: Callable[[Path], None]
    read: Callable[[Path], None]
    identity: dict[str, Any]
    adaptive: Adaptive | None = None
    data: Any = None
    """source of the batches; where it can tell what was read (`ledger`), training_state/ledger.json says so"""
    shards: Shards | None = None
    sharded: bool = False
    saved_step: int = -1  # step of the checkpoint that `last` leads to, or will when it appears
    nothing_found: bool = True  # by `find`
    _found: tuple[Path, dict[str, Any]] | None = None  # between `find` and `resume`
    _newest: tuple[Path | None, ...] = ()  # the newest checkpoint when `find` looked, on the main rank
    _pending: Pending | None = None
    _pruning: Future | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a model that cannot be saved in parts."""
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        if self.sharded and self.shards is None:
            raise ValueError(f"--train.save sharded is for {IN_PARTS}: remove it")

    def find(self, metric: str) -> TrainState:
        """Return the state of the checkpoint that the run goes on from, a fresh one if there is none.

        Nothing is restored yet: see `resume`. Raises ValueError when the checkpoint belongs to a run of another
        identity, or when the ranks find different checkpoints.
        """
        self.wait()
        state = TrainState(metric=metric)
        self._newest = (resolved(newest(self.run)),) if self.backend.main else ()
        # one rank reads all files of a checkpoint, and the others take the one that it chose
        last, damaged = self.backend.gather(newest_whole(self.run) if self.backend.main else None)[0]
        self.nothing_found = last is None
        if last is not None:
            stored = load_state(last)
            check_identity(self.run, stored["identity"], self.identity, self.backend.main)
            state, self._found = TrainState(**stored["progress"]), (last, stored)
            self.saved_step = state.step if last.name == "last" else -1
            best = self.run / "best"
            # the best is lost, or was chosen by another metric
            if not best.exists() or best.resolve().name in damaged or state.metric != metric:
                state.forget_best(metric)
        if len(steps := set(self.backend.gather(state.step))) > 1:
            raise ValueError(
                f"the processes find checkpoints of different steps ({', '.join(map(str, sorted(steps)))}) in "
                f"{self.run}: put it on a file system that all machines share"
            )
        return state

    def resume(self) -> None:
        """Restore the weights, the optimizer and the random generators from the checkpoint that `find` has found."""
        if self._newest:  # the run was not locked yet
            check_unchanged(self.run, *self._newest, resolved(newest(self.run)))
        if self._found is None:
            return
        (last, stored), self._found, backend = self._found, None, self.backend
        backend.load(self.model, self.read, last)
        backend.load_state(self.model, self.optimizer, stored | moments_in(last, stored, self.shards))
        if len(stored["rng"]) == backend.world:
            set_rng_state(stored["rng"][backend.rank], backend.device)
        if self.adaptive is not None:
            self.adaptive.load_state_dict(stored["adaptive"])
        if backend.main:
            begin_from(self.run, last, stored["progress"]["step"])

    def save(self, state: TrainState, is_best: bool = False) -> None:
        """Save `step_N`, complete or not at all, and let `last` (and `best`) lead to it.

        Where `step_N` is saved already, only the progress in it is replaced.
        """
        self.wait()
        backend, directory = self.backend, self.run / f"step_{state.step:08d}"
        links = ("best", "last") if is_best else ("last",)
        if state.step == self.saved_step:  # what `last` leads to is never rewritten: a kill could leave nothing
            if backend.main:
                write_progress(directory, vars(state))
                self._publish(directory, links)
            return
        with ExitStack() as stack:
            stack.enter_context(written_aside(directory) if backend.main else explained(directory))
            aside = place_aside(directory)
            share = self._write(aside, state)
            if backend.main or share is not None:
                self._pending = Pending(self._thread, aside, stack.pop_all(), share, backend)
                self._then = partial(self._publish, directory, links)
        self.saved_step = state.step

    def _write(self, aside: Path, state: TrainState) -> Share | None:
        """Write what the main rank writes; return this rank's share of what all ranks write."""
        backend = self.backend
        rng = backend.gather(rng_state(backend.device))  # until then, the main rank has made the directory
        if self.sharded:
            weights, moments = backend.parts(self.model, self.optimizer)
            tensors, others = by_kind(moments)
            share = self.shards.start(aside, weights, tensors, backend.rank, backend.gather)
            resumable = {"moments": others, "scaler": backend.scaler.state_dict()}
            if backend.main:
                self.write(aside, weights=False)
        else:
            share, resumable = None, backend.state(self.model, self.optimizer)
            backend.save(self.model, self.write, aside if backend.main else None)
        if backend.main:
            resumable |= {"progress": vars(state), "rng": rng, "identity": self.identity}
            if self.adaptive is not None:
                resumable["adaptive"] = self.adaptive.state_dict()
            save_state(aside, resumable)
            if hasattr(self.data, "ledger"):
                write_json(aside / "training_state" / "ledger.json", self.data.ledger(state.step, state.avoid))
        return share

    def _publish(self, directory: Path, links: Sequence[str]) -> None:
        """Let the links lead to a checkpoint; the thread then removes old ones."""
        for link in links:
            point(self.run / link, directory)
        self._pruning = self._thread.submit(prune, self.run, self.keep)

    def done(self) -> bool:
        """Return whether this rank has done its part of a checkpoint that has still to appear."""
        return self._pending is not None and self._pending.done()

    def settle(self, share: float) -> None:
        """Let a checkpoint appear that is on the disk; share: of the ranks that are `done`, the same on all of them."""
        if self._pending is not None and (self._pending.done() if self._pending.share is None else share > 1 - 1e-9):
            self._appear()

    def wait(self) -> None:
        """Wait until the last checkpoint has appeared and old ones are removed; OSError where it cannot be written."""
        self._appear()
        if self._pruning is not None:
            self._pruning.result()

    def _appear(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.finish(self._then)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """Wait for the thread. After an error of perhaps this rank alone, a checkpoint that all write is given up."""
        if error is None or self._pending is None or self._pending.share is None or self.backend.world == 1:
            with suppress(OSError) if error else nullcontext():
                self.wait()
        self._thread.shutdown()

    def load_best(self) -> None:
        """Load the weights of the best checkpoint into the model."""
        self.wait()
        self.backend.barrier()  # until the main rank has written it
        if self.backend.main and (wrong := damage(self.run / "best")):
            raise ValueError(
                f"{self.run / 'best'} is damaged: {wrong}; remove the link, and the same command chooses the best anew"
            )
        self.backend.load(self.model, self.read, self.run / "best")

    def clear(self, everything: bool) -> None:
        """Remove the result of a shorter run; with `everything`, also all checkpoints."""
        if self.backend.main:
            for name in ("result.json", "result.sha256", *(("last", "best") if everything else ())):
                (self.run / name).unlink(missing_ok=True)
            if everything:
                prune(self.run, keep=0)


def moments_in(directory: Path, stored: dict[str, Any], shards: Shards | None) -> dict[str, Any]:
    """Return the moments of a checkpoint in parts, with those in `stored`, which are no tensors; {} for another one."""
    moments = shards.moments(directory) if shards else {}
    for name, values in stored["moments"].items() if moments else ():
        moments[name] = {**moments.get(name, {}), **values}
    return {"moments": moments} if moments else {}


def by_kind(moments: dict[str, dict[str, Any]]) -> tuple[dict[str, dict], dict[str, dict]]:
    """Return the moments that are tensors, and those that are not, both by name of the parameter."""
    kinds = ({}, {})
    for name, values in moments.items():
        for key, value in values.items():
            kinds[not torch.is_tensor(value)].setdefault(name, {})[key] = value
    return kinds


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Write what resumes training (tensors, numbers, strings, and containers of them) into a checkpoint directory."""
    path = directory / STATE
    path.parent.mkdir()
    torch.save(state, path)


def load_state(directory: Path) -> dict[str, Any]:
    """Return the training state in a checkpoint. Only tensors and plain containers are unpickled.

    Raises FileNotFoundError where there is none, ValueError where it cannot be read.
    """
    path = directory / STATE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no training_state/state.pt: it can start a run, but not resume one (use --init_from)"
        )
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read: it is truncated, damaged, or holds more than tensors and plain values; "
            "let the link `last` lead to an older checkpoint (ln -sfn step_N last), or use --train.resume never to "
            "start anew"
        ) from error
    progress = read_progress(directory)
    return state | {"progress": progress} if progress else state


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoint directories of a run, oldest first."""
    return sorted(path for path in run.glob(f"step_{8 * '[0-9]'}") if path.is_dir())


def newest(run: Path) -> Path | None:
    """Return the checkpoint that a run goes on from, None if it has none.

    It is the link `last`, or the newest checkpoint where there is no such link (a copy may lose links, and a kill may
    come before the first one). Raises ValueError where the link has become a folder, or leads nowhere.
    """
    last = run / "last"
    if last.is_dir() and not last.is_symlink():
        raise ValueError(
            f"{last} should be a link to a checkpoint, found a folder (a copy of the run that followed its links): "
            f"remove {last} and {run / 'best'}, and the run goes on from its newest checkpoint"
        )
    if last.is_symlink() and not last.exists():  # the user decides which checkpoint replaces it
        left = ", ".join(path.name for path in checkpoints(run)) or "none"
        raise ValueError(
            f"{last} leads to {last.readlink()}, which does not exist (existing checkpoints: {left}): let it lead to "
            f"one of them (ln -sfn step_N {last}), or use --train.resume never to start anew"
        )
    return last if last.exists() else next(reversed(checkpoints(run)), None)


def newest_whole(run: Path) -> tuple[Path | None, set[str]]:
    """Return the newest checkpoint of a run whose files are as they were saved (None: it has none), and the names of
    the damaged ones before it, which are named on stderr.

    Raises ValueError where all are damaged.
    """
    first, damaged = newest(run), {}
    if first is None:
        return None, set()
    older = [path for path in reversed(checkpoints(run)) if path.name < first.resolve().name]
    for path in [first, *older]:
        wrong = damage(path)
        if wrong is None:
            if not has_sums(path):
                say(f"{path} has no SHA-256 of its files (an older version wrote it): it is used without a check")
            return path, set(damaged)
        damaged[path.resolve().name] = wrong
        say(f"{path.resolve()} is damaged: {wrong}")
    listed = "; ".join(f"{name}: {wrong}" for name, wrong in damaged.items())
    raise ValueError(
        f"{run} has no whole checkpoint ({listed}): restore one from a copy, or use --train.resume never to start anew"
    )


def prune(run: Path, keep: int) -> None:
    """Remove the oldest checkpoints beyond `keep`, never those that `last` or `best` lead to. Remove also what a kill
    has left half-written or half-removed."""
    linked = {(run / name).resolve() for name in ("last", "best")}
    spare = [path for path in checkpoints(run) if path.resolve() not in linked]
    for path in spare[: max(0, len(checkpoints(run)) - keep)]:
        path.rename(path.with_name(f".{path.name}.removed"))  # so that a kill leaves no half of it under its name
    for path in run.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)  # NFS keeps open files; the next call tries again
