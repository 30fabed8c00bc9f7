"""The flags of `quantize.py ladder`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from checkpoint.locate import DEFAULT_MODEL
from cli.flags import Needs, check_flags


class Step(NamedTuple):
    """A method of the ladder: settings of quantize.py."""

    settings: dict[str, Any]
    bits: tuple[int, ...] = (8, 4, 3, 2)
    """bits of a weight that it has"""
    format: str | None = None
    """layout of its files; None: one that keeps the model's shapes"""
    text: bool = False
    """whether it draws calibration rows"""


STEPS = {
    "rtn-": Step({"method": "rtn", "search": False}),
    "rtn": Step({"method": "rtn"}),
    "int8": Step({"method": "int8"}, (8,)),
    "smoothquant": Step({"method": "smoothquant"}, (8,), "compressed-tensors", text=True),
    "llm_int8": Step({"method": "llm_int8"}, (8,), "bnb"),
    "nf4": Step({"method": "nf4"}, (4,), "bnb"),
    "fp4": Step({"method": "fp4"}, (4,), "bnb"),
    "awq": Step({"method": "awq"}, text=True),
    "gptq-": Step({"method": "gptq", "search": False, "propagation": 0.0}, text=True),
    "gptq_no_qep": Step({"method": "gptq", "propagation": 0.0}, text=True),
    "gptq": Step({"method": "gptq"}, text=True),
}
ROUNDING = "rtn-"  # the row that "of rounding" compares with
QUICK = {"methods": ("rtn-", "gptq"), "bits": (8, 4), "draws": 1, "calib_tokens": 5_000, "heldout_tokens": 5_000}
NEEDS = tuple(Needs(name, "quick", (False,), "it chooses the rows itself; remove one of the two") for name in QUICK)


@dataclass(frozen=True)
class LadderArgs:
    """Quantize a model by every method and width, and print what each costs and gains: the ladder.

    Every row is kept in --out when it is done: after an interruption the same command goes on behind it. All runs on
    the CPU, where the speeds are measured, too.
    """

    calib: tuple[Path, ...]
    """calibration text: token bins, text files or folders, or conversations"""
    heldout: tuple[Path, ...]
    """text to measure on, likewise; it should not be part of --calib"""
    out: Path
    """directory of the table (ladder.md, ladder.json, ladder.png) and of its rows"""
    model: Path = DEFAULT_MODEL
    """directory of the model, or of a run (then its best checkpoint)"""
    group_size: Annotated[int, (-1, 1048576)] = 128
    """weights of a row that share a scale; -1: the whole row"""
    methods: tuple[Literal[tuple(STEPS)], ...] = tuple(STEPS)  # type: ignore[valid-type]
    """rows of the table. rtn-: plain rounding; rtn: with the search for a range; gptq-: GPTQ as published;
    gptq_no_qep: with the search; gptq: with the search and QEP. Others are the methods of quantize.py"""
    bits: tuple[Literal[2, 3, 4, 8], ...] = (8, 4, 3, 2)
    """bits of a weight"""
    draws: Annotated[int, (1, 100)] = 3
    """draws of calibration rows; a row is the mean over them"""
    calib_tokens: Annotated[int, (1, 2147483647)] = 25_000
    """tokens to calibrate on"""
    heldout_tokens: Annotated[int, (1, 2147483647)] = 25_000
    """tokens to measure on"""
    seq_len: Annotated[int, (0, 2147483647)] = 0
    """tokens in a row of text; 0: the model's context, 512 at most"""
    beside: tuple[Path, ...] = field(default_factory=tuple)
    """directories of other models with the same vocabulary, each a row of the table; one trained in few bits, for
    instance"""
    quick: bool = False
    """a first look: plain rounding and GPTQ in 8 and 4 bits, one draw, 5,000 tokens of each text"""

    def __post_init__(self) -> None:
        """Raise ValueError for flags that do not go together."""
        check_flags(self, NEEDS)
        if not self.calib or not self.heldout:
            missing = "heldout" if self.calib else "calib"
            raise ValueError(f"--{missing} needs at least one file: text to {TEXTS[missing]}")
        if self.group_size == 0:
            raise ValueError("--group_size should be -1 (the whole row) or at least 1, found 0")
        if len({path.name for path in self.beside}) < len(self.beside):
            raise ValueError("--beside has two directories of the same name, by which rows are called: rename one")

    def chosen(self) -> LadderArgs:
        """Return the arguments with what --quick chooses."""
        return dataclasses.replace(self, quick=False, **QUICK) if self.quick else self


TEXTS = {"calib": "calibrate on", "heldout": "measure on"}
