"""Scaled dot-product attention: masks, back-ends, key-value caches."""

from typing import Literal

NAMES = ("reference", "sdpa", "flash", "flex")  # the back-ends of backends.py; here for the argument parser
Choice = Literal[("auto", *NAMES)]  # auto: the fastest that can do it
