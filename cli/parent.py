"""End a process together with the one that started it, so that none trains or tokenizes on by itself."""

from __future__ import annotations

import os
import threading
import time

SECONDS = 0.5  # between two looks; a kill of the parent is no signal that its children could receive


def end_with_parent(parent: int) -> None:
    """Start a thread that ends this process, with status 1, soon after the process with the id `parent` has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
