"""What one process writes of a sharded checkpoint, with the planner and the files of torch.distributed.checkpoint.

Its `async_save` is not used: it exchanges plans and errors in a thread, where messages of steps may come between them.
Here the processes exchange in `Share` and before `finish`, between two steps, and `write` needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem


class Share:
    """The part of a checkpoint that this process writes: a copy in the memory of the CPU, that no step changes."""

    def __init__(
        self, folder: Path, tensors: Mapping[str, torch.Tensor], rank: int, gather: Callable[[Any], list[Any]]
    ) -> None:
        """Agree with all ranks on who writes what, and copy it. A tensor that several ranks have is written once."""
        self.folder, self.planner = folder, Copied()
        # one thread: an error in another one would be lost (pytorch/pytorch#191391)
        self.files = Files(folder, thread_count=1, overwrite=False)
        self.planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
        self.files.set_up_storage_writer(rank == 0, rank=rank)
        plans = gather(self.files.prepare_local_plan(self.planner.create_local_plan()))
        plans, self.metadata = self.planner.create_global_plan(plans)  # the same on every rank
        self.plan = self.planner.finish_plan(self.files.prepare_global_plan(plans)[rank])
        self.planner.copy(self.plan)

    def write(self) -> tuple[list[Any], list[Path]]:
        """Write the copy and force it to the disk; return what `finish` needs of every rank, and the files."""
        results = self.files.write_data(self.plan, self.planner).wait()
        self.planner.copies.clear()
        return results, sorted({self.folder / each.storage_data.relative_path for each in results})

    def finish(self, results: list[list[Any]]) -> None:
        """Write the metadata, once all ranks have written; results: of their `write`."""
        self.files.finish(self.metadata, results)


class Copied(DefaultSavePlanner):
    """Plans as its base does, and lets the copies be written, not what a step may have changed."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)  # the tensors have names already
        self.copies: dict[Any, torch.Tensor] = {}

    def copy(self, plan: SavePlan) -> None:
        """Copy the tensors of a plan, and forget all others."""
        for item in plan.items:
            part = super().resolve_data(item).detach()
            self.copies[item.index] = torch.empty(part.shape, dtype=part.dtype).copy_(part)
        self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        """Return the copy of a tensor."""
        return self.copies[write_item.index]


class Files(FileSystemWriter):
    """The files of a checkpoint, without the path under which it was written and a random name."""

    def storage_meta(self) -> None:
        """Return nothing to be stored."""
