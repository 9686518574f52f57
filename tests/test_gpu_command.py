"""`make gpu` on a machine without a GPU: the rehearsal, and what the command makes of other programs' output."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import memory
from benchmarks.gpu import claims, command, end_to_end, launch, op, proxy, steps
from benchmarks.gpu.run import Failure, Run
from benchmarks.gpu.steps import Step
from benchmarks.models import decoders
from benchmarks.sweeps import variants
from lvlm_fastxai import ops
from lvlm_fastxai.explain.relevancy_rows import explain_rows
from lvlm_fastxai.sweep import descent as sweep

ROOT = Path(__file__).parent.parent
GPU_STEPS = {"build", "tests", "memcheck", "racecheck", "ncu"}


def test_the_rehearsal_runs_every_step_that_needs_no_gpu(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "benchmarks", "gpu", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu.log").read_text()
    written = json.loads((tmp_path / "gpu.json").read_text())
    head, results = written["machine"], written["results"]
    assert head["rehearsal"] and head["gpu"] is None and head["torch"] == torch.__version__
    outcomes = {name: step["outcome"] for name, step in results["steps"].items()}
    assert outcomes == {step.name: "skipped" if step.name in GPU_STEPS else "passed" for step in steps.STEPS}
    assert "skipped: 5 steps: build, tests, memcheck, racecheck, ncu" in done.stdout

    assert set(results["smoke"]) == set(results["info"]["operators"])
    assert set(results["op"]["cases"]) == set(op.cases(rehearse=True)) and not results["op"]["left_out"]
    for figures in results["op"]["cases"].values():
        assert figures["relevancy_product"]["reference"]["seconds"] > 0
        assert figures["relevancy_product"]["reference"]["share_of_copy_rate"] > 0
        assert figures["glimpse_statistics"]["reference"]["difference"] < 0.01
        assert figures["attention_backward_relevancy"]["reference"]["difference"] < 0.01
        assert figures["library_backward"]["library"]["seconds"] > 0
    assert set(results["proxy"]["cases"]) == set(proxy.REHEARSED_CASES) and not results["proxy"]["left_out"]
    for figures in results["proxy"]["cases"].values():
        assert figures["reference"]["seconds"] > 0 and "error" not in figures["cpu"]
        assert figures["cpu"].get("difference", 0) < 1e-5
    assert results["proxy"]["live_maps"]["step_seconds"] > 0
    for name, (_, wanted) in end_to_end.REHEARSED_CASES.items():
        found = results["end-to-end"]["cases"][name]["variants"]
        assert set(found) == set(wanted)
        assert all(figures["time_ratio"] > 0 for figures in found.values())
        exact = [found[variant]["difference"] for variant in ("lean", "fast_fused", "eager") if variant in found]
        assert max(exact) < 0.01
    assert set(results["end-to-end"]["further_targets"]["llava-1.5-7b-2400"]) == set(end_to_end.FURTHER)
    assert len(results["claims"]) == len(claims.CLAIMS)
    assert {path.name for path in tmp_path.iterdir()} <= {"gpu.json", "gpu.log", "gpu.png"}


def options(folder: Path, **changed: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parsed = parser.parse_args(["--device", "cpu", "--out", str(folder)])
    return argparse.Namespace(**{**vars(parsed), **changed})


def a_run(folder: Path, **environment: str) -> Run:
    run = Run(folder, "cpu", True, {"gpu": None, "device": {"compute_capability": 90}})
    run.environment |= environment
    return run


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    seen: list[str] = []

    def fails(run: Run, seconds: float) -> None:
        run.results["fails"] = {"figure": 1}
        raise Failure("a reason")

    def hangs(run: Run, seconds: float) -> None:
        run.command([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], seconds)

    def looks(run: Run, seconds: float) -> None:
        seen.append((tmp_path / "gpu.json").read_text())

    # The last one's limit is all the time there is, so that the others' are not stretched.
    every = Step("fails", 1, 3, fails), Step("hangs", 1, 3, hangs), Step("looks", 1, 1000, looks)
    assert command.run_steps(options(tmp_path), every) == 1
    written = json.loads((tmp_path / "gpu.json").read_text())["results"]["steps"]
    assert [step["outcome"] for step in written.values()] == ["failed", "timed out", "passed"]
    assert written["fails"]["reason"].endswith("a reason") and "begun" in (tmp_path / "gpu.log").read_text()
    # Written after every step: whoever stops the last one has the figures of those before it.
    before = json.loads(seen[0])["results"]
    assert before["fails"] == {"figure": 1} and set(before["steps"]) == {"fails", "hangs"}


def test_a_gpu_that_torch_cannot_use_is_no_reason_for_a_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nvidia-smi").touch(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert command.run_steps(options(tmp_path, device=None), steps.STEPS) == 1
    assert "finds no GPU to use" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def test_later_steps_keep_the_time_that_they_need() -> None:
    step, later = Step("one", 10, 100, steps.info), [Step("two", 30, 50, steps.info)]
    assert steps.allowance(500, step, later) == 100
    assert steps.allowance(90, step, later) == 60
    assert steps.allowance(39, step, later) == 0
    assert [one.limit for one in steps.stretched([step, *later], 450)] == [300, 150]
    assert steps.stretched([step], 50) == [step]
    assert sum(step.least for step in steps.STEPS) < steps.TOTAL_SECONDS < 540


def test_a_step_without_time_or_program_is_skipped_by_name(tmp_path: Path) -> None:
    outcome = steps.perform(a_run(tmp_path), Step("info", 1, 1, steps.info), 0.0)
    assert (outcome["outcome"], outcome["reason"]) == ("skipped", "no time left")
    outcome = steps.perform(a_run(tmp_path, PATH=str(tmp_path)), Step("build", 1, 1, steps.build), 1.0)
    assert (outcome["outcome"], outcome["reason"]) == ("skipped", "no cmake on this machine")


def test_the_build_uses_switches_that_cmake_knows() -> None:
    described = (ROOT / "CMakeLists.txt").read_text()
    configure, compile_, install = steps.build_commands("cmake", "90", "1.0", Path("build"), Path("prefix"))
    switches = [found[1] for found in re.finditer(r"-D(FASTXAI_\w+)=", " ".join(configure))]
    assert switches
    for switch in switches:
        assert re.search(rf"set\({switch} .* CACHE ", described), switch
    assert "-DFASTXAI_CUDA_ARCHITECTURES=90" in configure
    assert compile_[1] == "--build" and install[1] == "--install"


def test_triton_kernels_are_found_without_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lvlm_fastxai").mkdir()
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "one.py").touch()
    command.link_triton_kernels(tmp_path)  # this environment has them installed
    assert not (tmp_path / "lvlm_fastxai" / "triton_kernels").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command.link_triton_kernels(tmp_path)
    assert (tmp_path / "lvlm_fastxai" / "triton_kernels" / "one.py").is_file()


def run_with(folder: Path, name: str, lines: str) -> Run:
    """A run whose program of this name runs what follows its own options and then prints lines."""
    program = folder / name
    program.write_text(f'#!/bin/sh\nwhile [ "$1" != "{sys.executable}" ]; do shift; done\n"$@" || exit 9\n{lines}\n')
    program.chmod(0o755)
    return a_run(folder, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_sanitizer_is_pointed_at_every_kernel(tmp_path: Path) -> None:
    run = run_with(tmp_path, "compute-sanitizer", "echo '========= ERROR SUMMARY: 0 errors'")
    steps.memcheck(run, 120)
    assert run.results["memcheck"] == {"summary": ["ERROR SUMMARY: 0 errors"]}
    for operator in ops.operators():
        assert f"{operator} cpu {next(iter(launch.launches(operator)))}" in (tmp_path / "gpu.log").read_text()
    run = run_with(tmp_path, "compute-sanitizer", "echo '========= ERROR SUMMARY: 3 errors'; exit 9")
    with pytest.raises(Failure, match="3 errors"):
        steps.memcheck(run, 120)


CSV = '''"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"
"0","7","columns<A, B>(int)","GPU Speed Of Light Throughput","Compute (SM) Throughput","%","71.25",""
"0","7","columns<A, B>(int)","GPU Speed Of Light Throughput","Duration","us","1,502.11",""
"0","7","columns<A, B>(int)","GPU Speed Of Light Throughput","","","","SOLBottleneck"
"1","7","average(int)","GPU Speed Of Light Throughput","Duration","us","3.10",""'''


def test_the_profiler_is_pointed_at_the_better_kernel(tmp_path: Path) -> None:
    run = run_with(tmp_path, "ncu", f"cat <<'END'\n{CSV}\nEND")
    case = next(iter(op.cases(rehearse=True)))
    figures = {"cpu": {"seconds": 1.0}, "reference": {"seconds": 0.5}, "cuda": {"unavailable": "no CUDA device"}}
    run.results["op"] = {"cases": {case: {"relevancy_product": figures}}}
    steps.ncu(run, 120)
    found = run.results["ncu"]
    assert (found["case"], found["backend"]) == (case, "cpu")
    assert found["kernels"] == {
        "0 columns<A, B>(int)": {"Compute (SM) Throughput": "71.25 %", "Duration": "1,502.11 us"},
        "1 average(int)": {"Duration": "3.10 us"},
    }


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["plain", "xdist"])
def test_verdicts_of_the_tests_are_counted(tmp_path: Path, workers: tuple[str, ...]) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "@pytest.mark.parametrize('x', ['a b', 'c'])\n"
        "def test_bad(x): assert x == 'c'\n"
        "def test_other(): pytest.skip('a reason')\n"
    )
    arguments = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *workers, "tests"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = steps.verdicts(done.stdout)
    assert found == {"passed": 2, "failed": 1, "skipped": 1, "failures": ["tests/test_some.py::test_bad[a b]"]}
    # A run that was stopped has no summary; what it had said counts.
    lines = done.stdout.splitlines()
    stopped = "\n".join(lines[: next(i for i, line in enumerate(lines) if "FAILURES" in line)])
    assert steps.verdicts(stopped) == found
    assert steps.verdicts("no module named pytest") == {"failures": []}


def test_claims_are_compared_with_their_figures() -> None:
    figures = {"fast": {"time_ratio": 1.04}, "eager": {"time_ratio": 2.08}, "lean": {"extra_bytes": 2**30}}
    results = {
        "op": {
            "cases": {steps.PROFILED: {"relevancy_product": {"cuda": {"seconds": 1.0, "share_of_matrix_rate": 0.5}}}}
        },
        "end-to-end": {"cases": {"llava-1.5-7b-2400": {"variants": figures}}},
        "proxy": {
            "cases": {"llava-1.5-7b-1": {"case": {}, "cuda": {"over_allowed": 1.8}, "triton": {"over_allowed": 0.9}}},
            "live_maps": {"share": 0.02},
        },
    }
    found = {claim["claim"]: (claim["figure"], claim["holds"]) for claim in claims.claims(results)}
    assert found["relevancy_product, share of the matrix product's rate, S = 8192"] == (0.5, True)
    assert found["fast / (forward + backward), S = 2400"] == (1.04, True)
    assert found["fast / (forward + backward), S = 8192"] == (None, None)
    assert found["eager / fast, S = 2400"] == (2.0, False)
    assert found["lean, GiB above the weights, S = 2400"] == (1.0, True)
    assert found["proxy_relevancy over 1.25 copies or a launch and 2 µs, 576 columns × 1"] == (0.9, True)
    assert found["proxy_relevancy over 1.25 copies or a launch and 2 µs, 576 columns × 64"] == (None, None)
    assert found["live maps over a decode step"] == (0.02, False)
    assert all(claim["holds"] is None for claim in claims.claims({}))


def test_the_cases_are_those_of_the_models() -> None:
    for name, (case, wanted) in end_to_end.CASES.items():
        assert f"-{case.columns}" in name and (case.targets == 1 or name.endswith(f"-{case.targets}-targets"))
        assert set(wanted) <= set(variants.VARIANTS) and "forward_backward" in wanted
        model = next(model for model in op.MODELS if name.startswith(model))
        assert op.MODELS[model] == (case.heads, case.key_heads, case.width // case.heads)
    for claim in claims.CLAIMS:
        if claim.path[:2] == ("end-to-end", "cases"):
            assert claim.path[4] in end_to_end.CASES[claim.path[2]][1]
    shapes = {(case.keys, case.targets) for case in op.cases(rehearse=False).values() if case.rows is None}
    assert shapes == {(keys, targets) for keys in (620, 2400, 8192, 32768) for targets in (1, 4, 16)}
    assert steps.PROFILED in op.cases(rehearse=False)


def test_a_row_count_is_forced_and_given_up_again(one_thread: None) -> None:
    case, _ = end_to_end.REHEARSED_CASES["llava-1.5-7b-2400"]
    model, inputs, targets = decoders.build(case, "cpu")
    before = sweep.select_rows
    with variants.forced_rows():
        certificate = explain_rows(model, inputs, targets, row_tolerance=0.1).certificate
    assert certificate is not None
    assert certificate.rows_kept.tolist() == [[math.ceil(variants.FORCED_SHARE * case.columns)] * case.layers]
    assert sweep.select_rows is before


def test_out_of_memory_is_a_result_and_other_errors_are_not() -> None:
    def fails(error: Exception) -> None:
        raise error

    message = "CUDA out of memory. Tried to allocate 4.00 GiB."
    assert memory.attempt(lambda: fails(torch.OutOfMemoryError(message)), "cpu") == memory.OUT_OF_MEMORY
    assert memory.attempt(lambda: 3, "cpu") == 3
    with pytest.raises(RuntimeError, match="illegal"):
        memory.attempt(lambda: fails(RuntimeError("CUDA error: an illegal memory access")), "cpu")
