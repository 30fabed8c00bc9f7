"""Say which command installs an optional package that is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def install_command(extra: str) -> str:
    """Return the command that installs requirements-EXTRA.txt into the .venv here or into another environment."""
    return f"bash setup.sh --extra {extra} (outside .venv: pip install -r requirements-{extra}.txt)"


def need(what: str, extra: str, *packages: str) -> None:
    """Exit with status 1 and one sentence, whose subject is `what`, where one of `packages` is not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        names = " and ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
        verb = "is" if len(missing) == 1 else "are"
        sys.exit(f"error: {what} needs {names}, which {verb} not installed: {install_command(extra)}")
