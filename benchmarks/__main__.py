"""``python -m benchmarks SUITE``: every figure is a ratio in one run, with the machine and the commit."""

from __future__ import annotations

import argparse
import importlib
import sys

SUITES = {
    "end-to-end": ("benchmarks.end_to_end", "whole explanations against eager, forward + backward, and forward"),
    "glimpse": ("benchmarks.glimpse", "GLIMPSE against chefer: time per target, several targets, memory"),
    "backward": ("benchmarks.backward", "the fused backward against torch's own followed by relevancy_product"),
    "fastrm": ("benchmarks.fastrm", "live maps against decoding, predicted against exact maps, and heads compared"),
    "gpu": ("benchmarks.gpu", "everything that a machine with a GPU has to show: `make gpu`"),
    "gpu-end-to-end": ("benchmarks.gpu_end_to_end", "whole explanations of 7B models on a GPU"),
    "gpu-launch": ("benchmarks.gpu_launch", "every operator's kernels once: smoke test, sanitizer, profiler"),
    "gpu-proxy": ("benchmarks.gpu_proxy", "proxy_relevancy and live maps on a GPU, against a copy and a decode step"),
    "gpu-op": ("benchmarks.gpu_op", "the operators on a GPU, against their twins and two measured limits"),
    "op": ("benchmarks.op", "an operator against its dense twin and this machine's matrix-product rate"),
    "pruned": ("benchmarks.pruned", "what the pruned sweep leaves out, what it saves, and how well it knows"),
    "real-lvlm": ("benchmarks.real_lvlm", "train and evaluate the LVLM of DINOv2-small and SmolLM2 that `pruned` uses"),
    "summary": ("benchmarks.summary", "the results files as the README's table and a plot"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="suite", required=True)
    for name, (module, text) in SUITES.items():
        suite = commands.add_parser(name, help=text, description=importlib.import_module(module).__doc__)
        importlib.import_module(module).add_arguments(suite)
    args = parser.parse_args()
    return importlib.import_module(SUITES[args.suite][0]).main(args)


if __name__ == "__main__":
    sys.exit(main())
