"""SIGTERM and SIGINT as requests to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from distributed.single import SingleProcess


@contextlib.contextmanager
def caught_signals(backend: SingleProcess, ask: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `ask` with their number; a second one acts as usual, except with several processes, since
    torchrun passes on what a terminal or a scheduler has sent to every process already."""

    def caught(number: int, frame: Any) -> None:
        ask(number)
        if backend.world == 1:
            signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    in_main = threading.current_thread() is threading.main_thread()  # Python allows handlers nowhere else
    for number in before if in_main else ():
        signal.signal(number, caught)
    try:
        yield
    finally:
        for number, handler in before.items() if in_main else ():
            signal.signal(number, handler)
