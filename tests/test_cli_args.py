"""One YAML file a run: what flags, files and defaults give together, and how wrong ones are refused."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import fine_tuning
import pretrain
from cli import args as cli_args
from cli.args import read_section
from cli.record import record_run


@dataclass(frozen=True)
class Inner:
    """The inner part."""

    size: int = 3
    """how big"""
    rate: float = 1e-3
    """how fast"""
    scaling: dict[str, bool | int | float | str] | None = None
    """a mapping"""


@dataclass(frozen=True)
class Args:
    """A script of a test."""

    inner: Inner = field(default_factory=Inner)
    flag: bool = False
    """a switch"""
    other_flag: bool = True
    """a switch that is on"""
    kind: Literal["plain", "fancy"] = "plain"
    """one of two"""
    path: Path | None = None
    """a file"""
    paths: tuple[Path, ...] = ()
    """files"""
    pair: tuple[float, float] = (0.9, 0.95)
    """two numbers"""
    limit: int | None = None
    """a number or nothing"""


@dataclass(frozen=True)
class Range:
    """A part that looks at its values."""

    low: int = 0
    high: int = 9

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ValueError("two lines\n  of it")
        if self.low > self.high:
            raise ValueError(f"low {self.low} lies above high {self.high}")


@dataclass(frozen=True)
class Checked:
    """A script that looks at its values, and its part at its own."""

    inner: Range = field(default_factory=Range)
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count is at least 1, found {self.count}")


def preset(folder: Path, values: Any, section: str = "pretrain") -> str:
    path = folder / "preset.yaml"
    path.write_text(yaml.safe_dump({section: values}, allow_unicode=True), encoding="utf8")
    return str(path)


def parse(*argv: str, cls: type = Args) -> Any:
    return cli_args.parse(cls, "pretrain", list(argv))


def refusal(capsys, *argv: str, cls: type = Args) -> str:
    """What is printed when these arguments are refused, with a status that is not 0."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv, cls=cls)
    assert stop.value.code not in (0, None)
    return stop.value.code if isinstance(stop.value.code, str) else "".join(capsys.readouterr())


# ---- precedence


def test_defaults():
    assert parse() == Args()


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = preset(tmp_path, {"inner": {"size": 5, "rate": 0.5}, "kind": "fancy"})
    assert parse("--config", file) == Args(Inner(5, 0.5), kind="fancy")
    expected = Args(Inner(5, 0.25), kind="plain")
    flags = ["--inner.rate", "0.25", "--kind", "plain"]
    assert parse("--config", file, *flags) == expected
    assert parse(*flags, "--config", file) == expected  # wherever the file stands
    assert parse(f"--config={file}", *flags) == expected


def test_of_two_files_the_later_wins(tmp_path):
    (tmp_path / "sub").mkdir()
    first = preset(tmp_path, {"inner": {"size": 5, "rate": 0.5}})
    second = preset(tmp_path / "sub", {"inner": {"size": 7}})
    assert parse("--config", first, "--config", second).inner == Inner(7, 0.5)


def test_a_script_without_a_section_keeps_its_defaults(tmp_path):
    assert parse("--config", preset(tmp_path, {"input": "x"}, section="data_process")) == Args()
    (tmp_path / "empty.yaml").write_text("# nothing yet\npretrain:\n")
    assert parse("--config", str(tmp_path / "empty.yaml")) == Args()


# ---- short names


@dataclass(frozen=True)
class Other:
    """Another group, which shares a name with `Inner` and one with the script."""

    size: int = 4
    limit: int = 5
    top_k: int = 6


@dataclass(frozen=True)
class Grouped:
    """A script with two groups."""

    inner: Inner = field(default_factory=Inner)
    other: Other = field(default_factory=Other)
    limit: int = 1
    text: str = ""


def test_a_name_that_only_one_group_has_needs_no_group(tmp_path, capsys):
    assert cli_args.short_names(Grouped) == {"rate": "inner.rate", "scaling": "inner.scaling", "top_k": "other.top_k"}
    for words in (
        ["--rate", "0.5", "--top_k", "7"],
        ["--rate=0.5", "--top-k=7"],
        ["--inner.rate", "0.5", "--top_k", "7"],
    ):
        assert parse(*words, cls=Grouped) == Grouped(Inner(rate=0.5), Other(top_k=7))
    assert parse("--limit", "9", cls=Grouped) == Grouped(limit=9)  # the script's own
    assert "--size" in refusal(capsys, "--size", "9", cls=Grouped)  # two groups have it
    assert parse("--text", "rate", cls=Grouped).text == "rate"  # a value is no flag
    assert parse("--text=--rate", cls=Grouped).text == "--rate"
    file = preset(tmp_path, {"inner": {"rate": 0.25}})
    assert parse("--rate", "0.5", "--config", file, cls=Grouped).inner.rate == 0.5  # flags win
    assert "unknown key 'rate'" in refusal(capsys, "--config", preset(tmp_path, {"rate": 1}), cls=Grouped)


# ---- types


@pytest.mark.parametrize("value", [True, False])
def test_switches(tmp_path, value):
    expected = Args(flag=value, other_flag=value)
    assert parse("--config", preset(tmp_path, {"flag": value, "other_flag": value})) == expected
    for word in (str(value), str(value).lower()):
        assert parse("--flag", word, "--other_flag", word) == expected
        assert parse(f"--flag={word}", f"--other_flag={word}") == expected


def test_lists_mappings_nothing_and_numbers(tmp_path):
    (tmp_path / "preset.yaml").write_text(
        "pretrain:\n"
        "  inner: {rate: 4e-3, scaling: {rope_type: linear, factor: 2.0}}\n"
        "  paths: [a b.bin, 文.bin]\n"
        "  pair: [0.5, -1]\n"
        "  path: null\n"
        "  limit: -3\n",
        encoding="utf8",
    )
    args = parse("--config", str(tmp_path / "preset.yaml"))
    assert args.inner.rate == 0.004  # which YAML itself takes for a string
    assert args.inner.scaling == {"rope_type": "linear", "factor": 2.0}
    assert args.paths == (Path("a b.bin"), Path("文.bin"))
    assert args.pair == (0.5, -1.0)
    assert args.path is None
    assert args.limit == -3
    assert parse("--config", preset(tmp_path, {"paths": []})).paths == ()


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(-(10**9), 10**9),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    flag=st.booleans(),
    kind=st.sampled_from(["plain", "fancy"]),
    path=st.none() | st.text("abc /._文", min_size=1).map(Path),
    paths=st.lists(st.text("abc/文", min_size=1).map(Path), max_size=3),
    limit=st.none() | st.integers(),
)
def test_what_a_run_records_is_a_config_of_the_same_run(tmp_path_factory, size, rate, flag, kind, path, paths, limit):
    args = Args(Inner(size, rate), flag, not flag, kind, path, tuple(paths), limit=limit)
    out = tmp_path_factory.mktemp("run")
    record_run(out, "pretrain", args)
    assert parse("--config", str(out / "config.yaml")) == args


@pytest.mark.parametrize("script, section", [(pretrain, "pretrain"), (fine_tuning, "fine_tuning")])
def test_the_scripts_own_arguments_are_recorded_whole(tmp_path, script, section):
    record_run(tmp_path, section, script.Args())
    assert cli_args.parse(script.Args, section, ["--config", str(tmp_path / "config.yaml")]) == script.Args()


# ---- refusals


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kindd": "plain"}, "unknown key 'kindd'; did you mean 'kind'?"),
        ({"inner": {"sise": 3}}, "unknown key 'inner.sise'; did you mean 'size'?"),
        ({"qqq": 3}, "unknown key 'qqq'"),
        ({"inner": 3}, "inner should be a mapping, found 3"),
        ([1, 2], "pretrain should be a mapping, found [1, 2]"),
    ],
)
def test_wrong_keys_are_named_with_the_nearest_known(tmp_path, capsys, values, message):
    file = preset(tmp_path, values)
    assert refusal(capsys, "--config", file).startswith(f"error: {file}: ")
    assert message in refusal(capsys, "--config", file)


def test_unknown_section(tmp_path, capsys):
    message = refusal(capsys, "--config", preset(tmp_path, {}, section="pretrian"))
    assert "unknown section 'pretrian'; did you mean 'pretrain'?" in message


@pytest.mark.parametrize(
    "content, message",
    [("pretrain: [1, 2", "is not valid YAML"), ("- 1\n- 2\n", "should have sections"), ("just words", "found str")],
)
def test_files_that_are_no_presets(tmp_path, capsys, content, message):
    (tmp_path / "x.yaml").write_text(content)
    refused = refusal(capsys, "--config", str(tmp_path / "x.yaml"))
    assert message in refused
    assert "\n" not in refused


def test_missing_files(tmp_path, capsys):
    message = refusal(capsys, "--config", str(tmp_path / "none.yaml"))
    assert message.startswith(f"error: --config: cannot read {tmp_path}/none.yaml: No such file")
    assert "cannot read" in refusal(capsys, "--config", str(tmp_path))
    assert "expects a YAML file" in refusal(capsys, "--config")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"inner": {"size": "many"}}, ["inner.size", "many"]),
        ({"kind": "odd"}, ["kind", "fancy"]),
        ({"flag": 2}, ["flag"]),
    ],
)
def test_wrong_types_name_key_and_value(tmp_path, capsys, values, words):
    message = refusal(capsys, "--config", preset(tmp_path, values))
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--inner.size", "many"], "--inner.size expects a whole number, found 'many'"),
        (["--inner.rate", "1e"], "--inner.rate expects a number, found '1e'"),
        (["--limit", "1.5"], "--limit expects a whole number or None, found '1.5'"),
    ],
)
def test_a_value_that_is_no_number_is_one_sentence(capsys, words, sentence):
    assert refusal(capsys, *words) == f"error: {sentence}; pretrain.py --help explains each flag"


def test_an_unknown_flag_is_refused_with_the_nearest_known(capsys):
    message = refusal(capsys, "--inner.sise", "3")
    assert "--inner.sise" in message and "--inner.size" in message


@pytest.mark.parametrize(
    "words, message",
    [
        (["--inner.low", "3", "--inner.high", "2"], "low 3 lies above high 2"),
        (["--inner.low", "-1"], "two lines of it"),
        (["--count", "0"], "count is at least 1, found 0"),
    ],
)
def test_a_value_that_a_dataclass_refuses_is_one_sentence(capsys, words, message):
    assert refusal(capsys, *words, cls=Checked) == f"error: {message}"
    assert capsys.readouterr().err == ""


def test_a_value_of_a_preset_that_a_dataclass_refuses_is_one_sentence(capsys, tmp_path):
    file = preset(tmp_path, {"inner": {"low": 3, "high": 2}})
    assert refusal(capsys, "--config", file, cls=Checked) == "error: low 3 lies above high 2"
    assert parse("--config", file, "--inner.high", "4", cls=Checked).inner == Range(3, 4)


def test_a_model_that_does_not_divide_is_refused_by_its_dataclass(capsys):
    message = refusal(capsys, "--model.dim", "30", "--model.n_heads", "4", cls=pretrain.Args)
    assert message.startswith("error: dim 30 does not divide into n_heads 4")


# ---- help, and odd presets


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("A script of a test.", "--inner.size", "how big", "--config FILE", "--flag"))
    for line in ("--path <path>", "--paths <paths>", "--limit <whole number>", "--kind <one of plain, fancy>"):
        assert line in text  # types as words, without None
    for line in ("--flag <yes or no>", "--pair <2 numbers>", "--inner.scaling <names with values>"):
        assert line in text


def test_a_preset_that_is_not_utf8_and_a_section_that_is_a_number_are_named(tmp_path):
    for name, raw, sentence in (("a.yaml", b"\xff\xfe", "not UTF-8"), ("b.yaml", b"1: 2", "unknown section 1")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(SystemExit) as stopped:
            read_section(tmp_path / name, "pretrain")
        assert name in str(stopped.value) and sentence in str(stopped.value)


def test_words_of_a_preset_are_read_as_they_are(tmp_path):
    (tmp_path / "p.yaml").write_text("pretrain:\n  train: {compile: off}\n  data: {verify: yes}\n")
    args = cli_args.parse(pretrain.Args, "pretrain", ["--config", str(tmp_path / "p.yaml")])
    assert args.train.compile == "off" and args.data.verify is True
    assert cli_args.parse(pretrain.Args, "pretrain", ["--data.verify", "on"]).data.verify is True


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("pretrain: " + "[" * 2000 + "]" * 2000, "nested too deep"),
        ("pretrain: {data: {train: &a [*a, *a]}}", "lists in lists at most 8 deep"),
        ("pretrain: {out: ''}", "--out should name a file or folder, found ''"),
        ("pretrain: {out: 2024-99-99}", "is not valid YAML"),
    ],
)
def test_odd_presets_are_one_sentence(tmp_path, text, sentence):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(SystemExit, match=sentence) as refused:
        cli_args.parse(pretrain.Args, "pretrain", ["--config", str(tmp_path / "p.yaml")])
    assert "\n" not in refused.value.code
