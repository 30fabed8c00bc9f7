"""The structure of the code keeps the eight rules of docs/architecture.md, and what checks them sees what breaks."""

import ast

import pytest
from arrows import (
    LIMITS,
    MOST,
    Module,
    broken_rules,
    circles,
    counts,
    floors,
    lengths,
    ninth_decile,
    place_graph,
    read_modules,
)

MODULES = read_modules()


def parsed(**texts: str) -> dict[str, Module]:
    """Modules of these texts; two underscores in a name stand for the dot between a room and its file."""
    names = {name.replace("__", "."): text for name, text in texts.items()}
    return {name: Module(name, name.split(".")[0], ast.parse(text), 1) for name, text in names.items()}


def test_the_rules_hold() -> None:
    assert broken_rules(MODULES) == []


def test_the_structure_stays_within_its_limits() -> None:
    assert {name: count for name, count in counts(MODULES).items() if count > MOST[name]} == {}


def test_files_classes_and_functions_fit_a_sitting_and_a_screen() -> None:
    sizes = lengths(MODULES)
    assert [each for each in sizes["file"] if each[0] > LIMITS["file"]] == []
    assert [each for each in sizes["class"] if each[0] > LIMITS["class"]] == []
    assert ninth_decile([n for n, _ in sizes["function"]]) <= LIMITS["function, nine in ten"]


def test_floors_and_arrows_of_a_small_house() -> None:
    house = parsed(a="import b\nfrom c import d", b="from c import d", c__d="", bench__x="import a")
    assert place_graph(house) == {"a": {"b", "c"}, "b": {"c"}, "c": set(), "bench": {"a"}}
    assert floors(place_graph(house)) == {"c": 1, "b": 2, "a": 3, "bench": 4}
    assert counts(house) == {"places": 4, "arrows": 4, "floors": 4, "circles of files": 0, "circles of places": 0}


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    house = parsed(one__a="from two import b", two__b="", two__c="from one import d", one__d="")
    assert counts(house)["circles of places"] == 1 and counts(house)["circles of files"] == 0


@pytest.mark.parametrize(
    "texts",
    [
        {"tuning__x": "import pretrain", "pretrain": ""},
        {"rope__x": "import tokenizer", "tokenizer": ""},
        {"lora__x": "from checkpoint import peft", "checkpoint__peft": ""},
        {"model": "from checkpoint import directory", "checkpoint__directory": ""},
        {"tuning__x": "from safetensors.torch import save_file"},
        {"training__x": "def f():\n    from checkpoint import directory", "checkpoint__directory": ""},
        {"decoding__x": "from chat.template import load", "chat__template": ""},
        {"training__x": "print('done')"},
    ],
)
def test_each_rule_sees_what_breaks_it(texts) -> None:
    assert len(broken_rules(parsed(**texts))) == 1


def test_what_is_allowed_is_not_seen() -> None:
    allowed = {
        "rope__x": "import hardware\nfrom rope import y",
        "rope__y": "",
        "hardware": "",
        "bench__z": "import eval",
    }
    assert broken_rules(parsed(eval="print(1)", cli__w="print(1, file=None)", **allowed)) == []
