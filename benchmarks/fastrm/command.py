"""FastRM: what live maps cost while a model talks, what a map costs against exact ones, and which head is best.

``live``: a LLaVA of random weights (decoder 8 × 1024, 576 image columns) writes 32 tokens, with a head attached and
without, in turns. What is counted is the time inside the two hooks and the streamer; the difference of whole runs
stands beside it, with the noise of the machine in it. Prediction, before the first run: a token reads 8 × 11.7 M + 33 M
weights, 0.5 GB in fp32; the head reads 576 × 1024 states, 2.4 MB, and 0.5 MB of its own. So 0.6 % of the bytes, and a
handful of small calls: 1 to 2 % of decode time.

``cost``: seconds and peak bytes of one map, of the exact rule in eager attention (as it should be run, and as published
tools run it), of our own exact sweeps, and of a head: its forward included, where an answer is read again, and without,
where it was attached while the answer was written. The paper's two figures (99.8 % less time, 44.4 % less memory than
the gradient method) are recomputed against both. Prediction: against eager 1 − 2.4 MB / (3 · 20 GFLOP …), over 99.9 %
of time without a forward, about 80 % with one; against our own sweep a third less with a forward.

``ceiling``: how far exact maps agree with themselves when nothing but the model's dtype changes, by the same F1.

``ablation``: heads of other layers, widths, norms, activations, losses, trained on the same maps, compared on the
validation maps that chose their epoch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common import machine, results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("live", "cost", "ablation", "ceiling"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--maps", type=Path, help="ablation: maps to train on; ceiling: exact maps")
    parser.add_argument("--validation", type=Path, help="ablation: maps to choose by")
    parser.add_argument("--other", type=Path, help="ceiling: exact maps of the same samples in another dtype")
    parser.add_argument("--epochs", type=int, default=12, help="ablation: at most")
    parser.add_argument(
        "--only", action="append", help="ablation: rows with this in their name only; they join those in --out"
    )
    parser.add_argument("--out", type=Path, help="results file (JSON)")


def main(args: argparse.Namespace) -> int:
    import torch

    from . import cost, heads, live

    torch.set_num_threads(args.threads)
    head = machine.describe()
    suites: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "live": live.live,
        "cost": cost.cost,
        "ablation": heads.ablation,
        "ceiling": heads.ceiling,
    }
    found = suites[args.what](args)
    if args.out:
        results.write_results(args.out, head, found)
    return 0
