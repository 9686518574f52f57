"""Commands of the system that tests start."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def compiler(*names: str) -> str:
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    pytest.skip(f"none of {', '.join(names)} is installed")


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return finished
