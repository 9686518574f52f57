"""The Triton kernels without a GPU: the operators' own tests in the interpreter, and when Triton is chosen."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lvlm_fastxai import ops
from lvlm_fastxai.ops._dispatch import Problem, chosen_backend

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
WITH_KERNELS = [name for name in ops.operators() if "triton" in ops.catalogue()[name].backends]
# Where requirements/dev.in names it.
EXPECTED = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info >= (3, 11)
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None and not (EXPECTED and os.environ.get("CI")),
    reason="triton is not installed",
)


def in_the_interpreter(*command: str, timeout: int = 280) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    for name in ("LVLM_FASTXAI_BACKEND", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    # A worker's variables would make the tests inside believe that they are one.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    finished = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return finished.stdout


@with_triton
@pytest.mark.parametrize("operator", WITH_KERNELS)
def test_the_operators_tests_pass_in_the_interpreter(operator: str) -> None:
    output = in_the_interpreter(
        *("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "no:benchmark"),
        *("-k", "triton or opcheck or first_choice", f"tests/test_{operator}.py"),
    )
    expected = importlib.import_module(f"test_{operator}").INTERPRETED_TESTS
    passed = re.search(r"(\d+) passed", output)
    assert passed is not None and int(passed[1]) >= expected, output[-2000:]
    assert "skipped" not in output, output[-2000:]


@with_triton
def test_what_no_row_sees_is_not_read() -> None:
    """Padding that holds NaN, and rows that see nothing and are NaN, change no gradient: 0 · NaN would be NaN."""
    program = (
        "import sys, torch\n"
        "sys.path.insert(0, 'tests')\n"
        "from test_attention_backward_relevancy import make\n"
        "for dtype in (torch.float32, torch.float16):\n"
        "    problem = make(targets=2, queries=70, dtype=dtype, lengths=torch.tensor([[9, 61]]))\n"
        "    case, expected = problem.case, problem.run('triton')\n"
        "    blind = (case.ranges[..., 0] >= case.ranges[..., 1])[0]\n"
        "    assert 0 < blind.sum() < 70\n"
        "    for hidden in (case.key, case.value):\n"
        "        hidden[:, :, :9] = hidden[:, :, 61:] = torch.nan\n"
        "    for unseeing in (case.query, case.grad_output, problem.output):\n"
        "        unseeing[..., blind, :] = torch.nan\n"
        "    assert all(map(torch.equal, problem.run('triton'), expected))\n"
    )
    in_the_interpreter("-c", program)


@with_triton
def test_the_interpreter_serves_the_cpu_when_it_is_asked_for() -> None:
    program = (
        "import torch\n"
        "from lvlm_fastxai import ops\n"
        "from lvlm_fastxai.ops._dispatch import Problem, chosen_backend\n"
        "name, cpu = 'relevancy_product', torch.device('cpu')\n"
        "assert ops.backends(name)['triton'] is None\n"
        "assert chosen_backend(name, cpu, torch.float16) != 'triton'\n"
        "assert chosen_backend(name, cpu, torch.float16, 'triton') == 'triton'\n"
        "print(ops.catalogue()[name].backends['triton'].supports(Problem(cpu, torch.bfloat16)))\n"
    )
    assert "bfloat16 wrongly" in in_the_interpreter("-c", program)


@pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="the interpreter is on")
@with_triton
def test_triton_says_why_not() -> None:
    def reason(problem: Problem | None) -> str:
        return ops.catalogue()["relevancy_product"].backends["triton"].supports(problem) or ""

    assert "TRITON_INTERPRET=1" in reason(Problem(CPU, torch.float32))
    assert "reference only" in reason(Problem(CPU, torch.float64))
    assert "the tensors are on meta" in reason(Problem(torch.device("meta"), torch.float32))
    if not torch.cuda.is_available():
        assert "no CUDA device" in reason(None)
        assert "no CUDA device" in str(ops.backends("relevancy_product")["triton"])
    assert chosen_backend("relevancy_product", CPU, torch.float32) != "triton"


@with_triton
def test_pieces_cover_a_width() -> None:
    from lvlm_fastxai.triton_kernels.relevancy_product import pieces

    for width in range(1, 257):
        low, high = pieces(width)
        assert width <= low + high <= max(16, width + 15 + width // 4)
        assert all(piece == 0 or (piece >= 16 and piece & (piece - 1) == 0) for piece in (low, high))
    assert [pieces(width) for width in (64, 72, 80, 96, 128, 256)] == [
        *((64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (256, 0)),
    ]


@with_triton
def test_targets_share_score_tiles_where_that_is_less_work() -> None:
    from lvlm_fastxai.triton_kernels.relevancy_product import targets_per_program

    assert [targets_per_program(n, False) for n in (1, 2, 3, 4, 5, 16)] == [1, 2, 1, 2, 2, 2]
    assert targets_per_program(4, False, width=256) == 1
    assert targets_per_program(5, True) == 5


@with_triton
def test_a_tile_s_keys_are_split_until_there_are_programs_enough() -> None:
    from lvlm_fastxai.triton_kernels.glimpse_statistics import splits_of

    # The scratch grows with the number of splits: bounded, and one where the rows alone make programs enough.
    assert [splits_of(tiles, 1000) for tiles in (1, 19, 40, 300, 512, 4096)] == [16, 16, 13, 2, 1, 1]
    assert splits_of(1, 3) == 3


@with_triton
def test_columns_are_read_in_as_few_pieces_as_pad_least() -> None:
    from lvlm_fastxai.triton_kernels.proxy_relevancy import configuration

    widths = (1, 512, 1024, 2048, 3584, 4096, 5120, 8192, 16384)
    read = [configuration(torch.bfloat16, width, 1)[::2] for width in widths]
    # Columns of a program, and states of each that it reads at a time.
    assert read == [
        *((8, 512), (8, 512), (4, 1024), (2, 2048), (4, 512), (1, 4096), (2, 1024), (1, 8192), (1, 8192)),
    ]


@with_triton
def test_centred_columns_of_several_pieces_far_from_zero_and_from_their_start() -> None:
    """The shift is the mean of the first states only, here of 512 of 1100, a hundred deviations off zero."""
    program = (
        "import torch\n"
        "import lvlm_fastxai as fx\n"
        "torch.manual_seed(0)\n"
        "for targets in (1, 3):\n"
        "    hidden, query = torch.randn(2, 150, 1100), torch.randn(2, targets, 1100) / 11\n"
        "    hidden[..., :512] += 4\n"
        "    hidden += torch.tensor((250.0, -250.0))[:, None, None]\n"
        "    problem = hidden, query, torch.zeros(2, targets)\n"
        "    for activation in ('sigmoid', 'softmax'):\n"
        "        options = {'norm': 'layer', 'activation': activation}\n"
        "        found = fx.ops.proxy_relevancy(*problem, **options, backend='triton')\n"
        "        truth = fx.ops.proxy_relevancy(*(t.double() for t in problem), **options, backend='reference')\n"
        "        for result, true in zip(found, truth, strict=True):\n"
        "            error = (result - true).abs().max()\n"
        "            assert error <= 1e-5, (targets, activation, error)\n"
    )
    in_the_interpreter("-c", program)
