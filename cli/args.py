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
import copy
import dataclasses
import errno
import inspect
import io
import itertools
import os
import signal
import sys
import time
import traceback
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro
import yaml

from cli.flags import where_set
from cli.kinds import explain, readable, shortened
from cli.memory import full_memory, memory_is_full
from cli.parent import end_with_parent
from cli.schema import check_bounds, check_word, flags_of, nearest, nearest_flag, short_names

T = TypeVar("T")
SECONDS_FOR_RANK_0 = 5.0
LONGEST = 1200  # characters of a message, which may quote a file
MOST_WORDS, MOST_DEPTH = 100_000, 8  # of one value of a preset; `&a [*a, *a]` would have no end
SECTIONS = ("train_tokenizer", "data_process", "pretrain", "fine_tuning", "quantize", "eval", "serve", "plan")
SECTIONS += ("report", "doctor")


def fail(message: str) -> NoReturn:
    """Print an error on stderr and exit with status 1; every script refuses bad input in this way.

    The middle of a very long message is left out.
    """
    let_rank_0_speak()
    sys.exit(f"error: {shortened(message, LONGEST)}")


def let_rank_0_speak() -> None:
    """Under torchrun, wait in the other ranks: rank 0 has most likely failed as well, and torchrun then ends this one.

    On a machine without rank 0, the ranks speak one after the other, so that the first ends the rest.
    """
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(1))  # torchrun's; the status is that of rank 0
        time.sleep(SECONDS_FOR_RANK_0 + int(os.environ.get("LOCAL_RANK", "0")))


def expect_interrupts() -> None:
    """End the process with one line at Ctrl-C, until `run` is called: PyTorch takes seconds to load."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)


def open_closed_streams() -> None:
    """Connect standard input and outputs that the caller has closed (`<&-`), which Python has as None, to nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, PTH123


def interrupted(*_: object) -> NoReturn:
    """End the process at once, with the status that a shell gives to Ctrl-C."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def parse(cls: type[T], section: str, argv: list[str] | None = None) -> T:
    """Return an instance of the dataclass `cls` with the values of `--config FILE` (its `section`) and of the flags.

    Exits with an error message for an unknown key, a wrong type, a value outside its bounds or that the `__post_init__`
    of a dataclass refuses, or a file that cannot be read.
    """
    if argv is None:
        expect_interrupts()
        open_closed_streams()
    argv = own_words(sys.argv[1:]) if argv is None else list(argv)
    if (first := getattr(cls, "first_word", "")) and argv and not argv[0].startswith("-"):
        argv.insert(0, f"--{first}")  # `import SRC` for `import --source SRC`
    try:
        words, named, preset = read_words(cls, section, argv)
    except ValueError as error:
        fail(" ".join(str(error).split()))
    description = (
        f"{inspect.getdoc(cls)}\n\n--config FILE reads values from a YAML preset (configs/); flags override them."
    )
    for short, whole in list(short_names(cls).items())[:1]:
        description += f" A name in a group may stand alone if no other flag has it: --{short} for --{whole}."
    errors, answer = Capture(), Capture()
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(answer),  # only --help prints there
            where_set(named, preset),
        ):
            args = tyro.cli(
                cls,
                args=words,
                prog=f"{section}.py",
                description=description,
                use_underscores=True,
                registry=readable(),
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
            )
            check_bounds(args, "--")
            return args
    except ValueError as error:
        fail(" ".join(str(error).split()))
    except SystemExit as stop:
        if error := dataclass_error(stop):
            fail(" ".join(str(error).split()))
        if errors.getvalue():
            fail(f"{explain(errors.getvalue(), flags_of(cls), words)}; {section}.py --help explains each flag")
        sys.stdout.write(answer.getvalue())
        raise


def read_words(cls: type, section: str, argv: list[str]) -> tuple[list[str], set[str], set[str]]:
    """Return the words of presets and of the command line for tyro, and which flags the command line and presets have.

    Raises ValueError for a flag that is unknown, or that should name a file and does not.
    """
    known = {flag.name: flag for flag in flags_of(cls)}
    names = short_names(cls) | {alias: flag.name for flag in known.values() for alias in flag.aliases}
    names |= {name: name for name in known}
    from_file: list[str] = []
    words: list[str] = []
    named: set[str] = set()  # also those that have their default value
    flag = None  # to which the next word belongs
    while argv:
        word = argv.pop(0)
        name, equals, value = word.partition("=")
        if name == "--config":
            if not value and not argv:
                raise ValueError("--config expects a YAML file, such as configs/tiny.yaml")
            path = Path(value or argv.pop(0))
            from_file += as_flags(cls, read_section(path, section), where=f"{path}: {section}")
        elif name.startswith("--") and name != "--help":
            if (whole := names.get(name[2:].replace("-", "_"))) is None:
                advice = nearest_flag(name[2:], known)
                raise ValueError(f"{name} is no flag of {section}.py (--help lists them){advice}")
            flag = known[whole]
            named.add(whole)
            words.append(f"--{whole}" + (f"={check_word(flag, value)}" if equals else ""))
        else:
            words.append(word if flag is None else check_word(flag, word))
    preset = {word[2:] for word in from_file if word.startswith("--")}
    return from_file + words, named, preset


class Capture(io.StringIO):
    """Text that is printed; it has the encoding of stdout, by which tyro decides whether it may draw lines."""

    encoding = property(lambda self: sys.__stdout__ and sys.__stdout__.encoding)


def parse_command(commands: dict[str, type], script: str, doc: str) -> tuple[str, Any]:
    """Return the first word of the command line, a command, and the parsed flags after it.

    commands: name of a command -> dataclass of its flags; with the name "", which a script may have, there is no such
    word. doc: text that --help prints.
    Exits with an error message when the command is missing or unknown.
    """
    expect_interrupts()
    open_closed_streams()
    words = sys.argv[1:]
    command = words[0] if words else ""
    if "" in commands and command.startswith("-"):
        command, words = "", ["", *words]
    if command in ("-h", "--help"):
        print(f"{doc.strip()}\n\n{script}.py {next(iter(commands))} --help explains each flag.", file=sys.stdout)
        sys.exit()
    if command not in commands:
        first = next(iter(commands))
        fail(f"{script}.py expects a command ({', '.join(commands)}) and its flags, see {script}.py {first} --help")
    return command, parse(commands[command], script, words[1:])


def own_words(argv: list[str]) -> list[str]:
    """Return the words of the command line without the one that the deepspeed launcher adds for every process."""
    launched = "LOCAL_RANK" in os.environ
    return [word for word in argv if not (launched and word.startswith("--local_rank="))]


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
        whole = yaml.load(path.read_text(encoding="utf8"), Loader=Plain) or {}
    except OSError as error:
        fail(f"--config: cannot read {path}: {error.strerror}; presets are in configs/")
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8 text")
    except RecursionError:
        fail(f"{path} is no preset: its values are nested too deep")
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date that is none, such as 2024-99-99
        fail(f"{path} is not valid YAML: {' '.join(str(error).split())}")
    if not isinstance(whole, dict):
        fail(f"{path} should have sections named as scripts ({', '.join(SECTIONS)}), found {type(whole).__name__}")
    for name in whole:
        if name not in SECTIONS:
            fail(f"{path}: unknown section {name!r}{nearest(str(name), SECTIONS)}; sections are {', '.join(SECTIONS)}")
    values = whole.get(section) or {}
    if not isinstance(values, dict):
        fail(f"{path}: {section} should be a mapping, found {values!r:.200}")
    return values


class Plain(yaml.SafeLoader):
    """YAML in which true, yes, on and off are words: the type of a flag decides whether they are truth values."""


Plain.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def as_flags(cls: type, values: dict[str, Any], where: str, prefix: str = "") -> list[str]:
    """Return YAML values as words of a command line; exits with an error for a key that is no field of `cls`.

    where: file and section, for errors; prefix: names of the enclosing fields, such as "model." Raises ValueError for
    a value that cannot be one of its flag.
    """
    flags = {flag.name.partition(".")[0]: flag for flag in flags_of(cls)}
    groups = typing.get_type_hints(cls)
    words = []
    for key, value in values.items():
        if key not in flags:
            fail(f"{where}: unknown key {prefix + str(key)!r}{nearest(str(key), flags)}")
        if dataclasses.is_dataclass(groups[key]):
            if not isinstance(value, dict):
                fail(f"{where}: {prefix + key} should be a mapping, found {value!r:.200}")
            words += as_flags(groups[key], value, where, f"{prefix}{key}.")
        else:
            own = list(itertools.islice(_words(value), MOST_WORDS + 1))
            if len(own) > MOST_WORDS:
                fail(f"{where}: {prefix + key} has more than {MOST_WORDS:,} values")
            words += [f"--{prefix}{key}", *(check_word(flags[key], word) for word in own)]
    return words


def _words(value: Any, depth: int = 0) -> Iterator[str]:
    if depth > MOST_DEPTH:
        raise ValueError(f"a preset has lists in lists at most {MOST_DEPTH} deep")
    if isinstance(value, dict):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, list):
        for item in value:
            yield from _words(item, depth + 1)
    else:
        yield str(value)


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
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "LOCAL_RANK" in os.environ:  # torchrun and the deepspeed launcher set it
        end_with_parent(os.getppid())
    for stream in (sys.stdout, sys.stderr):  # None where it is closed
        if getattr(stream, "errors", "") == "strict":  # the name of a file may be bytes that are not UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        main(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # what reads the output, such as `head`, has ended; Python would flush it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        full = memory_is_full(error)
        if isinstance(error, (RuntimeError, MemoryError)) and not full:
            let_rank_0_speak()
            raise  # a mistake of ours keeps its traceback
        if full:
            fail(full_memory(error, less_memory))
        fail(" ".join(sentence(error).split()))
    except KeyboardInterrupt:
        sys.exit(130)


def with_values(args: T, **changes: Any) -> T:
    """Return a copy of parsed arguments with values that the script has found out, such as the best of a run.

    `dataclasses.replace` would check once more what goes together, without knowing which values are a preset's.
    """
    copied = copy.copy(args)
    for name, value in changes.items():
        object.__setattr__(copied, name, value)  # arguments are frozen
    return copied
