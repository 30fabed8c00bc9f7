"""Treat SIGTERM and SIGINT as requests to stop after the current step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def caught_signals(received: list[int], world: int) -> Iterator[None]:
    """Within the block, append the number of each SIGTERM and SIGINT to `received`.

    A second signal acts as usual in a run of one process. With several it does not: torchrun passes on to every process
    what a terminal or a scheduler has already sent to it.
    """

    def catch(number: int, frame: Any) -> None:
        received.append(number)
        if world == 1:
            signal.signal(number, before[number])

    in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if in_main}
    for number in before:
        signal.signal(number, catch)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
