"""The list of operators: every room of the house reads it, and an operator that is on it lacks nothing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lvlm_fastxai as fx
from lvlm_fastxai.ops import _operators

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lvlm_fastxai"
CATALOGUE = fx.ops.catalogue()
# Where the kernels of each backend lie.
KERNELS = {"cpu": "csrc/cpu/{}.cpp", "cuda": "csrc/cuda/{}.cu", "triton": "triton_kernels/{}.py"}
# Every operator has these.
ROOMS = (
    "lvlm_fastxai/ops/{}.py",
    "lvlm_fastxai/reference/{}.py",
    "tests/test_{}.py",
    "benchmarks/bench_{}.py",
)


def test_the_list_has_what_the_rooms_have() -> None:
    found = {path.stem for path in (PACKAGE / "reference").glob("[!_]*.py")}
    found |= {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    found |= {path.stem for path in (ROOT / "triton_kernels").glob("[!_]*.py")}
    found |= {path.name.removesuffix("_kernel.cpp") for path in (ROOT / "csrc" / "cpu").glob("*_kernel.cpp")}
    listed = re.findall(r"^from lvlm_fastxai\.ops\.(\w+) import \1 as \1$", Path(_operators.__file__).read_text(), re.M)
    assert set(listed) == set(CATALOGUE) == found


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_operator_has_all_its_rooms(name: str) -> None:
    operator = CATALOGUE[name]
    assert not [room for room in ROOMS if not (ROOT / room.format(name)).is_file()]
    assert callable(getattr(fx.ops, name))
    assert fx.ops.backends(name)["reference"] is None
    for backend, kernels in KERNELS.items():
        has_kernels = backend in operator.backends and operator.composed_of is None
        assert (ROOT / kernels.format(name)).is_file() == has_kernels, backend


@pytest.mark.parametrize("name", [name for name, operator in CATALOGUE.items() if operator.composed_of is not None])
def test_a_composed_operator_calls_the_one_that_it_names(name: str) -> None:
    tree = ast.parse((PACKAGE / "ops" / f"{name}.py").read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert CATALOGUE[name].composed_of in calls


@pytest.mark.parametrize("name", fx.ops.operators())
def test_an_operator_has_the_tests_that_each_needs(name: str) -> None:
    tree = ast.parse((ROOT / "tests" / f"test_{name}.py").read_text(encoding="utf-8"))
    tests = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    gradient = "test_gradcheck" if CATALOGUE[name].differentiable else "test_backward_is_refused"
    assert {"test_opcheck", gradient, "test_compiles_to_one_graph"} <= tests
