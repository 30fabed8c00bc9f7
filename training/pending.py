"""A checkpoint that is on its way to the disk while steps go on.

When `Pending` is made, what is saved lies in files of the system's cache, or is a copy in memory (`share`), so that
steps may change the weights. A thread writes the copy, computes the SHA-256 of the files and forces them to the disk.
It sends no messages: they would come between the messages of steps. The processes agree between two steps that all of
them are ready, and the main rank then makes the checkpoint appear.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cli.record import file_sha256
from distributed.single import SingleProcess
from files import sync
from training.checksums import names, write_sums
from training.protocols import Share


class Pending:
    """A checkpoint that this process helps to write.

    aside: where its files are. stack: the contexts of writing, which make it appear, or remove it after an error.
    share: what this rank has still to write; None: the main rank has written all.
    """

    def __init__(
        self, thread: ThreadPoolExecutor, aside: Path, stack: ExitStack, share: Share | None, backend: SingleProcess
    ) -> None:
        self.aside, self.stack, self.share, self.backend = aside, stack, share, backend
        self.job = thread.submit(to_disk, aside, share, backend.main)

    def done(self) -> bool:
        """Return whether the thread of this process has done its part, or failed."""
        return self.job.done()

    def finish(self, then: Callable[[], None]) -> None:
        """Wait for the thread, and on the main rank let the checkpoint appear, then call `then`.

        Every rank that has a share calls it, because they exchange. Raises OSError where this rank could not write.
        """
        main = self.backend.main
        with self.stack:
            own = self.job.result()
            found = [own] if self.share is None else self.backend.gather(own)
            if main and self.share is not None:
                self.share.finish([results for results, _ in found])
            if main:
                write_sums(self.aside, {name: value for _, sums in found for name, value in sums.items()})
        if main:
            then()


def to_disk(aside: Path, share: Share | None, main: bool) -> tuple[list[Any], dict[str, str]]:
    """Write the share and force this rank's files to the disk; return what the main rank needs of it, and the SHA-256
    of the files by their names below `aside`."""
    results, files = share.write() if share else ([], [])
    if main:
        others = (aside / name for name in names(aside))
        files = [*files, *(path for path in others if share is None or path.parent != share.folder)]
    sums = {}
    for path in files:
        sums[path.relative_to(aside).as_posix()] = file_sha256(path)
        sync(path)
    return results, sums
