"""Weights as GGUF stores them: which type a matrix gets, and Q4_K, which the `gguf` library reads and does not write.

Q4_K: 256 weights of a row are 8 runs of 32; a weight is scale * code - minimum with a code of 4 bits. The scales and
minima of the runs are codes of 6 bits themselves, with a float16 scale for each kind: 144 bytes, 4.5 bits a weight.
The solver is the one of llama.cpp (ggml-quants.c: quantize_row_q4_K_ref, make_qkx2_quants; MIT).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

BLOCKS = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q4_0": 32, "Q4_K": 256}  # weights that are stored together
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "Q8_0": 34, "Q4_0": 18, "Q4_K": 144}  # of a block
ROWS = 4096  # blocks of 256 that are solved at once, which takes about 50 MB


def type_of(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """Return the type in which a tensor is stored; name: GGUF's.

    A row that blocks of the type of its role do not divide has the next larger type that does.
    """
    kind = type_of_role(name, shape, wanted)
    if shape[-1] % BLOCKS[kind]:
        return "Q8_0" if shape[-1] % BLOCKS["Q8_0"] == 0 else "F16"
    return kind


def type_of_role(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """Return the type that a tensor has where blocks divide its rows.

    Vectors are float32: llama.cpp reads no others. With 4 bits, embedding and head have 8, as errors there are not
    averaged by later layers.
    """
    if len(shape) == 1:
        return "F32"
    return "Q8_0" if wanted in ("Q4_0", "Q4_K") and name in ("token_embd.weight", "output.weight") else wanted


def larger_types(shapes: Mapping[str, tuple[int, ...]], wanted: str) -> list[str]:
    """Return a sentence for each type that matrices have in place of that of their role, as blocks do not divide their
    rows; shapes: by GGUF's names."""
    widths: dict[tuple[str, str], list[int]] = {}  # (type of the role, type in the file) -> widths of such matrices
    for name, shape in shapes.items():
        role, kind = type_of_role(name, shape, wanted), type_of(name, shape, wanted)
        if kind != role:
            widths.setdefault((role, kind), []).append(shape[-1])
    matrices = sum(len(shape) > 1 for shape in shapes.values())
    return [
        f"{len(found)} of {matrices} matrices are written as {kind} instead of {role}: blocks of {BLOCKS[role]} "
        f"weights do not divide their rows of {' and '.join(map(str, sorted(set(found))))}; the file is larger"
        for (role, kind), found in widths.items()
    ]


def n_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Return the bytes of a tensor."""
    return int(np.prod(shape)) // BLOCKS[kind] * BYTES[kind]


def encode(weight: np.ndarray, kind: str) -> np.ndarray:
    """Return a float32 tensor as the array that GGUFWriter writes: of numbers, or of bytes."""
    import gguf

    if kind == "Q4_K":
        return q4_k(weight)
    return gguf.quants.quantize(np.ascontiguousarray(weight, np.float32), gguf.GGMLQuantizationType[kind])


def q4_k(weight: np.ndarray) -> np.ndarray:
    """Return the rows (out, in / 256 * 144) uint8 of a matrix (out, in)."""
    blocks = np.ascontiguousarray(weight, np.float32).reshape(-1, 256)  # (out * in / 256, 256)
    packed = [q4_k_blocks(blocks[at : at + ROWS]) for at in range(0, len(blocks), ROWS)]
    return np.concatenate(packed).reshape(*weight.shape[:-1], -1)


def q4_k_blocks(blocks: np.ndarray) -> np.ndarray:
    """Return (n, 144) uint8 for n blocks (n, 256) float32."""
    x = blocks.reshape(-1, 8, 32)  # (n, runs, weights of a run)
    # A weight counts by its size and by the root mean square of its run.
    importance = np.sqrt((x * x).sum(-1, keepdims=True) / 32) + np.abs(x)  # (n, 8, 32)
    scales, minima, codes = fit_runs(x.reshape(-1, 32), importance.reshape(-1, 32))  # (8 n,), (8 n,), (8 n, 32)
    scales, minima = scales.reshape(-1, 8), minima.reshape(-1, 8)
    d, scale_codes = six_bits(scales)  # (n, 1) float16, (n, 8) uint8
    dmin, minimum_codes = six_bits(minima)
    step = d.astype(np.float32) * scale_codes  # (n, 8): the scale of each run as it is read back
    low = dmin.astype(np.float32) * minimum_codes
    # Scales and minima were rounded to 6 bits since the fit: codes are found anew for what a reader will compute.
    with np.errstate(divide="ignore", invalid="ignore"):
        again = np.rint((x + low[..., None]) / step[..., None])  # (n, 8, 32)
    codes = np.where(step[..., None] == 0, codes.reshape(-1, 8, 32), np.clip(np.nan_to_num(again), 0, 15))
    pairs = codes.astype(np.uint8).reshape(-1, 4, 2, 32)  # a byte holds a code of a run, and one of the next run
    nibbles = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)  # (n, 4, 32) -> (n, 128)
    # a block: 2 bytes of d, 2 of dmin, 12 of six-bit codes, 128 of weights
    return np.concatenate([d.view(np.uint8), dmin.view(np.uint8), pack_six(scale_codes, minimum_codes), nibbles], 1)


def fit_runs(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scale (m,), minimum (m,) and codes (m, 32) from 0 to 15 with scale * code - minimum close to x (m, 32).

    w: weight of each squared error. Codes are tried for 21 steps around (max - min) / 15; for each, scale and minimum
    are the solution of the weighted least squares.
    """
    low, high = np.minimum(x.min(-1), 0), x.max(-1)  # (m,)
    flat = high == low
    span = np.where(flat, 1, high - low).astype(np.float32)
    sum_w, sum_x = w.sum(-1), (w * x).sum(-1)  # (m,) each, as are all sums below

    def codes_for(count: float) -> np.ndarray:
        # `low` is that of the best fit so far, as in the original
        iscale = np.float32(count) / np.where(flat, 1, high - low).astype(np.float32)
        return np.clip(np.rint(iscale[:, None] * (x - low[:, None])), 0, 15).astype(np.float32)

    scale = span / np.float32(15)
    codes = codes_for(15.0)
    best = (w * (scale[:, None] * codes + low[:, None] - x) ** 2).sum(-1)  # (m,) weighted squared error
    for i in range(21):
        tried = codes_for(-1.0 + 0.1 * i + 15)  # (m, 32); the range is cut into 14.0, 14.1, ..., 16.0 steps
        # Normal equations of the line x = scale * tried + low, two unknowns a run, by Cramer's rule.
        sum_l, sum_l2, sum_xl = (w * tried).sum(-1), (w * tried * tried).sum(-1), (w * tried * x).sum(-1)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        with np.errstate(divide="ignore", invalid="ignore"):
            new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
            new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            # a minimum above 0 cannot be stored: the best line through 0
            new_scale = np.where(new_low > 0, sum_xl / sum_l2, new_scale)
        new_low = np.minimum(new_low, 0)
        error = (w * (new_scale[:, None] * tried + new_low[:, None] - x) ** 2).sum(-1)
        better = (determinant > 0) & (error < best) & ~flat
        codes = np.where(better[:, None], tried, codes)
        best, scale, low = (
            np.where(better, error, best),
            np.where(better, new_scale, scale),
            np.where(better, new_low, low),
        )
    return np.where(flat, 0, scale), -low, np.where(flat[:, None], 0, codes)


def six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the float16 scale (n, 1) and the codes (n, 8) from 0 to 63 of values (n, 8) from 0 on."""
    most = values.max(-1, keepdims=True)
    inverse = np.where(most > 0, 63 / np.where(most > 0, most, 1), 0).astype(np.float32)
    codes = np.clip(np.rint(inverse * values), 0, 63).astype(np.uint8)
    return (most / 63).astype(np.float16), codes


def pack_six(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Return 16 codes of 6 bits, (n, 8) and (n, 8), in (n, 12) bytes.

    Bytes 0-3 and 4-7 hold the first four scales and minima, and in their two high bits those of the last four; bytes
    8-11 hold the four low bits of the last four of both.
    """
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    third = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return np.concatenate([first, second, third], 1).astype(np.uint8)
