"""``lvlm-fastxai fastrm evaluate``: predicted maps against exact ones that the head has never seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ArgumentError
from ..evaluate.bootstrap import ClusterBootstrap
from ..evaluate.metrics import cell_coverage, evidence_cells, mass_in_mask, pointing_game
from ..explain.relevancy_rows import explain_rows
from ..prompting.answering import Answerer
from .head import FastRM, Prediction, min_max
from .states import Item, Items, read_states
from .train import binary_target

SCHEMA = "lvlm-fastxai/fastrm-evaluation/1"
PREDICTORS = ("fastrm", "raw_attention", "mean_map")
NAMES = {"fastrm": "FastRM", "raw_attention": "raw attention", "mean_map": "mean map", "exact": "exact map"}
SCORES = ("f1", "best_f1", "iou", "accuracy", "rank_correlation", "pointing_game", "mass_in_mask")
THRESHOLDS = np.linspace(0.02, 0.98, 97)


@dataclass(frozen=True)
class TokenScore:
    """One explained token: its question's kind and number, and (predictor) → counts and scores.

    Attributes:
        counts: {predictor: (true positive, false positive, false negative, true negative) at its own threshold}.
        sweep: {predictor: (thresholds, 3) true positive, false positive, false negative at `THRESHOLDS`}.
        scores: {predictor: {rank_correlation, pointing_game, mass_in_mask}}; the latter two of the exact map as well.
    """

    kind: str
    cluster: int
    counts: dict[str, tuple[int, int, int, int]]
    sweep: dict[str, NDArray[np.int64]]
    scores: dict[str, dict[str, float]]


def evaluate_head(
    head: FastRM,
    answerer: Answerer,
    items: Items | Sequence[Item],
    *,
    batch: int = 32,
    resamples: int = 2000,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score the head, the last layer's raw attention and the training maps' mean against exact maps.

    A positive is a column above ``binarisation`` of the exact map after min–max. The head calls positive what is above
    its decision threshold, which was chosen on validation data; the two baselines, after min–max, what is above
    ``binarisation``. ``best_f1`` gives each the one threshold that suits these very data best.

    Args:
        head: trained for the model.
        answerer: the model and its processor.
        items: exact maps with their samples.
        batch: answers per pass.
        resamples: of the bootstrap over questions.
        progress: called as ``progress(done, total)``.

    Returns:
        {"tokens", "answers", "positive_share", "groups": {kind or "all": {predictor: {score: [value, low, high]}}}}

    Raises:
        ModelMismatchError: the head belongs to another model.
    """
    head.check_model(answerer.model)
    found: list[TokenScore] = []
    positive = total = 0
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        for number, (item, exact, values, layout) in enumerate(_predict(head, answerer, part), start):
            target = binary_target(exact, head.config.binarisation).bool()
            positive += int(target.sum())
            total += target.numel()
            found += _score(head, item, number, exact, target, values, layout)
        if progress is not None:
            progress(min(start + batch, len(items)), len(items))
    if not found:
        raise ArgumentError("maps: there is no answer to evaluate on")
    kinds = sorted({score.kind for score in found})
    groups = {"all": found, **({kind: [s for s in found if s.kind == kind] for kind in kinds} if kinds != [""] else {})}
    return {
        "schema": SCHEMA,
        "answers": len(items),
        "tokens": len(found),
        "positive_share": positive / total,
        "decision_threshold": head.config.decision_threshold,
        "groups": {name: _summary(scores, resamples) for name, scores in groups.items()},
    }


def _predict(head: FastRM, answerer: Answerer, part: Sequence[Item]) -> Any:
    """(item, (T, n) exact map, {predictor: (T, n)}, layout) of each answer."""
    samples = [item.sample for item in part]
    answers = [item.record.token_ids for item in part]
    states = read_states(answerer, samples, answers, [head.config.layer], len(part))
    for item, sample, answer, known in zip(part, samples, answers, states, strict=True):
        picture = sample.picture()
        prompts = answerer.encode([picture], [sample.question])
        start = prompts["input_ids"].shape[1]
        rows = explain_rows(
            answerer.model,
            answerer.accepted(answerer.join(prompts, [answer])),
            [(0, start + place - 1, token) for place, token in enumerate(answer)],
            method="raw_attention",
            prompt_length=start,
        ).rows.cpu()
        columns = answerer.image_columns(prompts, 0)
        hidden, state = (of[head.config.layer][None].to(head.bias.device) for of in (known.hidden, known.state))
        prediction: Prediction = head.predict(hidden, state)
        exact = torch.from_numpy(np.ascontiguousarray(item.record.maps))
        values = {"fastrm": prediction.map[0].cpu(), "raw_attention": rows[:, columns]}
        if head.mean_map.shape == exact.shape[1:]:
            values["mean_map"] = head.mean_map.cpu().expand_as(exact)
        yield item, exact, values, (answerer.image_layouts(prompts, [[picture]])[0][0], columns, start)


def _score(
    head: FastRM,
    item: Item,
    cluster: int,
    exact: Tensor,
    target: Tensor,
    values: dict[str, Tensor],
    place: tuple[Any, list[int], int],
) -> list[TokenScore]:
    from scipy.stats import rankdata

    layout, columns, length = place
    sample = item.sample
    coverage = None
    if sample.mask is not None and sample.mask.any():
        coverage = cell_coverage(sample.mask, layout.shape, layout.box)
    thresholds = torch.from_numpy(THRESHOLDS).float()[:, None]
    found = []
    for row in range(len(exact)):
        counts, sweep = {}, {}
        scores: dict[str, dict[str, float]] = {}
        ranks = rankdata(exact[row].numpy())
        for name, maps in values.items():
            relative = maps[row] if name == "fastrm" and head.config.activation == "sigmoid" else min_max(maps[row])
            chosen = head.positive(maps[row]) if name == "fastrm" else relative > head.config.binarisation
            counts[name] = _confusion(chosen, target[row])
            above = relative > thresholds  # (thresholds, n)
            right = (above & target[row]).sum(1)
            sweep[name] = torch.stack([right, above.sum(1) - right, target[row].sum() - right], 1).numpy()
            scores[name] = {"rank_correlation": _correlation(ranks, rankdata(maps[row].numpy()))}
        for name, maps in {**values, "exact": exact}.items():
            own = scores.setdefault(name, {})
            if coverage is not None:
                line = torch.zeros(length)
                line[columns] = maps[row].float()
                grid = layout.read(line).double().numpy()
                own["pointing_game"] = pointing_game(grid, evidence_cells(coverage))
                own["mass_in_mask"] = mass_in_mask(grid, coverage)
        found.append(TokenScore(sample.kind or "", cluster, counts, sweep, scores))
    return found


def _confusion(chosen: Tensor, target: Tensor) -> tuple[int, int, int, int]:
    right = int((chosen & target).sum())
    wrong, missed = int(chosen.sum()) - right, int(target.sum()) - right
    return right, wrong, missed, target.numel() - right - wrong - missed


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's, of ranks; 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0


def _summary(found: Sequence[TokenScore], resamples: int) -> dict[str, dict[str, list[float | None]]]:
    """{predictor: {score: [value, low, high]}}: micro-averaged over columns, bootstrapped over questions."""
    bootstrap = ClusterBootstrap(np.array([score.cluster for score in found]), resamples=resamples)
    summary: dict[str, dict[str, list[float | None]]] = {}
    for name in (*PREDICTORS, "exact"):
        if not any(name in score.scores for score in found):
            continue
        own: dict[str, Any] = {}
        # Pictures with another number of columns than those of the training have no mean map, and count for nothing.
        if any(name in score.counts for score in found):
            none = np.zeros((len(THRESHOLDS), 3), dtype=np.int64)
            right, wrong, missed, rest = np.array([s.counts.get(name, (0,) * 4) for s in found], dtype=np.float64).T
            own["f1"] = bootstrap.ratio(2 * right, 2 * right + wrong + missed)
            own["iou"] = bootstrap.ratio(right, right + wrong + missed)
            own["accuracy"] = bootstrap.ratio(right + rest, right + wrong + missed + rest)
            sums = np.stack([s.sweep.get(name, none) for s in found]).sum(0)
            best = int(np.argmax(2 * sums[:, 0] / np.maximum(2 * sums[:, 0] + sums[:, 1] + sums[:, 2], 1)))
            right, wrong, missed = np.array([s.sweep.get(name, none)[best] for s in found], dtype=np.float64).T
            own["best_f1"] = bootstrap.ratio(2 * right, 2 * right + wrong + missed)
        for score in ("rank_correlation", "pointing_game", "mass_in_mask"):
            values = np.array([s.scores.get(name, {}).get(score, np.nan) for s in found])
            if np.isfinite(values).any():
                own[score] = bootstrap.mean(values)
        summary[name] = {
            score: [None if not np.isfinite(x) else float(x) for x in own[score]] for score in SCORES if score in own
        }
    return summary


def draw(result: dict[str, dict[str, Any]], path: Path) -> bool:
    """Draw F1 and rank correlation by kind of question, one panel per set; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(result), figsize=(6.5 * len(result), 7), squeeze=False, sharey="row", layout="constrained"
    )
    colours = {"fastrm": "#1a6fb4", "raw_attention": "#d9822b", "mean_map": "#8a8f98"}
    for column, (title, found) in enumerate(result.items()):
        groups = found["groups"]
        for axis, score in zip(axes[:, column], ("f1", "rank_correlation"), strict=True):
            for place, name in enumerate(PREDICTORS):
                bars = [groups[kind].get(name, {}).get(score) or [np.nan] * 3 for kind in groups]
                value, low, high = np.array(bars, dtype=np.float64).T
                at = np.arange(len(groups)) + (place - 1) * 0.27
                spread = np.nan_to_num(np.stack([value - low, high - value]).clip(0))
                axis.bar(at, value, 0.25, yerr=spread, label=NAMES[name], color=colours[name], error_kw={"lw": 1})
            axis.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
            axis.set_title(title if score == "f1" else "")
            axis.set_ylabel("F1 of relevant columns" if score == "f1" else "rank correlation")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def table(result: dict[str, dict[str, Any]]) -> str:
    """Write the scores in Markdown: a line per set, kind and predictor."""
    header = "| set | questions | map | F1 | best F1 | IoU | accuracy | rank corr. | pointing | mass in mask |"
    lines = [header, "|---|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    for title, found in result.items():
        for group, by_name in found["groups"].items():
            for name, scores in by_name.items():
                cells = [_cell(scores.get(score), interval=score in ("f1", "rank_correlation")) for score in SCORES]
                lines.append(f"| {title} | {group} | {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: list[float | None] | None, *, interval: bool) -> str:
    if value is None or value[0] is None:
        return ""
    if not interval or value[1] is None or value[2] is None:
        return f"{value[0]:.3f}"
    return f"{value[0]:.3f} ({value[1]:.3f} – {value[2]:.3f})"
