"""One run of `gpu`'s steps: its folder, its results, and the commands that it starts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common import machine, results


class Skip(Exception):
    """A step cannot run here, for this reason."""


class Failure(Exception):
    """A step found something wrong."""


class OutOfTime(Exception):
    """A step had to be stopped."""


@dataclass
class Run:
    """One run of the steps.

    Attributes:
        out: the folder of gpu.json, gpu.png and gpu.log.
        head: the machine.
        results: of the steps, by name; their outcomes under "steps".
        environment: of the programs that the steps run.
    """

    out: Path
    device: str
    rehearse: bool
    head: dict[str, Any]
    results: dict[str, Any] = field(default_factory=lambda: {"steps": {}})
    environment: dict[str, str] = field(default_factory=lambda: environment())

    def write(self) -> None:
        """Write gpu.json."""
        results.write_results(self.out / "gpu.json", self.head, self.results)

    def tool(self, name: str) -> str:
        """Find a program.

        Raises:
            Skip: it is not here.
        """
        found = shutil.which(name, path=self.environment["PATH"])
        if found is None:
            raise Skip(f"no {name} on this machine")
        return found

    def command(self, arguments: Sequence[str | Path], seconds: float, **variables: str) -> tuple[int, str]:
        """Run a command, whose output goes to the log as it comes; returns its exit code and output.

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
                env={**self.environment, **variables},
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
        """Run one of this package's other suites; its figures join the results, also when it fails.

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
    """Return the steps' environment: no network, no backend forced, tools of this Python and of CUDA on the path."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), *(str(path) for path in cuda_folders())]
    changed = {"PATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    forced = ("LVLM_FASTXAI_BACKEND", "TRITON_INTERPRET")
    return {name: value for name, value in os.environ.items() if name not in forced} | changed


def cuda_folders() -> list[Path]:
    """List where CUDA's tools lie when they are not on the path."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    return [toolkit / "bin", toolkit / "compute-sanitizer"]


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
    """Return the end of a text."""
    return text[-characters:].strip()
