"""Treat SIGTERM and SIGINT as requests to stop after the current step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from distributed.single import SingleProcess


@contextlib.contextmanager
def caught_signals(backend: SingleProcess, request_stop: Callable[[int], None]) -> Iterator[None]:
    """Within the block, call `request_stop` with the number of each SIGTERM and SIGINT.

    A second signal acts as usual in a run of one process. With several it does not: torchrun passes on to every process
    what a terminal or a scheduler has already sent to it.
    """

    def catch(number: int, frame: Any) -> None:
        request_stop(number)
        if backend.world == 1:
            signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
    for number in before if in_main else ():
        signal.signal(number, catch)
    try:
        yield
    finally:
        for number, handler in before.items() if in_main else ():
            signal.signal(number, handler)
