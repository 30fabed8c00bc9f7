"""The table of flags that go together only: which rows are broken, and what the message says."""

from dataclasses import dataclass, field

import pytest

from cli.flags import Needs, check_flags, read_flags


@dataclass(frozen=True)
class Inner:
    kind: str = "a"
    tea_leaves: int = 3
    tea_sugar: tuple[str, ...] = field(default_factory=lambda: ("white",))


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    mode: str = "slow"
    out: str = "here"


NEEDS = (
    Needs("inner.tea_*", "mode", ("fast", "faster"), "see {args.out}; remove it"),
    Needs("mode", "inner.kind", ("a", "b"), "c is fast already", lambda mode: mode == "fast"),
)


@pytest.mark.parametrize(
    "args",
    [
        Outer(),
        Outer(mode="faster", inner=Inner("c", 4)),
        Outer(mode="fast", inner=Inner(tea_sugar=())),
        Outer(inner=Inner(tea_sugar=("white",))),
    ],
)
def test_rows_that_are_kept(args):
    check_flags(args, NEEDS)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            Outer(inner=Inner(tea_leaves=4)),
            "--inner.tea_leaves 4 needs --mode fast or faster, found slow: see here; remove it",
        ),
        (
            Outer(inner=Inner("c", 4, ()), out="there"),
            "--inner.tea_leaves 4 and --inner.tea_sugar need --mode fast or faster, found slow: see there; remove it",
        ),
        (Outer(mode="fast", inner=Inner("c")), "--mode fast needs --inner.kind a or b, found c: c is fast already"),
    ],
)
def test_the_first_broken_row_is_the_message(args, message):
    with pytest.raises(ValueError) as refused:
        check_flags(args, NEEDS)
    assert str(refused.value) == message


def test_flags_by_name_and_by_pattern():
    assert list(read_flags(Outer(), "inner.kind")) == [("inner.kind", "a", "a")]
    assert [name for name, _, _ in read_flags(Outer(), "inner.tea_*")] == ["inner.tea_leaves", "inner.tea_sugar"]
    assert not list(read_flags(Outer(), "inner.coffee"))
