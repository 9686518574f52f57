"""``python -m benchmarks SUITE``: every figure is a ratio in one run, with the machine and the commit."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# name: the module that has ``add_arguments(parser)`` and ``main(args)``, and what it measures
SUITES = {
    "op": ("ops.op", "an operator against its dense twin and this machine's matrix-product rate"),
    "backward": ("ops.backward", "the fused backward against torch's own followed by relevancy_product"),
    "end-to-end": ("sweeps.end_to_end", "whole explanations against eager, forward + backward, and forward"),
    "glimpse": ("sweeps.glimpse", "GLIMPSE against chefer: time per target, several targets, memory"),
    "pruned": ("sweeps.pruned.command", "what the pruned sweep leaves out, what it saves, and how well it knows"),
    "fastrm": ("fastrm.command", "live maps against decoding, predicted against exact maps, and heads compared"),
    "gpu": ("gpu.command", "everything that a machine with a GPU has to show: `make gpu`"),
    "gpu-op": ("gpu.op", "the operators on a GPU, against their twins and two measured limits"),
    "gpu-proxy": ("gpu.proxy", "proxy_relevancy and live maps on a GPU, against a copy and a decode step"),
    "gpu-end-to-end": ("gpu.end_to_end", "whole explanations of 7B models on a GPU"),
    "gpu-launch": ("gpu.launch", "every operator's kernels once: smoke test, sanitizer, profiler"),
    "real-lvlm": ("real_lvlm.command", "train and evaluate the LVLM of DINOv2-small and SmolLM2 that `pruned` uses"),
    "summary": ("summary", "the results files as the README's table and a plot"),
}


def main(arguments: Sequence[str]) -> int:
    """Run one suite. Only its own module is imported."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="suite", required=True)
    suites = {name: commands.add_parser(name, help=text) for name, (_, text) in SUITES.items()}
    module = None
    if arguments and arguments[0] in SUITES:
        module = importlib.import_module(f"benchmarks.{SUITES[arguments[0]][0]}")
        suites[arguments[0]].description = module.__doc__
        module.add_arguments(suites[arguments[0]])
    args = parser.parse_args(arguments)
    assert module is not None, "argparse lets no other suite through"
    return module.main(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
