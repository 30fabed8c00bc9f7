"""Bar on a terminal, plain lines elsewhere. The clock is the tests' own."""

import pytest

from cli import progress
from cli.progress import Bar, Progress, say, track


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, in a list of one, for tests to move."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_plain_line_every_ten_seconds_with_rate_and_time_left(clock, capsys):
    with Progress("reading", "documents", total=1000) as bar:
        for _ in range(25):
            clock[0] += 1.0
            bar.add(10)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 110 of 1,000 documents, 10.0/s, 01:29 left",
        "reading: 220 of 1,000 documents, 10.0/s, 01:18 left",
    ]


def test_what_an_earlier_run_did_counts_as_done_and_not_for_the_rate(clock, capsys):
    bar = Progress("reading", "B", total=4_000_000, done=3_000_000)
    clock[0] += 20
    bar.add(500_000)
    assert capsys.readouterr().err == "reading: 3.50MB of 4.00MB, 25.0kB/s, 00:20 left\n"


@pytest.mark.parametrize("total", [None, 3])  # 3: a rough total that turns out to be too small
def test_without_a_total_there_is_no_time_left(total, clock, capsys):
    bar = Progress("reading", "documents", total)
    clock[0] += 20
    bar.add(40)
    assert capsys.readouterr().err == "reading: 40 documents, 2.0/s\n"


def test_nothing_done_yet_says_so_without_dividing_by_it(clock, capsys):
    bar = Progress("reading", "B", total=10)
    clock[0] += 20
    bar.add(0)
    assert capsys.readouterr().err == "reading: 0.00B of 10.0B\n"


def test_no_time_is_left_before_there_is_something_to_estimate_it_from(clock, capsys, monkeypatch):
    bar = Progress("reading", "B", total=41_000_000)
    clock[0] += 12
    bar.add(235)  # the first document, after a download
    for _ in range(3):
        clock[0] += 11
        bar.add(1_100_000)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 235B of 41.0MB",
        "reading: 1.10MB of 41.0MB, 50.0kB/s, 13:17 left",
        "reading: 2.20MB of 41.0MB, 75.0kB/s, 08:37 left",
        "reading: 3.30MB of 41.0MB, 87.5kB/s, 07:10 left",
    ]
    # on a terminal, too
    early = Bar.format_meter(235, 41e6, 12.0, unit="B", unit_scale=True, initial=0)
    later = Bar.format_meter(1e6, 41e6, 12.0, unit="B", unit_scale=True, initial=0)
    assert "<" not in early and "235/41.0M [00:12]" in early and "00:12<08:00" in later


def test_an_inactive_one_shows_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("evaluating", "batches", total=10, active=False) as bar:
        clock[0] += 20
        bar.add(5)
        bar.show(6, "loss 1")
    assert "".join(capsys.readouterr()) == ""


def test_a_note_of_the_callers_is_shown_at_once(clock, capsys):
    bar = Progress("training", "step", total=10)
    bar.show(4, "loss 1.5 left 2m")
    assert capsys.readouterr().err == "step 4/10 loss 1.5 left 2m\n"
    assert bar.done == 4


def test_a_bar_on_a_terminal_and_lines_above_it(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("training", "step", total=10) as bar:
        bar.show(4, "loss 1.5")
        say("hello")
    err = capsys.readouterr().err
    assert "training" in err
    assert "4/10" in err
    assert "loss 1.5" in err
    assert "hello\n" in err


def test_track_yields_the_items_and_counts_those_that_are_done(clock, capsys):
    seen = []
    for item in track(iter("abcd"), "counting", "letters", total=4):
        seen.append(item)
        clock[0] += 11
    assert seen == list("abcd")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"counting: {n} of 4 letters" for n in (1, 2, 3, 4)]
