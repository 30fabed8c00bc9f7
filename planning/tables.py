"""Numbers of a plan as text: sizes, times, tables, bars."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from planning.devices import GIB

BAR = 30  # characters


def gib(n_bytes: float) -> str:
    """Return bytes in the unit of GPU memory, such as "23.4 GiB"; small ones in MiB."""
    return f"{n_bytes / GIB:,.1f} GiB" if abs(n_bytes) >= 0.1 * GIB else f"{n_bytes / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """Return a time for a reader, such as "3.2 days"."""
    for unit, size, most in (("s", 1, 120), ("minutes", 60, 120), ("hours", 3600, 72)):
        if seconds < most * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds / 86400:,.1f} days"


def count(n: float) -> str:
    """Return a large number for a reader, such as "6.74 B"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.3g}"


def number(x: float) -> str:
    """Return a number with three digits, or all digits of its whole part."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def some_rows(n: int) -> str:
    """Return a number of rows in words."""
    return f"{n:,} row{'s' * (n != 1)}"


def some(texts: Sequence[str], most: int = 6) -> str:
    """Return the first of some texts in one, and how many others there are."""
    more = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {more} other{'s' * (more > 1)}" if more > 0 else "")


def spent(seconds: float, n_devices: int, watts: float | None, price: float) -> str:
    """Return a time with the device-hours, the energy and the cost that it means.

    watts: of a device, None where they are not known; price: of a device for an hour, 0 for no amount.
    """
    hours = seconds / 3600 * n_devices
    texts = [duration(seconds), f"{number(hours)} device-hours"]
    texts += [f"{number(hours * watts / 1000)} kWh at the boards' full power"] if watts else []
    return ", ".join([*texts, f"{number(hours * price)} at {price:g} an hour"] if price else texts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of texts below a head, the first column to the left and the others to the right."""
    lines = [head, *rows]
    widths = [max(width(line[i]) for line in lines) for i in range(len(head))]

    def aligned(line: Sequence[str]) -> str:
        first, *others = ((" " * (w - width(text)), text) for w, text in zip(widths, line))
        return "  ".join([first[1] + first[0], *(space + text for space, text in others)]).rstrip()

    return "\n".join(map(aligned, lines))


def width(text: str) -> int:
    """Return the columns that a text takes on a terminal; a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text)


def bars(parts: dict[str, float]) -> str:
    """Return sizes in bytes, one a line, each with a bar of its share."""
    total = sum(parts.values())
    rows = [(name, gib(size), f"{size / total:.1%}", "#" * round(BAR * size / total)) for name, size in parts.items()]
    wide = max(map(len, parts))
    lines = [f"  {name:{wide}}  {amount:>11}  {part:>6}  {bar}".rstrip() for name, amount, part, bar in rows]
    return "\n".join([*lines, f"  {'together':{wide}}  {gib(total):>11}"])
