"""Compiles every Triton kernel to machine code for every supported architecture, on a machine without a GPU.

Prints registers and shared memory of each variant, and fails when one spills registers, does not fit its architecture's
shared memory, has no tensor-core instruction where it should, or reads matrices other than 16 bytes at a time. Run by
`make triton`. What is compiled of each operator stands in `variants/`.

    python .ci/cubins.py [--architectures 80 90 …] [--document docs/triton.md]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from variants import TYPES, Variant

from lvlm_fastxai import ops
from lvlm_fastxai.triton_kernels._tiles import launch_options

# Most shared memory that one block of threads can have, in KiB: CUDA C++ Programming Guide, "Compute Capabilities".
# sm_87 has 163, but what is compiled for it stands for sm_86 and sm_89 too.
SHARED_KIB = {80: 163, 87: 99, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
# cp.async.cg is always of 16 bytes.
WIDE_READS = ("ld.global.v4.b32", "cp.async.cg.shared.global")
NARROW_READS = ("ld.global.b16", "ld.global.u16")


# These have given the same numbers as sm_87 for every variant: they are compiled for one width, to see that they do.
LIKE_87 = (86, 89)
WIDTH_OF_ALL = 128

MODULES = {
    name: importlib.import_module(f"variants.{name}")
    for name in ops.operators()
    if "triton" in ops.catalogue()[name].backends
}
VARIANTS: list[Variant] = [variant for module in MODULES.values() for variant in module.VARIANTS]
# Types of the kernels' arguments, for every operator; a module's own POINTERS come before them.
POINTERS = dict.fromkeys(("logsumexp", "delta", "row", "partial", "row_sums", "gradient_sums", "norms"), "*fp32")
POINTERS |= dict.fromkeys(("key_start", "key_end", "ranges", "tiles", "counts"), "*i32")
SCALARS = dict.fromkeys(("score_scale", "scale", "head_share", "eps"), "fp32")
MATRICES = ("query", "key", "value", "grad_output", "grad_query", "grad_key", "grad_value", "hidden")


def targets_of(variant: Variant) -> str:
    return f"{variant.targets}{', one gradient' * variant.shared_gradient}{', centred' * variant.centered}"


def name(variant: Variant) -> str:
    return f"{variant.kernel}, {TYPES[variant.dtype]}, width {variant.width}, targets {targets_of(variant)}"


class Compiled(NamedTuple):
    registers: int
    stack: int
    shared: int
    tensor_cores: str
    wide_reads: bool


def source(variant: Variant) -> ASTSource:
    """The kernel with the argument types and alignments of tensors as torch allocates them."""
    module = MODULES[variant.operator]
    kernel, constants = module.compile_time(variant)
    types = dict.fromkeys(MATRICES, f"*{TYPES[variant.dtype]}") | POINTERS | SCALARS | getattr(module, "POINTERS", {})
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    # key_end is a view that begins one element after key_start.
    aligned = [name for name, kind in signature.items() if kind[0] == "*" and name != "key_end"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of stack, which is where spilled registers go."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.check_output([program, "-res-usage", file.name], text=True, stderr=subprocess.STDOUT)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump printed {printed!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def compile_for(variant: Variant, architecture: int) -> Compiled:
    compiled = triton.compile(source(variant), target=GPUTarget("cuda", architecture, 32), options=launch_options())
    registers, stack = resources(compiled.asm["cubin"])
    used = [name for name in TENSOR_CORES if name in compiled.asm["ptx"]]
    ptx = compiled.asm["ptx"]
    wide = any(read in ptx for read in WIDE_READS) and not any(read in ptx for read in NARROW_READS)
    return Compiled(registers, stack, compiled.metadata.shared, " ".join(used), wide)


def complaints(architecture: int, variant: Variant, compiled: Compiled) -> list[str]:
    found = []
    if compiled.stack:
        found.append(f"{compiled.stack} bytes of stack: registers are spilled")
    if compiled.shared > SHARED_KIB[architecture] * 1024:
        found.append(f"{compiled.shared} bytes of shared memory, of {SHARED_KIB[architecture]} KiB")
    exact = variant.dtype == torch.float32 or getattr(MODULES[variant.operator], "EXACT", False)
    if not exact and not compiled.tensor_cores:
        found.append("no tensor-core instruction")
    if variant.is_aligned and not compiled.wide_reads:
        found.append("matrices are read other than 16 bytes at a time")
    return found


def table(results: dict[Variant, dict[int, Compiled]], architectures: list[int]) -> str:
    """Markdown: one row per variant, `registers / KiB of shared memory` per architecture."""
    lines = [
        "| kernel | dtype | width | targets | " + " | ".join(f"sm_{a}" for a in architectures) + " |",
        "|---|---|---:|---|" + "---:|" * len(architectures),
    ]
    for variant, by_architecture in results.items():
        cells = [f"{c.registers} / {c.shared / 1024:.0f}" for c in (by_architecture[a] for a in architectures)]
        what = (variant.kernel, TYPES[variant.dtype], variant.width, targets_of(variant))
        lines.append(f"| {' | '.join(map(str, what))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", choices=SHARED_KIB, default=list(SHARED_KIB))
    parser.add_argument("--document", type=Path, help="also write the table between the markers of this file")
    options = parser.parse_args()

    results: dict[Variant, dict[int, Compiled]] = {variant: {} for variant in VARIANTS}
    wrong = []
    kernels = [
        (variant, architecture)
        for variant, architecture in itertools.product(VARIANTS, options.architectures)
        if architecture not in LIKE_87 or variant.width == WIDTH_OF_ALL
    ]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as processes:
        all_compiled = processes.map(compile_for, *zip(*kernels, strict=True))
        for (variant, architecture), compiled in zip(kernels, all_compiled, strict=True):
            results[variant][architecture] = compiled
            print(f"sm_{architecture} {name(variant)}: {compiled}", flush=True)
            found = complaints(architecture, variant, compiled)
            wrong += [f"sm_{architecture} {name(variant)}: {what}" for what in found]
            like = results[variant].get(87, compiled)
            if architecture in LIKE_87 and compiled != like:
                wrong.append(f"sm_{architecture} {name(variant)}: sm_87 gives {like}; compile every width for both")
    text = table(results, [a for a in options.architectures if a not in LIKE_87])
    print(text)
    print(f"{len(kernels)} kernels, triton {triton.__version__}")
    if options.document and not wrong:
        document = options.document.read_text(encoding="utf-8")
        begin, end = "<!-- cubins:begin -->\n", "\n<!-- cubins:end -->"
        before, after = document.split(begin)[0], document.split(end)[1]
        options.document.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
