"""One process: in which ways a model can be trained or decoded on a device, and what each takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from model_args import ModelArgs
from planning import memory
from planning.devices import GPUS, Device, usable
from planning.memory import Adapter, Step
from planning.shapes import Source
from planning.tables import gib, some_rows, table

ROWS = 4096  # the most rows of a micro-batch that are looked for


@dataclass(frozen=True)
class Way:
    """A way to train."""

    name: str
    step: Step
    flags: str
    """flags of the script that differ from its defaults"""
    n_bytes: int
    """of the process, by `memory.training`"""
    most_rows: int
    """rows of a micro-batch that fit; 0: none"""


def ways(args: ModelArgs, step: Step, rank: int, available: float) -> Iterator[Way]:
    """Yield the ways to train, the one that takes most first; rank: of LoRA; available: bytes."""
    kinds: list[tuple[str, Adapter | None, str]] = [
        ("all weights", None, ""),
        ("LoRA", Adapter(rank), f"--lora.method lora --lora.r {rank}"),
        ("QLoRA (int8)", Adapter(rank, "int8"), f"--lora.method lora --lora.base int8 --lora.r {rank}"),
        ("QLoRA (nf4)", Adapter(rank, "nf4"), f"--lora.method lora --lora.base nf4 --lora.r {rank}"),
    ]
    for name, adapter, flags in kinds:
        for again in (False, True):
            # a row always needs its activations: the given number of rows decides what is shown
            own = replace(step, adapter=adapter, checkpointing=again)
            n_bytes = sum(memory.training(args, own).values())
            most = memory.largest_rows(args, own, available, ROWS)
            more = " --train.gradient_checkpointing True" * again
            yield Way(name + ", recomputed" * again, own, (flags + more).strip(), n_bytes, most)


def table_of_ways(found: list[Way], available: float) -> str:
    """Return the ways as a table."""
    head = (f"training, rows of {found[0].step.seq_len:,} tokens", some_rows(found[0].step.rows), "fits", "most rows")
    rows = []
    for way in found:
        most = f"{way.most_rows:,}" + "+" * (way.most_rows == ROWS)
        rows.append((way.name, gib(way.n_bytes), "yes" if way.n_bytes <= available else "no", most))
    return table(head, rows)


def decoding(args: ModelArgs, device: Device, available: float, text_len: int) -> list[dict[str, Any]]:
    """Return for each way to store the weights what decoding takes: bytes, texts that fit, the most tokens a second.

    text_len: tokens of a text. Rates are None where the device's are not known.
    """
    found = []
    for kind in ("fp32", "bf16", "int8", "gptq4", "nf4"):
        cache_kind = "fp32" if kind == "fp32" else "bf16"
        weights = memory.stored(args, kind)
        cache = memory.cache_per_token(args, cache_kind) * text_len
        cache_8 = memory.cache_per_token(args, "int8") * text_len
        row: dict[str, Any] = {"weights": kind, "weight_bytes": weights, "cache_bytes": cache, "cache_int8": cache_8}
        texts = row["texts"] = max(0, int((available - weights) // cache))
        row["one"] = row["all"] = None
        if device.bandwidth and device.peak and texts:
            rate = {"bandwidth": device.bandwidth, "peak": device.peak}
            row["one"] = memory.decoding_rate(args, weights, cache, rows=1, **rate)
            row["all"] = memory.decoding_rate(args, weights, cache, rows=texts, **rate)
        found.append(row)
    return found


def table_of_decoding(found: list[dict[str, Any]], text_len: int) -> str:
    """Return what `decoding` returned as a table."""
    head = ("decoding, weights in", "weights", f"cache of {text_len:,}", "in 8 bits", "texts that fit")
    rates = found[-1]["one"] is not None
    rows = []
    for row in found:
        line = [row["weights"], *(gib(row[name]) for name in ("weight_bytes", "cache_bytes", "cache_int8"))]
        line.append(f"{row['texts']:,}")
        if rates:
            line += [f"{row[name]:,.0f}" if row[name] else "-" for name in ("one", "all")]
        rows.append(line)
    return table((*head, "tokens/s, one", "tokens/s, all") if rates else head, rows)


def verdict(
    found: list[Way], decodable: list[dict[str, Any]], available: float, source: Source, batch_size: int
) -> str:
    """Return in sentences whether the model can be trained and decoded, and by which command.

    batch_size: rows of an optimizer step
    """
    fits = [way for way in found if way.most_rows]
    if not fits:
        least = min(found, key=lambda way: way.n_bytes)
        texts = [
            f"It cannot be trained: {least.name} takes {gib(least.n_bytes)}, {gib(least.n_bytes - available)} too much."
        ]
        texts.append(nearest(least.n_bytes, "trained"))
    else:
        best, whole = fits[0], fits[0].step.adapter is None
        what = "All weights can be trained" if whole else "Adapters can be trained"
        least = min(found[0].n_bytes, found[1].n_bytes)
        missing = f" All weights cannot: they take {gib(least)}, {gib(least - available)} too much." * (not whole)
        by = "" if whole else f" by {best.name.removesuffix(', recomputed')}"
        again = ", with blocks recomputed" * best.step.checkpointing
        texts = [f"{what}{by}{again}, up to {some_rows(best.most_rows)} at once.{missing}"]
        texts.append(f"  {command(best, source, batch_size)}")
    if kinds := [row["weights"] for row in decodable if row["texts"]]:
        texts.append(f"It can answer with weights in {', '.join(kinds)}.")
    else:
        least = min(row["weight_bytes"] + row["cache_bytes"] for row in decodable)
        texts.append(f"It cannot answer even with the fewest bits: {gib(least - available)} too much.")
        texts += [said] if (said := nearest(least, "asked")) not in texts else []
    return "\n".join(texts)


def nearest(n_bytes: float, what: str) -> str:
    """Return in a sentence which GPU of the table is the smallest that holds so many bytes."""
    large = [device for device in GPUS.values() if usable(device) >= n_bytes]
    if not large:
        return "No GPU of the table is large enough: plan for several with --gpus, or take a shorter --seq_len."
    least = min(large, key=lambda device: device.memory)
    return f"The smallest GPU of the table on which it can be {what} is --gpu {least.name}, with {gib(least.memory)}."


def command(way: Way, source: Source, batch_size: int) -> str:
    """Return the command of a training: the rows that are asked for, else the most that fit and divide those of a
    step."""
    script = f"pretrain.py {source.command}"
    if way.step.adapter is not None:
        loaded = source.command if source.command.startswith("--init_from") else "--init_from DIR"
        script = f"fine_tuning.py {loaded} --data FILE"
    rows = min(way.most_rows, way.step.rows)
    if way.step.rows == 1:
        rows = max(n for n in range(1, min(way.most_rows, batch_size) + 1) if batch_size % n == 0)
    data = ""
    if source.recipe is None or (source.seq_len, source.batch_size) != (way.step.seq_len, batch_size):
        data = f"--data.seq_len {way.step.seq_len} --data.batch_size {batch_size}"
    flags = [script, way.flags, source.flags, data, f"--train.micro_batch_size {rows}"]
    return " ".join(["python", *filter(None, flags)])
