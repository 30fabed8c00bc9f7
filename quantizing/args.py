"""The flags of quantize.py."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from checkpoint.locate import DEFAULT_MODEL
from cli.flags import Needs, check_flags
from quant.kinds import FORMATS, METHODS, OPTIONS

NO_TEXT = "the others look at the weights alone; remove it"
TEXT = tuple(name for name, method in METHODS.items() if method.text)
NEEDS = (
    *(Needs(name, "method", TEXT, NO_TEXT) for name in ("calib", "calib_tokens", "seq_len", "seed")),
    *(
        Needs(flag, "method", tuple(name for name, each in METHODS.items() if flag in each.flags), "remove it")
        for flag in sorted(OPTIONS)
    ),
    Needs("format", "bits", (4,), "its files keep 4 bits", lambda value: value == "awq"),
)


@dataclass(frozen=True)
class Args:
    """Quantize the weights of a model, and write them in a format that other programs read."""

    out: Path
    """directory to write; it must not exist yet"""
    model: Path = DEFAULT_MODEL
    """directory of the model, or of a run (then its best checkpoint)"""
    method: Literal[tuple(METHODS)] = "gptq"  # type: ignore[valid-type]
    """gptq: Frantar et al. 2022, with error propagation (QEP); awq: Lin et al. 2023; rtn: round to nearest, without
    any text; int8: likewise, a scale a row; smoothquant (Xiao et al. 2022): inputs in 8 bits, too; llm_int8
    (Dettmers et al. 2022): the same but for outliers; nf4, fp4 (Dettmers et al. 2023; needs bitsandbytes): 16 uneven
    levels; qat: packs what pretrain.py --qat_bits has trained, as it is; bitnet: what pretrain.py --bitnet has trained,
    in 2 bits (b158) or 1 (b1)"""
    bits: Literal[2, 3, 4, 8] | None = None
    """bits of a weight. None: 4, or as many as the method has; awq's format has 4 only"""
    group_size: Annotated[int, (-1, 1048576)] = 128
    """weights of a row that share a scale; -1: the whole row"""
    override: tuple[str, ...] = ()
    """other widths for some layers, as REGEX=BITS; the first that is found in the layer's name counts, for instance
    'down_proj=8' 'layers\\.0\\.=8'"""
    symmetric: bool = False
    """put zero in the middle of the codes; False: where the weights of a group ask for it, which loses less"""
    format: Literal[FORMATS] | None = None  # type: ignore[valid-type]
    """layout of the files. gptq: AutoGPTQ's; gptq_v2: the same with true zero points; awq: AutoAWQ's, 4 bits only;
    compressed-tensors: pack-quantized, any shape; bnb: bitsandbytes'. None: gptq, or bnb for llm_int8, nf4 and fp4"""
    calib: tuple[Path, ...] = ()
    """calibration text (gptq, awq, smoothquant): token bins, text files or folders, or conversations in any form"""
    calib_tokens: Annotated[int, (1, 2147483647)] = 25_000
    """tokens to calibrate on"""
    seq_len: Annotated[int, (0, 2147483647)] = 0
    """tokens in a row of calibration; 0: the model's context, 512 at most"""
    propagation: Annotated[float, (0, 1)] = 0.5
    """strength of QEP in gptq, 0 to 1: correct each layer for the error that the layers below it leave"""
    damping: Annotated[float, (0, 1)] = 0.01
    """gptq: this share of their mean is added to the second moments of the inputs, so that they can be inverted"""
    act_order: bool = True
    """gptq rounds the inputs with the largest second moment first"""
    search: bool = True
    """narrow the range of a group where that lowers the error (gptq and rtn)"""
    alpha: Annotated[float | None, (0, 1)] = None
    """smoothquant: share of the difficulty that is moved from inputs into weights, 0 to 1; None: searched"""
    threshold: float = 6.0
    """llm_int8: inputs of this magnitude or more are outliers, multiplied in full precision; 0: no outliers"""
    double_quant: bool = True
    """nf4 and fp4: quantize the scales as well, which then take 0.127 instead of 0.5 bits for each weight"""
    seed: Annotated[int, (0, 2**63 - 1)] = 0
    """seed of the choice of calibration rows"""
    device: str = "auto"
    """auto: cuda, else mps, else cpu"""

    def __post_init__(self) -> None:
        """Raise ValueError for flags that do not go together."""
        method = METHODS[self.method]
        if self.method == "qat" and self.bits:
            raise ValueError(f"--method qat packs the bits that were trained; remove --bits {self.bits}")
        object.__setattr__(self, "bits", self.bits or method.bits[0])
        object.__setattr__(self, "format", self.format or method.formats[0])
        for name in ("bits", "format"):
            if getattr(self, name) not in (can := getattr(method, name.removesuffix("s") + "s")):
                raise ValueError(
                    f"--{name} should be {' or '.join(map(str, can))} with --method {self.method}, "
                    f"found {getattr(self, name)}"
                )
        if method.text and not self.calib:
            raise ValueError(f"--method {self.method} needs calibration text: name a file with --calib (or use rtn)")
        check_flags(self, NEEDS)
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"--threshold should be a number from 0 on, found {self.threshold}")
        if self.group_size == 0:
            raise ValueError("--group_size should be -1 (the whole row) or at least 1, found 0")
        if not 0 < self.damping < 1:
            raise ValueError(f"--damping should be above 0 and below 1, found {self.damping}")
        for text in self.override:
            self.check_override(text)

    def check_override(self, text: str) -> None:
        """Raise ValueError for a pair of --override that is none."""
        pattern, _, bits = text.rpartition("=")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"--override {text}: {pattern} is no regular expression ({error})") from None
        if not pattern or bits not in map(str, METHODS[self.method].bits):
            raise ValueError(f"--override should be REGEX=BITS with bits of {METHODS[self.method].bits}, found {text}")
        if self.format == "awq":
            raise ValueError("--override needs a --format that keeps other widths than 4 bits, and awq does not")

    def bits_of(self, name: str) -> int:
        """Return the width of the codes of a layer."""
        pairs = (text.rpartition("=") for text in self.override)
        return next((int(bits) for pattern, _, bits in pairs if re.search(pattern, name)), self.bits)
