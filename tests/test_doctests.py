"""Examples in docstrings run, every public name has one, and the program whose types are checked runs too."""

from __future__ import annotations

import doctest
import importlib
import inspect
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import lvlm_fastxai as fx

PACKAGE = Path(fx.__file__).parent
PROMPT = ">>>"


def modules_with_examples() -> list[str]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if "triton_kernels" not in parts and PROMPT in path.read_text(encoding="utf-8"):
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


def test_no_example_is_skipped() -> None:
    wrong = [name for name in modules_with_examples() if "+SKIP" in inspect.getsource(importlib.import_module(name))]
    assert not wrong


def public_names() -> Iterator[tuple[str, object]]:
    for prefix, room, names in (
        ("", fx, fx.__all__),
        ("ops.", fx.ops, [name for name in dir(fx.ops) if not name.startswith("_")]),
        ("fastrm.", fx.fastrm, fx.fastrm.__all__),
    ):
        for name in names:
            value = getattr(room, name)
            if not isinstance(value, ModuleType) and (inspect.isclass(value) or inspect.isfunction(value)):
                yield f"{prefix}{name}", value


def test_every_public_name_has_an_example() -> None:
    named = dict(public_names())
    assert {"Explainer", "ops.relevancy_product", "fastrm.stream"} <= named.keys()
    assert not [name for name, value in named.items() if PROMPT not in (inspect.getdoc(value) or "")]


@pytest.mark.usefixtures("one_thread")
def test_the_typed_example_runs() -> None:
    runpy.run_path(str(Path(__file__).with_name("typed_example.py")), run_name="__main__")
