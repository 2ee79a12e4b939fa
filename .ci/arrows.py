"""Holds the direction of imports: python .ci/arrows.py [--graph]

Every import counts, also one inside a function or under TYPE_CHECKING, but for those of FOR_TYPES. Exits with 1 on an
arrow that points upwards, and on a circle. `--graph` prints each module with those it imports.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

FOLDERS = {"saef": "core", "saef.hooks": "hooks", "saef.integrations": "integrations"}
# From the bottom up; a module imports from its own folder and from rows below its own.
ROWS = [
    ["saef.rules", "saef.comm"],
    ["saef.wire", "saef.protocols"],
    ["saef.step"],
    ["saef.checkpoint", "saef.telemetry"],
    ["saef.state"],
    ["saef.storage", "saef.later"],
    ["saef"],
    ["saef.hooks"],
    ["saef.integrations"],
    ["saef.trial"],
    ["saef.__main__"],
]
# `saef.hooks` and `saef.integrations` are attributes of `saef` that it imports by name when they are first used. Under
# TYPE_CHECKING, and nowhere else, it may say so to type checkers.
FOR_TYPES = {("saef", "saef.hooks"), ("saef", "saef.integrations")}
ROOM = {room: row for row, rooms in enumerate(ROWS) for room in rooms}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the distribution by its name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The distribution's modules that a module imports."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text("utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{source}.{alias.name}"
                found = target if target in known else source if source in known else ""
                if found and not (id(node) in for_types and (name, found) in FOR_TYPES):
                    yield found


def room(name: str) -> str:
    """The longest name in ROWS that a module belongs to."""
    return max((r for r in ROOM if name == r or (r != "saef" and name.startswith(f"{r}."))), key=len, default="")


def main() -> int:
    known = modules(Path(__file__).resolve().parent.parent)
    graph = {name: sorted({*imports(name, path, known)} - {name}) for name, path in known.items()}
    if "--graph" in sys.argv:
        for name, targets in graph.items():
            print(f"{name:40} {' '.join(targets)}")
    problems = [f"{name} is in no room: name it in {Path(__file__).name}" for name in graph if not room(name)]
    for name, targets in graph.items():
        for target in targets:
            mine, theirs = room(name), room(target)
            if mine and theirs and mine != theirs and ROOM[theirs] >= ROOM[mine]:
                problems.append(f"{name} imports {target}: arrows point down only")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        problems.append(f"a circle: {' imports '.join(error.args[1][::-1])}")
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(graph)} modules, {sum(map(len, graph.values()))} arrows, {len(problems)} problems")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
