"""What the loop does when numbers go wrong: say which tensor, batch and documents, notice spikes, go back.

A step whose gradient is not finite is left out by the backend, on every rank alike, because the norm is over all ranks.
After the twentieth in a row (state.Diverged), the run goes back to its last checkpoint, with half the learning rate
from there on, and leaves out the batches from twenty steps before the first bad one to the last (as Chowdhery et al.
2022, arXiv:2204.02311, section 5.1, did by hand). All of this is a function of the losses, so that a run that is killed
and goes on does the same. Where nothing goes wrong, no number changes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from dataset import IGNORE, Batch
from files import write_json
from optim.schedule import lr_factor
from training.log import RunLog
from training.protocols import take_metrics
from training.state import MOST_SKIPPED, Diverged

Trainer = Any  # training.trainer.Trainer, which imports this file
RECENT, ENOUGH = 32, 16  # steps that a loss is compared with, and the least number of them
MOST_DUMPS = 5  # files of a kind in a run
FOLDER = "guards"


# ---- after every step


def after_step(trainer: Trainer, loss: float, norm: float, micro_batches: Sequence[Batch]) -> None:
    """Look at the mean loss and the gradient norm of the step that was just done, before its number is counted."""
    state, log, step = trainer.state, trainer.log, trainer.state.step + 1
    if not math.isfinite(norm):
        skipped = f"the step was skipped ({state.skipped + 1} in a row)"
        log.say(f"step {step}: gradient norm {norm}; {skipped}")
        dump(trainer, "not_finite", {"loss": loss, "gradient_norm": norm}, micro_batches)
        return
    if (usual := spike(state.recent, loss)) is not None:
        log.say(f"step {step}: the loss jumps to {loss:.3f}, from {usual:.3f} (median of the last {len(state.recent)})")
        log.write(step, {"spike": loss - usual})
        dump(trainer, "spike", {"loss": loss, "usual_loss": usual, "gradient_norm": norm}, None)
    if math.isfinite(loss):
        state.recent = [*state.recent, loss][-RECENT:]


def spike(recent: Sequence[float], loss: float) -> float | None:
    """Return the median of the recent losses where `loss` is far above it: by half a nat, and by ten times their
    median distance from it; else None."""
    if len(recent) < ENOUGH:
        return None
    usual = median(recent)
    spread = median(abs(each - usual) for each in recent)
    return usual if loss > usual + max(0.5, 10 * spread) else None


# ---- which tensor, which batch, which documents


def dump(trainer: Trainer, kind: str, values: dict[str, Any], micro_batches: Sequence[Batch] | None) -> None:
    """Write what is known of a step to `guards/KIND_step_N.json` in the run; every rank calls it.

    micro_batches: this rank's, to find the tensors that are not finite; None: they are not looked for.
    """
    backend, step = trainer.backend, trainer.state.step
    path = Path(trainer.run) / FOLDER / f"{kind}_step_{step + 1:08d}.json"
    # the main rank decides for all: the others may not see its disk
    old = len(list(path.parent.glob(f"{kind}_*"))) if backend.main else 0
    if backend.gather(old)[0] >= MOST_DUMPS:
        return
    own: dict[str, Any] = {"rank": backend.rank, "rows": origins(trainer.data, step, backend)}
    if micro_batches is not None and backend.replicated:
        own |= culprits(trainer.model, micro_batches)
    ranks = backend.gather(own)
    if backend.main:
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"step": step + 1, **values, "learning_rates": rates, "ranks": ranks})
        trainer.log.say(f"  which rows and tensors: {path}")


def origins(data: Any, step: int, backend: Any) -> list[str]:
    """Return where each row of this rank's batch comes from, in words; [] for a source that does not tell."""
    tell = getattr(data, "origins", None)
    return [] if tell is None else tell(step, backend.data_rank, backend.data_world)


def culprits(model: nn.Module, micro_batches: Sequence[Batch]) -> dict[str, Any]:
    """Return the names of weights, outputs of modules and gradients that are not finite, and the loss of each row.

    The batch goes through the model once more. Random numbers are drawn as if it had not, gradients are removed.
    """
    found: dict[str, Any] = {"weights": named_bad((name, p) for name, p in model.named_parameters())}
    outputs: list[str] = []
    rows: list[float] = []
    devices = [model.device] if getattr(model, "device", torch.device("cpu")).type == "cuda" else []
    with torch.random.fork_rng(devices=devices), watching(model, outputs):
        for micro in micro_batches:
            loss, losses = model.forward(**inputs_of(micro, token_losses=True))
            loss.backward()
            if losses.shape == micro.targets.shape:
                n = (micro.targets != IGNORE).sum(1).clamp(min=1)
                weights = 1.0 if micro.loss_weights is None else micro.loss_weights
                rows += ((losses * weights).sum(1) / n).tolist()
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    found |= {"outputs": outputs[:10], "gradients": named_bad(gradients), "loss_of_rows": rows}
    for p in model.parameters():
        p.grad = None
    take_metrics(model)
    return found


def named_bad(tensors: Iterator[tuple[str, torch.Tensor]]) -> list[str]:
    """Return the names of the first ten tensors that are not finite."""
    bad = (name for name, tensor in tensors if not tensor.isfinite().all())
    return [name for name, _ in zip(bad, range(10))]


@contextlib.contextmanager
def watching(model: nn.Module, into: list[str]) -> Iterator[None]:
    """Within the block, append the name of each module whose output is not finite, in order of their calls."""

    def look(name: str, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if torch.is_tensor(tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
            into.append(name)

    named = [(name, module) for name, module in model.named_modules() if name]
    hooks = [m.register_forward_hook(lambda _, __, out, name=name: look(name, out)) for name, m in named]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def inputs_of(micro: Batch, token_losses: bool) -> dict[str, Any]:
    """Return the keyword arguments of a model's forward pass over a micro-batch."""
    names = ("tokens", "targets", "positions", "doc_ids", "loss_weights")
    return {name: getattr(micro, name) for name in names} | {"token_losses": token_losses}


# ---- going back


def set_rate(trainer: Trainer) -> None:
    """Set the learning rate of the next step: that of the schedule, halved by each time that the run went back."""
    state = trainer.state
    factor = lr_factor(state.step, trainer.total_steps, trainer.optim, trainer.deadline.share(state))
    trainer.optimizer.set_lr(factor * 0.5**state.rollbacks)


def roll_back(trainer: Trainer, error: Diverged) -> None:
    """Go back to the last checkpoint; raises `error` where there is none, or where the run has gone back as often as
    it may. Every rank calls it."""
    old, checkpoints = trainer.state, trainer.checkpoints
    checkpoints.wait()
    if old.rollbacks >= trainer.args.rollbacks:
        raise error
    state = checkpoints.find(trainer.args.metric)
    first = old.step - (MOST_SKIPPED - 1)  # number of the first bad batch
    if checkpoints.nothing_found or state.step > first:
        raise error
    checkpoints.resume()
    state.avoid = sorted({*old.avoid, *range(max(state.step, first - MOST_SKIPPED), old.step + 1)})
    state.rollbacks, state.skipped, state.seconds = old.rollbacks + 1, 0, old.seconds  # the clock does not go back
    trainer.state = state
    trainer.log.close()
    trainer.log = RunLog(trainer.run, state.step, trainer.total_steps, trainer.backend.main, state.evaluated)
    trainer.clock.restart(state)
    checkpoints.save(state)  # only its progress: a run that is killed now does not have to diverge again
    trainer.log.say(
        f"{MOST_SKIPPED} steps in a row had no finite gradient: back to step {state.step}, with half the learning rate "
        f"from here on; the batches of steps {state.avoid[0] + 1} to {state.avoid[-1] + 1} are left out "
        f"({state.rollbacks} of at most {trainer.args.rollbacks} times)"
    )


def leave_out(trainer: Trainer) -> float:
    """Count a step whose batch is not trained on; return its gradient norm, which is none."""
    set_rate(trainer)
    trainer.state.step += 1
    return math.nan


@contextlib.contextmanager
def closing(trainer: Trainer) -> Iterator[None]:
    """Finish a checkpoint and close the log at the end of the block, the present one: the log is replaced where the run
    goes back."""
    try:
        with trainer.checkpoints:
            yield
    finally:
        trainer.log.close()
