"""The rows of the ladder as lines of text, as a Markdown table, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from quantizing.ladder_args import ROUNDING

Row = dict[str, Any]
COLUMNS = (  # heading and width
    *(("method", 13), ("bits", 5), ("calib", 7), ("loss", 17), ("more nats", 18), ("of rounding", 14)),
    *(("bits/byte", 16), ("KL", 8), ("top-1", 7), ("MB", 7), ("bits/w", 7), ("bits/lin", 9), ("RSS MB", 7)),
    *(("prefill/s", 10), ("of fp32", 8), ("decode/s", 9), ("of fp32", 8), ("seconds", 8)),
)
LEGEND = """\
- calib: tokens it was calibrated on. loss: held-out nats a token. more nats: the loss less that of float32 on the same
  rows. ±: half of the 95 % interval over held-out rows. of rounding: more nats as a share of plain rounding's (rtn-),
  from the best to the worst draw; empty where plain rounding loses less than its interval.
- KL: of the float32 predictions to these, nats a token. top-1: tokens after which the likeliest continuation is
  float32's.
- MB: weight files. bits/w: their size over all parameters. bits/lin: of the linear layers alone, scales and zero points
  counted. RSS MB: memory of a process after it has loaded the model and decoded.
- prefill/s, decode/s: tokens a second of one stream; of fp32: as a multiple of float32, which is measured in turns with
  it. seconds: to quantize.
"""


def cells(row: Row, rows: Iterable[Row]) -> list[str]:
    """Return the texts of a row in the order of COLUMNS; rows: those that are there, with plain rounding's."""
    resident = row.get("resident")
    return [
        row["method"],
        str(row["bits"]),
        f"{row['calib_tokens']:,}" if "calib_tokens" in row else "",
        f"{row['loss']:.4f} ±{row['loss_half']:.4f}",
        f"{row['more_nats']:+.4f} ±{row['more_nats_half']:.4f}",
        of_rounding(row, rows),
        f"{row['bits_per_byte']:.4f} ±{row['bits_per_byte_half']:.4f}",
        f"{row['kl']:.5f}",
        f"{row['top1']:.1%}",
        f"{row['bytes'] / 1e6:.2f}",
        f"{row['bits_per_parameter']:.2f}",
        f"{row['bits_per_weight']:.2f}",
        f"{resident / 1e6:.1f}" if resident else "",
        f"{row['prefill']:.0f}",
        f"{row['prefill_of_full']:.2f}",
        f"{row['decode']:.0f}",
        f"{row['decode_of_full']:.2f}",
        f"{row['seconds']:.1f}" if "seconds" in row else "",
    ]


def of_rounding(row: Row, rows: Iterable[Row]) -> str:
    """Return what the draws of a row lose as a share of what plain rounding to as many bits loses; "" where that is not
    in the table, or within the interval of no loss, which makes a share of anything."""
    plain = next((each for each in rows if (each["method"], each["bits"]) == (ROUNDING, row["bits"])), None)
    if plain is None or not plain["more_nats"] > max(0.0, plain["more_nats_half"]):
        return ""
    shares = [more / plain["more_nats"] for more in row["more_nats_of_draws"]]
    low, high = f"{min(shares):.2f}", f"{max(shares):.2f}"
    return low if low == high else f"{low} to {high}"


def header() -> str:
    """Return the line above the rows."""
    return "".join(f"{name:<{width}}" if i == 0 else f"{name:>{width}}" for i, (name, width) in enumerate(COLUMNS))


def line(row: Row, rows: Iterable[Row]) -> str:
    """Return a row as a line of text."""
    texts = zip(cells(row, rows), COLUMNS)
    return "".join(f"{text:<{width}}" if i == 0 else f"{text:>{width}}" for i, (text, (_, width)) in enumerate(texts))


def markdown(description: str, rows: Sequence[Row]) -> str:
    """Return the whole table in Markdown, with what it was measured on and what its columns are."""
    names = [name for name, _ in COLUMNS]
    lines = [names, ["---"] * len(names), *(cells(row, rows) for row in rows)]
    table = "\n".join(f"| {' | '.join(each)} |" for each in lines)
    return f"{description}\n\n{table}\n\n{LEGEND}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw what each row loses against its bits a weight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for number, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = [
            (row["bits_per_weight"], row["more_nats"], row["more_nats_half"])
            for row in rows
            if row["method"] == name and row["bits"] < 32 and row["more_nats"] > 0
        ]
        if points:
            x, y, half = zip(*sorted(points))
            # the lower end of an interval may be below 0, which a logarithmic axis has not
            low = [min(h, 0.9 * value) if math.isfinite(h) else 0 for h, value in zip(half, y)]
            high = [h if math.isfinite(h) else 0 for h in half]
            style = "os^Dv<>pPX*"[number % 11]
            axes.errorbar(x, y, yerr=(low, high), marker=style, capsize=2, linewidth=1, label=name)
    axes.set(xlabel="bits a weight of the linear layers, scales counted", yscale="log")
    axes.set_ylabel("more nats a token than in float32, held out")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
