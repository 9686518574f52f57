"""Nothing is too long to be read in one sitting, and no two modules import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lvlm_fastxai"
ROOMS = (PACKAGE, ROOT / "triton_kernels", ROOT / "benchmarks", ROOT / ".ci")

MODULE_LINES, FUNCTION_LINES, LOOSE_FILES = 500, 60, 8


def sources() -> list[Path]:
    # Beside an editable installation lies a link to the Triton kernels.
    found = (path for room in ROOMS for path in room.rglob("*.py"))
    return sorted(path for path in found if (PACKAGE / "triton_kernels") not in path.parents)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines of a function's body that hold code: neither its signature and docstring nor comments."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    if not body:
        return 0
    within = lines[body[0].lineno - 1 : function.end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in within)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """Modules of this repository that a file imports, also inside functions; imports for type checkers are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *((node.module,) if node.module else ())))
            for alias in node.names:
                # `from . import ops` imports a module, `from .errors import ArgumentError` a name of one.
                full = f"{source}.{alias.name}"
                found = full if full in known else source
                if found in known:
                    yield found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which reaches all the others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo.extend(graph[module])
        reached[start] = seen
    return [
        sorted({start, *(other for other in reached[start] if start in reached[other])})
        for start in graph
        if start in reached[start]
    ]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_and_its_functions_can_be_seen_whole(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < MODULE_LINES
    functions = (
        n for n in ast.walk(ast.parse("\n".join(lines))) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert not {f.name: n for f in functions if (n := code_lines(f, lines)) > FUNCTION_LINES}


def test_no_two_modules_import_each_other() -> None:
    modules = {module_of(path): path for path in sources()}
    graph = {name: set(imported(path, modules.keys())) - {name} for name, path in modules.items()}
    assert circles(graph) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"], ["b", "c"]]


def test_few_files_lie_loose() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= LOOSE_FILES
