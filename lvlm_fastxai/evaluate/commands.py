"""``lvlm-fastxai evaluate``: its options, and what it prints and writes. Importing it loads no torch."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..console import Bars, say
from .defaults import CURVES, DESCRIPTIONS, METHODS, SCENES

if TYPE_CHECKING:
    from .evaluation import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``lvlm-fastxai evaluate``."""
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="checkpoint folder (default: the shipped LVLM)")
    add("--trust-remote-code", action="store_true", help="run Python code that lies in the checkpoint's folder")
    add("--scenes", type=int, default=SCENES, metavar="N", help="held-out scenes (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="picks the scenes (default: %(default)s)")
    add("--methods", default=",".join(METHODS), metavar="A,B", help=f"some of {', '.join(METHODS)} (default: all)")
    curves_help = "questions that get deletion and insertion curves; half as many descriptions (default: %(default)s)"
    add("--curves", type=int, default=CURVES, metavar="N", help=curves_help)
    descriptions_help = "held-out scenes to describe, for the maps of whole answers (default: %(default)s)"
    add("--descriptions", type=int, default=DESCRIPTIONS, metavar="N", help=descriptions_help)
    add("--fill", default="mean", help="what replaces a cell there: mean (colour of the picture, default) or blur")
    add("--out", type=Path, default=Path("out/evaluation"), metavar="DIR", help="output folder (default: %(default)s)")
    add("--document", type=Path, metavar="FILE", help="also rewrite the figures in a Markdown file, and its plot")
    add("--json", action="store_true", help="print the result as JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the tables and write evaluation.json, evaluation.csv and, with matplotlib, the two plots.

    Args:
        args: as parsed by `add_arguments`.

    Returns:
        0.

    Raises:
        FastXAIError: bad input, the message says what to do.
    """
    import torch

    from ..explain.explanation import prepare_directory
    from ..models.checkpoint import load_checkpoint
    from . import output, plot
    from .evaluation import Settings, evaluate

    methods = tuple(name.strip() for name in args.methods.split(",") if name.strip())
    settings = Settings(args.scenes, args.seed, methods, args.curves, args.fill, args.descriptions)
    folder = prepare_directory(args.out)
    if args.document is not None:
        output.check_document(args.document)  # before minutes of work, not after
    model, processor, source = load_checkpoint(args.model, trust_remote_code=args.trust_remote_code)
    say(
        f"{settings.scenes} held-out scenes, up to ten questions each; maps by {', '.join(settings.methods)}; "
        f"descriptions of {settings.descriptions}; deletion and insertion for {settings.curves} and "
        f"{settings.curves // 2} right answers"
    )
    with Bars(unit="question", announce=True) as bar:
        evaluation = evaluate(model, processor, settings, progress=bar)
    import transformers

    from .. import __version__

    result = evaluation.to_dict() | {
        "command": command(settings, args.model),
        "model": {
            "name": "the shipped LVLM" if args.model is None else source.resolve().name,
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "fingerprint": fingerprint(source),
            "device": str(model.device),
        },
        "versions": {"lvlm_fastxai": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
    }
    output.write_json(folder / "evaluation.json", result)
    output.write_csv(folder / "evaluation.csv", evaluation)
    written = ["evaluation.json", "evaluation.csv"]
    if plot.available():
        written += plot.draw(result, folder / "evaluation.png")
        if args.document is not None:
            plot.draw(result, args.document.with_suffix(".png"))
    else:
        say("no plot: matplotlib is not installed (pip install matplotlib)")
    if args.document is not None:
        output.update_document(args.document, result)
        written.append(str(args.document))
    print(json.dumps(result, ensure_ascii=False) if args.json else "\n\n".join(t.text() for t in output.tables(result)))
    say(f"written to {folder}: {', '.join(written)} ({sum(evaluation.seconds.values()):.0f} s)")
    return 0


def fingerprint(folder: Path) -> str:
    """First twelve hexadecimal digits of the SHA-256 of the folder's weight files; "" if it has none."""
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12] if files else ""


def command(settings: Settings, model: Path | None) -> str:
    """The command line that computes the figures again."""
    options = [
        *(("--model", model.name) if model is not None else ()),
        *("--scenes", settings.scenes, "--seed", settings.seed, "--curves", settings.curves),
        *("--descriptions", settings.descriptions),
        *(("--methods", ",".join(settings.methods)) if settings.methods != METHODS else ()),
        *(("--fill", settings.fill) if settings.fill != "mean" else ()),
    ]
    return " ".join(["lvlm-fastxai evaluate", *map(str, options)])
