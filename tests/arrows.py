"""The structure of the code, read from its imports: places, arrows, floors, circles, and the rules they keep.

python -m tests.arrows     print the counts, the floors, and whatever breaks a rule

A place is a script or file at the top, or a folder. An arrow A -> B means that A imports B, anywhere in A. The floor of
a place is one above all that it imports. docs/architecture.md explains the plan that these rules keep.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = {
    *("train_tokenizer", "data_process", "pretrain", "fine_tuning", "quantize", "convert", "eval", "serve", "plan"),
    *("doctor", "report"),
}
METHODS = ("rope", "attention", "quant", "optim", "loss")
SPEAK = {"serving", "evaluation", "bench", *SCRIPTS}  # may print to standard output
MOST = {"places": 42, "arrows": 260, "floors": 10, "circles of files": 0, "circles of places": 0}
LIMITS = {"file": 400, "class": 180, "function, nine in ten": 25}  # lines


class Module(NamedTuple):
    """One Python file: its dotted name, the place it belongs to, its syntax tree and its number of lines."""

    name: str
    place: str
    tree: ast.Module
    lines: int


def read_modules(repository: Path = REPOSITORY) -> dict[str, Module]:
    """Parse every Python file at the top and in the folders beside it, without the tests and examples."""
    modules = {}
    for path in sorted([*repository.glob("*.py"), *repository.glob("*/*.py")]):
        parts = path.relative_to(repository).with_suffix("").parts
        if parts[0] in ("tests", "examples") or parts[0].startswith("."):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf8")
        modules[name] = Module(name, parts[0], ast.parse(text), text.count("\n"))
    return modules


def imported(module: Module, modules: dict[str, Module]) -> Iterator[str]:
    """Yield the names of our modules that `module` imports, at its top or inside a function."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in modules or node.module in modules:
                    yield whole if whole in modules else node.module


def file_graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Return for each module those that it imports."""
    return {name: set(imported(module, modules)) - {name} for name, module in modules.items()}


def place_graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Return for each place those that it imports."""
    graph: dict[str, set[str]] = {module.place: set() for module in modules.values()}
    for name, targets in file_graph(modules).items():
        graph[modules[name].place] |= {modules[target].place for target in targets} - {modules[name].place}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for target in graph[node]:
            if target not in number:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], number[target])
        if low[node] == number[node]:
            at = stack.index(node)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in number:
            visit(node)
    return found


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return the floor of each place: 1 where it imports nothing of ours. The graph must have no circles."""
    known: dict[str, int] = {}

    def floor(place: str) -> int:
        if place not in known:
            known[place] = 1 + max((floor(target) for target in graph[place]), default=0)
        return known[place]

    return {place: floor(place) for place in graph}


def counts(modules: dict[str, Module]) -> dict[str, int]:
    """Return how many places, arrows, floors and circles there are."""
    places = place_graph(modules)
    place_circles = circles(places)
    return {
        "places": len(places),
        "arrows": sum(map(len, places.values())),
        "floors": 0 if place_circles else max(floors(places).values()),
        "circles of files": len(circles(file_graph(modules))),
        "circles of places": len(place_circles),
    }


# ---- the rules


def broken_rules(modules: dict[str, Module]) -> list[str]:
    """Return a sentence for each import or call that breaks one of the eight rules of docs/architecture.md."""
    graph = file_graph(modules)
    broken = []

    def forbid(sources: Iterable[str], allowed: set[str] | None, forbidden: set[str], why: str) -> None:
        for name in sources:
            for target in graph[name]:
                place = modules[target].place
                if place == modules[name].place:
                    continue
                if place in forbidden or (allowed is not None and place not in allowed):
                    broken.append(f"{name} imports {target}: {why}")

    def inside(*places: str) -> list[str]:
        return [name for name, module in modules.items() if module.place in places]

    everything_else = [name for name, module in modules.items() if module.place != "bench"]
    forbid(everything_else, None, SCRIPTS, "a script is a recipe, and no library")
    forbid(inside(*METHODS), {"hardware"}, set(), "a method is read, tested and copied on its own")
    forbid(inside("lora"), {"quant"}, set(), "an adapter knows trees of modules, not files, not our model")
    below_model = {"model_args", "rope", "attention", "loss", "hardware"}
    forbid(inside("model"), below_model, set(), "the learner's file does not know the disk")
    forbid(inside("training"), None, {"checkpoint", "chat", "tuning", "serving"}, "the loop is handed save and load")
    forbid(inside("decoding"), None, {"tokenizer", "chat", "serving"}, "ids in, ids out")
    for name, module in modules.items():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import | ast.ImportFrom) and module.place not in ("checkpoint", "files", "bench"):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                if any(each.split(".")[0] == "safetensors" for each in names):
                    broken.append(f"{name} imports safetensors: only checkpoint/ reads and writes weights")
            if module.place not in SPEAK and is_print(node):
                broken.append(f"{name}:{node.lineno} prints to standard output, which belongs to results")
    return broken


def is_print(node: ast.AST) -> bool:
    """Whether a node of a syntax tree is a call of print without `file`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"):
        return False
    return not any(keyword.arg == "file" for keyword in node.keywords)


def lengths(modules: dict[str, Module]) -> dict[str, list[tuple[int, str]]]:
    """Return the lines of every file, class and function outside bench/, longest first."""
    found: dict[str, list[tuple[int, str]]] = {"file": [], "class": [], "function": []}
    for name, module in modules.items():
        if module.place == "bench":
            continue
        found["file"].append((module.lines, name))
        for node in ast.walk(module.tree):
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found[kind].append((node.end_lineno - node.lineno + 1, f"{name}.{node.name}"))
    return {kind: sorted(items, reverse=True) for kind, items in found.items()}


def ninth_decile(values: list[int]) -> float:
    """Return what nine in ten of some lengths do not exceed."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1]


def main() -> int:
    """Print the structure; returns 1 where a rule is broken."""
    modules = read_modules()
    graph = place_graph(modules)
    measured = counts(modules)
    for name, count in measured.items():
        print(f"{name:20} {count:4}   at most {MOST[name]}")
    if not measured["circles of places"]:
        by_floor = floors(graph)
        for floor in range(max(by_floor.values()), 0, -1):
            print(f"floor {floor}: {'  '.join(sorted(place for place in graph if by_floor[place] == floor))}")
    for circle in [*circles(file_graph(modules)), *circles(graph)]:
        print("circle:", " ".join(circle))
    sizes = lengths(modules)
    print(f"{'lines outside bench':20} {sum(lines for lines, _ in sizes['file']):5,}")
    for kind, items in sizes.items():
        print(f"longest {kind:12} {items[0][0]:4}   {items[0][1]}")
    print(f"nine in ten functions have at most {ninth_decile([n for n, _ in sizes['function']]):.0f} lines")
    broken = broken_rules(modules)
    print(*broken, sep="\n")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
