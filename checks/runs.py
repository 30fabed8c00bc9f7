"""The directory of a run: its checkpoints, and what its log says."""

from __future__ import annotations

from pathlib import Path

from checks.check import FAULT, OK, WARNING, Check, attempt, judged
from reporting.findings import findings
from reporting.record import read_run
from training.checksums import damage
from training.state import checkpoints, newest

LEVELS = {"error": FAULT, "warning": WARNING, "note": OK}  # of reporting.findings
OLDER = "let `last` lead to a whole checkpoint (ln -sfn step_N last), or restore the files from a copy"


def run_directory(run: Path) -> list[Check]:
    """Return the checks of the checkpoints of a run, and the findings that its report has."""
    if not run.is_dir():
        return [Check(FAULT, "run", "the directory of a run", f"{run} does not exist", "look at the path")]
    found = attempt("last checkpoint", "a link `last` to a checkpoint", OLDER, lambda: _last(run))
    for path in checkpoints(run):
        wrong = damage(path)
        found.append(judged(path.name, "files with the SHA-256 that was saved", wrong or "whole", OLDER, bool(wrong)))
    advice = f"python report.py {run} shows the curves"
    for each in findings(read_run(run)):
        text = f"{each.title}: {each.text}"
        found.append(Check(LEVELS[each.level], "log", "numbers of a healthy run", text, advice))
    if (folder := run / "guards").is_dir():
        files = sorted(folder.iterdir())
        why = "each file names the rows and tensors (docs/training.md, Guards)"
        found.append(Check(WARNING, "guards", "no step that had to be explained", f"{len(files)} in {folder}", why))
    return found


def _last(run: Path) -> list[Check]:
    last = newest(run)
    if last is None:
        return [Check(WARNING, "last checkpoint", "a checkpoint", f"none in {run}", "start the run, or check --run")]
    return [Check(OK, "last checkpoint", "a checkpoint", last.resolve().name)]
