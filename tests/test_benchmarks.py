"""The benchmarks' own house: commands load when they are called, imports make no circle, and cases stay what they were.

What only a long run can show is not here; the smallest case of each measurement is.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lvlm_fastxai as fx
from benchmarks.__main__ import SUITES
from benchmarks.common import memory, timing
from benchmarks.ops import cases as ops_cases
from benchmarks.sweeps.pruned import cases, descents, texts, tradeoff
from lvlm_fastxai import ops

ROOT = Path(__file__).parent.parent
ROOMS = ("common", "models", "ops", "real_lvlm", "sweeps", "fastrm", "gpu")


def modules() -> dict[str, ast.Module]:
    """Dotted name → source of every module of the benchmarks."""
    found = {}
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Modules of the benchmarks that one imports, anywhere in it."""
    is_package = (ROOT / name.replace(".", "/")).is_dir()
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                module = f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source
                if module in known and module != name:
                    yield module


def test_imports_make_no_circle_and_rooms_use_those_before_them() -> None:
    trees = modules()
    uses = {name: set(imports(name, tree, set(trees))) for name, tree in trees.items()}
    wrong = []
    for name, used in uses.items():
        room = name.split(".")[1] if name.count(".") else ""
        for other in used:
            theirs = other.split(".")[1] if other.count(".") else ""
            if room in ROOMS and (theirs not in ROOMS or ROOMS.index(theirs) > ROOMS.index(room)):
                wrong.append(f"{name} imports {other}")
    assert not wrong
    # Whoever imports nothing that is left is taken away; what stays in the end imports itself.
    left = dict(uses)
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("name", SUITES, ids="{} suite".format)
def test_every_suite_takes_its_arguments(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{SUITES[name][0]}")
    parser = argparse.ArgumentParser(description=module.__doc__)
    module.add_arguments(parser)
    assert parser.format_help()
    assert callable(module.main)


def test_the_list_of_suites_loads_none_of_them() -> None:
    program = (
        "import sys; from benchmarks.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: print({'torch', 'numpy', 'benchmarks.ops'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in SUITES) and done.stdout.endswith("set()\n")


def has_history() -> bool:
    command = ["git", "cat-file", "-e", f"{texts.COMMIT}:LICENSE"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not has_history(), reason="no git checkout with its history")
def test_texts_are_those_of_the_commit_that_was_measured() -> None:
    every = {**texts.TEXTS, **texts.CALIBRATION_TEXTS, **texts.QUESTIONS, **texts.CALIBRATION_QUESTIONS}
    files = {file for each in every.values() for file in each.files}
    listed = ["git", "ls-tree", "-r", "--name-only", texts.COMMIT]
    assert files <= set(subprocess.check_output(listed, cwd=ROOT, text=True).splitlines())

    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    # The CPU kernel, for one, has changed since, and tests/oracle.py has moved.
    read = texts.Reader(tokenizer).tokens(("tests/oracle.py",), 60)
    assert "".join(map(chr, read)) == texts.text_of("tests/oracle.py")[:60]
    prose = texts.Reader(tokenizer).tokens(("docs/evaluation.md",), 5000)
    assert "\n|" not in "".join(map(chr, prose)) and "\n|" in texts.text_of("docs/evaluation.md")


def test_a_text_that_is_not_there_is_said() -> None:
    with pytest.raises(SystemExit, match=r"LICENSE is read from commit 0000000, which needs a git checkout"):
        texts.text_of("LICENSE", "0" * 40)


def test_a_descent_gives_the_pruned_rows(one_thread: None) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    targets = [(0, 39, 7), (0, 30, 3)]
    case = cases.Case("random", "prose", {"input_ids": torch.randint(0, 50, (1, 40))}, targets)
    exact = descents.exact_rows(model, case)
    with descents.opened(model, case) as opened:
        points = descents.points_of(opened, case, exact, (0.3, 0.05))
        row = opened.row(0, 0.3)
    torch.testing.assert_close(row, fx.relevancy_rows(model, case.inputs, targets[:1], row_tolerance=0.3)[0])
    assert [(point["row"], point["tolerance"]) for point in points] == [(39, 0.3), (39, 0.05), (30, 0.3), (30, 0.05)]
    assert all(0 < point["error"] < 0.5 and 0 < point["kept"] < 1 for point in points if point["tolerance"] == 0.3)
    lost = descents.half_points(descents.half_copy(model), case, exact)
    assert len(lost) == 2 and all(0 < point["error"] < 0.2 for point in lost)


def test_pictures_are_measured(one_thread: None) -> None:
    settings = argparse.Namespace(pictures=2, tolerances=(0.1,), method="chefer")
    *_, found = tradeoff.picture(settings)
    assert len(found["pointing"]["rows"]) >= 1 and len(found["points"]["rows"]) == len(found["bf16"]["rows"])
    columns = found["pointing"]["columns"]
    assert {"exact", "0.1", "bf16", "same cell, 0.1"} <= set(columns)
    assert all(row[columns.index("same cell, exact")] == 1.0 for row in found["pointing"]["rows"])


def test_operators_are_given_the_tensors_that_they_name() -> None:
    tensors, options = ops_cases.build(ops_cases.Case(2, 1, 9, 8, targets=3, rows=4))
    for operator in ops_cases.WORK:
        arguments = ops_cases.arguments_of(operator, tensors)
        getattr(ops, operator)(*arguments, **options, backend="reference")
    with pytest.raises(LookupError, match="proxy_relevancy takes hidden, offset"):
        ops_cases.arguments_of("proxy_relevancy", tensors)
    square = ops_cases.build(ops_cases.Case(2, 2, 10, 8))[1]["key_ranges"]
    case = ops_cases.Case(2, 2, 10, 8)
    # 55 of 100 entries are visible under the causal mask; two products of 2·8 operations on each in each of two heads.
    assert ops_cases.operations(case, square) == 2 * 8 * 2 * (55 + 55)
    assert ops_cases.operations(case, square, "glimpse_statistics") == 2 * 8 * 2 * (55 + 100)
    assert ops_cases.operations(case, square, "attention_backward_relevancy") == 2 * 8 * 2 * (55 + 4 * 55)


def test_a_fresh_process_calls_the_function() -> None:
    assert memory.in_fresh_process(math.factorial, 5) == 120
    with pytest.raises(RuntimeError, match="math:factorial"):
        memory.in_fresh_process(math.factorial, -1)


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    taken = timing.in_turns(calls, 2)
    assert order == ["a", "b"] * 3  # one round warms up
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 2, "b": 2}
