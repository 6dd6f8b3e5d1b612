"""Which part of the package may import which: the directions that DESIGN.md draws."""

import ast
from functools import cache
from pathlib import Path

import pytest

import gen_accel
from gen_accel.kernels import KERNELS

PACKAGE = Path(gen_accel.__file__).parent

# From the ground up: a part imports parts of lower floors and itself.
FLOORS = (
    (
        *(
            "hub",
            "lazy",
            "memory",
            "parsing",
            "paths",
            "process",
            "published",
            "registry",
            "runs",
            "served",
            "version",
        ),
        "video",
    ),
    ("io",),
    ("cluster", "config"),
    ("plan",),
    ("method",),
    ("kernels",),
    ("block_mask", "functional"),
    ("attention_processors",),
    ("measure",),
    ("pipelines",),
    ("demo",),
    ("lora",),
    ("cli", "ui"),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
# Fronts and signs, which lead to every floor and belong to none.
ABOVE_ALL = ("gen_accel", "__main__")


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, set[str]]:
    """Modules of the package to those that they import anywhere, in functions too."""
    files = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                home = node.module or ""
                if node.level:
                    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    home = ".".join([*above, home] if home else above)
                whole = [f"{home}.{alias.name}" for alias in node.names]
                named = [full if full in files else home for full in whole]
            else:
                continue
            found[name] |= {one for one in named if one in files} - {name}
    return found


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


@pytest.mark.slow
def test_every_part_has_a_floor():
    parts = {part_of(module) for module in imports()}
    assert parts == {*FLOOR, *ABOVE_ALL}


def test_no_import_runs_upward():
    upward = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if part_of(module) not in ABOVE_ALL
        and (part_of(other) in ABOVE_ALL or FLOOR[part_of(other)] > FLOOR[part_of(module)])
    ]
    assert upward == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one node, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_the_finder_of_circles_finds_one():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_import_circle():
    """Between modules. A package's `__init__`, which gathers what its modules hold, is left out
    where a module below it imports a neighbour through it."""
    assert circles(imports()) == []


def test_a_kernel_imports_no_method_and_no_other_kernel():
    def backend(module: str) -> str | None:
        parts = module.split(".")
        return (
            parts[2] if parts[1:2] == ["kernels"] and parts[2:3] and parts[2] in KERNELS else None
        )

    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        if backend(module)
        for other in others
        if part_of(other) == "attention_processors"
        or (backend(other) is not None and backend(other) != backend(module))
    ]
    assert wrong == []


def names_of(path: Path) -> set[str] | None:
    """What a module holds at its top; None where it answers for further names by itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if node.name == "__getattr__":
                return None
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    return found


@pytest.mark.slow
def test_tests_benchmarks_and_examples_import_names_that_there_are():
    """A renamed function is found in a second here, and otherwise by the slowest test."""
    root = PACKAGE.parent
    files = {module_of(path): path for path in PACKAGE.rglob("*.py")}
    held = {module: names_of(path) for module, path in files.items()}
    outside = [
        path
        for part in ("tests", "benchmarks", "examples")
        for path in sorted((root / part).rglob("*.py"))
    ]
    assert outside
    missing = []
    for path in outside:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module not in held:
                continue
            there = held[node.module]
            missing += [
                f"{path.relative_to(root)}:{node.lineno} {node.module}.{alias.name}"
                for alias in node.names
                if there is not None
                and alias.name not in there
                and f"{node.module}.{alias.name}" not in files
            ]
    assert missing == []
