"""What must be shown on a GPU: one figure of the results each, and its bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import op
from .steps import PROFILED


@dataclass(frozen=True)
class Claim:
    """A figure of the results that must not be above (or below) a bound."""

    text: str
    path: tuple[str, ...]
    at_most: float | None = None
    at_least: float | None = None


def ratio_of(case: str, variant: str) -> tuple[str, ...]:
    """Return the path of a variant's time over forward + backward."""
    return "end-to-end", "cases", case, "variants", variant, "time_ratio"


CLAIMS = (
    Claim("relevancy_product, share of the matrix product's rate, S = 8192", ("share",), at_least=0.45),
    Claim("fast / (forward + backward), S = 2400", ratio_of("llava-1.5-7b-2400", "fast"), at_most=1.05),
    Claim("fast / (forward + backward), S = 8192", ratio_of("llava-1.5-7b-8192", "fast"), at_most=1.10),
    Claim("eager / fast, S = 2400", ("eager_over_fast",), at_least=4.0),
    Claim(
        "lean, GiB above the weights, S = 2400",
        ("end-to-end", "cases", "llava-1.5-7b-2400", "variants", "lean", "gib"),
        at_most=1.0,
    ),
    Claim(
        "lean, GiB above the weights, S = 32768",
        ("end-to-end", "cases", "llava-1.5-7b-32768", "variants", "lean", "gib"),
        # A card of 80 GB has 79.6 GiB; the weights are 12.6, and CUDA and torch keep one or two.
        at_most=65.0,
    ),
    *(
        Claim(
            f"5 % of the rows, one more target / (forward + backward), S = {columns}",
            ("end-to-end", "further_targets", f"llava-1.5-7b-{columns}", "pruned_5_percent"),
            at_most=0.2,
        )
        for columns in (2400, 8192)
    ),
    *(
        Claim(
            f"proxy_relevancy over 1.25 copies or a launch and 2 µs, 576 columns × {batch}",
            ("proxy_over_allowed", f"llava-1.5-7b-{batch}"),
            at_most=1.0,
        )
        for batch in (1, 64)
    ),
    Claim("live maps over a decode step", ("proxy", "live_maps", "share"), at_most=0.01),
)


def claims(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every claim with its figure (None: not measured) and whether it holds."""
    cases = results.get("end-to-end", {}).get("cases", {})
    shape = results.get("op", {}).get("cases", {}).get(PROFILED, {}).get("relevancy_product", {})
    backend = op.best(shape)[0]
    known = {**results, "share": None if backend is None else shape[backend]["share_of_matrix_rate"]}
    variants = cases.get("llava-1.5-7b-2400", {}).get("variants", {})
    eager, fast = (variants.get(name, {}).get("time_ratio") for name in ("eager", "fast"))
    known["proxy_over_allowed"] = {
        name: min((each["over_allowed"] for each in figures.values() if "over_allowed" in each), default=None)
        for name, figures in results.get("proxy", {}).get("cases", {}).items()
    }
    known["eager_over_fast"] = eager / fast if eager and fast else None
    found = []
    for claim in CLAIMS:
        figure: Any = known
        for key in claim.path:
            if isinstance(figure, dict) and key == "gib":
                figure = figure.get("extra_bytes")
                figure = figure / 2**30 if isinstance(figure, int) else None
            else:
                figure = figure.get(key) if isinstance(figure, dict) else None
        holds = None
        if figure is not None:
            holds = figure >= claim.at_least if claim.at_most is None else figure <= claim.at_most
        bound = f"≥ {claim.at_least}" if claim.at_most is None else f"≤ {claim.at_most}"
        found.append({"claim": claim.text, "bound": bound, "figure": figure, "holds": holds})
    return found
