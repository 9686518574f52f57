"""What the page says in words: how the explanation was made, and how it is to be read."""

from __future__ import annotations

import html
import re

from ...methods import registry
from ..data import ANSWER_DEFINITION, CONFIDENCE_DEFINITION, WEIGHTED_DEFINITION, ExplanationData
from .entries import compared_method
from .text import percent
from .weights import weight_meanings

__all__ = ["facts_list", "how_to_read", "seconds_text"]


def facts_list(explanation: ExplanationData) -> str:
    facts = {
        "Method": registry.find(explanation.method).title,
        **{name.replace("_", " ").capitalize(): str(value) for name, value in explanation.options.items()},
        **_choice(explanation),
        "Model": explanation.model_name,
        "Architecture": explanation.model_class,
        "Confidence": percent(explanation.confidence),
        **_decision(explanation),
        "Time to answer": seconds_text(explanation.seconds.get("generate", 0.0)),
        "Time to explain": seconds_text(explanation.seconds.get("explain", 0.0)),
        "Peak memory": "not measured" if explanation.peak_bytes is None else _bytes(explanation.peak_bytes),
        "Memory mode": explanation.memory,
        "Backend": explanation.backend,
        "Device": f"{explanation.device}, {explanation.dtype}",
        "Sequence": f"{explanation.sequence_length} positions",
        "Image grid": ", ".join(f"{m.shape[0]} × {m.shape[1]}" for m in explanation.image_maps) or "unknown",
        **_pruning(explanation),
        "Versions": ", ".join(f"{name} {version}" for name, version in explanation.versions.items()),
    }
    return "".join(
        # A long class name may break between its words.
        f"<div><dt>{html.escape(name)}</dt><dd>{re.sub('(?<=[a-z])(?=[A-Z])', '<wbr>', html.escape(value))}</dd></div>"
        for name, value in facts.items()
    )


def _decision(explanation: ExplanationData) -> dict[str, str]:
    facts = {} if explanation.entropy is None else {"Map entropy": f"{explanation.entropy:.3f} (FastRM, 0 to 1)"}
    if explanation.decision is not None:
        facts["Decision"] = f"{explanation.decision['verdict']}: {explanation.decision['reason']}"
    return facts


def _choice(explanation: ExplanationData) -> dict[str, str]:
    if explanation.chosen_tokens == "all":
        return {}
    explained = len(explanation.tokens)
    return {"Tokens": f"{explanation.chosen_tokens}: {explained} of {explained + len(explanation.untouched)}"}


def _pruning(explanation: ExplanationData) -> dict[str, str]:
    if explanation.row_tolerance == 0:
        return {}
    if explanation.share_of_rows == 1:
        return {"Row tolerance": f"{explanation.row_tolerance}: exact"}
    return {
        "Row tolerance": f"{explanation.row_tolerance}: {percent(explanation.share_of_rows)} of the rows visited",
        "Estimated error": f"at most {percent(explanation.estimated_error)} of a token's relevancy",
    }


def how_to_read(explanation: ExplanationData) -> str:
    exact = (
        "The map of a token is the relevancy of each image patch for the raw logit of that token, propagated through "
        "every layer of the language model."
        if registry.find(explanation.method).read_out == "propagated"
        else "The map of a token holds one score for each image patch, as the method named above defines it."
    )
    lines = [
        f"{exact} Values are raw: not rescaled, not thresholded. The colour scale runs from zero to the largest value "
        "of the token shown; “one scale for all tokens” keeps it fixed instead. “Raw grid” shows the patches as the "
        "model has them; otherwise they are drawn smoothly through the same values. The overlay is more transparent "
        "where the value is small.",
        f"For the whole answer, maps and scores are the "
        f"{WEIGHTED_DEFINITION if explanation.weighted else ANSWER_DEFINITION}. "
        f"Its confidence is the {CONFIDENCE_DEFINITION}.",
        "“Where the relevancy lies” sums the raw values over the image, the question, the prompt's template (the words "
        "and markers around the question) and the answer's earlier tokens. The entry of the position that produced the "
        "token is left out, there and in the question's words."
        + (" For the whole answer it is the tokens' plain mean, without weights." if explanation.weighted else ""),
        "A map says which inputs the answer depends on by this measure. It does not say that the answer is right.",
    ]
    if registry.find(explanation.method).read_out == "predicted":
        lines.insert(
            -1,
            "A trained head has predicted these maps, values between 0 and 1, while the answer was written. They "
            "are approximate, and of the image alone: the zeros at the question's words are no measurement, and there "
            "are no sums by part. The entropy says how concentrated a map is: 0 on one patch, 1 on all alike.",
        )
    if explanation.comparison is not None:
        lines.insert(
            -1,
            f"The comparison is the {ANSWER_DEFINITION} by {compared_method(explanation)}, for the same tokens and "
            "from the same backward passes. It has a colour scale of its own, and its values and those of the other "
            "method have no common unit: compare where they lie, not how large they are. There are no sums by part "
            "for it.",
        )
    parts = [f"<p>{html.escape(line)}</p>" for line in lines]
    if explanation.weighted:
        parts.insert(
            -1,
            "<p>In the table of token weights the bars of p run to 100 %, all others to the largest value of their "
            f"column.</p>{weight_meanings()}",
        )
    return "".join(parts)


def seconds_text(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _bytes(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
