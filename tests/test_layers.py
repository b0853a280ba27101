"""Rooms import from the floors below them only; nothing low imports something high, there is no circle."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dskd_lightning

PACKAGE = Path(dskd_lightning.__file__).parent
FLOORS: list[set[str]] = [
    {"errors", "structures", "cache_dir", "cores", "memory", "modes", "ranks", "waiting"},
    {"described", "processor"},
    {"files", "http_json", "tokenizers", "functional", "demo"},
    {"projection", "checkpoints"},
    {"alignment"},
    {"generation", "runs"},
    {"models"},
    {"strategies"},
    {"objectives"},
    {"training"},
    {"data"},
    {"teacher_cache"},
    {"assembly"},
    {"module"},
    {"evaluation"},
    {"callbacks"},
    {"comparison"},
    {"launch"},
    {"study", "vocab", "demo.build"},
    {"planning"},
    {"cli"},
]
"""From the ground up; a module named with its dot stands on a floor of its own, apart from its package."""
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
ENTRANCES = {"__init__", "__main__"}  # of the package itself: they name what is public


def _modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in ENTRANCES:
            yield ".".join(parts).removesuffix(".__init__"), path


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules of this package that run-time code imports, inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dskd_lightning."):
            module = (node.module or "").removeprefix("dskd_lightning.")
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if PACKAGE.joinpath(*inner.split(".")).with_suffix(".py").is_file() else module
        elif isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("dskd_lightning.")
                for a in node.names
                if a.name.startswith("dskd_lightning.")
            )
        else:
            yield from _imports(node)


def _room(module: str) -> str:
    return module if module in FLOOR else module.partition(".")[0]


def _graph() -> dict[str, set[str]]:
    return {name: set(_imports(ast.parse(path.read_text("utf-8")))) for name, path in _modules()}


def test_every_room_has_a_floor() -> None:
    assert {_room(name) for name in _graph()} == set(FLOOR)


def test_no_room_imports_from_a_higher_floor() -> None:
    upward = [
        f"{name} imports {other}"
        for name, others in _graph().items()
        for other in others
        if (room := _room(name)) != (target := _room(other)) and FLOOR[target] >= FLOOR[room]
    ]
    assert upward == []


def test_modules_form_no_circle() -> None:
    graph = _graph()
    seen: dict[str, bool] = {}  # False while a module's own imports are being walked

    def walk(name: str, path: tuple[str, ...]) -> None:
        if name in seen:
            assert seen[name], " -> ".join([*path[path.index(name) :], name])
            return
        seen[name] = False
        for other in sorted(graph.get(name, ())):
            # A package's __init__ gathers its modules, which never import it back.
            walk(other, (*path, name))
        seen[name] = True

    for name in graph:
        walk(name, ())


def _reached_from(start: str) -> set[str]:
    graph, reached, waiting = _graph(), set[str](), [start]
    while waiting:
        name = waiting.pop()
        if name in graph and name not in reached:
            reached.add(name)
            waiting += graph[name]
    return reached


def test_the_module_alone_brings_no_report() -> None:
    """Torchmetrics imports matplotlib where it is installed: only our own imports can be looked at."""
    reached = _reached_from("module")
    assert not {_room(name) for name in reached} & {"comparison", "callbacks", "evaluation", "launch"}
    sources = {name: path.read_text("utf-8") for name, path in _modules()}
    unwanted = re.compile(r"^(import|from) (matplotlib|jinja2)", re.MULTILINE)  # at the top, not within
    assert [name for name in reached if unwanted.search(sources[name])] == []


def test_importing_the_module_leaves_the_upper_rooms_alone() -> None:
    code = "import sys; from dskd_lightning import DistillationModule; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {name.split(".")[1] for name in done.stdout.split() if name.startswith("dskd_lightning.")}
    assert not imported & {"comparison", "callbacks", "evaluation", "launch", "cli"}
