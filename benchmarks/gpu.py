"""Everything that a machine with a GPU has to show, in one command and under nine minutes: ``make gpu``.

Builds the extension in place for the GPU that is there, with the machine's own Python, and installs nothing. Then, one
after the other and each in a process of its own: a smoke test, the `gpu` tests, the benchmarks of the operators, of
live maps and of whole explanations, compute-sanitizer, and ncu on the better kernel. A step that fails, or runs out of
time, stops no other, but the exit code says so; one that cannot run here, or no longer fits into the time, is skipped
by name.

DIR/gpu.json is rewritten after every step, so whoever stops the run keeps what it has shown: machine, versions and
commit, every step's outcome and seconds, every figure. Beside it gpu.png, and gpu.log with what the steps printed.

Without a GPU the same code runs on the CPU at tiny shapes, and the steps that need one are skipped: a rehearsal, whose
figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import gpu_op, machine

TOTAL_SECONDS = 525.0
RESULTS = machine.ROOT / "benchmarks" / "results"
REHEARSAL = machine.ROOT / "build" / "gpu-rehearsal"
BUILD = machine.ROOT / "build" / "gpu"
# Acceptance shape of relevancy_product, which ncu is pointed at.
PROFILED = "llava-1.5-7b-8192-1"
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
# A benchmark stops by itself this long before it would be stopped: its imports, and the case that is under way.
GRACE_SECONDS = 20.0


class Skip(Exception):
    """Why a step cannot run here."""


class Failure(Exception):
    """What a step found wrong."""


class OutOfTime(Exception):
    """A step had to be stopped."""


@dataclass
class Run:
    """One run of the steps."""

    out: Path
    device: str
    rehearse: bool
    head: dict[str, Any]
    results: dict[str, Any] = field(default_factory=lambda: {"steps": {}})

    def write(self) -> None:
        machine.write_results(self.out / "gpu.json", self.head, self.results)

    def command(self, arguments: Sequence[str | Path], seconds: float, **variables: str) -> tuple[int, str]:
        """Exit code and output of a command, which goes to the log as it comes.

        Raises:
            OutOfTime: it took longer; it has been stopped, and so have its children.
        """
        arguments = [str(argument) for argument in arguments]
        log = self.out / "gpu.log"
        with log.open("ab") as file:
            file.write(f"\n$ {' '.join(arguments)}\n".encode())
            file.flush()
            start = file.tell()
            process = subprocess.Popen(
                arguments,
                cwd=machine.ROOT,
                env={**environment(), **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,
            )
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                raise OutOfTime(f"stopped after {seconds:.0f} s") from None
            finally:
                stop(process)
        with log.open("rb") as file:
            file.seek(start)
            return process.returncode, file.read().decode(errors="replace")

    def suite(self, step: str, arguments: Sequence[str], seconds: float) -> None:
        """One of this package's other suites, whose figures join the results, also when it fails.

        Raises:
            Failure: it failed.
        """
        figures = self.out / f"gpu-{step}.part.json"
        figures.unlink(missing_ok=True)
        rehearse = ["--rehearse"] if self.rehearse else []
        common = ["--device", self.device, *rehearse, "--out", figures]
        try:
            code, output = self.command([sys.executable, "-m", "benchmarks", *arguments, *common], seconds)
        finally:
            if figures.exists():
                self.results[step] = json.loads(figures.read_text())["results"]
                figures.unlink()
        if code != 0:
            raise Failure(tail(output))


def environment() -> dict[str, str]:
    """For the steps: no network, no backend forced, and the tools of this Python and of CUDA on the path."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), *(str(path) for path in cuda_folders())]
    changed = {"PATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    forced = ("LVLM_FASTXAI_BACKEND", "TRITON_INTERPRET")
    return {name: value for name, value in os.environ.items() if name not in forced} | changed


def cuda_folders() -> list[Path]:
    """Where CUDA's tools lie when they are not on the path."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return [toolkit / "bin", toolkit / "compute-sanitizer"]


def tool(name: str) -> str:
    """A program of these names.

    Raises:
        Skip: it is not here.
    """
    found = shutil.which(name, path=environment()["PATH"])
    if found is None:
        raise Skip(f"no {name} on this machine")
    return found


def stop(process: subprocess.Popen) -> None:
    """End a step's processes: first ask, as Ctrl-C does, so that pytest still says what it has seen."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(text: str, characters: int = 3000) -> str:
    return text[-characters:].strip()


def describe() -> dict[str, Any]:
    """The machine and its GPU. Called in a process of its own, since asking a GPU takes memory on it."""
    import torch

    head = machine.describe()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        head["device"] = {
            "name": properties.name,
            "compute_capability": properties.major * 10 + properties.minor,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda_of_torch": torch.version.cuda,
        }
    packages = ("triton", "numpy", "pytest", "matplotlib")
    head["packages"] = {name: machine.version(name) for name in packages}
    return head


def build(run: Run, seconds: float) -> None:
    """The extension, in place, for this GPU alone, by CMake itself: setup.py wants setuptools from 2025."""
    import lvlm_fastxai

    cmake = tool("cmake")
    tool("nvcc")
    if importlib.util.find_spec("pybind11") is None:
        raise Skip("no pybind11 beside this Python; the Triton kernels need no build")
    architecture = os.environ.get("LVLM_FASTXAI_CUDA_ARCHS") or str(run.head["device"]["compute_capability"])
    until = time.monotonic() + seconds
    for arguments in build_commands(cmake, architecture, lvlm_fastxai.__version__, BUILD, machine.ROOT):
        code, output = run.command(arguments, until - time.monotonic())
        if code != 0:
            raise Failure(tail(output))


def build_commands(cmake: str, architecture: str, version: str, folder: Path, prefix: Path) -> list[list[str]]:
    """Configure, compile, install."""
    ninja = ["-G", "Ninja"] if shutil.which("ninja", path=environment()["PATH"]) else []
    switches = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python3_EXECUTABLE": sys.executable,
        "FASTXAI_VERSION": version,
        "FASTXAI_CUDA": "ON",
        "FASTXAI_CUDA_ARCHITECTURES": architecture,
    }
    return [
        [cmake, "-S", str(machine.ROOT), "-B", str(folder), *ninja, *(f"-D{k}={v}" for k, v in switches.items())],
        [cmake, "--build", str(folder), "--parallel", str(os.cpu_count())],
        [cmake, "--install", str(folder), "--prefix", str(prefix), "--strip"],
    ]


def info(run: Run, seconds: float) -> None:
    """What can run here, with the reasons for what cannot; on a GPU some kernels must."""
    code, output = run.command([sys.executable, "-m", "lvlm_fastxai.info", "--json"], seconds)
    if code != 0:
        raise Failure(tail(output))
    run.results["info"] = found = json.loads(output[output.index("{") :])
    if run.device == "cuda":
        for operator, backends in found["operators"].items():
            if backends["cuda"] is not None and backends["triton"] is not None:
                raise Failure(f"{operator}: cuda: {backends['cuda']}; triton: {backends['triton']}")


def smoke(run: Run, seconds: float) -> None:
    """Every operator, backend and kind of kernel once, against the twin."""
    run.suite("smoke", ["gpu-launch"], seconds)


def tests(run: Run, seconds: float) -> None:
    """The tests that are marked `gpu`."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("no pytest beside this Python")
    arguments = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        arguments += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    try:
        code, output = run.command(arguments, seconds, OMP_NUM_THREADS="2")
    finally:
        run.results["tests"] = verdicts((run.out / "gpu.log").read_text(errors="replace"))
    if code != 0 or not run.results["tests"].get("passed"):
        raise Failure(tail(output))


def verdicts(output: str) -> dict[str, Any]:
    """How many of pytest's tests passed, failed and so on, also of a run that was stopped, and which failed."""
    output = output[output.rindex("test session starts") :] if "test session starts" in output else ""
    # With xdist the verdict stands before the test's name, otherwise behind it.
    found = re.findall(
        r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (tests/\S.*)$|^(tests/\S.*?) ([A-Z]+)(?: \(.*\))? +\[ *\d+%\]$", output, re.M
    )
    counts: dict[str, Any] = {"failures": []}
    for before, named_behind, named_before, behind in found:
        verdict = (before or behind).lower()
        counts[verdict] = counts.get(verdict, 0) + 1
        if verdict in ("failed", "error"):
            counts["failures"].append((named_behind or named_before).strip())
    return counts


def op(run: Run, seconds: float) -> None:
    """The operators' benchmarks."""
    run.suite("op", ["gpu-op", "--seconds", str(max(1.0, seconds - GRACE_SECONDS))], seconds)


def proxy(run: Run, seconds: float) -> None:
    """proxy_relevancy, and live maps."""
    run.suite("proxy", ["gpu-proxy", "--seconds", str(max(1.0, seconds - GRACE_SECONDS))], seconds)


def end_to_end(run: Run, seconds: float) -> None:
    """Whole explanations."""
    rounds = ["--rounds", "1"] if run.rehearse else []
    run.suite("end-to-end", ["gpu-end-to-end", *rounds, "--seconds", str(max(1.0, seconds - GRACE_SECONDS))], seconds)


def memcheck(run: Run, seconds: float) -> None:
    """Reads and writes out of bounds; torch's cache of freed memory, which would hide them, is off."""
    sanitize(run, "memcheck", seconds)


def racecheck(run: Run, seconds: float) -> None:
    """Shared memory that is read and written without a barrier in between."""
    sanitize(run, "racecheck", seconds)


def sanitize(run: Run, name: str, seconds: float) -> None:
    sanitizer = tool("compute-sanitizer")
    arguments = [sanitizer, "--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
    driver = [sys.executable, "-m", "benchmarks", "gpu-launch", "--device", run.device]
    code, output = run.command([*arguments, *driver], seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    run.results[name] = {"summary": summaries}
    if code != 0 or not summaries:
        raise Failure(tail(output))


def ncu(run: Run, seconds: float) -> None:
    """What bounds the better kernel of relevancy_product."""
    profiler = tool("ncu")
    case = next(iter(gpu_op.cases(rehearse=True))) if run.rehearse else PROFILED
    figures = run.results.get("op", {}).get("cases", {}).get(case, {}).get("relevancy_product", {})
    reasons = run.results.get("info", {}).get("operators", {}).get("relevancy_product", {})
    usable = [name for name, reason in reasons.items() if reason is None]
    backend = gpu_op.best(figures)[0] or next(iter(usable), "cuda")
    # The clocks stay as they are: the card may be shared, and the other figures were taken at its own clocks.
    arguments = [profiler, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "details"]
    for section in SECTIONS:
        arguments += ["--section", section]
    rehearse = ["--rehearse"] if run.rehearse else []
    driver = [sys.executable, "-m", "benchmarks", "gpu-launch", "--device", run.device, *rehearse]
    code, output = run.command([*arguments, *driver, "--profile", case, "--backend", backend], seconds)
    run.results["ncu"] = {"case": case, "backend": backend, "kernels": metrics(output)}
    if code != 0 or not run.results["ncu"]["kernels"]:
        raise Failure(tail(output))


def metrics(output: str) -> dict[str, dict[str, str]]:
    """Kernel → metric → value with its unit, of ncu's CSV."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name"):
            kernel = found.setdefault(f"{row['ID']} {row['Kernel Name'][:100]}", {})
            kernel[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return found


def plot(run: Run, seconds: float) -> None:
    """Left, the operator's share of the matrix product's rate; right, whole explanations over forward + backward."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Skip("no matplotlib beside this Python")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    operator_cases = run.results.get("op", {}).get("cases", {})
    whole_cases = run.results.get("end-to-end", {}).get("cases", {})
    if not operator_cases and not whole_cases:
        raise Skip("no figures to draw")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 0.5 + 0.24 * max(20, rows_of(whole_cases))))
    for label, points in shares(operator_cases).items():
        left.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=label)
    left.set_xscale("log")
    ticks = sorted({size for points in shares(operator_cases).values() for size in points})
    left.set_xticks(ticks, [str(size) for size in ticks])
    left.set_xticks([], minor=True)
    left.set_xlabel("S")
    left.set_title("relevancy_product, one target: share of the matrix product's rate", fontsize=9)
    left.axhline(0.45, color="#8a8f98", linewidth=0.8)
    if left.lines[:-1]:
        left.legend(fontsize=7)
    labels, ratios = [], []
    for name, result in whole_cases.items():
        for variant, found in result["variants"].items():
            labels.append(f"{name} {variant}" + ("" if "time_ratio" in found else f": {found['seconds']}"))
            ratios.append(found.get("time_ratio", 0.0))
    right.barh(labels, ratios, color="#b5541c")
    right.axvline(1, color="#40444b", linewidth=0.8)
    right.invert_yaxis()
    right.tick_params(labelsize=6)
    right.set_title("time over forward + activation-only backward", fontsize=9)
    where = run.head["gpu"] or run.head["processor"]
    notice = "REHEARSAL, figures mean nothing. " if run.rehearse else ""
    stamp = f"{where}, torch {run.head['torch']}, {run.head['date']}, commit {run.head['commit']}"
    figure.text(0.01, 0.005, notice + stamp, fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(run.out / "gpu.png", dpi=110)
    pyplot.close(figure)


def rows_of(cases: dict[str, Any]) -> int:
    return sum(len(result["variants"]) for result in cases.values())


def shares(cases: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Model and backend → S → share of the matrix product's rate, for one target and all rows."""
    found: dict[str, dict[int, float]] = {}
    for name, result in cases.items():
        model, _, kind = name.rsplit("-", 2)
        for backend, each in result.get("relevancy_product", {}).items():
            if kind == "1" and "share_of_matrix_rate" in each:
                found.setdefault(f"{model}, {backend}", {})[result["case"]["keys"]] = each["share_of_matrix_rate"]
    return found


@dataclass(frozen=True)
class Step:
    """What is done in at most ``limit`` seconds, if there are ``least`` seconds for it."""

    name: str
    least: float
    limit: float
    work: Callable[[Run, float], None]
    needs_gpu: bool = False


STEPS = (
    Step("build", 40, 150, build, needs_gpu=True),
    Step("info", 5, 30, info),
    Step("smoke", 15, 75, smoke),
    Step("tests", 45, 130, tests, needs_gpu=True),
    Step("op", 45, 110, op),
    Step("proxy", 30, 60, proxy),
    Step("end-to-end", 60, 140, end_to_end),
    Step("memcheck", 35, 60, memcheck, needs_gpu=True),
    Step("racecheck", 35, 60, racecheck, needs_gpu=True),
    Step("ncu", 25, 45, ncu, needs_gpu=True),
    Step("plot", 3, 15, plot),
)


def stretched(steps: Sequence[Step], seconds: float) -> list[Step]:
    """The steps with limits that use up the time where there are so few of them that it would be left over."""
    factor = max(1.0, seconds / sum(step.limit for step in steps))
    return [replace(step, limit=factor * step.limit) for step in steps]


def allowance(remaining: float, step: Step, later: Sequence[Step]) -> float:
    """Seconds that a step may take, so that each of the later ones still gets its least; 0 if that is too little."""
    left = min(step.limit, remaining - sum(other.least for other in later))
    return left if left >= step.least else 0.0


def perform(run: Run, step: Step, seconds: float) -> dict[str, Any]:
    """One step's outcome."""
    started = time.monotonic()
    outcome: dict[str, Any] = {"outcome": "passed"}
    try:
        if step.needs_gpu and run.device != "cuda":
            raise Skip("no GPU")
        if seconds <= 0:
            raise Skip("no time left")
        step.work(run, seconds)
    except Skip as reason:
        outcome = {"outcome": "skipped", "reason": str(reason)}
    except OutOfTime as reason:
        outcome = {"outcome": "timed out", "reason": str(reason)}
    except Exception as error:
        outcome = {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"}
    return {**outcome, "seconds": round(time.monotonic() - started, 1), "allowed_seconds": round(seconds, 1)}


@dataclass(frozen=True)
class Claim:
    """A figure of the results that must not be above (or below) a bound."""

    text: str
    path: tuple[str, ...]
    at_most: float | None = None
    at_least: float | None = None


def ratio_of(case: str, variant: str) -> tuple[str, ...]:
    return "end-to-end", "cases", case, "variants", variant, "time_ratio"


CLAIMS = (
    Claim("relevancy_product, share of the matrix product's rate, S = 8192", ("share",), at_least=0.45),
    Claim("fast / (forward + backward), S = 2400", ratio_of("llava-1.5-7b-2400", "fast"), at_most=1.05),
    Claim("fast / (forward + backward), S = 8192", ratio_of("llava-1.5-7b-8192", "fast"), at_most=1.10),
    Claim("eager / fast, S = 2400", ("eager_over_fast",), at_least=4.0),
    Claim(
        "lean, GiB above the weights, S = 2400",
        ("end-to-end", "cases", "llava-1.5-7b-2400", "variants", "lean", "gib"),
        at_most=1.0,
    ),
    Claim(
        "lean, GiB above the weights, S = 32768",
        ("end-to-end", "cases", "llava-1.5-7b-32768", "variants", "lean", "gib"),
        # A card of 80 GB has 79.6 GiB; the weights are 12.6, and CUDA and torch keep one or two.
        at_most=65.0,
    ),
    *(
        Claim(
            f"5 % of the rows, one more target / (forward + backward), S = {columns}",
            ("end-to-end", "further_targets", f"llava-1.5-7b-{columns}", "pruned_5_percent"),
            at_most=0.2,
        )
        for columns in (2400, 8192)
    ),
    *(
        Claim(
            f"proxy_relevancy over 1.25 copies or a launch and 2 µs, 576 columns × {batch}",
            ("proxy_over_allowed", f"llava-1.5-7b-{batch}"),
            at_most=1.0,
        )
        for batch in (1, 64)
    ),
    Claim("live maps over a decode step", ("proxy", "live_maps", "share"), at_most=0.01),
)


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every claim with its figure (None: not measured) and whether it holds."""
    cases = results.get("end-to-end", {}).get("cases", {})
    shape = results.get("op", {}).get("cases", {}).get(PROFILED, {}).get("relevancy_product", {})
    backend = gpu_op.best(shape)[0]
    known = {**results, "share": None if backend is None else shape[backend]["share_of_matrix_rate"]}
    variants = cases.get("llava-1.5-7b-2400", {}).get("variants", {})
    eager, fast = (variants.get(name, {}).get("time_ratio") for name in ("eager", "fast"))
    known["proxy_over_allowed"] = {
        name: min((each["over_allowed"] for each in figures.values() if "over_allowed" in each), default=None)
        for name, figures in results.get("proxy", {}).get("cases", {}).items()
    }
    known["eager_over_fast"] = eager / fast if eager and fast else None
    found = []
    for claim in CLAIMS:
        figure: Any = known
        for key in claim.path:
            if isinstance(figure, dict) and key == "gib":
                figure = figure.get("extra_bytes")
                figure = figure / 2**30 if isinstance(figure, int) else None
            else:
                figure = figure.get(key) if isinstance(figure, dict) else None
        holds = None
        if figure is not None:
            holds = figure >= claim.at_least if claim.at_most is None else figure <= claim.at_most
        bound = f"≥ {claim.at_least}" if claim.at_most is None else f"≤ {claim.at_most}"
        found.append({"claim": claim.text, "bound": bound, "figure": figure, "holds": holds})
    return found


def link_triton_kernels() -> None:
    """Put the Triton kernels where an installed package has them, if nothing else has: nothing is installed here."""
    if importlib.util.find_spec("lvlm_fastxai.triton_kernels") is None:
        (machine.ROOT / "lvlm_fastxai" / "triton_kernels").symlink_to(Path("..", "triton_kernels"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, help="folder of the results; default benchmarks/results, or build/ for a rehearsal"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes; always without a GPU")
    parser.add_argument(
        "--step", action="append", choices=[step.name for step in STEPS], help="repeatable; default all"
    )
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all steps together")
    parser.add_argument("--commit", help="for the results, where the checkout is a copy without its history")


def main(args: argparse.Namespace) -> int:
    until = time.monotonic() + args.seconds
    # A step's processes are a group of their own, which only this process can end.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    asked = "import json; from benchmarks import gpu; print(json.dumps(gpu.describe()))"
    described = subprocess.run(
        [sys.executable, "-c", asked], cwd=machine.ROOT, env=environment(), capture_output=True, text=True
    )
    if described.returncode != 0:
        print(f"this Python cannot tell what is here ({sys.executable}):\n{tail(described.stderr)}")
        return 1
    head = json.loads(described.stdout.splitlines()[-1])
    device = args.device or ("cuda" if head["gpu"] else "cpu")
    # A rehearsal must not pass for a run where a GPU is there and this torch cannot use it.
    wanted = args.device == "cuda" or (args.device is None and shutil.which("nvidia-smi") is not None)
    if wanted and not head["gpu"]:
        print(f"torch {head['torch']} of {sys.executable} finds no GPU to use")
        return 1
    rehearse = args.rehearse or device == "cpu"
    head |= {"commit": args.commit or head["commit"], "rehearsal": rehearse}
    out = (args.out or (REHEARSAL if rehearse else RESULTS)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.log").unlink(missing_ok=True)
    run = Run(out, device, rehearse, head)
    print(f"{'rehearsal on ' if rehearse else ''}{head['gpu'] or head['processor']}, torch {head['torch']}", flush=True)
    if device == "cuda":
        link_triton_kernels()
    steps = stretched([step for step in STEPS if not args.step or step.name in args.step], args.seconds)
    for number, step in enumerate(steps):
        seconds = allowance(until - time.monotonic(), step, steps[number + 1 :])
        try:
            run.results["steps"][step.name] = outcome = perform(run, step, seconds)
        finally:  # also when somebody stops this, with what the step has left behind
            run.results["claims"] = claims(run.results)
            run.write()
        reason = outcome.get("reason", "").splitlines()
        print(f"{step.name}: {outcome['outcome']}, {outcome['seconds']} s {reason[-1] if reason else ''}", flush=True)
    return report(run)


def report(run: Run) -> int:
    """Say what came out, in the terminal; the exit code."""
    for claim in [] if run.rehearse else run.results["claims"]:
        verdict = {None: "not measured", True: "holds", False: "DOES NOT HOLD"}[claim["holds"]]
        figure = "" if claim["figure"] is None else f"{claim['figure']:.3f} "
        print(f"{claim['claim']}: {figure}({claim['bound']}) {verdict}")
    named: dict[str, list[str]] = {}
    for name, outcome in run.results["steps"].items():
        named.setdefault(outcome["outcome"], []).append(name)
    for outcome, names in named.items():
        print(f"{outcome}: {len(names)} steps: {', '.join(names)}")
    print(f"written to {run.out}" + (": a rehearsal, whose figures mean nothing" if run.rehearse else ""))
    return 1 if named.get("failed") or named.get("timed out") else 0
