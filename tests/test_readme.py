"""What both READMEs tell a newcomer to type is understood by the programs, what they point to is there, and the
commands of the journeys do their work, in miniature."""

import dataclasses
import importlib
import io
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from helpers.miniature import EXCHANGES, JOURNEY, Miniature
from torch.distributed.run import get_args_parser

from cli.args import SECTIONS, parse

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = tuple(f"{section}.py" for section in SECTIONS)
TEXTS = {name: (REPOSITORY / name).read_text(encoding="utf8") for name in ("README.md", "README_CN.md")}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands in the ```bash blocks, without their comments, and those within a line of text."""
    lines = [line for kind, block in FENCE.findall(text) if kind == "bash" for line in block.splitlines()]
    lines += [code for code in inline(text) if re.match(r"(bash|source|python|torchrun) ", code)]
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def inline(text: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"`([^`]+)`", FENCE.sub("", text))


COMMANDS = commands(TEXTS["README.md"])
RUN_SH = [command for command in COMMANDS if command.startswith("bash run.sh")]
PYTHON = [command for command in COMMANDS if command.startswith(("python ", "torchrun "))]
TAKEN = [shlex.join(shlex.split(command)) for command in JOURNEY]
RUN_HERE = tuple(f"python {script}" for script in (*SCRIPTS, "convert.py") if script != "serve.py")  # which never ends
OTHERS = [each for each in PYTHON if each.startswith(RUN_HERE) and each not in TAKEN]


# ---- both languages


def shape(text: str) -> dict[str, Any]:
    """What a translation leaves as it is."""
    prose = FENCE.sub("", text)
    return {
        "headings": re.findall(r"^#+(?= )", prose, re.MULTILINE),
        "journeys": len(re.findall(r"^\*\*.+?\*\*", prose, re.MULTILINE)),
        "blocks": [kind for kind, _ in FENCE.findall(text)],
        "table cells": [line.count("|") for line in prose.splitlines() if line.startswith("|")],
        "links": [link for link in links(text) if link not in TEXTS],
        "placeholders": re.findall(r"@@\w+@@", text),
    }


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text)


def test_both_languages_say_the_same() -> None:
    english, chinese = TEXTS.values()
    assert commands(english) == commands(chinese)
    assert shape(english) == shape(chinese)
    assert sorted(inline(english)) == sorted(inline(chinese))
    assert "README_CN.md" in links(english) and "README.md" in links(chinese)


# ---- what one is told to type


def understood(words: list[str]) -> str:
    """Parse a command that starts a Python program as its launcher and the program would; the program's path."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    program, arguments = words[at], words[at + 1 :]
    if words[0] == "torchrun" or "torch.distributed.run" in words:
        launcher = words[:at] if words[0] == "torchrun" else words[words.index("torch.distributed.run") : at]
        assert get_args_parser().parse_args([*launcher[1:], *words[at:]]).training_script == program
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    if program == "convert.py":
        parse(module.COMMANDS[arguments[0]][1], "convert", arguments[1:])
    elif program in SCRIPTS:
        parse(module.Args, module.__name__, arguments)
    else:  # in bench/
        assert {word for word in arguments if word.startswith("--")} <= flags(module.Args)
    return program


def flags(cls: type, prefix: str = "--") -> set[str]:
    """All flags of a program's Args."""
    hints, found = typing.get_type_hints(cls), set()
    for field in dataclasses.fields(cls):
        nested = dataclasses.is_dataclass(hints[field.name])
        found |= flags(hints[field.name], f"{prefix}{field.name}.") if nested else {prefix + field.name}
    return found


@pytest.mark.parametrize("command", PYTHON)
def test_a_command_has_flags_that_its_program_knows(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)  # for configs/
    understood(shlex.split(command))


@pytest.mark.parametrize("command", RUN_SH)
def test_run_sh_knows_its_switches_and_the_scripts_what_it_gives_them(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = [*shlex.split(command), "--dry_run"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    lines = [shlex.split(line) for line in told.stdout.splitlines() if ".py " in line and not line.startswith("#")]
    assert {understood(words) for words in lines} <= set(SCRIPTS)
    assert told.stdout.startswith("# == setup")


def test_the_other_commands_name_a_file() -> None:
    others = [shlex.split(command) for command in COMMANDS if command not in RUN_SH + PYTHON]
    assert ["bash", "test.sh"] in others
    extras = [words for words in others if words[:3] == ["bash", "setup.sh", "--extra"]]
    assert extras and all((REPOSITORY / f"requirements-{words[3]}.txt").is_file() for words in extras)
    others = [words for words in others if words not in extras]
    assert [words for words in others if len(words) != 2 or not (REPOSITORY / words[1]).is_file()] == []


def test_flags_in_the_text_exist() -> None:
    settings = [importlib.import_module(name).Args for name in SECTIONS]
    settings += [command[1] for command in importlib.import_module("convert").COMMANDS.values()]
    known = {"--help"}.union(*map(flags, settings))
    mentioned = {code.split()[0] for code in inline(TEXTS["README.md"]) if code.startswith("--")}
    assert mentioned and mentioned <= known


# ---- what one is pointed to


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_pictures_lead_somewhere(name: str) -> None:
    local = [link for link in links(TEXTS[name]) if not link.startswith(("http", "#"))]
    assert local and [link for link in local if not (REPOSITORY / link).exists()] == []


@pytest.mark.parametrize("name", TEXTS)
def test_the_layout_is_what_is_there(name: str) -> None:
    cells = "".join(line for line in TEXTS[name].splitlines() if line.startswith("|"))
    named = {code for code in inline(cells) if re.fullmatch(r"\w+(\.py|/)", code)}
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []
    assert {path.name for path in REPOSITORY.glob("*.py")} == {path for path in named if path.endswith(".py")}


@pytest.mark.parametrize("name", TEXTS)
def test_presets_are_named(name: str) -> None:
    for preset in (REPOSITORY / "configs").glob("*.yaml"):
        assert re.search(rf"\b{preset.stem}\b", TEXTS[name])


# ---- the commands at work


@pytest.fixture(scope="module")
def after_run_sh(miniature: Miniature) -> Miniature:
    """The miniature in the place of the default run, beside the presets."""
    (miniature.folder / "path/to").mkdir(parents=True)
    links = {"data/tiny": "mine", "out/tiny": "mine", "configs": REPOSITORY / "configs"}
    for link, target in (links | {"path/to/model": "../../out/mine/pretrain/best"}).items():
        (miniature.folder / link).symlink_to(target)
    return miniature


def test_the_miniature_goes_the_journey_that_is_told() -> None:
    assert [command for command in COMMANDS if command in TAKEN] == TAKEN


@pytest.mark.parametrize("command", OTHERS)
def test_the_other_commands_work_after_it(
    command: str, after_run_sh: Miniature, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(next(iter(EXCHANGES))))  # for the chat
    more = "--train.max_steps 2" if "pretrain.py" in command or "configs/fine_tuning" in command else ""
    if "--rope.type" in command:  # stretched beyond the miniature's context
        more += " --model.max_seq_len 192 --data.seq_len 192"
    assert after_run_sh.run(command, more)
