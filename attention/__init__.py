"""Scaled dot-product attention: masks, back-ends, key-value caches."""

from typing import Literal

NAMES = ("reference", "sdpa", "flash", "flex")  # keys of backends.BACKENDS; here for the argument parser, without torch
Choice = Literal[("auto", *NAMES)]  # auto: the fastest back-end that can do the work
CACHES = ("static", "int8", "sinks")  # keys of cache.KINDS, here for the same reason
