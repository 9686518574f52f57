"""The accuracy as docs/real-lvlm.md: ``python -m benchmarks real-lvlm report``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..common import machine
from ..common.tables import markdown, provenance, written

RESULTS = machine.RESULTS / "real-lvlm.json"
DOCUMENT = machine.DOCUMENTS / "real-lvlm.md"


def table(entry: dict[str, Any]) -> str:
    """Lay out a results file as Markdown."""
    results = entry["results"]
    rows = []
    for title in ("held-out scenes", "easy-VQA test"):
        kinds = results[title]["kinds"]
        whole = {name: sum(kind[name] for kind in kinds.values()) for name in ("asked", "right", "commonest")}
        for kind, own in [*kinds.items(), ("all", whole)]:
            shares = [f"{own[name] / own['asked']:.1%}" for name in ("right", "commonest")]
            rows.append(
                [f"{title}, {kind.removeprefix('easy-vqa ')}", str(own["asked"]), f"**{shares[0]}**", shares[1]]
            )
    spent = results["training"]
    minutes = (spent["features_seconds"] + spent["questions_seconds"]) / 60
    return "\n\n".join(
        [
            markdown(["", "questions", "right", "always the commonest answer"], rows),
            f"Trained for {minutes:.0f} minutes with {spent['machine']['threads']} thread(s), features of "
            f"{spent['pictures']} pictures included: {spent['steps']} steps.",
            f"`python -m benchmarks real-lvlm evaluate`: {provenance(entry['machine'])}.",
        ]
    )


def report(args: argparse.Namespace) -> int:
    """Write the results file's table into the document."""
    text = table(json.loads(args.out.read_text()))
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8"), {"accuracy": text}), encoding="utf-8")
    print(text)
    return 0
