"""`proxy_relevancy` on a GPU against a copy and an empty launch, and what live maps add to a decode step.

The operator is called as a decoding loop calls it, from a CUDA graph: all calls of a case are captured in one, each on
states of its own that together exceed the L2 cache, and the graph's time is shared out among them. The empty launch, a
kernel that writes one number, is taken in the same way, a copy of 1 GiB between events. `kernels` is a backend's own
launch, `call` all that `ops.proxy_relevancy` puts on the device. Bytes: states, queries and results, each moved once.

Live maps: `generate()` on the language model of LLaVA-1.5-7B with random bf16 weights, 576 image columns in a prompt
of 620, with and without `LiveMaps` and a head of random weights; the difference per token, over the time of a token.
What `LiveMaps` does once, before the first token, is on its own.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..common import memory, timing
from ..models import decoders
from . import end_to_end, op, suite
from .launch import ProxyLaunch
from .suite import Suite, figures_or_reason

# States of one graph's calls: more than twice the L2 of today's largest GPUs.
ROTATED_BYTES = 256 * 2**20
MOST_CALLS = 64
NEW_TOKENS = 33  # the first comes with the prompt
IMAGE_COLUMNS = 576
IMAGE_TOKEN = 31999
LIVE_MAPS = "live maps"


@dataclass(frozen=True)
class Case:
    """Shape of one call, bf16."""

    columns: int
    width: int
    batch: int = 1
    targets: int = 1
    norm: str = "rms"
    activation: str = "sigmoid"


CASES = {
    # LLaVA-1.5-7B's: the acceptance shapes first.
    "llava-1.5-7b-1": Case(576, 4096),
    "llava-1.5-7b-64": Case(576, 4096, batch=64),
    "llava-1.5-7b-1-layer-softmax": Case(576, 4096, norm="layer", activation="softmax"),
    "llava-1.5-7b-1-64-targets": Case(576, 4096, targets=64),
    "llava-next-7b-1": Case(2880, 4096),
    "qwen2.5-vl-7b-1": Case(1200, 3584),
    "smolvlm-256m-64": Case(1088, 576, batch=64),
    "width-8192-1": Case(576, 8192),
}
REHEARSED_CASES = {"llava-1.5-7b-1": Case(6, 40), "llava-1.5-7b-64": Case(6, 40, batch=3, targets=2)}


def measure(case: Case, device: str, copied: float, launch: float) -> dict[str, Any]:
    """Measure every backend on a case.

    Args:
        copied: bytes per second of a copy.
        launch: seconds of an empty launch.
    """
    shape = ProxyLaunch(case.columns, case.width, case.targets, "bfloat16", case.norm, case.activation)
    arguments = tuple(tensor.to(device) for tensor in shape.arguments(case.batch))
    options: dict[str, Any] = {"norm": case.norm, "activation": case.activation}
    found: dict[str, Any] = {}
    for backend, usable in op.backends_of("proxy_relevancy", arguments, options).items():
        if isinstance(usable, str):
            found[backend] = {"unavailable": usable}
        else:
            work = partial(measure_backend, case, backend, arguments, copied, launch)
            found[backend] = figures_or_reason(work, device)
    return found


def measure_backend(
    case: Case, backend: str, arguments: tuple[Any, ...], copied: float, launch: float
) -> dict[str, float]:
    """Measure one backend: the whole call, and of those with kernels the launch on its own."""
    import torch

    from lvlm_fastxai import ops
    from lvlm_fastxai.ops import _dispatch

    hidden, query, offset = arguments
    device = hidden.device.type
    lengths = torch.full((case.batch,), case.columns, dtype=torch.int32, device=device)
    states = [hidden.clone() for _ in range(max(1, min(MOST_CALLS, ROTATED_BYTES // hidden.nbytes)))]
    call = partial(ops.proxy_relevancy, norm=case.norm, activation=case.activation)
    truth, results = (call(*arguments, backend=name) for name in ("reference", backend))
    whole = partial(call, query=query, offset=offset, lengths=lengths, backend=backend)
    figures = {
        "seconds": replayed([partial(whole, own) for own in states], device),
        "difference": max((a - b).abs().max().item() for a, b in zip(results, truth, strict=True)),
    }
    if backend == "reference":
        return figures
    run = _dispatch.select("proxy_relevancy", hidden, backend)
    rest: Any = query, offset, lengths, 1e-6, case.norm == "layer", case.activation == "softmax"
    seconds = replayed([partial(run, own, *rest) for own in states], device)
    moved = hidden.nbytes + query.nbytes + 4 * case.batch * case.targets * (case.columns + 2)
    return figures | {
        "kernel_seconds": seconds,
        "share_of_copy_rate": moved / seconds / copied,
        "seconds_above_launch": seconds - launch,
        # 80 % of the copy's rate, or 2 µs above an empty launch, whichever is longer.
        "over_allowed": seconds / max(launch + 2e-6, moved / (0.8 * copied)),
    }


def replayed(calls: Sequence[Callable[[], Any]], device: str, rounds: int = 15) -> float:
    """Take the median seconds of a call, of all of them one after the other, from a CUDA graph."""
    import torch

    for call in calls[:2]:
        call()  # compiles, loads modules
    if device != "cuda":
        return statistics.median(timing.seconds(call, device) for call in calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(timing.event_seconds(graph.replay, rounds)) / len(calls)


def empty_launch(device: str) -> float:
    """Measure the seconds of a kernel that writes one number."""
    import torch

    number = torch.zeros(1, device=device)
    return replayed([partial(number.fill_, 1.0)] * MOST_CALLS, device)


def live_maps(case: decoders.Case, image_columns: int, device: str, rounds: int = 3) -> dict[str, float]:
    """Measure a decode step without and with live maps, and what they add, as a share of it."""
    import torch

    from lvlm_fastxai.fastrm.head import FastRM, FastRMConfig
    from lvlm_fastxai.fastrm.live import LiveMaps
    from lvlm_fastxai.models.fingerprint import fingerprint

    torch.manual_seed(0)
    model = decoders.build_model(case, device)
    model.config.image_token_id = image_token = min(IMAGE_TOKEN, case.vocabulary - 1)
    tokens = torch.randint(3, image_token, (1, case.columns), device=device)
    tokens[:, 5 : 5 + image_columns] = image_token
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    head = FastRM(FastRMConfig(case.width, model_fingerprint=fingerprint(model))).to(device)
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}

    maps: list[LiveMaps] = []
    set_up = timing.seconds(lambda: maps.append(LiveMaps(head, model, inputs)), device)

    def plain() -> None:
        model.generate(**inputs, **options)

    def live() -> None:
        with maps[0] as attached:
            attached.steps.clear()
            model.generate(**inputs, **options, streamer=attached)
        if len(attached.steps) != NEW_TOKENS:
            raise RuntimeError(f"{len(attached.steps)} maps for {NEW_TOKENS} tokens")

    def prompt() -> None:
        model.generate(**inputs, do_sample=False, max_new_tokens=1)

    seconds = timing.in_turns({"plain": plain, "live": live, "prompt": prompt}, rounds, device)
    steps = [(a - b) / (NEW_TOKENS - 1) for a, b in zip(seconds["plain"], seconds["prompt"], strict=True)]
    added = [(a - b) / NEW_TOKENS for a, b in zip(seconds["live"], seconds["plain"], strict=True)]
    return {
        "set_up_seconds": set_up,
        "step_seconds": statistics.median(steps),
        "added_seconds": statistics.median(added),
        "share": statistics.median(a / b for a, b in zip(added, steps, strict=True)),
    }


def line(name: str, figures: dict[str, Any]) -> str:
    """Lay out one case for the terminal."""
    parts = []
    for backend, each in figures.items():
        if "kernel_seconds" in each:
            text = f"kernels {each['kernel_seconds'] * 1e6:.1f} µs = {each['share_of_copy_rate']:.0%} of a copy"
            parts.append(f"{backend} {text}, call {each['seconds'] * 1e6:.1f} µs")
        elif "seconds" in each:
            parts.append(f"{backend} {each['seconds'] * 1e6:.1f} µs")
    return f"{name}: " + " | ".join(parts)


def errors(results: dict[str, Any]) -> list[str]:
    """List what went wrong, apart from memory."""
    found = []
    for name, figures in results["cases"].items():
        found += [f"{name} {backend}: {each['error']}" for backend, each in figures.items() if "error" in each]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    suite.add_arguments(parser, CASES)


def main(args: argparse.Namespace) -> int:
    import torch

    every = REHEARSED_CASES if args.rehearse else CASES
    wanted = {name: case for name, case in every.items() if not args.case or name in args.case}
    decoder, image_columns = end_to_end.llava_7b(620), IMAGE_COLUMNS
    if args.rehearse:
        decoder, image_columns = replace(end_to_end.REHEARSED_CASES["llava-1.5-7b-2400"][0], columns=20), 9
    run = Suite(args, [*wanted, LIVE_MAPS])
    with torch.no_grad():
        copied = op.copy_rate(args.device, 2**16 if args.rehearse else op.COPIED_BYTES)
        launch = empty_launch(args.device)
        run.results |= {"copy_gigabytes_per_second": copied / 1e9, "empty_launch_seconds": launch}
        print(f"copy {copied / 1e9:.0f} GB/s, empty launch {launch * 1e6:.1f} µs", flush=True)
        for name, case in wanted.items():
            if not run.has_time():
                break
            figures = memory.attempt(partial(measure, case, args.device, copied, launch), args.device)
            figures = {"set_up": {"seconds": figures}} if isinstance(figures, str) else figures
            print(line(name, figures), flush=True)
            memory.free(args.device)
            run.add(name, case, figures)
        if run.has_time():
            found = memory.attempt(partial(live_maps, decoder, image_columns, args.device), args.device)
            run.results["live_maps"] = {"seconds": found} if isinstance(found, str) else found
            run.left_out.remove(LIVE_MAPS)
            print(f"live maps: {run.results['live_maps']}")
    run.write()
    return run.finish(errors(run.results))
