"""Which head is best, and how far exact maps agree with themselves."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from ..common import machine
from ..common.results import write_results

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
    """Train every head of :data:`ABLATIONS` on the same maps, and compare them on the maps that chose their epoch."""
    import lvlm_fastxai as fx
    from lvlm_fastxai.fastrm.shards import open_maps
    from lvlm_fastxai.fastrm.states import Items
    from lvlm_fastxai.fastrm.train import StateCache, TrainSettings
    from lvlm_fastxai.prompting.answering import Answerer

    if args.maps is None or args.validation is None:
        sys.exit("ablation: give --maps and --validation, folders of `lvlm-fastxai fastrm build-maps`")
    answerer = Answerer(*fx.load_tiny_lvlm())
    items, validation = Items([open_maps(args.maps)]), Items([open_maps(args.validation)])
    layers = (0, 1, -2, -1)
    learn, check = (StateCache(answerer, each, layers, float("inf")) for each in (items, validation))
    # Single rows join those that are there.
    found: dict[str, Any] = {}
    if args.only and args.out and args.out.exists():
        found = json.loads(args.out.read_text())["results"]
    base = TrainSettings(epochs=args.epochs, **PLAIN)
    seen: dict[str, Any] = {}
    for name, changes in ABLATIONS.items():
        if args.only and not any(part in name for part in args.only):
            continue
        changes = dict(changes)
        share = changes.pop("share", 1.0)
        settings = replace(base, **changes)
        key = str((settings, share))
        if key not in seen:  # the plain head stands once in each group
            part = items[: round(len(items) * share)]
            seen[key] = train_one(answerer, part, validation, settings, (learn.first(len(part)), check))
        found[name] = seen[key]
        print(f"{name:24} F1 {found[name]['validation_f1']:.4f}  {found[name]['parameters']} parameters", flush=True)
        if args.out:
            write_results(args.out, machine.describe(), found)
    return found


def train_one(answerer: Any, items: Any, validation: Any, settings: Any, caches: tuple[Any, Any]) -> dict[str, Any]:
    """Train one head; returns its figures."""
    from lvlm_fastxai.fastrm import FastRMConfig
    from lvlm_fastxai.fastrm.train import train_head

    config = FastRMConfig(hidden_size=answerer.model.config.get_text_config().hidden_size)
    begun = time.perf_counter()
    trained = train_head(answerer, items, validation, config, settings, caches=caches)
    return {
        "validation_f1": trained.f1,
        "epochs": len(trained.history),
        "parameters": sum(parameter.numel() for parameter in trained.head.parameters()),
        "seconds": time.perf_counter() - begun,
    }


def ceiling(args: argparse.Namespace) -> dict[str, Any]:
    """Compare exact maps of the same samples in two dtypes, by the F1 that heads are judged by."""
    from lvlm_fastxai.fastrm.shards import open_maps
    from lvlm_fastxai.fastrm.train import binary_target

    if args.maps is None or args.other is None:
        sys.exit("ceiling: give --maps and --other, folders of build-maps with one source and two dtypes")
    both = open_maps(args.maps), open_maps(args.other)
    right = chosen = wanted = tokens = 0
    for one, other in zip(both[0].records(), both[1].records(), strict=True):
        if one.token_ids != other.token_ids or not one.token_ids:
            continue
        first, second = (binary_target(torch.from_numpy(each.maps.copy()), 0.3).bool() for each in (one, other))
        right += int((first & second).sum())
        chosen, wanted = chosen + int(second.sum()), wanted + int(first.sum())
        tokens += len(one.token_ids)
    found = {
        "dtypes": [each.settings["dtype"] for each in both],
        "source": both[0].source_spec,
        "tokens": tokens,
        "f1": 2 * right / (chosen + wanted),
    }
    print(f"{found['dtypes'][1]} against {found['dtypes'][0]}, {tokens} tokens: F1 {found['f1']:.3f}")
    return found
