"""Rotary encoding against complex numbers, transformers, and Meta's pairing of neighbours."""

import cmath
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hardware
import rope
from rope.keys import POSITIVE

transformers = pytest.importorskip("transformers")


def plain(head_dim: int, theta: float = 10000.0) -> tuple[list[float], float]:
    """Frequencies and factor of the unscaled encoding."""
    return rope.make(head_dim, theta, None, 4096).frequencies(4096)


def rotated(x: torch.Tensor, positions: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    """x (T, D) rotated by `positions` (T,) through the module's own functions."""
    cos, sin = rope.cos_sin(positions, *plain(x.shape[-1], theta))
    return rope.rotate(x[None, :, None], cos[None, :, None], sin[None, :, None])[0, :, 0]


@given(st.integers(1, 40), st.sampled_from([100.0, 10000.0, 5e5]))
def test_frequencies_are_powers_of_theta(half, theta):
    frequencies, factor = plain(2 * half, theta)
    assert factor == 1.0
    assert frequencies == pytest.approx([math.exp(-math.log(theta) * i / half) for i in range(half)], rel=1e-13)


def test_angles_at_far_positions():
    positions = torch.tensor([0, 1, 17, 4095, 131071])
    frequencies, factor = plain(64)
    cos, sin = rope.cos_sin(positions, frequencies, factor)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == (5, 32)
    for i, position in enumerate(positions.tolist()):
        for j, frequency in enumerate(frequencies):
            angle = position * frequency
            # float32 rounds the frequency and the product: two half-units in the last place of the angle
            assert abs(complex(cos[i, j], sin[i, j]) - cmath.exp(1j * angle)) < angle * 2**-23 + 2e-7


def test_rotation_is_multiplication_of_complex_numbers():
    x, positions = torch.randn(7, 10), torch.tensor([0, 3, 1, 100, 5, 5, 2])
    y = rotated(x, positions)
    for t, position in enumerate(positions.tolist()):
        for i in range(5):
            z = complex(x[t, i], x[t, i + 5]) * cmath.exp(1j * position * 10000 ** (-2 * i / 10))
            assert abs(complex(y[t, i], y[t, i + 5]) - z) < 1e-5  # angles up to 100 in float32


def test_scores_depend_on_distances_only():
    q, k = torch.randn(2, 1, 16).double()
    at = lambda x, position: rotated(x, torch.tensor([position]))  # noqa: E731
    near = (at(q, 9) * at(k, 2)).sum()
    assert (at(q, 59) * at(k, 52)).sum().item() == pytest.approx(near.item(), abs=1e-5)
    assert (at(q, 10) * at(k, 2)).sum().item() != pytest.approx(near.item(), abs=1e-3)


def test_equals_transformers():
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = transformers.LlamaConfig(hidden_size=48, num_attention_heads=4, head_dim=12)
    q, k = torch.randn(2, 3, 9, 4, 12).unbind()  # (B, T, H, D)
    positions = torch.arange(9)[None] + torch.tensor([[0], [3], [50]])
    theirs = LlamaRotaryEmbedding(config)(q, positions)  # cos, sin (B, T, D)
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *theirs)
    ours = [part[:, :, None] for part in rope.cos_sin(positions, *plain(12))]
    for x, y in zip((q, k), expected):
        # angles up to 59, whose frequencies transformers rounds twice
        torch.testing.assert_close(rope.rotate(x, *ours).transpose(1, 2), y, atol=2e-5, rtol=0)


def test_metas_pairs_are_ours_after_permuting_rows():
    H, D, dim, T = 3, 8, 24, 5
    meta, x = torch.randn(H * D, dim, dtype=torch.float64), torch.randn(T, dim, dtype=torch.float64)
    ours = meta.view(H, D // 2, 2, dim).transpose(1, 2).reshape(H * D, dim)
    pairs = (x @ meta.T).view(T, H, D // 2, 2)
    angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D, 2).double() / D)  # (T, D/2)
    product = torch.view_as_complex(pairs) * torch.polar(torch.ones(()).double(), angles)[:, None]
    expected = torch.cat((product.real, product.imag), dim=-1)  # Meta's pairs, laid out as halves
    for h in range(H):
        y = rotated((x @ ours.T).view(T, H, D)[:, h], torch.arange(T))
        torch.testing.assert_close(y, expected[:, h], atol=1e-5, rtol=0)  # float32 angles


def test_half_precision_is_rotated_in_float32():
    x = torch.randn(50, 16).bfloat16()
    y = rotated(x, torch.arange(50))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotated(x.float(), torch.arange(50)).bfloat16())


def test_fractional_positions_and_attention_factor():
    cos, sin = rope.cos_sin(torch.tensor([[0.5, 1.25]]), [1.0, 0.1], 1.5)
    assert cos.shape == (1, 2, 2)
    expected = [[1.5 * math.cos(p * f) for f in (1.0, 0.1)] for p in (0.5, 1.25)]
    torch.testing.assert_close(cos[0], torch.tensor(expected), atol=1e-6, rtol=0)
    torch.testing.assert_close((cos**2 + sin**2), torch.full((1, 2, 2), 2.25), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"type": "default"}])
def test_plain_encoding_by_any_name(scaling):
    assert rope.rope_type(scaling) == "default"
    assert rope.make(8, 10000.0, scaling, 64).frequencies(9) == plain(8)


def test_a_registered_family_is_found(monkeypatch):
    monkeypatch.setattr(rope.base, "FAMILIES", dict(rope.FAMILIES))
    monkeypatch.setattr(rope, "FAMILIES", rope.base.FAMILIES)

    @rope.register("halved", required={"by": POSITIVE})
    def halved(head_dim, theta, scaling, max_seq_len):
        return rope.fixed([f / scaling["by"] for f in plain(head_dim, theta)[0]])

    assert rope.make(4, 100.0, {"rope_type": "halved", "by": 2.0}, 64).frequencies(1) == ([0.5, 0.05], 1.0)
    with pytest.raises(ValueError, match="'halved': by should be a number, above 0, found -1"):
        rope.make(4, 100.0, {"rope_type": "halved", "by": -1}, 64)


def test_a_new_file_is_all_that_a_new_family_needs(tmp_path):
    shutil.copytree(Path(rope.__file__).parent, tmp_path / "rope")
    shutil.copy(hardware.__file__, tmp_path)
    (tmp_path / "rope" / "thirds.py").write_text(
        "from rope.base import fixed, plain, register\n"
        "@register('thirds')\n"
        "def thirds(head_dim, theta, scaling, max_seq_len):\n"
        "    return fixed([f / 3 for f in plain(head_dim, theta)])\n"
    )
    code = "import rope; print(rope.make(4, 100.0, {'type': 'thirds'}, 8).frequencies(1), sorted(rope.FAMILIES))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    expected = ([1 / 3, 0.1 / 3], 1.0), sorted([*rope.FAMILIES, "thirds"])
    assert done.stdout.strip() == f"{expected[0]} {expected[1]}", done.stderr
