"""Processes that a test starts, and what they start themselves."""

import subprocess

import psutil


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL a process and its descendants: torchrun gives its workers sessions of their own."""
    first = psutil.Process(process.pid)
    for each in [first, *first.children(recursive=True)]:
        each.kill()


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    """Exit status and stderr, after at most two minutes, or `seconds`; nothing is left running."""
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill_all(process)
        raise
    return process.returncode, err
