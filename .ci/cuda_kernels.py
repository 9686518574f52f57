"""cuda_kernels.py LIBRARY: what the compiled CUDA kernels take and hold, per architecture; fails when they should not.

Registers, stack and instructions are read out of the machine code in LIBRARY, shared memory is what the launcher asks
for at most. A kernel fails that keeps anything on the stack (spilled registers, arrays that are not in registers), asks
for more shared memory than its architectures have, was written for tensor cores and does not use them, copies tiles in
less than 16 bytes at a time, or streams states with fewer 16-byte loads than it has registers for. Needs cuobjdump and
nvdisasm, on PATH or in Triton's wheel, and a C++ compiler.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lvlm_fastxai import ops

ROOT = Path(__file__).resolve().parents[1]
# Most shared memory that one block can have, in KiB: CUDA C++ Programming Guide, "Compute Capabilities".
SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}
# Before the machine code of sm_80 there are no asynchronous copies and no tensor cores for bfloat16.
FIRST_WITH_TENSOR_CORES = 80
INSTRUCTIONS = {
    "tensor core": re.compile(r"\bHMMA\.16816\."),
    "16-byte copy": re.compile(r"\bLDGSTS\.E(\.\w+)*\.128\b"),
    "16-byte load": re.compile(r"\bLDG\.E(\.\w+)*\.128\b"),
    "matrix load": re.compile(r"\bLDSM\.(16\.)?MT?88\.4\b"),
    "local memory": re.compile(r"\b(LDL|STL)\b"),
}


class Kernel(NamedTuple):
    architecture: int
    name: str
    registers: int
    stack: int


def find_tools() -> None:
    """cuobjdump calls nvdisasm itself, so both have to be on PATH. Triton's wheel has them where nvcc comes without."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        tools = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        os.environ["PATH"] = os.pathsep.join((os.environ["PATH"], str(tools)))
    for name in ("cuobjdump", "nvdisasm"):
        if shutil.which(name) is None:
            # Looking is what CI is for; anyone else may have neither.
            print(f"cuda_kernels: no {name}, the machine code was NOT looked at")
            sys.exit(os.environ.get("CI") == "true")


def output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def readable(listing: str) -> str:
    """Names without mangling, namespaces and parameters."""
    listing = subprocess.run(["c++filt"], input=listing, capture_output=True, text=True, check=True).stdout
    return re.sub(r"(?<=[\w>])\(.*\)", "", listing.replace("fastxai::cuda::", "").replace("void ", ""))


def resources(library: str) -> list[Kernel]:
    found, architecture, name = [], 0, ""
    for line in readable(output("cuobjdump", "--dump-resource-usage", library)).splitlines():
        if heading := re.match(r"arch = sm_(\d+)", line):
            architecture = int(heading[1])
        elif heading := re.match(r" Function (.+):$", line):
            name = heading[1].strip()
        elif usage := re.match(r"\s+REG:(\d+) STACK:(\d+)", line):
            found.append(Kernel(architecture, name, int(usage[1]), int(usage[2])))
    return found


def instructions(library: str) -> dict[tuple[int, str], Counter[str]]:
    """How often each kernel's machine code holds each of INSTRUCTIONS."""
    found: dict[tuple[int, str], Counter[str]] = {}
    architecture, counts = 0, Counter[str]()
    for line in readable(output("cuobjdump", "-sass", library)).splitlines():
        if heading := re.match(r"arch = sm_(\d+)", line):
            architecture = int(heading[1])
        elif heading := re.match(r"\s+Function : (.+)$", line):
            counts = found.setdefault((architecture, heading[1].strip()), Counter())
        else:
            counts.update(name for name, pattern in INSTRUCTIONS.items() if pattern.search(line))
    return found


class Expected(NamedTuple):
    """What a kernel's file in tests/native says of it."""

    shared: int = 0
    multiplies: bool = False
    loads: int = 0


def expected_kernels() -> dict[str, Expected]:
    """What is expected of each kernel; its shared memory in bytes is what the launcher's own code asks for at most."""
    folder = ROOT / "tests" / "native"
    operators = [name for name in ops.operators() if "cuda" in ops.catalogue()[name].backends]
    included = [word for name in operators for word in ("-include", folder / f"{name}.h")]
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "on_host"
        compiler = os.environ.get("CXX", "c++")
        output(compiler, "-std=c++17", "-w", *included, folder / "on_host.cpp", "-o", program)
        lines = [line.split(maxsplit=3) for line in readable(output(program)).splitlines()]
    return {name.strip(): Expected(int(size), multiplies == "1", int(loads)) for size, multiplies, loads, name in lines}


def complaints(kernel: Kernel, counts: Counter[str], expected: Expected | None) -> list[str]:
    found = []
    if kernel.stack or counts["local memory"]:
        found.append(f"{kernel.stack} bytes of stack, {counts['local memory']} accesses to local memory")
    for_tensor_cores = "<TensorCore" in kernel.name
    if for_tensor_cores and kernel.architecture < FIRST_WITH_TENSOR_CORES:
        return found  # empty there, and never launched
    if expected is None:
        if for_tensor_cores or "<Fma" in kernel.name:
            found.append("it multiplies matrices, and no file in tests/native expects it")
        return found
    if expected.shared > SHARED_KIB[kernel.architecture] << 10:
        found.append(f"{expected.shared} bytes of shared memory, there are {SHARED_KIB[kernel.architecture]} KiB")
    if for_tensor_cores and not counts["tensor core"]:
        found.append("no tensor-core instruction")
    if for_tensor_cores and not counts["matrix load"]:
        found.append("no matrix load")
    if counts["16-byte load"] < expected.loads:
        found.append(f"{counts['16-byte load']} 16-byte loads, expected {expected.loads}")
    wide = "16-byte copy" if kernel.architecture >= FIRST_WITH_TENSOR_CORES else "16-byte load"
    if expected.multiplies and not counts[wide]:
        found.append(f"no {wide}")
    return found


def main() -> None:
    (library,) = sys.argv[1:]
    find_tools()
    expected, counted, kernels = expected_kernels(), instructions(library), resources(library)
    if not kernels:
        sys.exit(f"cuda_kernels: {library} holds no machine code")
    architectures = sorted({kernel.architecture for kernel in kernels})
    print(f"{'registers on sm_':>49}  " + "".join(f"{architecture:>5}" for architecture in architectures))
    failures = []
    for name in sorted({kernel.name for kernel in kernels}):
        of_name = {kernel.architecture: kernel for kernel in kernels if kernel.name == name}
        short = name.replace("relevancy_product_columns", "columns")
        cells = [f"{of_name[a].registers:>5}" if a in of_name else f"{'-':>5}" for a in architectures]
        counts = counted.get((max(of_name), name), Counter())
        print(
            f"{short:>49}  {''.join(cells)}  shared ≤ {expected.get(name, Expected()).shared / 1024:5.1f} KiB  HMMA"
            f" {counts['tensor core']:>3}  LDSM {counts['matrix load']:>3}  LDGSTS.128 {counts['16-byte copy']:>2}"
            f"  LDG.128 {counts['16-byte load']:>2}"
        )
        for architecture, kernel in of_name.items():
            for complaint in complaints(kernel, counted.get((architecture, name), Counter()), expected.get(name)):
                failures.append(f"sm_{architecture} {short}: {complaint}")
    print(f"{len(kernels)} kernels; instructions as on sm_{architectures[-1]}")
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
