"""Rows of every family, method and memory mode, to be compared bit by bit with those of another version.

    python tests/support/same_rows.py write rows.safetensors      # with the version before a change
    python tests/support/same_rows.py check rows.safetensors      # after it

The file is large and speaks for one machine and one set of packages: keep it out of the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import lvlm_fastxai as fx
from support import models

METHODS = ("chefer", "lvlm_interpret", "glimpse", "raw_attention")
MEMORY = ("fast", "lean", "min")
DTYPES = (torch.float32, torch.bfloat16)


def rows() -> Iterator[tuple[str, Tensor]]:
    """A name and (N, S) rows for each case."""
    for name in models.NAMES:
        for dtype in DTYPES:
            model, inputs = models.build(name, dtype, batch=2, padding="left", text=20)
            targets = [
                target
                for sample in range(2)
                for target in (models.answer_targets(inputs, sample)[i] for i in (0, 3, 5))
            ]
            start = inputs["input_ids"].shape[1] - models.ANSWER
            for method in METHODS:
                for memory in MEMORY:
                    for tolerance in (0.0, 0.2):
                        found = fx.relevancy_rows(
                            model,
                            inputs,
                            targets,
                            method=method,
                            memory=memory,
                            row_tolerance=tolerance,
                            prompt_length=start if method == "lvlm_interpret" else None,
                        )
                        yield f"{name} {str(dtype)[6:]} {method} {memory} {tolerance}", found.contiguous()


def main() -> int:
    """Write the rows, or compare them with those written before; 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("write", "check"))
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = dict(rows())
    digest = hashlib.sha256(b"".join(found[name].numpy().tobytes() for name in sorted(found))).hexdigest()[:16]
    if args.action == "write":
        save_file(found, args.file)
        print(f"{len(found)} cases written, {digest}")
        return 0
    before = load_file(args.file)
    wrong = [name for name in before.keys() | found.keys() if not _same(before.get(name), found.get(name))]
    print(f"{len(found)} cases, {len(wrong)} differ, {digest}", *sorted(wrong), sep="\n")
    return int(bool(wrong))


def _same(before: Tensor | None, now: Tensor | None) -> bool:
    return before is not None and now is not None and before.dtype == now.dtype and torch.equal(before, now)


if __name__ == "__main__":
    sys.exit(main())
