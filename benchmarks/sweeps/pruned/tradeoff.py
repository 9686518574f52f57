"""Error, rank correlation, top-10 overlap and the pointing game over the tolerance, beside dense bf16."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...common.results import Point, as_table
from . import cases
from .descents import bar, exact_rows, half_copy, half_points, load_smollm2, opened, points_of
from .texts import QUESTIONS, TWO_TEXTS, Reader

SAVED_PICTURES = 20


def text(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure SmolLM2, with the estimate's parts."""
    model, tokenizer = load_smollm2()
    half, reader = half_copy(model), Reader(tokenizer, args.texts)
    points: list[Point] = []
    dense: list[Point] = []
    count = max(1, args.targets // 2)
    total = len(args.lengths) * (len(TWO_TEXTS) * args.targets + count * len(QUESTIONS))
    with bar(total, "texts") as progress:
        for columns in args.lengths:
            chosen = cases.ordinary(reader, TWO_TEXTS, columns, args.targets)
            chosen += cases.answers(model, reader, QUESTIONS, columns, count)
            for case in chosen:
                exact = exact_rows(model, case, args.method)
                with opened(model, case, args.method) as descents:
                    points += points_of(descents, case, exact, args.tolerances, progress.update)
                dense += half_points(half, case, exact, args.method)
            yield {"points": as_table(points), "bf16": as_table(dense)}


def picture(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure the shipped LVLM."""
    import lvlm_fastxai as fx

    yield from of_pictures(*fx.load_tiny_lvlm(), args)


def real(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure DINOv2-small and SmolLM2, put together by `python -m benchmarks real-lvlm train`."""
    from ...real_lvlm.model import load_real_lvlm

    yield from of_pictures(*load_real_lvlm(), args)


def of_pictures(model: Any, processor: Any, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure an LVLM: the same for its answers' tokens, and the pointing game of each answer's image map."""
    from lvlm_fastxai.tiny import scenes

    model.requires_grad_(False)
    half = half_copy(model)
    points: list[Point] = []
    dense: list[Point] = []
    pointing: list[Point] = []

    def tables() -> dict[str, Any]:
        return {"points": as_table(points), "bf16": as_table(dense), "pointing": as_table(pointing)}

    with bar(args.pictures, "pictures", "picture") as progress:
        for each in cases.pictures(model, processor, scenes.held_out(args.pictures)):
            case = each.case
            exact = exact_rows(model, case, args.method)
            with opened(model, case, args.method) as descents:
                points += points_of(descents, case, exact, args.tolerances)
                numbers = range(len(case.targets))
                pruned = {str(t): torch.stack([descents.row(n, t) for n in numbers]) for t in args.tolerances}
            dense += half_points(half, case, exact, args.method)
            rows = {"exact": exact, **pruned, "bf16": exact_rows(half, case, args.method)}
            pointing.append({"kind": case.kind, **pointing_of(each, rows)})
            progress.update(1)
            if len(pointing) % SAVED_PICTURES == 0:
                yield tables()
    yield tables()


def pointing_of(each: cases.Picture, rows: dict[str, Tensor]) -> dict[str, float]:
    """Play the pointing game with every way's map, and say whether its highest cell is the exact map's.

    Args:
        rows: way → (N, S) relevancy; "exact" is one of them.
    """
    from lvlm_fastxai.evaluate.metrics import cell_coverage, evidence_cells, pointing_game

    layout = each.layout
    evidence = evidence_cells(cell_coverage(each.question.mask, layout.shape, layout.box))
    maps = {name: torch.stack([layout.read(row) for row in own]).mean(0).double().numpy() for name, own in rows.items()}
    best = maps["exact"].argmax()
    return {
        **{name: pointing_game(own, evidence) for name, own in maps.items()},
        **{f"same cell, {name}": float(own.argmax() == best) for name, own in maps.items()},
    }
