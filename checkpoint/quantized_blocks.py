"""Blocks of a model that are quantized already, in a folder that is there until the whole model is.

Each block is a file with all of its tensors and the reports of its layers; a description says what they depend on.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from checkpoint import safetensors_files
from files import read_json, sync, write_json
from quant.grouped import GroupedLinear
from quant.int8 import W8A8Linear
from quant.linear import QuantizedLinear
from quant.replace import replace

KINDS = {cls.kind: cls for cls in (GroupedLinear, W8A8Linear)}  # what methods with calibration text make
DESCRIPTION = "description.json"


def is_left_over(folder: Path) -> bool:
    """Tell whether a folder holds nothing but what a kill before its description leaves there."""
    return all(path.name == f"{DESCRIPTION}.part" for path in folder.iterdir())


class BegunBlocks:
    """The folder of a work that has begun. Work of another description is removed."""

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        """Raises ValueError where something else than such work has the name of the folder."""
        self.folder, self.description = folder, json.loads(json.dumps(description))
        before = read_json(folder / DESCRIPTION)
        if before is None and folder.exists() and not (folder.is_dir() and is_left_over(folder)):
            raise ValueError(
                f"{folder}, where quantized blocks are kept until all are done, is something else: move it, or choose "
                "another --out"
            )
        if before != self.description:
            self.remove()

    def path(self, number: int) -> Path:
        """Return the file of a block."""
        return self.folder / f"block_{number:04d}.safetensors"

    def save(self, number: int, block: nn.Module, reports: dict[str, dict[str, Any]]) -> None:
        """Keep a quantized block and the reports of its layers by name."""
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            write_json(self.folder / DESCRIPTION, self.description)
        layers = {
            name: {"kind": layer.kind, "bits": getattr(layer, "bits", 8)}
            for name, layer in block.named_modules()
            if isinstance(layer, QuantizedLinear)
        }
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in block.state_dict().items()}
        aside = self.folder / ".writing"
        save_file(state, aside, {"layers": json.dumps(layers), "reports": json.dumps(reports)})
        sync(aside)
        aside.replace(self.path(number))

    def load(self, number: int, block: nn.Module) -> dict[str, dict[str, Any]] | None:
        """Make `block` what was kept of it, and return the reports of its layers; None where nothing was."""
        if not self.path(number).is_file():
            return None
        device = next(block.parameters()).device
        try:
            with safetensors_files.opened(self.path(number)) as file:
                about = file.metadata()
                state = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
        except ValueError as error:
            raise ValueError(f"{error}; all blocks are removed, and the same command quantizes them again") from None
        for name, settings in json.loads(about["layers"]).items():
            layer = block.get_submodule(name)
            names = [path[len(name) + 1 :] for path in state if path.startswith(f"{name}.")]
            buffers = {key: state[f"{name}.{key}"] for key in names if key != "bias"}
            quantized = KINDS[settings["kind"]].of_buffers(layer, buffers)
            if settings["kind"] == "grouped":
                quantized.bits = settings["bits"]
            replace(block, name, quantized)
        with torch.no_grad():
            block.load_state_dict(state)
        return json.loads(about["reports"])

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
