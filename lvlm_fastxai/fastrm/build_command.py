"""Read the options of ``lvlm-fastxai fastrm build-maps``, and run it.

Importing this module loads neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ..console import Bars, add_model_arguments, number_or, say
from ..training.processes import join_processes, own_device
from .defaults import ANSWERS, BATCH, MAX_NEW_TOKENS, METHODS, SHARD_SIZE

__all__ = ["add_build_arguments", "run_build"]


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``lvlm-fastxai fastrm build-maps``."""
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="a .jsonl file with a line {'image': …, 'question': …, 'answer': …} per sample (answers may be missing, "
        "paths are relative to the file), a folder of datasets' save_to_disk, or scenes:train|validation|held-out"
        "?count=N&seed=K&kinds=a,b (or &without=a,b)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; a run that was stopped goes on there")
    add_model_arguments(parser)
    add("--method", choices=METHODS, default=METHODS[0], help="of the maps (default: %(default)s)")
    add(
        "--row-tolerance",
        type=number_or("auto"),
        default=0.0,
        metavar="E",
        help="0 for exact maps, up to below 1 or 'auto' for pruned ones (default: %(default)s)",
    )
    add(
        "--answers",
        choices=ANSWERS,
        default=ANSWERS[0],
        help="whose answers to explain: the model's own, right or wrong, which are what a head sees in use (default), "
        "or the source's where it has one",
    )
    add("--batch", type=int, default=BATCH, metavar="N", help="samples per pass (default: %(default)s)")
    add("--shard-size", type=int, default=SHARD_SIZE, metavar="N", help="samples per file (default: %(default)s)")
    add(
        "--max-new-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="longest answer of the model, in tokens (default: %(default)s)",
    )
    add("--json", action="store_true", help="print what was done as JSON")


def run_build(args: argparse.Namespace) -> int:
    """Build maps as the command line asks for them.

    Args:
        args: as parsed by `add_build_arguments`.

    Returns:
        0.

    Raises:
        FastXAIError: bad input, the message says what to do.
    """
    from ..models.checkpoint import load_checkpoint
    from ..prompting.sources import open_source
    from .build import build_maps

    source = open_source(args.source)
    state = join_processes(args.device.partition(":")[0])
    device = own_device(args.device, state)
    model, processor, _ = load_checkpoint(args.model, device, args.dtype, trust_remote_code=args.trust_remote_code)
    with Bars(unit="sample", shown=state.is_main_process, anywhere=True) as bars:
        built = build_maps(
            model,
            processor,
            source,
            args.out,
            method=args.method,
            row_tolerance=args.row_tolerance,
            answers=args.answers,
            batch=args.batch,
            shard_size=args.shard_size,
            max_new_tokens=args.max_new_tokens,
            progress=lambda done, total: bars("maps", done, total),
            say=say,
        )
    if not state.is_main_process:
        return 0
    if args.json:
        print(json.dumps(asdict(built), ensure_ascii=False))
        return 0
    done = built.samples - built.found
    rate = f", {done / built.seconds:.1f} samples/s" if done else ""
    print(
        f"{built.samples} samples in {built.shards} files: {args.out} ({done} of them in {built.seconds:.0f} s{rate})"
    )
    return 0
