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
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import end_to_end, machine

IMAGE, TEXT, NEW_TOKENS = 576, 128, 32
IMAGE_TOKEN = 31999
EXACT = ("eager", "eager_as_published", "fast", "lean")
HEADS = ("head_after_forward", "head")
COST_CASE = "decoder-704"


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

    torch.set_num_threads(args.threads)
    head = machine.describe()
    results = {"live": live, "cost": cost, "ablation": ablation, "ceiling": ceiling}[args.what](args)
    if args.out:
        machine.write_results(args.out, head, results)
    return 0


def build_llava(dtype: str = "float32") -> Any:
    """LLaVA of random weights: the decoder of `end_to_end`'s acceptance case under a tower of two layers."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    case = end_to_end.CASES[COST_CASE]
    text = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
    )
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).to(getattr(torch, dtype)).eval()


def new_head(model: Any) -> Any:
    """An untrained head for the model, of the shape that ships."""
    from lvlm_fastxai.fastrm import FastRM, FastRMConfig
    from lvlm_fastxai.models.fingerprint import fingerprint

    shipped = FastRM.from_pretrained("shipped").config
    width = model.config.get_text_config().hidden_size
    config = FastRMConfig(
        hidden_size=width,
        layer=-1,
        dim=shipped.dim,
        query_width=shipped.query_width,
        norm=shipped.norm,
        model_fingerprint=fingerprint(model),
    )
    return FastRM(config).eval()


def live(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lvlm_fastxai.fastrm import LiveMaps

    model = build_llava()
    head = new_head(model)
    tokens = torch.randint(5, 30000, (1, IMAGE + TEXT))
    tokens[0, 8 : 8 + IMAGE] = IMAGE_TOKEN
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "pixel_values": torch.randn(1, 3, 336, 336),
    }

    def write(count: int, streamer: Any = None) -> float:
        begun = time.perf_counter()
        model.generate(
            **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0, streamer=streamer
        )
        return time.perf_counter() - begun

    spent = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            begun = time.perf_counter()
            try:
                return call(*arguments)
            finally:
                spent[0] += time.perf_counter() - begun

        return run

    attached = LiveMaps(head, model, inputs)
    for name in ("_see_layer", "_see_logits", "put"):
        setattr(attached, name, timed(getattr(attached, name)))
    rows = []
    for number in range(args.rounds + 1):
        first, plain = write(1), write(NEW_TOKENS)
        attached.steps.clear()
        spent[0] = 0.0
        with attached:
            attended = write(NEW_TOKENS, attached)
            kept = attached.state_bytes
        assert len(attached.steps) == NEW_TOKENS
        if number:  # the first round warms up
            decode = plain - first
            rows.append((decode, spent[0], (attended - plain) / decode))
    decode, inside, _ = (statistics.median(column) for column in zip(*rows, strict=True))
    results = {
        "decode_seconds": decode,
        "live_seconds": inside,
        "share_of_decode": statistics.median(own / whole for whole, own, _ in rows),
        "share_of_decode_rounds": [own / whole for whole, own, _ in rows],
        "difference_of_whole_runs": statistics.median(difference for *_, difference in rows),
        "difference_of_whole_runs_rounds": [difference for *_, difference in rows],
        "state_bytes": kept,
        "tokens": NEW_TOKENS,
        "image_columns": IMAGE,
    }
    print(
        f"{NEW_TOKENS} tokens, {IMAGE} image columns: decode {decode:.3f} s, live maps {1e3 * inside:.1f} ms = "
        f"{results['share_of_decode']:.2%} of it (difference of whole runs "
        f"{results['difference_of_whole_runs']:+.2%}); {kept / 2**20:.1f} MiB of states"
    )
    return results


def cost_work(variant: str) -> tuple[Callable[[], object], int]:
    """The call of one variant, and the bytes of the model's weights."""
    import torch

    case = end_to_end.CASES[COST_CASE]
    model, inputs, targets = end_to_end.build(case, "cpu")
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if variant not in HEADS:
        return end_to_end.work(variant, model, inputs, targets), weights
    head = new_head(model)
    kept: dict[str, Any] = {}

    def keep(module: Any, arguments: tuple, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        kept["hidden"], kept["state"] = states[:, 8 : 8 + IMAGE], states[:, -1:]

    model.model.layers[head.config.layer].register_forward_hook(keep)

    def forward() -> None:
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            model(**inputs, use_cache=False, logits_to_keep=1)

    def predict() -> Any:
        return head.predict(kept["hidden"], kept["state"])

    def both() -> Any:
        forward()
        return predict()

    forward()
    return (predict if variant == "head" else both), weights


def cost(args: argparse.Namespace) -> dict[str, Any]:
    variants = (*EXACT, *HEADS)
    memory = {variant: machine.in_fresh_process("benchmarks.fastrm", variant) for variant in variants}
    calls = {}
    for variant in variants:
        calls[variant], weights = cost_work(variant)
        calls[variant]()
    taken: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(args.rounds):
        for variant, call in calls.items():
            taken[variant].append(machine.seconds(call, "cpu"))
    figures: dict[str, Any] = {}
    for variant in variants:
        extra = memory[variant]
        figures[variant] = {"seconds": statistics.median(taken[variant]), "extra_bytes": extra, "saved": {}}
        for base in EXACT if variant in HEADS else ():
            ratio = statistics.median(a / b for a, b in zip(taken[variant], taken[base], strict=True))
            own, theirs = memory[variant], memory[base]
            assert isinstance(own, int) and isinstance(theirs, int)
            figures[variant]["saved"][base] = {
                "time": 1 - ratio,
                "times_faster": 1 / ratio,
                "extra_memory": 1 - own / theirs,
                "memory_with_weights": 1 - (own + weights) / (theirs + weights),
            }
    results = {"case": COST_CASE, "weights_bytes": weights, "variants": figures}
    print(f"one map, {COST_CASE}, weights {weights / 2**20:.0f} MiB")
    for variant, found in figures.items():
        print(f"  {variant:20}{found['seconds']:10.4f} s{found['extra_bytes'] / 2**20:10.1f} MiB")
        for base, saved in found["saved"].items():
            print(
                f"    against {base:20}{saved['time']:8.2%} less time ({saved['times_faster']:.4g}x), "
                f"{saved['extra_memory']:.1%} less memory ({saved['memory_with_weights']:.1%} with the weights)"
            )
    return results


# The head as the paper has it, as far as it says; each row changes one thing, the last all that turned out better.
PLAIN = {"layer": -1, "dim": 64, "query_width": 0, "norm": "rms", "class_weight": 0.5}
ABLATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer 0": {"layer": 0},
    "layer 1": {"layer": 1},
    "layer 2": {"layer": -2},
    "layer 3 (last)": {"layer": -1},
    "dim 16": {"dim": 16},
    "dim 32": {"dim": 32},
    "dim 64": {"dim": 64},
    "dim 128": {"dim": 128},
    "query width 0": {"query_width": 0},
    "query width 256": {"query_width": 256},
    "query width 512": {"query_width": 512},
    "RMSNorm": {"norm": "rms"},
    "LayerNorm": {"norm": "layer"},
    "softmax": {"activation": "softmax"},
    "class weight 0": {"class_weight": 0.0},
    "class weight 0.5": {"class_weight": 0.5},
    "class weight 1": {"class_weight": 1.0},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate 1e-2": {"learning_rate": 1e-2},
    "binarisation 0.1": {"binarisation": 0.1},
    "binarisation 0.5": {"binarisation": 0.5},
    "an eighth of the maps": {"share": 0.125},
    "half of the maps": {"share": 0.5},
    "defaults": {"layer": -2, "query_width": 256, "norm": "layer", "class_weight": 0.0},
}


def ablation(args: argparse.Namespace) -> dict[str, Any]:
    import lvlm_fastxai as fx
    from lvlm_fastxai.fastrm import FastRMConfig
    from lvlm_fastxai.fastrm.shards import open_maps
    from lvlm_fastxai.fastrm.states import Items
    from lvlm_fastxai.fastrm.train import StateCache, TrainSettings, train_head
    from lvlm_fastxai.prompting.answering import Answerer

    if args.maps is None or args.validation is None:
        sys.exit("ablation: give --maps and --validation, folders of `lvlm-fastxai fastrm build-maps`")
    model, processor = fx.load_tiny_lvlm()
    answerer = Answerer(model, processor)
    items, validation = Items([open_maps(args.maps)]), Items([open_maps(args.validation)])
    layers = (0, 1, -2, -1)
    learn = StateCache(answerer, items, layers, float("inf"))
    check = StateCache(answerer, validation, layers, float("inf"))
    # Single rows join those that are there.
    results: dict[str, Any] = {}
    if args.only and args.out and args.out.exists():
        results = json.loads(args.out.read_text())["results"]
    base = TrainSettings(epochs=args.epochs, **PLAIN)
    seen: dict[str, Any] = {}
    for name, changes in ABLATIONS.items():
        if args.only and not any(part in name for part in args.only):
            continue
        changes = dict(changes)
        share = changes.pop("share", 1.0)
        settings = replace(base, **changes)
        if str((settings, share)) not in seen:  # the plain head stands once in each group
            config = FastRMConfig(hidden_size=model.config.get_text_config().hidden_size)
            part = items[: round(len(items) * share)]
            caches = (learn.first(len(part)), check)
            begun = time.perf_counter()
            trained = train_head(answerer, part, validation, config, settings, caches=caches)
            seen[str((settings, share))] = {
                "validation_f1": trained.f1,
                "epochs": len(trained.history),
                "parameters": sum(parameter.numel() for parameter in trained.head.parameters()),
                "seconds": time.perf_counter() - begun,
            }
        results[name] = seen[str((settings, share))]
        print(
            f"{name:24} F1 {results[name]['validation_f1']:.4f}  {results[name]['parameters']} parameters", flush=True
        )
        if args.out:
            machine.write_results(args.out, machine.describe(), results)
    return results


def ceiling(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lvlm_fastxai.fastrm.shards import open_maps
    from lvlm_fastxai.fastrm.train import binary_target

    if args.maps is None or args.other is None:
        sys.exit("ceiling: give --maps and --other, folders of build-maps with one source and two dtypes")
    both = open_maps(args.maps), open_maps(args.other)
    right = chosen = wanted = tokens = 0
    for one, other in zip(both[0].records(), both[1].records(), strict=True):
        if one.token_ids != other.token_ids or not one.token_ids:
            continue
        first, second = (binary_target(torch.from_numpy(found.maps.copy()), 0.3).bool() for found in (one, other))
        right += int((first & second).sum())
        chosen, wanted = chosen + int(second.sum()), wanted + int(first.sum())
        tokens += len(one.token_ids)
    results = {
        "dtypes": [found.settings["dtype"] for found in both],
        "source": both[0].source_spec,
        "tokens": tokens,
        "f1": 2 * right / (chosen + wanted),
    }
    print(f"{results['dtypes'][1]} against {results['dtypes'][0]}, {tokens} tokens: F1 {results['f1']:.3f}")
    return results


if __name__ == "__main__":
    worker = argparse.ArgumentParser()
    worker.add_argument("--worker", required=True, metavar="VARIANT")
    machine.limit_memory()
    call, _ = cost_work(worker.parse_args().worker)
    call()  # what libraries and thread pools keep for good is not part of a map
    print(machine.peak_extra_bytes(call, "cpu"))
