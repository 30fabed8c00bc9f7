"""A picture of memory by part, one bar for each way to train."""

from __future__ import annotations

from pathlib import Path

from planning.devices import GIB

SUFFIXES = (".png", ".svg", ".pdf")
MOST = 12  # bars


def check_suffix(path: Path) -> None:
    """Raise ValueError for a file of a kind that is not drawn."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--picture {path} should end with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")


def draw(path: Path, ways: dict[str, dict[str, float]], available: float, title: str) -> None:
    """Draw the parts of each way (name -> part -> bytes) as a stacked bar, beside the bytes that are available."""
    from matplotlib.figure import Figure  # takes a third of a second to import

    names = list(ways)[:MOST]
    figure = Figure(figsize=(8, 1.4 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    left = dict.fromkeys(names, 0.0)
    for part in dict.fromkeys(part for name in names for part in ways[name]):
        sizes = {name: ways[name].get(part, 0.0) / GIB for name in names}
        axes.barh(names, list(sizes.values()), left=list(left.values()), label=part)
        left = {name: left[name] + sizes[name] for name in names}
    axes.axvline(available / GIB, color="black", lw=1, ls="--", label="available")
    axes.set(xlabel="GiB on the fullest device", title=title, xlim=(0, max([*left.values(), available / GIB]) * 1.03))
    axes.invert_yaxis()  # the first way on top
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)
