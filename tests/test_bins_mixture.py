"""Rows of sources in shares: at every row, over phases, against counts made row by row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bins.mixture import Mixture, read_phases

CYCLE = Mixture.CYCLE


@settings(max_examples=12, deadline=None)
@given(
    shares=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any),
    batch_size=st.integers(1, 70),
    more=st.lists(st.integers(1, 60), min_size=9, max_size=9),
    change=st.integers(1, 200),
)
def test_shares_hold_at_every_row_and_change_at_the_step(shares, batch_size, more, change):
    more = more[: len(shares)]
    mixture = Mixture([(0, shares), (change, more)], batch_size)
    steps = change + 200
    rows = np.concatenate([mixture.sources(step) for step in range(steps)])
    for kind, own in ((shares, rows[: change * batch_size]), (more, rows[change * batch_size :])):
        wanted = np.array(kind) / sum(kind)
        seen = np.cumsum(own[:, None] == np.arange(len(kind)), axis=0)
        ideal = np.arange(1, len(own) + 1)[:, None] * wanted
        # a share is rounded to 1 / CYCLE, which may add up over the rows
        assert (np.abs(seen - ideal) < 1 + np.arange(1, len(own) + 1)[:, None] / CYCLE).all()
    for step in {0, 1, change - 1, change, change + 1, steps}:
        expected = np.bincount(rows[: step * batch_size], minlength=len(shares))
        assert mixture.counts(step).tolist() == expected.tolist()


def test_round_shares_are_exact_and_no_source_waits_for_the_end():
    shares = [0.9, *[0.01] * 10]
    rows = Mixture([(0, shares)], CYCLE).sources(0)
    seen = np.cumsum(rows[:, None] == np.arange(11), axis=0)
    assert seen[-1].tolist() == [9000, *[100] * 10]
    assert np.abs(seen - np.arange(1, CYCLE + 1)[:, None] * np.array(shares)).max() < 1


def test_the_flag_is_read():
    mix = {"zh": "0.6,0.2@0.8", "en": 0.4, "code": "0,0.3@5,0.4@900"}
    assert read_phases(mix, 1000) == [
        (0, [0.6, 0.4, 0.0]),
        (5, [0.6, 0.4, 0.3]),
        (800, [0.2, 0.4, 0.3]),
        (900, [0.2, 0.4, 0.4]),
    ]


@pytest.mark.parametrize(
    ("mix", "sentence"),
    [
        ({"zh": "much"}, r"--data.mix zh much: expected a share"),
        ({"zh": "0.5@0.1"}, r"expected a share, and later ones"),
        ({"zh": "0.5,0.3"}, r"expected a share, and later ones"),
        ({"zh": "0.5,0.3@inf"}, r"expected a share, and later ones"),
        ({"zh": "-1"}, r"should not be negative"),
        ({"zh": "nan"}, r"should not be negative"),
        ({"zh": "1,1@-3"}, r"should not be negative"),
        ({"zh": "1,0@5", "en": "0"}, r"all shares are 0 from step 5 on"),
    ],
)
def test_what_is_no_mixture_is_one_sentence(mix, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_phases(mix, 10)
