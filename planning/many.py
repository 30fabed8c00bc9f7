"""Several GPUs: the strategies as a table, and what follows from them in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from planning import cluster, devices, launch
from planning.cluster import Cluster, Prediction
from planning.memory import Step
from planning.shapes import Source
from planning.tables import count, duration, gib, some, some_rows, spent, table

MOST_COMMANDS = 3  # that are printed


class Found(NamedTuple):
    """What a plan for several GPUs has found."""

    source: Source
    where: Cluster
    step: Step
    fits: list[Prediction]
    """strategies that fit, the fastest first"""
    others: list[Prediction]
    """strategies that do not fit, the smallest first"""
    tokens: float | None
    """number of tokens to train on; None: not said"""
    price: float
    """price of a GPU for an hour; 0: no costs are printed"""

    def able(self) -> tuple[list[launch.Launch], dict[str, list[str]]]:
        """Return the strategies that fit and run here, and the labels of those that only fit, by the reason."""
        return launch.sorted_out(self.source, self.where, self.step, self.fits)


def find(source: Source, where: Cluster, step: Step, tokens: float | None, price: float) -> Found:
    """Return all strategies, those that fit apart. Raises ValueError where none divides the rows of a step."""
    return Found(source, where, step, *cluster.rank(source.args, step, where), tokens, price)


def table_of_strategies(found: Found) -> str:
    """Return the strategies that fit as a table."""
    head = ("strategy", "rows", "recomputed", "GPU memory", "s a step", "bubble", "sent", "waiting", "MFU", "tokens/s")
    head += ("time",) * bool(found.tokens) + ("amount",) * bool(found.tokens and found.price)
    lines = []
    for each in found.fits:
        line = (each.strategy.label, str(each.rows), "yes" if each.checkpointing else "no", gib(each.total))
        line += (f"{each.seconds:.3g}", f"{each.bubble:.1%}", gib(each.volume), f"{each.waiting:.3g} s")
        line += (f"{each.mfu:.1%}", f"{each.tokens_per_second:,.0f}")
        if found.tokens:
            seconds = found.tokens / each.tokens_per_second
            line += (duration(seconds),)
            line += (f"{seconds / 3600 * found.where.gpus * found.price:,.0f}",) if found.price else ()
        lines.append(line)
    return table(head, lines)


def left_out(found: Found) -> Iterator[str]:
    """Yield which strategies are too large, and which ones cannot divide the rows of a step."""
    if found.others:
        sizes = [f"{each.strategy.label} {each.size}" for each in found.others]
        yield f"too large, with their smallest need: {some(sizes)}"
    for why, labels in cluster.undivided(found.source.args, found.where).items():
        yield f"not counted: {some(labels)}: {why}"


def conclusion(found: Found) -> Iterator[str]:
    """Yield what follows: the fastest strategy and its price, what runs here, or what is missing."""
    source, where, step = found.source, found.where, found.step
    if not found.fits:
        nearest = found.others[0]
        missing = gib(nearest.total - devices.usable(where.device))
        yield (
            f"Nothing fits: the nearest, {nearest.strategy.label} with {some_rows(nearest.rows)}, needs "
            f"{gib(nearest.total)}, {missing} more than there are."
        )
        yield from cluster.what_fits(source.args, step, where)
        return
    best = found.fits[0]
    if found.tokens:
        costs = spent(found.tokens / best.tokens_per_second, where.gpus, where.device.watts, found.price)
        yield f"fastest, {best.strategy.label}: {count(found.tokens)} tokens take {costs}"
    able, refused = found.able()
    for why, labels in refused.items():
        yield f"not run by this repository: {', '.join(labels)}: {why}"
    if not able:
        known, _ = launch.sorted_out(source, where, step, found.others)
        needs = f": the nearest, {known[0].found.strategy.label}, takes {known[0].found.size}" if known else ""
        yield f"Nothing that fits can be run with this repository{needs}."
    each_node = " (in each node)" * (where.gpus > where.per_node)
    for each in able[:MOST_COMMANDS]:
        yield f"{each.found.strategy.label} is run by{each_node}:\n  {each.command()}"
