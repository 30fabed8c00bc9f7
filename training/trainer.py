"""The one training loop. It does not know what is trained or where a batch came from.

A step: take this rank's rows of the batch, run them in micro-batches, divide the summed loss by the number of targets
of the whole step over all ranks, clip, update. A batch is a pure function of the step, so the step number is the
position in the data, and a resumed run has exactly the losses of an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from attention import backends
from cli.progress import say
from dataset import BatchSource
from distributed.single import SingleProcess
from hardware import peak_flops
from optim.args import OptimArgs
from optim.optimizers import Optimizers
from training import guards
from training.args import TrainArgs
from training.checksums import read_result, write_result
from training.deadline import Deadline
from training.flops import train_flops_per_token
from training.guards import inputs_of
from training.heldout import batches_on_the_way, evaluate, sums_by_group
from training.log import Clock, RunLog, format_metrics
from training.norms import Norms
from training.precision import about_compiling, check_data, prepare
from training.protocols import Adaptive, Shards, TrainableModel, take_metrics
from training.samples import Sampler
from training.signals import caught_signals
from training.state import Checkpoints, Diverged, TrainState


class Trainer:
    """Train `model` on `data`; write checkpoints and logs under `run`, and go on from the last checkpoint there.

    save(directory) writes the trained weights, load(directory) copies them back into the model. `identity` names what
    determines the order of the losses (data, seed, batch size): a checkpoint of another identity is not resumed.
    `group_names` are the names of the groups of the batches; their losses are logged as loss/NAME. `sampler` writes
    what the model says to fixed prompts at every evaluation. `shards` saves checkpoints in parts.
    """

    def __init__(
        self,
        model: TrainableModel,
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
        sampler: Sampler | None = None,
        shards: Shards | None = None,
    ) -> None:
        check_data(model, args, data, backend)
        self.model, self.optimizer, self.data, self.backend = model, optimizer, data, backend
        self.args, self.optim, self.run, self.adaptive = args, optim, run, adaptive
        self.sampler = sampler if args.sample_tokens else None
        self.eval_data, self.group_names = eval_data, group_names
        if eval_data is None and args.patience:
            raise ValueError(f"--train.patience {args.patience} needs held-out data, and there are none: remove it")
        if eval_data is not None:
            self.eval_batches = batches_on_the_way(args, eval_data, token_bytes is not None, group_names)
            how = {"backend": backend, "micro_batch_size": args.micro_batch_size, "group_names": group_names}
            self.evaluate = partial(evaluate, model, eval_data, token_bytes, **how)
        self.total_steps, self.deadline = args.steps(data.steps_per_epoch), Deadline(args.max_minutes)
        self.signals: list[int] = []  # SIGTERM and SIGINT that this process has received
        self.stopping = False  # whether any rank has received one; the same on all ranks
        how = {"adaptive": adaptive, "data": data, "shards": shards, "sharded": args.save == "sharded"}
        self.checkpoints = Checkpoints(run, args.keep, backend, model, optimizer, save, load, identity, **how)
        self.state = TrainState(metric=args.metric) if args.resume == "never" else self.checkpoints.find(args.metric)

    @property
    def finished(self) -> bool:
        """Whether the last step is done, or `patience` evaluations went by without a new best."""
        return self.at_end or 0 < self.args.patience <= self.state.evals_since_best

    @property
    def at_end(self) -> bool:
        """Whether the last step is done: that of the number of steps, or the one in which the time was up."""
        return self.state.step >= self.total_steps or self.deadline.passed(self.state)

    @property
    def nothing_to_do(self) -> bool:
        """Whether an earlier call has trained to the end and written the result; a damaged one is made again."""
        return self.finished and read_result(self.run) is not None and (self.run / "best").exists()

    def fit(self) -> dict[str, Any]:
        """Train to the last step; return the final metrics. On SIGTERM or SIGINT save and raise SystemExit."""
        backend = self.backend
        if (result := earlier_result(self)) is not None:
            return result
        self.deadline.start(self.state)
        dtype = prepare(self.model, self.args, backend, self.data)
        self.forward = backend.wrap(self.model, self.optimizer)
        self.norms = Norms(self.model, self.optimizer, self.args.log_norms)
        self.checkpoints.resume()
        self.checkpoints.clear(everything=self.args.resume == "never")  # only now: a refused run loses nothing
        self.log, self.clock = start_log(self, dtype)
        catching = caught_signals(self.signals, backend.world)
        with guards.closing(self), catching, backends.use(self.args.attention), explain_out_of_memory():
            while True:
                try:
                    self._train()
                    break
                except Diverged as error:
                    guards.roll_back(self, error)
            return stop(self) if self.stopping else self._finish()

    def _train(self) -> None:
        args, state, epoch, first = self.args, self.state, self.data.steps_per_epoch, self.state.step + 1
        while not self.finished and not self.stopping:
            norm = guards.leave_out(self) if state.step in state.avoid else self._step()
            if self.adaptive is not None and (values := self.adaptive.after_step(state.step)):
                self.log.write(state.step, values)
            if is_due(args.log_interval, state.step, epoch) or (self.at_end and args.log_interval):
                log_averages(self, norm)
            if state.step == first and args.log_interval:  # the next line measures without it, for it compiles
                self.log.say(f"step {first}/{self.total_steps} took {self.clock.restart(state):.0f} s")
                if args.log_interval > 1 and state.step == 1 and state.targets:  # near ln V for a new model
                    self.log.write(1, {"first_step": state.averages(())["loss"]})
            if self.at_end:
                return
            if is_due(args.eval_interval, state.step, epoch) and self.eval_data is not None and not state.skipped:
                with self.clock.paused():
                    self._evaluate_and_save()
                if self.finished:
                    if args.log_interval and state.targets:
                        log_averages(self, norm)
                    self.log.say(f"no better held-out {args.metric} in {args.patience} evaluations: stopping early")
            elif is_due(args.save_interval, state.step, epoch) and not state.skipped:  # a run goes back to good weights
                with self.clock.paused():
                    self._save()
            if self.sampler is not None and self.sampler.is_due(args.sample_minutes):
                with self.clock.paused():
                    self.sampler.show(state.step, self.backend)

    def _save(self, is_best: bool = False) -> None:
        self.state.log = self.log.contents()
        self.checkpoints.save(self.state, is_best)

    def _step(self) -> float:
        """Do one optimizer step; return the gradient norm before clipping."""
        state, backend, n_groups = self.state, self.backend, len(self.group_names)
        batch = self.data.batch(state.step, backend.data_rank, backend.data_world)
        n_targets = int(backend.sum([batch.n_targets])[0])
        guards.set_rate(self)
        micro_batches = [part.to(backend.device) for part in batch.split(self.args.micro_batch_size)]
        inputs = [inputs_of(micro, token_losses=n_groups > 0) for micro in micro_batches]
        measured = self.norms.before(state.step + 1, inputs[0])
        outputs = backend.forward_backward(self.forward, inputs, n_targets)
        norm = backend.step(self.args.grad_clip)
        groups = sum(sums_by_group(each, part, n_groups) for part, (_, each) in zip(micro_batches, outputs))
        metrics = take_metrics(self.model)
        values = {"loss": sum_of_losses(outputs), "groups": groups, "metrics": list(metrics.values())}
        values |= {"stop": len(self.signals), "saved": self.checkpoints.done(), "seconds": self.deadline.elapsed()}
        sums = backend.sum_named(values)
        self.checkpoints.settle(sums["saved"] / backend.data_world)
        self.stopping, state.seconds = sums["stop"] > 0, sums["seconds"] / backend.data_world
        if measured:
            self.log.write(state.step + 1, measured | self.norms.values(norm, self.args.grad_clip))
        guards.after_step(self, sums["loss"] / max(1, n_targets), norm, micro_batches)
        totals = sums["loss"], sums["groups"], dict(zip(metrics, sums["metrics"]))
        state.add(norm, backend.data_world * batch.tokens.numel(), n_targets, *totals)
        return norm

    def _evaluate_and_save(self) -> None:
        """Evaluate on the way, log it and save; the checkpoint is the `best` if none was better."""
        state, n_batches = self.state, self.eval_batches
        metrics = self.evaluate(max_batches=n_batches)
        self.log.write(state.step, {f"eval_{name}": value for name, value in metrics.items()})
        is_best = state.judge(metrics[self.args.metric])
        note = f" (first {n_batches} batches)" * (n_batches > 0) + ", best so far" * is_best
        sample(self)
        self.log.draw()
        self.log.say(f"step {state.step}: held-out {format_metrics(metrics)}{note}")
        self._save(is_best)

    def _finish(self) -> dict[str, Any]:
        """Evaluate the best checkpoint on all held-out data and write `result.json`."""
        state, checkpoints = self.state, self.checkpoints
        result: dict[str, Any] = {"steps": state.step, "tokens": state.tokens, "model": str(self.run / "last")}
        if self.eval_data is None:
            sample(self)
            self._save(is_best=True)
        else:
            if state.evaluated != state.step:  # else stopped early, or killed just before the end
                self._save()  # an error in the evaluation loses nothing
                self._evaluate_and_save()
            if state.evals_since_best and math.isfinite(state.best):  # the last weights are not the best ones
                checkpoints.load_best()
            metrics = self.evaluate(with_error=True)
            checkpoints.wait()  # a run that has diverged keeps what it has saved, too
            if not math.isfinite(metrics["loss"]):
                raise Diverged(f"the held-out loss is {metrics['loss']}: the run diverged; lower the learning rate")
            result |= metrics | {"model": str(self.run / "best")}
        checkpoints.wait()
        if self.backend.main:
            write_result(self.run, result)
        return result


def sample(trainer: Trainer) -> None:
    """Write what the model says to the prompts."""
    if trainer.sampler is not None:
        trainer.sampler.write(trainer.run, trainer.state.step, trainer.backend)


def stop(trainer: Trainer) -> None:
    """Save, and end the process as the signal asks."""
    trainer._save()
    trainer.checkpoints.wait()
    number = signal.Signals((trainer.signals or [signal.SIGTERM])[-1])  # perhaps only another rank received it
    trainer.log.say(f"stopped by {number.name} after step {trainer.state.step}: saved; the same command goes on")
    raise SystemExit(128 + number)


def earlier_result(trainer: Trainer) -> dict[str, Any] | None:
    """Return the metrics of a run that is finished, and say so; None where there is something to do."""
    run, main = trainer.run, trainer.backend.main
    if trainer.nothing_to_do:
        if main:
            say(f"{run} is finished ({trainer.state.step} steps): nothing to do")
        return read_result(run) or {}
    if main and (run / "result.json").is_file() and read_result(run) is None:
        say(f"{run}/result.json is not what the run wrote: it is made again")
    return None


def about(trainer: Trainer) -> dict[str, Any]:
    """Return the size of a run, for its record: steps, tokens, parameters, processes."""
    model, data, heldout, backend = trainer.model, trainer.data, trainer.eval_data, trainer.backend
    return {
        "steps": trainer.total_steps,
        "steps_per_epoch": data.steps_per_epoch,
        "tokens_per_step": data.batch_size * data.seq_len,
        "held_out_positions": heldout and heldout.steps_per_epoch * heldout.batch_size * heldout.seq_len,
        "parameters": model.n_parameters(),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "vocab_size": model.args.vocab_size,
        "context": model.args.max_seq_len,
        "device": backend.device.type,
        "processes": backend.world,
    }


@contextlib.contextmanager
def explain_out_of_memory() -> Iterator[None]:
    """Raise ValueError, with the flags that save memory, where the block runs out of the device's memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{str(error).split('. ')[0]}: lower --train.micro_batch_size (gradients are accumulated), "
            "or use --train.gradient_checkpointing true"
        ) from error


def is_due(interval: float, step: int, steps_per_epoch: int) -> bool:
    """Return whether `step` ends an interval, in steps or, below 1, as a share of an epoch; 0: never."""
    steps = interval if interval >= 1 else max(1, round(interval * steps_per_epoch))
    return interval > 0 and step % steps == 0


def sum_of_losses(outputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return the sum of the losses of the micro-batches, in float32 on their device, which is waited for once."""
    total = torch.zeros((), device=outputs[0][0].device)
    for loss, _ in outputs:
        total += loss
    return total.item()


def log_averages(trainer: Trainer, norm: float) -> None:
    """Log the averages of the steps since the last call, and their rate; reset the sums. norm: of the last gradient."""
    log, state, lr = trainer.log, trainer.state, trainer.optimizer.param_groups[0]["lr"]
    averages = state.averages(trainer.group_names)
    state.reset()
    log.write(state.step, averages | {"lr": lr, "grad_norm": norm, "tokens": state.tokens})
    paused = trainer.clock.away
    rate, left, mfu = trainer.clock.read(state)
    if fewer := trainer.deadline.fewer_steps(state, trainer.total_steps):
        log.say(fewer)
    left = min(left, trainer.deadline.left(state))
    times = {"pause_seconds": paused, "seconds": round(state.seconds, 2)}
    log.write(state.step, {"tokens_per_second": rate, "mfu": mfu} | times)
    note = {"left": tqdm.format_interval(left), "tok/s": f"{rate:.0f}"}
    note |= {name.removeprefix("loss/"): f"{value:.4f}" for name, value in averages.items()}
    log.progress(state.step, note | {"norm": f"{norm:.2f}", "lr": f"{lr:.1e}", "mfu": f"{mfu:.0%}"})


def start_log(trainer: Trainer, dtype: torch.dtype) -> tuple[RunLog, Clock]:
    """Open the log, say how large the run is and what its `mfu` means, and start the clock; dtype: of activations."""
    data, steps, optim, backend = trainer.data, trainer.total_steps, trainer.optim, trainer.backend
    peak, source = peak_flops(backend.device, dtype)
    options = {"evaluated": trainer.state.evaluated, "loggers": trainer.args.loggers}
    last = trainer.state.step if trainer.finished else steps
    log = RunLog(trainer.run, trainer.state.step, last, active=backend.main, **options)
    log.compare(trainer.state.log)
    kind = {"cuda": "GPU"}.get(backend.device.type, backend.device.type.upper())
    log.say(
        f"Training in {str(dtype).removeprefix('torch.')} on {backend.world} {kind} process{'es' * (backend.world > 1)}"
        f":\n{steps:,} steps of {data.batch_size * data.seq_len:,} tokens "
        f"({steps / data.steps_per_epoch:.3g} epochs of {data.steps_per_epoch:,} steps)."
    )
    if compiling := about_compiling(trainer.model, trainer.args, backend.device, data):
        log.say(compiling)
    log.say(f"(mfu below: share of {peak / 1e9:,.0f} GFLOP/s, {source}.)")
    if steps <= optim.warmup_steps:
        epochs = math.ceil(10 * optim.warmup_steps / data.steps_per_epoch)
        longer = "--train.max_steps" if trainer.args.max_steps else f"--train.epochs (to {epochs:,} for ten times that)"
        log.say(
            f"The run has {steps} steps, and {optim.warmup_steps} are for warming up: it will learn little. Raise "
            f"{longer}, or lower --optim.warmup_steps (to {steps // 10} for a tenth of the run), with a new --out or "
            "--train.resume never."
        )
    flops_per_token = train_flops_per_token(trainer.model.args, data.seq_len)
    return log, Clock(trainer.state, steps, flops_per_token, peak * backend.world)
