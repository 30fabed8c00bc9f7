"""The table of oracles: what the command measures is within its bounds, and docs/oracles.md keeps what it prints."""

import oracles
import pytest
from helpers.oracle_row import ROWS, Row

LINES = [line for line in oracles.DOCUMENT.read_text(encoding="utf8").splitlines() if line.startswith("|")]
KEPT = [[cell.strip() for cell in line.strip("|").split("|")] for line in LINES[2:]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.algorithm}: {row.oracle}")
def test_an_error_is_within_its_bound(row):
    error, right = oracles.measure(row)
    assert right, error


def test_the_kept_table_has_the_rows_that_are_printed():
    cells = [[cell.strip() for cell in oracles.line(row, "").strip("|").split("|")] for row in ROWS]
    assert [kept[:3] + kept[4:] for kept in KEPT] == [row[:3] + row[4:] for row in cells]


def test_the_kept_errors_are_within_their_bounds():
    measured = [kept for kept in KEPT if not kept[3].startswith("not measured")]
    assert measured
    assert [kept for kept in measured if not float(kept[3]) <= float(kept[4])] == []


def test_an_error_beyond_its_bound_fails_the_command(monkeypatch, capsys):
    rows = [Row("good", "x", "y", 1e-5, lambda: 1e-6), Row("bad", "x", "y", 1e-5, lambda: 1e-4)]
    rows += [Row("not a number", "x", "y", 1e-5, lambda: float("nan"))]
    rows += [Row("absent", "x", "y", 0, lambda: pytest.importorskip("no_such_package"))]
    monkeypatch.setattr(oracles, "ROWS", rows)
    assert oracles.main([]) == 1
    said = capsys.readouterr().out
    assert "bad, not a number above its bound" in said
    assert "| absent | x | y | not measured: could not import 'no_such_package'" in said


def test_an_unknown_flag_is_refused(capsys):
    assert oracles.main(["--wirte"]) == 1
    assert "--wirte is not known" in capsys.readouterr().err
