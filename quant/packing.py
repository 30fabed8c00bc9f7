"""Codes of b bits as 32-bit words: the stream of GPTQ and compressed-tensors files, and the order of AWQ's.

A stream is little-endian: value i takes the bits b i to b i + b - 1, counted from the lowest bit of the first word.
Where b does not divide 32 (3 bits), a value may lie across two words; 32 values always fill b words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column 8 c + AWQ_ORDER[i]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes (rows, n) as words (rows, ceil(n * bits / 32)) int32, packed along the last dimension.

    Raises ValueError where a code needs more bits.
    """
    codes = codes.to(torch.int64)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        found = f"{int(codes.min())} to {int(codes.max())}"
        raise ValueError(f"codes of {bits} bits should be from 0 to {2**bits - 1}, found {found}")
    rows, n = codes.shape
    # One bit a column, then 32 of them a word.
    single = (codes[:, :, None] >> torch.arange(bits, device=codes.device)) & 1  # (rows, n, bits)
    single = F.pad(single.reshape(rows, n * bits), (0, -n * bits % 32))  # (rows, 32 words)
    words = single.reshape(rows, -(-n * bits // 32), 32) << torch.arange(32, device=codes.device)
    return to_int32(words.sum(-1))


def unpack(words: torch.Tensor, bits: int, n: int | None = None) -> torch.Tensor:
    """Return the codes (rows, n) uint8 of words (rows, ceil(n * bits / 32)) int32; n None: as many as they hold."""
    rows, held = len(words), words.shape[1] * 32 // bits
    if 8 % bits == 0:  # no code lies across two bytes
        octets = words.contiguous().view(torch.uint8)  # (rows, 4 words)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        return ((octets[:, :, None] >> shifts) & (2**bits - 1)).reshape(rows, held)[:, :n]
    single = (words.to(torch.int64)[:, :, None] >> torch.arange(32, device=words.device)) & 1  # (rows, words, 32)
    single = single.reshape(rows, words.shape[1] * 32)[:, : held * bits]
    values = single.reshape(rows, held, bits) << torch.arange(bits, device=words.device)  # (rows, held, bits)
    return values.sum(-1)[:, :n].to(torch.uint8)


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """Return 4-bit codes (rows, n) as AWQ's words (rows, n / 8) int32: eight neighbours a word, in AWQ_ORDER."""
    if codes.shape[1] % 8:
        raise ValueError(f"AWQ packs eight columns a word, found {codes.shape[1]}: pad them to a multiple of 8")
    octets = codes.reshape(len(codes), -1, 8)  # (rows, n / 8, 8)
    return pack(octets[:, :, list(AWQ_ORDER)].reshape(len(codes), -1), 4)


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Return the 4-bit codes (rows, n) uint8 of AWQ's words (rows, n / 8) int32."""
    octets = unpack(words, 4).reshape(len(words), -1, 8)  # (rows, n / 8, 8)
    back = [AWQ_ORDER.index(i) for i in range(8)]
    return octets[:, :, back].reshape(len(words), -1)


def to_int32(words: torch.Tensor) -> torch.Tensor:
    """Return words 0 .. 2^32 - 1 (int64) with the same bits as int32: the upper half becomes negative."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
