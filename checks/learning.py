"""The first steps of a run that is about to start: loss, targets, causality, gradients, one batch, memory.

Called by `--check True` of the trainings with the trainer that would run, so that its own model, data, optimizer and
rates are looked at. The model is trained on one batch, and has to be thrown away after.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from checks.check import FAULT, WARNING, Check, attempt, judged, worst
from checks.machine import disk, free_bytes, machine
from cli.memory import size
from dataset import IGNORE, Batch
from model import Transformer
from training.precision import prepare
from training.trainer import Trainer, inputs_of

ROWS, STEPS, SECONDS = 4, 30, 20.0  # of the batch that is learnt by heart
LOW = "raise --optim.lr (and --optim.muon_lr); if that does not help, look at what is trained (--show 3)"
HIGH = "lower --optim.lr and --optim.muon_lr by ten"
TARGETS = "the batch source is wrong: targets have to be the tokens one place later, -100 where nothing is trained"


def training_checks(trainer: Trainer, new: bool) -> list[Check]:
    """Return all checks of a run; new: its model has not been trained before."""
    args, device = trainer.args, trainer.backend.device
    found = machine(device, args.dtype, args.compile)
    batch = attempt("data", "a first batch", TARGETS, lambda: batch_checks(trainer))
    found += batch
    if worst(batch) == FAULT:
        return found
    trainer.args = args = type(args)(**vars(args) | {"compile": "off"})  # a few steps are not worth the minutes
    prepare(trainer.model, args, trainer.backend, trainer.data)
    call = trainer.backend.wrap(trainer.model, trainer.optimizer)
    rows = trainer.data.batch(0, 0, 1).split(ROWS)[0].to(device)
    found += first_loss(trainer, call, rows, new)
    if isinstance(trainer.model, Transformer):
        found.append(causal(trainer.model, rows))
    found += memory(trainer, call)
    found += learns(trainer, call, rows)
    needed = (args.keep + 2) * 3 * 4 * sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return [*found, disk(Path(trainer.run), needed, f"{args.keep + 2} checkpoints")]


# ---- the data


def batch_checks(trainer: Trainer) -> list[Check]:
    """Return whether ids are in range, something is trained, and targets are the next tokens."""
    batch, rows = trainer.data.batch(0, 0, 1), trainer.model.args.vocab_size
    used = torch.cat([batch.tokens.flatten(), batch.targets[batch.targets != IGNORE]])
    low, high = int(used.min()), int(used.max())
    another = "the data were made with another tokenizer: make them again with data_process.py"
    trained = batch.targets != IGNORE
    share = trained.float().mean().item()
    empty = "nothing of the first batch is trained: look at samples with fine_tuning.py --show 3"
    found = f"{share:.1%} of {batch.targets.numel():,} positions".replace("%", " %")
    return [
        judged("ids", f"0 to {rows - 1:,}", f"{low:,} to {high:,}", another, low < 0 or high >= rows),
        judged("trained positions", "more than 1 %", found, empty, share < 0.01, FAULT if not share else WARNING),
        shifted(batch),
    ]


def shifted(batch: Batch) -> Check:
    """Compare each target with the next token of its row, where both belong to one document."""
    here = (batch.targets[:, :-1] != IGNORE) & (batch.targets[:, 1:] != IGNORE)
    if batch.doc_ids is not None:
        here &= batch.doc_ids[:, :-1] == batch.doc_ids[:, 1:]
    n = max(1, int(here.sum()))
    after = int((batch.targets[:, :-1] == batch.tokens[:, 1:])[here].sum()) / n
    same = int((batch.targets[:, :-1] == batch.tokens[:, :-1])[here].sum()) / n
    found = f"{after:.1%} are the next token, {same:.1%} the token itself".replace("%", " %")
    return judged("targets", "the tokens one place later", found, TARGETS, bool(here.any()) and after < 0.98)


# ---- a forward and a backward pass


def mean_loss(call: Callable, rows: Batch) -> torch.Tensor:
    """Return the mean loss of some rows, with its graph."""
    loss, n = call(**inputs_of(rows, token_losses=False))
    return loss / n.clamp(min=1)


def first_loss(trainer: Trainer, call: Callable, rows: Batch, new: bool) -> list[Check]:
    """Return whether the first loss is that of a guess, and whether each parameter gets a finite gradient."""
    loss, chance = mean_loss(call, rows), math.log(trainer.model.args.vocab_size)
    loss.backward()
    value, found = loss.item(), []
    if new:
        text = f"{value:.2f}; ln({trainer.model.args.vocab_size:,}) = {chance:.2f}"
        advice = "initial weights are too large, or the model sees what it should predict"
        bad = not abs(value - chance) <= max(0.5, 0.1 * chance)
        found.append(judged("first loss", "near ln(vocabulary)", text, advice, bad))
    elif trainer.model.args.vocab_size and getattr(trainer.model, "take_metrics", None) is None:
        text = f"{value:.2f}; a guess: {chance:.2f}"
        advice = "the model may be untrained or damaged, or its tokenizer another one: python doctor.py --model DIR"
        found.append(judged("first loss", "well below a guess", text, advice, not value < 0.9 * chance, WARNING))
    named = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    infinite = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
    dead = [name for name, p in named if p.grad is None or not p.grad.any()]
    # LoRA's A gets none while B is zero, and a model of pairs begins with no margin
    dead = [name for name in dead if "lora_" not in name and "rope." not in name]
    for what, those, level, advice in (
        ("finite gradients", infinite, FAULT, "use --train.dtype fp32, and look at the weights: doctor.py --model"),
        ("living gradients", dead, WARNING, "these parameters do not learn: a module may be cut off from the loss"),
    ):
        text = f"{len(named) - len(those)} of {len(named)} tensors" + (f"; not {', '.join(those[:3])}" if those else "")
        found.append(judged(what, "all trained tensors", text, advice, bool(those), level))
    trainer.optimizer.zero_grad()
    return found


@torch.no_grad()
def causal(model: Transformer, rows: Batch) -> Check:
    """Change the second half of a row, and see whether the scores of the first half change."""
    model.eval()
    tokens = rows.tokens[:1]
    half, other = tokens.shape[1] // 2, tokens.clone()
    other[:, half:] = (other[:, half:] + 1) % model.args.vocab_size
    before, after = (model.forward(each)[:, :half] for each in (tokens, other))
    model.train()
    moved = (before - after).abs().max().item() if half else 0.0
    advice = "attention sees later tokens: look at the mask (--train.attention reference as a test)"
    # bf16 kernels may round a row differently; a leak moves scores by tenths
    return judged("causality", "scores that later tokens do not change", f"moved by {moved:.1g}", advice, moved > 0.05)


# ---- one batch


def learns(trainer: Trainer, call: Callable, rows: Batch) -> list[Check]:
    """Train on one batch at the peak rates; its loss has to fall far."""
    trainer.optimizer.set_lr(1.0)
    losses, begin = [], time.perf_counter()
    while len(losses) <= STEPS and (time.perf_counter() - begin < SECONDS or len(losses) < 4):
        loss = mean_loss(call, rows)
        losses.append(loss.item())
        trainer.backend.backward(loss)
        trainer.backend.step(trainer.args.grad_clip)
    first, last, n = losses[0], losses[-1], len(losses) - 1
    found = f"{first:.3f}, after {n} steps {last:.3f}"
    name, expected = "one batch", "a loss that falls by a tenth or more at the peak rates"
    if not math.isfinite(last) or last > first:
        return [Check(FAULT, name, expected, found, HIGH)]
    if max(losses[1:]) > first + max(1.0, 0.2 * first):
        return [Check(WARNING, name, expected, f"{found}, and {max(losses):.2f} in between", HIGH)]
    if last > 0.995 * first:
        return [Check(FAULT, name, expected, found, LOW)]
    return [judged(name, expected, found, LOW, last > 0.9 * first, WARNING)]


# ---- memory


def memory(trainer: Trainer, call: Callable) -> list[Check]:
    """Measure steps of one and two rows, and extend them to a micro-batch of the run."""
    batch = trainer.data.batch(0, 0, 1)
    rows = min(trainer.args.micro_batch_size or len(batch), len(batch))
    device = trainer.backend.device
    used = []
    for n in sorted({1, min(2, rows)}):
        part = batch.split(n)[0].to(device)
        used.append(peak(device, lambda part=part: mean_loss(call, part).backward()))
        trainer.optimizer.zero_grad()
    needed = int(used[0] + (used[-1] - used[0]) * (rows - 1)) if rows > 1 else used[0]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    needed += 8 * trained  # two moments of float32 at most
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
    found = f"{size(needed)} for {rows} rows, measured on {len(used)}; {size(free)} free"
    advice = "lower --train.micro_batch_size, or use --train.gradient_checkpointing True"
    return [judged("micro-batch", "memory for it", found, advice, needed > 0.95 * free)]


def peak(device: torch.device, work: Callable[[], None]) -> int:
    """Return the bytes that `work` takes at most beside what was taken before; 0 where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        clear.write_text("5")  # the peak begins anew (man proc)
        before = resident(status, "VmRSS")
    except OSError:
        work()
        return 0
    work()
    return max(0, resident(status, "VmHWM") - before)


def resident(status: Path, name: str) -> int:
    """Return a size of /proc/self/status in bytes."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
