"""A short form of `python -m tests.fuzz`, and that it sees what is neither accepted nor refused in one sentence."""

import json
import random
import sys

import pytest
from fuzz import attempt, kinds, main, outcome, table, world
from helpers.fuzz_values import DEEP, changed, damaged, paths, with_depth

TRIALS = {"flags": 4, "pairs of flags": 4, "presets": 16, "directories": 8}


@pytest.fixture(scope="module")
def scratch():
    with world() as folder:
        yield folder


@pytest.mark.parametrize("kind", kinds())
def test_odd_input_is_accepted_or_refused_in_one_sentence(scratch, kind):
    rows = [attempt(kind, kinds()[kind], number, 0, scratch) for number in range(TRIALS[kind.partition(":")[0]])]
    assert [row["note"] for row in rows if row["verdict"] != "held"] == []


def test_a_trial_is_the_same_whenever_it_is_repeated(scratch):
    make = kinds()["directories: chat"]
    rows = [attempt("directories: chat", make, 3, 1, scratch) for _ in range(2)]
    assert rows[0] == rows[1] != attempt("directories: chat", make, 4, 1, scratch)


@pytest.mark.parametrize(
    "call, how",
    [
        (lambda: None, "accepted"),
        (lambda: exec("raise ValueError('two\\n lines')"), "sentences"),
        (lambda: {}["a"], "tracebacks"),
        (lambda: max([]), "tracebacks"),
        (lambda: exec("raise RuntimeError"), "tracebacks"),
        (lambda: sys.exit("error: two\nlines"), "tracebacks"),
        (lambda: sys.exit("error: " + "x" * 2000), "tracebacks"),
        (lambda: sys.exit(2), "tracebacks"),
        (lambda: sys.exit(), "accepted"),
        (lambda: exec("while True: pass"), "slow"),
    ],
)
def test_outcomes(monkeypatch, call, how):
    monkeypatch.setattr("fuzz.HANGS", 1)
    assert outcome(call).how == how


def test_each_field_is_found_and_one_is_changed():
    value = {"a": 1, "b": [1, {"c": 2}], "d": {}}
    assert [*paths(value)] == [("a",), ("b",), ("b", 0), ("b", 1), ("b", 1, "c"), ("d",)]
    for seed in range(50):
        new, how = changed(value, random.Random(seed))
        assert how and json.dumps(new) != json.dumps(value)
    assert value == {"a": 1, "b": [1, {"c": 2}], "d": {}}


def test_depth_and_damage():
    assert with_depth(json.dumps({"a": DEEP}), 3) == '{"a": [[[]]]}'
    assert len({damaged(b'{"a": 1}', random.Random(seed))[0] for seed in range(50)} - {b'{"a": 1}'}) > 10


def test_a_table_counts_by_kind():
    rows = [{"kind": "fuzz: a", "how": "accepted"}, {"kind": "fuzz: a", "how": "slow"}]
    assert table(rows).splitlines()[2:] == ["| a | 2 | 1 | 0 | 0 | 1 |", "| all | 2 | 1 | 0 | 0 | 1 |"]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fuzz.build", lambda folder: folder)
    results = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["fuzz", "--trials", "2", "--only", "presets", "--results", str(results)])
    with pytest.raises(SystemExit) as stop:
        main()
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert not stop.value.code and capsys.readouterr().out.splitlines()[-1].startswith("| all | 2 |")
    assert [row["trial"] for row in rows] == [0, 1]
    assert set(rows[0]) >= {"kind", "promise", "trial", "seed", "verdict", "note"}
