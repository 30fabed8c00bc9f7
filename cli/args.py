"""Parse the arguments of a script: a dataclass is the schema, a YAML preset has values, flags override them.

A preset such as `configs/tiny.yaml` describes a whole run, with one section per script:

    train_tokenizer: {vocab_size: 4800}
    pretrain: {model: {dim: 160}, train: {max_steps: 2000}}

`parse(Args, "pretrain")` reads the section of its name. The values become flags, `--model.dim 160 ...`, in front of
those of the command line: one parser, one validation, one kind of error message, and the later value wins.

On the command line, a field of a group may be named without its group where no other flag has that name:
`--temperature 0` is short for `--sampling.temperature 0`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import inspect
import io
import os
import re
import sys
import time
import traceback
import typing
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
import yaml

from cli.flags import on_command_line
from cli.memory import full_memory, memory_is_full
from cli.parent import end_with_parent

T = TypeVar("T")
NUMBERS = {  # tyro's words for a flag of this type, and for one that may be None as well
    r"invalid literal for int\(\) with base 10: '(.*?)'": "a whole number",
    r"could not convert string to float: '(.*?)'": "a number",
    r"no type matching \{None\}\|INT could be instantiated from \['(.*?)'\]": "a whole number or None",
    r"no type matching \{None\}\|FLOAT could be instantiated from \['(.*?)'\]": "a number or None",
}
SECONDS_FOR_RANK_0 = 5.0
SECTIONS = ("train_tokenizer", "data_process", "pretrain", "fine_tuning", "quantize", "eval", "serve")


def fail(message: str) -> NoReturn:
    """Print an error on stderr and exit with status 1; every script refuses bad input in this way."""
    sys.exit(f"error: {message}")


def parse(cls: type[T], section: str, argv: list[str] | None = None) -> T:
    """Return an instance of the dataclass `cls` with the values of `--config FILE` (its `section`) and of the flags.

    Exits with an error message for an unknown key, a wrong type, a value that the `__post_init__` of a dataclass
    refuses, or a file that cannot be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    from_file, flags, whole_names = [], [], short_names(cls)
    named = set()  # flags of the command line, also those that have their default value
    while argv:
        word = argv.pop(0)
        name, _, value = word.partition("=")
        if name.startswith("--") and (whole := whole_names.get(name[2:].replace("-", "_"))):
            name, word = f"--{whole}", word.replace(name, f"--{whole}", 1)
        if name != "--config":
            last = value if name.startswith("--") else word  # the value: write YAML's true and false as Python does
            named.add(name.removeprefix("--").replace("-", "_"))
            flags.append(word.removesuffix(last) + last.capitalize() if last in ("true", "false") else word)
        elif value or argv:
            path = Path(value or argv.pop(0))
            from_file += as_flags(cls, read_section(path, section), where=f"{path}: {section}")
        else:
            fail("--config expects a YAML file, such as configs/tiny.yaml")
    description = (
        f"{inspect.getdoc(cls)}\n\n--config FILE reads values from a YAML preset (configs/); flags override them."
    )
    for short, whole in list(whole_names.items())[:1]:
        description += f" A name in a group may stand alone if no other flag has it: --{short} for --{whole}."
    errors, answer = Capture(), Capture()
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(answer),  # only --help prints there
            on_command_line(named),
        ):
            return tyro.cli(
                cls,
                args=from_file + flags,
                prog=f"{section}.py",
                description=description,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as stop:
        if error := dataclass_error(stop):
            fail(" ".join(str(error).split()))
        if error := type_error(errors.getvalue()):
            fail(f"{error}; {section}.py --help explains each flag")
        sys.stdout.write(plain_types(answer.getvalue()))
        sys.stderr.write(plain_types(errors.getvalue()))
        raise


def short_names(cls: type) -> dict[str, str]:
    """Return the path of each nested field of a dataclass whose name no other field has: temperature ->
    sampling.temperature."""
    paths: dict[str, list[str]] = {}

    def visit(part: type, prefix: str) -> None:
        hints = typing.get_type_hints(part)
        for field in dataclasses.fields(part):
            if dataclasses.is_dataclass(hints[field.name]):
                visit(hints[field.name], f"{prefix}{field.name}.")
            else:
                paths.setdefault(field.name, []).append(f"{prefix}{field.name}")

    visit(cls, "")
    return {name: places[0] for name, places in paths.items() if len(places) == 1 and "." in places[0]}


class Capture(io.StringIO):
    """Text that is printed; it has the encoding of stdout, by which tyro decides whether it may draw lines."""

    encoding = property(lambda self: sys.__stdout__.encoding)


def type_error(text: str) -> str | None:
    """Return tyro's error about a value that is not a number as one sentence; None for another error."""
    text = " ".join(re.sub("[╭╮╰╯│─]", " ", text).split())
    for pattern, kind in NUMBERS.items():
        if match := re.search(rf"Error parsing (\S+): {pattern}", text):
            return f"{match[1]} expects {kind}, found {match[2]!r}"
    return None


def plain_types(text: str) -> str:
    """Rewrite the types in tyro's help: `{None}|INT` as `INT`, `[PATH [PATH ...]]` as `PATH ...`; widths stay equal."""
    text = re.sub(r"\{None\}\|(\w+)", r"\1       ", text)
    return re.sub(r"\[(\w+) \[\1 \.\.\.\]\]", lambda match: f"{match[1]} ...".ljust(len(match[0])), text)


def parse_command(commands: dict[str, type], script: str, doc: str) -> tuple[str, Any]:
    """Return the first word of the command line, a command, and the parsed flags after it.

    commands: name of a command -> dataclass of its flags; doc: text that --help prints.
    Exits with an error message when the command is missing or unknown.
    """
    words = sys.argv[1:]
    command = words[0] if words else ""
    if command in ("-h", "--help"):
        print(f"{doc.strip()}\n\n{script}.py {next(iter(commands))} --help explains each flag.", file=sys.stdout)
        sys.exit()
    if command not in commands:
        first = next(iter(commands))
        fail(f"{script}.py expects a command ({', '.join(commands)}) and its flags, see {script}.py {first} --help")
    return command, parse(commands[command], script, words[1:])


def dataclass_error(stop: SystemExit) -> ValueError | None:
    """Return the error that the `__post_init__` of a dataclass raised, if that is why tyro exits; else None.

    tyro exits while it handles the error, so the error is in the chain of contexts.
    """
    error = stop.__context__
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and any(frame.f_code.co_name == "__post_init__" for frame, _ in frames):
            return error
        error = error.__context__
    return None


def read_section(path: Path, section: str) -> dict[str, Any]:
    """Return the mapping under `section` in a YAML preset; {} if the preset has no such section."""
    try:
        whole = yaml.safe_load(path.read_text(encoding="utf8")) or {}
    except OSError as error:
        fail(f"--config: cannot read {path}: {error.strerror}; presets are in configs/")
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8 text")
    except yaml.YAMLError as error:
        fail(f"{path} is not valid YAML: {' '.join(str(error).split())}")
    if not isinstance(whole, dict):
        fail(f"{path} should have sections named as scripts ({', '.join(SECTIONS)}), found {type(whole).__name__}")
    for name in whole:
        if name not in SECTIONS:
            fail(f"{path}: unknown section {name!r}{nearest(str(name), SECTIONS)}; sections are {', '.join(SECTIONS)}")
    values = whole.get(section) or {}
    if not isinstance(values, dict):
        fail(f"{path}: {section} should be a mapping, found {values!r}")
    return values


def as_flags(cls: type, values: dict[str, Any], where: str, prefix: str = "") -> list[str]:
    """Return YAML values as words of a command line; exits with an error for a key that is no field of `cls`.

    where: file and section, for errors; prefix: names of the enclosing fields, such as "model."
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    words = []
    for key, value in values.items():
        if key not in names:
            fail(f"{where}: unknown key {prefix + str(key)!r}{nearest(str(key), names)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                fail(f"{where}: {prefix + key} should be a mapping, found {value!r}")
            words += as_flags(hints[key], value, where, f"{prefix}{key}.")
        else:
            words += [f"--{prefix}{key}", *_words(value)]
    return words


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [word for pair in value.items() for item in pair for word in _words(item)]
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [str(value)]


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Return text such as `"; did you mean 'max_steps'?"`, or "" if no known name is similar."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def sentence(error: Exception) -> str:
    """Return the message of an error; for an error of the system (`[Errno 28] ...`) with advice."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        place = f"to write{where}" if where else "on the disk"
        return f"no space left {place} ({error.strerror}); free some space, then repeat the command to continue"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"no access to{where or ' a file'} ({error.strerror}); choose another place, or change its permissions"
    return f"{error.strerror}:{where}" if where else error.strerror


def run(main: typing.Callable[[Any], dict], args: Any, less_memory: str = "use a machine with more") -> None:
    """Call `main(args)`; exits with status 1 and one sentence for an error that the user can correct.

    less_memory: what to change where memory is full. Under torchrun the process ends when torchrun does, and one rank
    prints the sentence.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())
    for stream in (sys.stdout, sys.stderr):  # None where it is closed
        if getattr(stream, "errors", "") == "strict":  # the name of a file may be bytes that are not UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        main(args)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        full = memory_is_full(error)
        if isinstance(error, (RuntimeError, MemoryError)) and not full:
            raise  # a mistake of ours keeps its traceback
        if os.environ.get("RANK", "0") != "0":  # rank 0 has most likely failed as well, and torchrun then ends this one
            time.sleep(SECONDS_FOR_RANK_0)
        if full:
            fail(full_memory(error, less_memory))
        fail(" ".join(sentence(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)
