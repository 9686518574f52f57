"""The tests' own house: what they share lies in `support`."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent


def test_no_test_module_imports_another() -> None:
    """A module that another one imports runs its collection twice, and cannot be changed on its own."""
    wrong = []
    for path in sorted(HERE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            parts = {part for module in modules for part in module.split(".")}
            wrong += [f"{path.relative_to(HERE)} imports {part}" for part in parts if (HERE / f"{part}.py").is_file()]
    assert not wrong
