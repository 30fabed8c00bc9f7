"""The one training loop. It does not know what is trained or where a batch came from.

A step: take this rank's rows of the batch, run them in micro-batches, divide the summed loss by the number of targets
of the whole step over all ranks, clip, update. A batch is a pure function of the step, so the step number is the
position in the data, and a resumed run goes through the very same losses.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from attention import backends
from dataset import BatchSource
from distributed.single import SingleProcess
from files import point, written_aside
from hardware import peak_flops
from model import Transformer
from optim.args import OptimArgs
from optim.optimizers import Optimizers
from optim.schedule import lr_factor
from training.args import TrainArgs
from training.flops import train_flops_per_token
from training.heldout import evaluate, shown, sums_by_group, take_measures
from training.log import RunLog
from training.precision import check_length, prepare
from training.signals import caught_signals
from training.state import load_state, newest, prune, rng_state, save_state, set_rng_state


@dataclass
class Progress:
    """What a run has done, beside its weights; saved with them."""

    step: int = 0
    tokens: int = 0
    best: float = math.inf
    evals_since_best: int = 0
    evaluated: int = -1  # the step of the last evaluation
    loss_sum: float = 0.0  # since the last line of the log
    targets: int = 0  # likewise
    skipped: int = 0  # steps in a row whose gradient was not finite
    group_losses: list[float] = field(default_factory=list)  # of each group, since the last line of the log
    group_targets: list[float] = field(default_factory=list)  # likewise
    measures: dict[str, float] = field(default_factory=dict)  # likewise, of a model that tells more than its loss
    metric: str = "loss"  # which `best` is one of


class Diverged(ValueError):
    """A run whose numbers are no longer finite."""


class Adaptive(Protocol):
    """What changes in the course of a run beside the weights, such as how much each task counts."""

    def after_step(self, step: int) -> dict[str, float]:
        """Called on every rank after each step; returns what is to be logged."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """Trains `model` on `data`; writes checkpoints and logs under `run`, and goes on from the last one found there.

    save(directory) and load(directory) put the trained weights into a checkpoint and take them back. `identity` names
    what determines the order of the losses (data, seed, batch size): a checkpoint of another identity is not resumed.
    `group_names`: what the groups of the batches are called, whose losses are logged one by one as loss/NAME. Where the
    metric is of groups, whose targets the first batches may lack, every evaluation takes all held-out batches.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: Optimizers,
        data: BatchSource,
        backend: SingleProcess,
        args: TrainArgs,
        optim: OptimArgs,
        run: Path,
        *,
        save: Callable[[Path], None],
        load: Callable[[Path], None],
        identity: dict[str, Any],
        eval_data: BatchSource | None = None,
        token_bytes: np.ndarray | None = None,
        group_names: Sequence[str] = (),
        adaptive: Adaptive | None = None,
    ) -> None:
        self.model, self.optimizer, self.data, self.backend = model, optimizer, data, backend
        self.args, self.optim, self.run = args, optim, run
        self.save_weights, self.load_weights, self.identity = save, load, identity
        self.eval_data, self.token_bytes = eval_data, token_bytes
        self.group_names, self.adaptive = list(group_names), adaptive
        of_groups = ["task_mean", *(f"loss/{name}" for name in group_names)] if group_names else []
        measures = ["loss", *["bits_per_byte"] * (token_bytes is not None), *of_groups]
        if eval_data is not None and args.metric not in measures:
            raise ValueError(f"--train.metric should be one of {', '.join(measures)}, found {args.metric!r}")
        self.eval_batches = None if args.metric in of_groups else args.eval_batches or None
        self.total_steps = args.max_steps or max(1, math.ceil(args.epochs * data.steps_per_epoch))
        self.progress = Progress(metric=args.metric)
        self._forget_groups()
        self.saved_step = -1  # the step that `last` leads to
        self.stop_signal = 0  # what this process was asked to stop by
        self.stopping = False  # whether any rank was, which all of them know at the end of a step
        check_length(data.seq_len, model)
        self._resume()
        if len(steps := set(backend.gather(self.progress.step))) > 1:
            raise ValueError(
                f"the processes find checkpoints of different steps ({', '.join(map(str, sorted(steps)))}) in {run}: "
                "let it lie on a file system that all machines share"
            )

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or `patience` evaluations went by without a new best."""
        p = self.progress
        return p.step >= self.total_steps or 0 < self.args.patience <= p.evals_since_best

    def fit(self) -> dict[str, Any]:
        """Run to the last step; returns the final measures. On SIGTERM or SIGINT saves and raises SystemExit."""
        result = self.run / "result.json"
        if self.finished and result.is_file() and (self.run / "best").exists():
            if self.backend.main:
                print(f"{self.run} is finished ({self.progress.step} steps): nothing to do", flush=True)
            return json.loads(result.read_text())
        dtype = prepare(self.model, self.args, self.backend.device)
        self.forward = self.backend.wrap(self.model, self.optimizer)
        if self.backend.main:
            self._clear()  # only now: nothing is lost to a run that is refused
        peak, peak_source = peak_flops(self.backend.device, dtype)
        self.log = RunLog(self.run, self.progress.step, self.total_steps, active=self.backend.main)
        self.log.say(
            f"{str(dtype).removeprefix('torch.')} on {self.backend.device} x {self.backend.world}; "
            f"MFU against {peak / 1e9:.0f} GFLOP/s ({peak_source})"
        )
        if self.total_steps <= self.optim.warmup_steps:
            more = "--train.max_steps" if self.args.max_steps else "--train.epochs, or lower --data.batch_size"
            self.log.say(
                f"{self.total_steps} steps in all, and {self.optim.warmup_steps} are for warming up: it will learn "
                f"little; raise {more}, or lower --optim.warmup_steps"
            )
        clock = Clock(self.progress, self.total_steps, peak * self.backend.world)
        with caught_signals(self.backend, self._ask), backends.use(self.args.attention):
            try:
                while not self.finished and not self.stopping:
                    norm = self._step()
                    if self.adaptive is not None and (values := self.adaptive.after_step(self.progress.step)):
                        self.log.write(self.progress.step, values)
                    at_end = self.progress.step == self.total_steps
                    if self._due(self.args.log_interval) or (at_end and self.args.log_interval):
                        self._log(norm, clock)
                    if at_end:
                        break
                    if self._due(self.args.eval_interval) and self.eval_data is not None:
                        self._evaluate_and_save()
                        if self.finished:
                            if self.args.log_interval and self.progress.targets:
                                self._log(norm, clock)
                            which, n = self.args.metric, self.args.patience
                            self.log.say(f"no better held-out {which} in {n} evaluations: stopping early")
                    elif self._due(self.args.save_interval):
                        self._save()
                return self._finish()
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{str(error).split('. ')[0]}: lower --train.micro_batch_size (gradients are accumulated), "
                    "or say --train.gradient_checkpointing true"
                ) from error
            finally:
                self.log.close()

    def _step(self) -> float:
        """One optimizer step; returns the gradient norm before clipping."""
        p, args, backend = self.progress, self.args, self.backend
        batch = self.data.batch(p.step, backend.rank, backend.world)
        (n_targets,) = backend.sum([batch.n_targets])
        self.optimizer.set_lr(lr_factor(p.step, self.total_steps, self.optim))
        loss_sum = torch.zeros((), device=backend.device)
        by_group = torch.zeros(2, len(self.group_names), dtype=torch.float64)
        parts = batch.split(args.micro_batch_size)
        for part in parts:
            micro = part.to(backend.device)
            with backend.accumulating(last=part is parts[-1]):
                loss, token_losses = self.forward(
                    micro.tokens,
                    micro.targets,
                    positions=micro.positions,
                    doc_ids=micro.doc_ids,
                    loss_weights=micro.loss_weights,
                    **{"token_losses": True} if self.group_names else {},
                )
                backend.backward(loss / max(1, n_targets))
            loss_sum += loss.detach()
            if self.group_names:
                by_group += sums_by_group(token_losses, micro, len(self.group_names))
        norm = backend.step(args.grad_clip)
        measured = take_measures(self.model)
        sums = [loss_sum.item(), bool(self.stop_signal), *by_group.flatten().tolist(), *measured.values()]
        loss_total, n_asked, *sums = backend.sum(sums)
        self.stopping = n_asked > 0
        if math.isfinite(norm):
            p.loss_sum, p.targets, p.skipped = p.loss_sum + loss_total, p.targets + int(n_targets), 0
            p.group_losses = [a + b for a, b in zip(p.group_losses, sums)]
            p.group_targets = [a + b for a, b in zip(p.group_targets, sums[len(self.group_names) :])]
            p.measures = {name: p.measures.get(name, 0.0) + b for name, b in zip(measured, sums[by_group.numel() :])}
        else:
            p.skipped += 1
            self.log.say(f"step {p.step + 1}: gradient norm {norm}; the step was skipped ({p.skipped} in a row)")
            if p.skipped >= 20:
                raise Diverged("20 steps in a row had no finite gradient; lower the learning rate, or use bf16")
        p.step += 1
        p.tokens += backend.world * batch.tokens.numel()
        return norm

    def _ask(self, number: int) -> None:
        self.stop_signal = number

    def _due(self, interval: float) -> bool:
        """Whether the step that was done ends an interval, in steps or, below 1, as a share of an epoch."""
        steps = interval if interval >= 1 else max(1, round(interval * self.data.steps_per_epoch))
        return interval > 0 and self.progress.step % steps == 0

    def _forget_groups(self) -> None:
        n = len(self.group_names)
        self.progress.group_losses, self.progress.group_targets = [0.0] * n, [0.0] * n

    def _log(self, norm: float, clock: Clock) -> None:
        p = self.progress
        loss = p.loss_sum / p.targets if p.targets else math.nan
        parts = zip(self.group_names, p.group_losses, p.group_targets)
        told = {f"loss/{name}": nats / targets for name, nats, targets in parts if targets}
        told |= {name: value / p.targets for name, value in p.measures.items()}
        p.loss_sum, p.targets, p.measures = 0.0, 0, {}
        self._forget_groups()
        lr = self.optimizer.param_groups[0]["lr"]
        self.log.write(p.step, {"loss": loss, **told, "lr": lr, "grad_norm": norm, "tokens": p.tokens})
        rate, left, mfu = clock.read(p, train_flops_per_token(self.model.args, self.data.seq_len))
        self.log.write(p.step, {"tokens_per_second": rate, "mfu": mfu})
        shown = {"loss": f"{loss:.4f}"} | {name.removeprefix("loss/"): f"{value:.4f}" for name, value in told.items()}
        shown |= {"norm": f"{norm:.2f}", "lr": f"{lr:.1e}", "tok/s": f"{rate:.0f}"}
        self.log.progress(p.step, shown | {"mfu": f"{mfu:.0%}", "left": tqdm.format_interval(left)})

    def _evaluate(self, max_batches: int | None) -> dict[str, float]:
        how = (self.token_bytes, max_batches, self.backend, self.args.micro_batch_size, self.group_names)
        return evaluate(self.model, self.eval_data, *how)

    def _evaluate_and_save(self) -> None:
        """Evaluate on the first `eval_batches` batches, log it and save; it is the `best` if none was better."""
        p = self.progress
        measures = self._evaluate(self.eval_batches)
        self.log.write(p.step, {f"eval_{name}": value for name, value in measures.items()})
        value = measures[self.args.metric]
        is_best, p.evaluated = value < p.best, p.step
        p.best, p.evals_since_best = (value, 0) if is_best else (p.best, p.evals_since_best + 1)
        self.log.say(f"step {p.step}: held out: {shown(measures)}{' (best)' if is_best else ''}")
        self._save(is_best)

    def _finish(self) -> dict[str, Any]:
        p = self.progress
        if self.stopping:
            self._save()
            asked = signal.Signals(self.stop_signal or signal.SIGTERM)  # perhaps another rank alone was asked
            self.log.say(f"stopped by {asked.name} after step {p.step}: saved")
            raise SystemExit(128 + asked)
        result: dict[str, Any] = {"steps": p.step, "tokens": p.tokens, "model": str(self.run / "last")}
        if self.eval_data is None:
            self._save(is_best=True)
        else:
            if p.evaluated != p.step:  # else stopped early, or killed just before the end
                self._evaluate_and_save()
            if p.evals_since_best and math.isfinite(p.best):  # the last weights are not the ones that `best` leads to
                self.backend.gather(None)  # until rank 0 has written it
                self.load_weights(self.run / "best")
            measures = self._evaluate(None)
            if not math.isfinite(measures["loss"]):
                raise Diverged(f"the held-out loss is {measures['loss']}: the run diverged; lower the learning rate")
            self.log.say(f"the best on all held-out data: {shown(measures)}")
            result |= measures | {"model": str(self.run / "best")}
        if self.backend.main:
            (self.run / "result.json").write_text(json.dumps(result, indent=2))
        return result

    # ---- checkpoints

    def _save(self, is_best: bool = False) -> None:
        """Write `step_N`, complete or not at all, and let `last` (and `best`) lead to it."""
        backend, p = self.backend, self.progress
        rng = backend.gather(rng_state(backend.device))
        if backend.main:
            directory = self.run / f"step_{p.step:08d}"
            if p.step != self.saved_step:  # else an evaluation saved it, and what `last` leads to is never touched
                with written_aside(directory) as aside:
                    self.save_weights(aside)
                    state = {"progress": vars(p), "optimizer": self.optimizer.state_dict(), "rng": rng}
                    state |= {"scaler": backend.scaler.state_dict(), "identity": self.identity}
                    if self.adaptive is not None:
                        state["adaptive"] = self.adaptive.state_dict()
                    save_state(aside, state)
            if is_best:
                point(self.run / "best", directory)
            point(self.run / "last", directory)
            prune(self.run, self.args.keep)
        self.saved_step = p.step

    def _clear(self) -> None:
        """Remove the result of a shorter run, and all checkpoints of one that is replaced."""
        (self.run / "result.json").unlink(missing_ok=True)
        if self.args.resume == "never":
            for name in ("last", "best"):
                (self.run / name).unlink(missing_ok=True)
            prune(self.run, keep=0)

    def _resume(self) -> None:
        if self.args.resume == "never" or (last := newest(self.run)) is None:
            return
        if self.backend.main and last.name != "last":
            print(f"{self.run} has no link `last`: going on from its newest checkpoint, {last.name}", flush=True)
        state = load_state(last)
        for name, value in self.identity.items():
            if state["identity"].get(name) != value:
                raise ValueError(
                    f"{self.run} holds a run with {name} {state['identity'].get(name)!r}, and this one has {value!r}: "
                    "it cannot be continued; choose another --out, or --train.resume never to replace it"
                )
        self.load_weights(last)
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the loss was not scaled, in another dtype than float16
            self.backend.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) == self.backend.world:
            set_rng_state(state["rng"][self.backend.rank], self.backend.device)
        if self.adaptive is not None:
            self.adaptive.load_state_dict(state["adaptive"])
        self.progress = Progress(**state["progress"])
        if self.backend.main:
            print(f"going on from step {self.progress.step} of {self.run}", flush=True)
        self.saved_step = self.progress.step if last.name == "last" else -1
        if not (self.run / "best").exists() or self.progress.metric != self.args.metric:
            # which checkpoint was the best is lost, or of no use: the next evaluation finds one anew
            self.progress.best, self.progress.evals_since_best, self.progress.evaluated = math.inf, 0, -1
            self.progress.metric = self.args.metric


class Clock:
    """Rate since the last reading, and time left."""

    def __init__(self, progress: Progress, total_steps: int, peak: float) -> None:
        self.total_steps, self.peak = total_steps, peak
        self.step, self.tokens, self.time = progress.step, progress.tokens, time.perf_counter()

    def read(self, progress: Progress, flops_per_token: float) -> tuple[float, float, float]:
        """Tokens a second, seconds left and model flops utilisation, of the steps since the last call."""
        now = time.perf_counter()
        seconds, steps, tokens = now - self.time, progress.step - self.step, progress.tokens - self.tokens
        self.step, self.tokens, self.time = progress.step, progress.tokens, now
        rate = tokens / seconds
        return rate, seconds / steps * (self.total_steps - progress.step), rate * flops_per_token / self.peak
