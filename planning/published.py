"""Published runs beside what the formulas of this folder say of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from planning.devices import GIB, GPUS
from planning.shapes import PUBLISHED
from planning.tables import table
from training.flops import train_flops_per_token

TITAN = "torchtitan, docs/performance.md"
LLAMA2 = "Touvron et al. 2023, arXiv:2307.09288, table 2"


class Row(NamedTuple):
    """One published number."""

    run: str
    what: str
    published: float
    formula: float
    form: str  # how both are printed
    source: str


def rows(efficiency: float) -> Iterator[Row]:
    """Yield the comparisons; efficiency: model flops utilisation that the predictions of time assume."""
    for name, parameters in (("llama2-7b", 6738415616), ("llama2-13b", 13015864320), ("llama2-70b", 68976648192)):
        whole = PUBLISHED[name].n_parameters()
        yield Row(name, "parameters", parameters, whole, ",.0f", "numel() of the published weights")
    utilisations = (
        ("tinyllama", 2048, "a100", 24_000, 0.56, "TinyLlama, README"),
        ("llama3-8b", 8192, "h100", 5762, 0.33, TITAN),
        ("llama3-8b", 8192, "h100", 6667, 0.39, f"{TITAN}, compiled"),
    )
    for name, seq_len, gpu, rate, published, source in utilisations:
        found = rate * train_flops_per_token(PUBLISHED[name], seq_len) / GPUS[gpu].peak
        yield Row(f"{name} on {gpu}", f"MFU at {rate:,} tokens/s", published, found, ".1%", source)
    yield Row(
        "llama3-405b on 16,384 h100", "MFU at 400 TFLOP/s", 0.41, 400e12 / GPUS["h100"].peak, ".1%", "Llama 3, 2024"
    )
    hours = 4.33e19 / (GPUS["h100"].peak * efficiency) / 3600
    what = f"H100 hours at {efficiency:.0%} MFU"
    yield Row("nanochat, run 1 (4.33e19 operations)", what, 8 * 10949 / 3600, hours, ".1f", "nanochat, leaderboard")
    for name, hours in (("llama2-7b", 184_320), ("llama2-13b", 368_640), ("llama2-70b", 1_720_320)):
        flops = train_flops_per_token(PUBLISHED[name], 4096) * 2e12
        found = flops / (GPUS["a100"].peak * efficiency) / 3600
        yield Row(f"{name}, 2 T tokens", f"A100 hours at {efficiency:.0%} MFU", hours, found, ",.0f", LLAMA2)
    # FSDP keeps 1 / GPUs of 16 bytes a parameter: what 120 more GPUs save
    saved = 16 * PUBLISHED["llama3-8b"].n_parameters() * (1 / 8 - 1 / 128) / GIB
    for published in (15.4, 15.0):
        yield Row("llama3-8b, FSDP", "GiB less on 128 GPUs than on 8", published, saved, ".1f", TITAN)


def report(efficiency: float) -> str:
    """Return the comparisons as a table."""
    lines = []
    for row in rows(efficiency):
        both = (format(value, row.form) for value in (row.published, row.formula))
        lines.append((row.run, row.what, *both, f"{row.formula / row.published - 1:+.1%}", row.source))
    return table(("run", "what", "published", "formula", "difference", "source"), lines)
