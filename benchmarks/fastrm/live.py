"""Live maps beside decoding: the time inside the hooks and the streamer, and the difference of whole runs."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .models import IMAGE, IMAGE_TOKEN, TEXT, build_llava, new_head

NEW_TOKENS = 32


class Clock:
    """Adds up the seconds inside the calls that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a call."""

        def run(*arguments: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.seconds += time.perf_counter() - begun

        return run


def live(args: argparse.Namespace) -> dict[str, Any]:
    """Write the same tokens with live maps and without, in turns."""
    from lvlm_fastxai.fastrm import LiveMaps

    model = build_llava()
    head, inputs = new_head(model), inputs_of_picture()

    def write(count: int, streamer: Any = None) -> float:
        begun = time.perf_counter()
        model.generate(
            **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, streamer=streamer
        )
        return time.perf_counter() - begun

    clock = Clock()
    attached = LiveMaps(head, model, inputs)
    for name in ("_see_layer", "_see_logits", "put"):
        setattr(attached, name, clock.timed(getattr(attached, name)))
    rows = []
    kept = 0
    for number in range(args.rounds + 1):
        first, plain = write(1), write(NEW_TOKENS)
        attached.steps.clear()
        clock.seconds = 0.0
        with attached:
            attended = write(NEW_TOKENS, attached)
            kept = attached.state_bytes
        assert len(attached.steps) == NEW_TOKENS
        if number:  # the first round warms up
            decode = plain - first
            rows.append((decode, clock.seconds, (attended - plain) / decode))
    return summary(rows, kept)


def inputs_of_picture() -> dict[str, Any]:
    """Make the model's inputs for one picture inside random text."""
    tokens = torch.randint(5, 30000, (1, IMAGE + TEXT))
    tokens[0, 8 : 8 + IMAGE] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, 336, 336)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels}


def summary(rows: list[tuple[float, float, float]], state_bytes: int) -> dict[str, Any]:
    """Take medians and print them.

    Args:
        rows: of each round the seconds of decoding and inside live maps, and the difference of whole runs as a share.
    """
    decode, inside, _ = (statistics.median(column) for column in zip(*rows, strict=True))
    found = {
        "decode_seconds": decode,
        "live_seconds": inside,
        "share_of_decode": statistics.median(own / whole for whole, own, _ in rows),
        "share_of_decode_rounds": [own / whole for whole, own, _ in rows],
        "difference_of_whole_runs": statistics.median(difference for *_, difference in rows),
        "difference_of_whole_runs_rounds": [difference for *_, difference in rows],
        "state_bytes": state_bytes,
        "tokens": NEW_TOKENS,
        "image_columns": IMAGE,
    }
    print(
        f"{NEW_TOKENS} tokens, {IMAGE} image columns: decode {decode:.3f} s, live maps {1e3 * inside:.1f} ms = "
        f"{found['share_of_decode']:.2%} of it (difference of whole runs "
        f"{found['difference_of_whole_runs']:+.2%}); {state_bytes / 2**20:.1f} MiB of states"
    )
    return found
