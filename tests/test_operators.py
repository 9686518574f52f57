"""The list of operators: every room of the house reads it, and an operator that is on it lacks nothing.

The toy operator in `toy_operator/` has what docs/extending.md asks for. Here it runs with a stand-in for its kernel;
test_build.py compiles the kernel.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import native
from torch import Tensor

import lvlm_fastxai as fx
from lvlm_fastxai import ops, reference
from lvlm_fastxai.errors import ArgumentError, BackendUnavailableError
from lvlm_fastxai.ops import _dispatch, _operators

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lvlm_fastxai"
CATALOGUE = fx.ops.catalogue()
# Where the kernels of each backend lie, and what checks their machine code.
KERNELS = {
    "cpu": ("csrc/cpu/{}.cpp",),
    "cuda": ("csrc/cuda/{}.cu", "tests/native/{}.h"),
    "triton": ("triton_kernels/{}.py", ".ci/variants/{}.py"),
}
# Every operator has these.
ROOMS = (
    "lvlm_fastxai/ops/{}.py",
    "lvlm_fastxai/reference/{}.py",
    "tests/test_{}.py",
    "benchmarks/ops/bench_{}.py",
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
        assert [(ROOT / file.format(name)).is_file() for file in kernels] == [has_kernels] * len(kernels), backend


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


TOY = "softplus_product"
TOY_FILES = Path(__file__).with_name("toy_operator")


def kernel(rows: Tensor, weight: Tensor, beta: float) -> Tensor:
    """What stands in for the toy's C++ kernel, which is not in the library that is loaded here."""
    assert rows.dtype == torch.float32
    return torch.nn.functional.softplus(rows @ weight, beta)


@pytest.fixture(scope="module")
def toy() -> Iterator[Any]:
    """The toy's contract, with its files in the rooms of the package."""
    with pytest.MonkeyPatch.context() as patch:
        for room in (ops, reference):
            patch.setattr(room, "__path__", [*room.__path__, str(TOY_FILES / room.__name__.rpartition(".")[2])])
        module = importlib.import_module(f"lvlm_fastxai.ops.{TOY}")
        torch.library.impl(f"lvlm_fastxai::{TOY}", "CPU", kernel)
        yield module
    del _dispatch._operators[TOY]
    delattr(ops, TOY)


def toy_arguments(dtype: torch.dtype = torch.float32, rows: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(rows, 3, generator=generator, dtype=dtype, requires_grad=True),
        torch.randn(3, generator=generator, dtype=dtype, requires_grad=True),
    )


@native
def test_the_toy_is_dispatched_as_any_operator(toy: Any) -> None:
    assert ops.catalogue()[TOY].kind == "rows" and ops.catalogue()[TOY].differentiable
    assert ops.backends(TOY) == {"cpu": None, "reference": None}
    rows, weight = toy_arguments()
    found = toy.softplus_product(rows, weight, beta=0.7)
    torch.testing.assert_close(found, toy.dense(rows, weight, 0.7))
    assert torch.equal(found, kernel(rows, weight, 0.7))
    with fx.use_backend("reference"):
        assert torch.equal(toy.softplus_product(rows, weight, beta=0.7), toy.dense(rows, weight, 0.7))
    with pytest.raises(BackendUnavailableError, match="backend 'triton' is not implemented"):
        toy.softplus_product(rows, weight, backend="triton")
    with pytest.raises(BackendUnavailableError, match="served by the reference only"):
        toy.softplus_product(*toy_arguments(torch.float64), backend="cpu")
    with pytest.raises(ArgumentError, match=r"softplus_product: `weight` must have shape \(3,\), got \(2,\)"):
        toy.softplus_product(rows, weight[1:])
    with pytest.raises(ArgumentError, match="`rows` must be float32 or float64"):
        toy.softplus_product(rows.half(), weight.half())


@native
def test_the_toy_passes_opcheck(toy: Any) -> None:
    operator = getattr(torch.ops.lvlm_fastxai, TOY).default
    torch.library.opcheck(operator, (*toy_arguments(), 0.7))


def test_the_toy_passes_gradcheck(toy: Any) -> None:
    assert torch.autograd.gradcheck(
        lambda *arguments: toy.softplus_product(*arguments, beta=0.7), toy_arguments(torch.float64)
    )


@native
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_one_formula_serves_every_backend(toy: Any, backend: str) -> None:
    """The gradient is the registered one on each, and the formula is told which backend ran."""
    rows, weight = toy_arguments()
    found = toy.softplus_product(rows, weight, beta=0.7, backend=backend)
    gradients = torch.autograd.grad(found.sum(), (rows, weight))
    expected = torch.autograd.grad(toy.dense(rows, weight, 0.7).sum(), (rows, weight))
    torch.testing.assert_close(gradients, expected)
    assert toy.softplus_product(rows, weight, backend=backend).grad_fn.backend == backend


@native
@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_toy_compiles_to_one_graph_with_its_backward(toy: Any, backend: str | None) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(toy.softplus_product, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (5, 8):
        rows, weight = toy_arguments(rows=count)
        results = [call(rows, weight, beta=0.7, backend=backend) for call in (compiled, toy.softplus_product)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(result.sum(), (rows, weight)) for result in results))
