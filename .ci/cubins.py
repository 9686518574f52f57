"""Compiles every Triton kernel to machine code for every supported architecture, on a machine without a GPU.

Prints registers and shared memory of each variant, and fails when one spills registers, does not fit its architecture's
shared memory, has no tensor-core instruction where it should, or reads matrices other than 16 bytes at a time. Run by
`make triton`.

    python .ci/cubins.py [--architectures 80 90 …] [--document docs/triton.md]
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lvlm_fastxai.triton_kernels import (
    attention_backward_relevancy,
    glimpse_statistics,
    proxy_relevancy,
    relevancy_product,
)
from lvlm_fastxai.triton_kernels._tiles import ALIGNMENT, launch_options

# Most shared memory that one block of threads can have, in KiB: CUDA C++ Programming Guide, "Compute Capabilities".
# sm_87 has 163, but what is compiled for it stands for sm_86 and sm_89 too.
SHARED_KIB = {80: 163, 87: 99, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")
# cp.async.cg is always of 16 bytes.
WIDE_READS = ("ld.global.v4.b32", "cp.async.cg.shared.global")
NARROW_READS = ("ld.global.b16", "ld.global.u16")


class Variant(NamedTuple):
    kernel: str
    dtype: torch.dtype
    width: int
    targets: int = 1
    shared_gradient: bool = False
    centered: bool = False


# These have given the same numbers as sm_87 for every variant: they are compiled for one width, to see that they do.
LIKE_87 = (86, 89)
WIDTH_OF_ALL = 128

# The extremes of each choice that the `configuration` make; fp16 compiles to the same as bf16.
VARIANTS = [
    *(Variant("column_sums", torch.bfloat16, width) for width in (64, 72, 96, 100, 128, 256)),
    *(Variant("column_sums", torch.bfloat16, width, 2) for width in (72, 96, 128)),
    *(Variant("column_sums", torch.bfloat16, width, 8, True) for width in (128, 256, 512)),
    Variant("column_sums", torch.float16, 128, 2),
    Variant("column_sums", torch.float32, 128, 2),
    Variant("column_sums", torch.float32, 300),
    *(
        Variant(kernel, dtype, width)
        for kernel in ("key_gradients", "query_gradients")
        for dtype, width in (
            *((torch.bfloat16, width) for width in (72, 96, 100, 128, 256)),
            *((torch.float32, width) for width in (128, 300)),
        )
    ),
    *(Variant("tile_sums", torch.bfloat16, width) for width in (64, 72, 96, 100, 128, 256)),
    *(Variant("tile_sums", torch.float32, width) for width in (128, 300)),
    *(
        Variant("column_scores", dtype, width, centered=centered)
        for dtype, width in (*((torch.bfloat16, width) for width in (128, 4096, 5120, 8192)), (torch.float32, 8192))
        for centered in (False, True)
    ),
    Variant("column_scores", torch.bfloat16, 100, centered=True),
    *(
        Variant("tile_scores", dtype, width, targets, centered=True)
        for dtype in (torch.bfloat16, torch.float32)
        for width, targets in ((128, 64), (4096, 16), (4096, 64))
    ),
    # It reads scores, which have no width.
    Variant("finish_rows", torch.float32, 1),
]
# The products of a folded query are of float32 numbers, exactly.
WITHOUT_TENSOR_CORES = ("column_scores", "tile_scores", "finish_rows")
# Query heads to a key head, where a kernel is compiled for that: LLaMA 3 8B's.
GROUP = 4


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


def is_aligned(variant: Variant) -> bool:
    """Whether a contiguous tensor's rows all begin at a multiple of 16 bytes."""
    return variant.width % ALIGNMENT == 0


def source(variant: Variant) -> ASTSource:
    """The kernel with the argument types and alignments of tensors as torch allocates them."""
    alignment = ALIGNMENT if is_aligned(variant) else 1
    kernel: Any
    if variant.kernel == "column_sums":
        kernel = relevancy_product.column_sums
        configuration = relevancy_product.configuration(*variant[1:5])
        constants = relevancy_product.constants(configuration, variant.width, variant.shared_gradient, alignment)
    elif variant.kernel == "tile_sums":
        kernel = glimpse_statistics.tile_sums
        statistics = glimpse_statistics.configuration(variant.dtype, variant.width)
        constants = glimpse_statistics.constants(statistics, GROUP, variant.width, alignment)
    elif variant.kernel == "finish_rows":
        kernel = proxy_relevancy.finish_rows
        constants = {"SOFTMAX": True, "PIECE": proxy_relevancy.ROW_PIECE}
    elif variant.kernel in ("column_scores", "tile_scores"):
        kernel = getattr(proxy_relevancy, variant.kernel)
        scores = proxy_relevancy.configuration(*variant[1:4])
        constants = proxy_relevancy.constants(scores, variant.width, alignment, variant.centered)
    else:
        kernel = getattr(attention_backward_relevancy, variant.kernel)
        chosen = attention_backward_relevancy.configuration(variant.dtype, variant.width)
        tile = chosen.key_tile if variant.kernel == "key_gradients" else chosen.query_tile
        constants = attention_backward_relevancy.constants(chosen, variant.width, alignment, tile)
    element = f"*{TYPES[variant.dtype]}"
    types = dict.fromkeys(("query", "key", "value", "grad_output", "grad_query", "grad_key", "grad_value"), element)
    state = ("logsumexp", "delta", "row", "partial", "row_sums", "gradient_sums", "norms")
    types |= dict.fromkeys(state, "*fp32")
    types |= dict.fromkeys(("key_start", "key_end", "ranges", "tiles", "counts"), "*i32")
    types |= dict.fromkeys(("score_scale", "scale", "head_share"), "fp32")
    if variant.kernel in WITHOUT_TENSOR_CORES:
        types |= dict.fromkeys(("query", "offset", "scores", "entropy", "bernoulli"), "*fp32")
        types |= {"hidden": element, "lengths": "*i32", "eps": "fp32"}
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
    exact = variant.dtype == torch.float32 or variant.kernel in WITHOUT_TENSOR_CORES
    if not exact and not compiled.tensor_cores:
        found.append("no tensor-core instruction")
    if is_aligned(variant) and not compiled.wide_reads:
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
