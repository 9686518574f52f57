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
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common import machine
from .claims import claims
from .run import Failure, Run, environment, tail
from .steps import STEPS, TOTAL_SECONDS, Step, allowance, perform, stretched

REHEARSAL = machine.ROOT / "build" / "gpu-rehearsal"


def describe() -> dict[str, Any]:
    """Describe the machine and its GPU. Called in a process of its own, since asking a GPU takes memory on it."""
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


def link_triton_kernels(root: Path) -> None:
    """Link the Triton kernels where an installed package has them, if nothing else has: nothing is installed here."""
    if importlib.util.find_spec("lvlm_fastxai.triton_kernels") is None:
        (root / "lvlm_fastxai" / "triton_kernels").symlink_to(Path("..", "triton_kernels"))


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
    # A step's processes are a group of their own, which only this process can end.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return run_steps(args, STEPS)


def run_steps(args: argparse.Namespace, every: Sequence[Step]) -> int:
    """Run the steps that the arguments ask for; returns the exit code."""
    until = time.monotonic() + args.seconds
    try:
        head, device = find_device(args.device)
    except Failure as failure:
        print(failure)
        return 1
    rehearse = args.rehearse or device == "cpu"
    head |= {"commit": args.commit or head["commit"], "rehearsal": rehearse}
    out = (args.out or (REHEARSAL if rehearse else machine.RESULTS)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.log").unlink(missing_ok=True)
    run = Run(out, device, rehearse, head)
    print(f"{'rehearsal on ' if rehearse else ''}{head['gpu'] or head['processor']}, torch {head['torch']}", flush=True)
    if device == "cuda":
        link_triton_kernels(machine.ROOT)
    steps = stretched([step for step in every if not args.step or step.name in args.step], args.seconds)
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


def find_device(asked: str | None) -> tuple[dict[str, Any], str]:
    """Describe the machine, and choose the device: the one asked for, or the GPU if there is one.

    Raises:
        Failure: this Python cannot tell what is here, or its torch cannot use the GPU that is wanted.
    """
    program = "import json; from benchmarks.gpu import command; print(json.dumps(command.describe()))"
    command = [sys.executable, "-c", program]
    described = subprocess.run(command, cwd=machine.ROOT, env=environment(), capture_output=True, text=True)
    if described.returncode != 0:
        raise Failure(f"this Python cannot tell what is here ({sys.executable}):\n{tail(described.stderr)}")
    head = json.loads(described.stdout.splitlines()[-1])
    # A rehearsal must not pass for a run where a GPU is there and this torch cannot use it.
    wanted = asked == "cuda" or (asked is None and shutil.which("nvidia-smi") is not None)
    if wanted and not head["gpu"]:
        raise Failure(f"torch {head['torch']} of {sys.executable} finds no GPU to use")
    return head, asked or ("cuda" if head["gpu"] else "cpu")


def report(run: Run) -> int:
    """Say in the terminal what came out; returns the exit code."""
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
