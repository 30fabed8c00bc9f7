"""Every algorithm, the independent one it is checked against, what was tried, and the largest error seen.

python -m tests.oracles            prints the table
python -m tests.oracles --write    and keeps it in docs/oracles.md
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
sys.path[:0] = [str(TESTS), str(TESTS.parent)]  # as pytest has it

from cli.extras import need  # noqa: E402

need("tests.oracles", "dev", "peft", "pytest", "transformers")

import oracle_rows_model  # noqa: E402, F401  (they fill ROWS)
import oracle_rows_use  # noqa: E402, F401
import oracle_rows_weights  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402
from helpers.oracle_row import ROWS, Row  # noqa: E402

DOCUMENT = TESTS.parent / "docs" / "oracles.md"
HEADING = "| algorithm | checked against | tried | largest error | bound |\n|---|---|---|---|---|"
INTRODUCTION = """# What every algorithm is checked against

    python -m tests.oracles --write

The command above measures this table. The tests compare more shapes than these, random ones among them, and also
results that are not numbers. fp64 means that both sides compute in float64: rounding is negligible there, so a larger
error would mean another formula. fp32 means that both sides compute in float32: the error is that of rounding in
another order. A bound of 0 means equal bit for bit. Errors are absolute; for large numbers they are relative.

"""


def measure(row: Row) -> tuple[str, bool]:
    """The error as the table has it, and whether it is within the bound; a row whose package is missing is."""
    torch.manual_seed(0)
    try:
        error = row.measure()
    except (ImportError, pytest.skip.Exception) as missing:
        return f"not measured: {str(missing).splitlines()[0]}", True
    return f"{error:.3g}", error <= row.bound


def line(row: Row, error: str) -> str:
    return f"| {row.algorithm} | {row.oracle} | {row.tried} | {error} | {row.bound:.3g} |"


def main(arguments: list[str]) -> int:
    """Print the table as it is measured; 1 where an error is above its bound."""
    if unknown := [each for each in arguments if each != "--write"]:
        print(
            f"error: {unknown[0]} is not known; there is --write, which keeps the table in {DOCUMENT.name}",
            file=sys.stderr,
        )
        return 1
    torch.set_num_threads(1)
    began, lines, wrong = time.process_time(), [], []
    print(HEADING)
    for row in ROWS:
        error, right = measure(row)
        lines.append(line(row, error))
        wrong += [] if right else [row.algorithm]
        print(lines[-1], flush=True)
    seconds = time.process_time() - began
    print(f"\n{len(ROWS)} rows, {seconds:.0f} s of one core; {', '.join(wrong) or 'none'} above its bound")
    if "--write" in arguments:
        DOCUMENT.write_text(INTRODUCTION + "\n".join([HEADING, *lines]) + "\n", encoding="utf8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
