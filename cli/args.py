"""One run, one YAML file: dataclasses are the schema, YAML the values, flags override both.

A preset such as `configs/tiny.yaml` describes a whole run, with one section a script:

    train_tokenizer: {vocab_size: 4800}
    pretrain: {model: {dim: 160}, train: {max_steps: 2000}}

`parse(Args, "pretrain")` reads its own section. A YAML value is nothing but a flag written down: the section is
flattened into `--model.dim 160 ...` and put before the flags of the command line, so there is one parser,
one validation and one error message, and the later value wins.

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
import sys
import traceback
import typing
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
import yaml

T = TypeVar("T")
SECTIONS = ("train_tokenizer", "data_process", "pretrain", "fine_tuning", "eval")


def fail(message: str) -> NoReturn:
    """Print one sentence on stderr and exit with status 1: the way every script refuses bad input."""
    sys.exit(f"error: {message}")


def parse(cls: type[T], section: str, argv: list[str] | None = None) -> T:
    """An instance of the dataclass `cls` from `--config FILE` (its `section`) and flags; flags win.

    Exits non-zero with one clear message on an unknown key, a wrong type, a value that a dataclass refuses in its
    `__post_init__`, or an unreadable file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    from_file, flags, whole_names = [], [], short_names(cls)
    while argv:
        word = argv.pop(0)
        name, _, value = word.partition("=")
        if name.startswith("--") and (whole := whole_names.get(name[2:].replace("-", "_"))):
            name, word = f"--{whole}", word.replace(name, f"--{whole}", 1)
        if name != "--config":
            said = value if name.startswith("--") else word  # YAML's true and false are Python's True and False
            flags.append(word.removesuffix(said) + said.capitalize() if said in ("true", "false") else word)
        elif value or argv:
            path = Path(value or argv.pop(0))
            from_file += as_flags(cls, read_section(path, section), where=f"{path}: {section}")
        else:
            fail("--config expects a YAML file, such as configs/tiny.yaml")
    description = f"{inspect.getdoc(cls)}\n\n--config FILE reads values from a YAML preset (configs/); flags win."
    for short, whole in list(whole_names.items())[:1]:
        description += f" A name in a group may stand alone if no other flag has it: --{short} for --{whole}."
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(
                cls,
                args=from_file + flags,
                prog=f"{section}.py",
                description=description,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
    except SystemExit as stop:
        if error := refused_by_dataclass(stop):
            fail(" ".join(str(error).split()))
        sys.stderr.write(told.getvalue())
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


def parse_command(commands: dict[str, type], script: str, doc: str) -> tuple[str, Any]:
    """Return the command that stands first on the command line and its parsed flags; `commands`: name -> dataclass.

    Without a command, or with an unknown one, exits with a sentence; --help prints `doc`.
    """
    words = sys.argv[1:]
    command = words[0] if words else ""
    if command in ("-h", "--help"):
        print(f"{doc.strip()}\n\n{script}.py {next(iter(commands))} --help explains each flag.", file=sys.stdout)
        sys.exit()
    if command not in commands:
        fail(f"{script}.py takes a command, {', '.join(commands)}, and its flags: {script}.py merge --help")
    return command, parse(commands[command], script, words[1:])


def refused_by_dataclass(stop: SystemExit) -> ValueError | None:
    """The error raised in the `__post_init__` of a dataclass, if that is why tyro stopped.

    tyro draws a box around it and exits while it handles it, so it stands in the chain of contexts.
    """
    error = stop.__context__
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and any(frame.f_code.co_name == "__post_init__" for frame, _ in frames):
            return error
        error = error.__context__
    return None


def read_section(path: Path, section: str) -> dict[str, Any]:
    """The mapping under `section` in a YAML preset; `{}` when the preset leaves that script at its defaults."""
    try:
        whole = yaml.safe_load(path.read_text(encoding="utf8")) or {}
    except OSError as error:
        fail(f"cannot read the config {path}: {error.strerror}; presets lie in configs/")
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8 text")
    except yaml.YAMLError as error:
        fail(f"{path} is not valid YAML: {' '.join(str(error).split())}")
    if not isinstance(whole, dict):
        fail(
            f"{path} should hold sections named after the scripts ({', '.join(SECTIONS)}), found {type(whole).__name__}"
        )
    for name in whole:
        if name not in SECTIONS:
            fail(f"{path}: unknown section {name!r}{nearest(str(name), SECTIONS)}; sections are {', '.join(SECTIONS)}")
    values = whole.get(section) or {}
    if not isinstance(values, dict):
        fail(f"{path}: {section} should be a mapping, found {values!r}")
    return values


def as_flags(cls: type, values: dict[str, Any], where: str, prefix: str = "") -> list[str]:
    """YAML values as the command-line words that say the same, checked against the fields of the dataclass `cls`."""
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
    """`"; did you mean 'max_steps'?"` or the empty string."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def sentence(error: Exception) -> str:
    """What an error says; one of the system's own (`[Errno 28] ...`), with what to do about it."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no room to write{where or ' on the disk'} ({error.strerror}); make some, and the same command goes on"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"no access to{where or ' a file'} ({error.strerror}); choose another place, or change its permissions"
    return f"{error.strerror}:{where}" if where else error.strerror


def run(main: typing.Callable[[Any], dict], args: Any) -> None:
    """Call `main(args)`, and turn an error a user can mend into one sentence and exit status 1."""
    try:
        main(args)
    except (ValueError, OSError) as error:
        fail(" ".join(sentence(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)
