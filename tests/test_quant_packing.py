"""Packed codes against integers written out bit by bit."""

import pytest
import torch

from quant.packing import AWQ_ORDER, pack, pack_awq, unpack, unpack_awq


def random_codes(rows: int, n: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * n + bits)
    return torch.randint(2**bits, (rows, n), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (5, 64), (2, 43), (1, 1), (0, 32), (2, 0)])
def test_a_row_is_one_little_endian_number(bits, shape):
    codes = random_codes(*shape, bits)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (shape[0], -(-shape[1] * bits // 32))
    for row, packed in zip(codes.tolist(), words.tolist()):
        number = sum(code << (bits * i) for i, code in enumerate(row))
        assert [word % 2**32 for word in packed] == [number >> (32 * i) & (2**32 - 1) for i in range(len(packed))]
    assert torch.equal(unpack(words, bits, shape[1]), codes)


def test_the_highest_bit_makes_a_word_negative():
    words = pack(torch.full((1, 8), 15, dtype=torch.uint8), 4)
    assert words.tolist() == [[-1]] and unpack(words, 4).tolist() == [[15] * 8]


@pytest.mark.parametrize("shape", [(1, 8), (3, 24), (6, 64)])
def test_awqs_order(shape):
    codes = random_codes(*shape, 4)
    words = pack_awq(codes)
    for row, packed in zip(codes.tolist(), words.tolist()):
        for c, word in enumerate(packed):
            assert word % 2**32 == sum(row[8 * c + AWQ_ORDER[i]] << 4 * i for i in range(8))
    assert torch.equal(unpack_awq(words), codes)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="from 0 to 7, found 0 to 8"):
        pack(torch.arange(9, dtype=torch.uint8)[None].expand(1, 9).repeat(1, 32), 3)
    with pytest.raises(ValueError, match="eight columns"):
        pack_awq(torch.zeros(1, 12, dtype=torch.uint8))
