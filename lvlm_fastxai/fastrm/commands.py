"""Read the options of ``lvlm-fastxai fastrm build-maps | train | evaluate``, and run what was chosen.

Importing this module loads neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import Bars, add_model_arguments, say
from ..errors import ArgumentError
from ..files import write_whole
from ..training.metrics import MetricsLog
from ..training.processes import agree, join_processes, own_device
from .build_command import add_build_arguments, run_build

if TYPE_CHECKING:
    from ..prompting.sources import Source
    from .shards import MapSet
    from .states import Items
    from .train import Trained

__all__ = ["add_arguments", "run"]

# Written out, since the modules that know them load torch.
NORMS, ACTIVATIONS = ("rms", "layer"), ("sigmoid", "softmax")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands and options of ``lvlm-fastxai fastrm``."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, summary: str, example: str, work: Any) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(fastrm=work)
        return made

    add_build_arguments(
        command(
            "build-maps",
            "write exact relevancy maps of a source's answers, on one process or many; a stopped run goes on",
            "torchrun --nproc-per-node 8 -m lvlm_fastxai.cli fastrm build-maps vqa.jsonl --model llava-1.5-7b-hf "
            "--device cuda --out maps",
            run_build,
        )
    )
    _add_train(
        command(
            "train",
            "train a FastRM head on exact maps",
            "lvlm-fastxai fastrm train maps --source vqa.jsonl --model llava-1.5-7b-hf --out head",
            _run_train,
        )
    )
    _add_evaluate(
        command(
            "evaluate",
            "compare a head's maps with exact ones that it has never seen",
            "lvlm-fastxai fastrm evaluate --head head maps-test --source vqa-test.jsonl --model llava-1.5-7b-hf",
            _run_evaluate,
        )
    )


def run(args: argparse.Namespace) -> int:
    """Run one of the commands of ``lvlm-fastxai fastrm``.

    Returns:
        0.

    Raises:
        FastXAIError: bad input; the message says what to do.
    """
    return int(args.fastrm(args))


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--source",
        action="append",
        default=[],
        metavar="SOURCE",
        help="what a set of maps was built from, where it is no generated scenes; may be repeated",
    )
    add_model_arguments(parser)
    add("--json", action="store_true", help="print the result as JSON")


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "maps",
        nargs="+",
        metavar="MAPS",
        help="folders of build-maps; or sources with answers, such as decisions that "
        "`review export` wrote, whose maps are built first",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the head")
    add(
        "--validation",
        action="append",
        default=[],
        metavar="MAPS",
        help="maps to choose epoch and threshold by (default: the last tenth of MAPS); may be repeated",
    )
    head = parser.add_argument_group("the head")
    head.add_argument("--layer", type=int, metavar="L", help="decoder layer whose output is read; -1 is the last")
    head.add_argument("--dim", type=int, metavar="D", help="width of query and keys")
    head.add_argument("--query-width", type=int, metavar="W", help="width of a GELU layer before the query; 0 for none")
    head.add_argument("--norm", choices=NORMS, help="RMSNorm or LayerNorm")
    head.add_argument("--activation", choices=ACTIVATIONS, help="of the scores")
    train = parser.add_argument_group("the training")
    train.add_argument(
        "--binarisation",
        type=float,
        metavar="B",
        help="a column is a target where the min–max normalised relevancy is above it",
    )
    train.add_argument(
        "--class-weight", type=float, metavar="A", help="positive columns weigh ((1-s)/s)^A, s their share"
    )
    train.add_argument("--epochs", type=int, metavar="N", help="at most")
    train.add_argument(
        "--patience", type=int, metavar="N", help="epochs without a better validation F1 before it stops"
    )
    train.add_argument("--batch", type=int, metavar="N", help="answers per step and process")
    train.add_argument("--learning-rate", type=float, metavar="R", help="of AdamW")
    train.add_argument("--weight-decay", type=float, metavar="R", help="of AdamW")
    train.add_argument(
        "--cache-gib",
        type=float,
        metavar="G",
        help="memory for hidden states; what does not fit is read again in every epoch",
    )
    train.add_argument("--seed", type=int, metavar="N", help="of the weights and the order")
    train.add_argument("--log", type=Path, metavar="DIR", help="TensorBoard logs (default: OUT/log)")
    _add_model(parser)


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("maps", nargs="+", metavar="MAPS", help="folders of build-maps, each reported apart; NAME=FOLDER names one")
    add("--head", default="shipped", metavar="DIR", help="folder of the head (default: the shipped one)")
    add("--out", type=Path, default=Path("out/fastrm-evaluation"), metavar="DIR", help="default: %(default)s")
    add("--resamples", type=int, default=2000, metavar="N", help="of the bootstrap (default: %(default)s)")
    _add_model(parser)


def _run_train(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from .. import __version__
    from ..explain.explanation import prepare_directory
    from ..models.checkpoint import load_checkpoint
    from ..models.fingerprint import fingerprint, model_name
    from ..prompting.answering import Answerer
    from ..prompting.sources import open_source
    from .head import FastRMConfig
    from .train import TrainSettings, train_head, write_training

    given = {field.name: getattr(args, field.name, None) for field in fields(TrainSettings)}
    settings = TrainSettings(**{name: value for name, value in given.items() if value is not None})
    state = join_processes(args.device.partition(":")[0])
    folder = agree(state, lambda: prepare_directory(args.out))
    sources = [open_source(spec) for spec in args.source]
    model, processor, _ = load_checkpoint(
        args.model, own_device(args.device, state), args.dtype, trust_remote_code=args.trust_remote_code
    )
    own = fingerprint(model)
    with Bars(shown=state.is_main_process, leave=False) as bars:
        folders = [_maps_of(spec, folder, sources, model, processor, bars) for spec in args.maps]
        items = _items(folders, sources, own)
        validation = _items([Path(spec) for spec in args.validation], sources, own) if args.validation else None
        methods = {maps.method for maps in items.maps}
        if len(methods) > 1:
            raise ArgumentError(
                f"maps: they were made by {' and '.join(sorted(methods))}; a head predicts one method's"
            )
        config = FastRMConfig(
            hidden_size=model.config.get_text_config().hidden_size,
            method=methods.pop(),
            model_name=model_name(model),
            model_fingerprint=own,
            trained_on=tuple(maps.source_spec for maps in items.maps),
            version=__version__,
        )
        answerer = Answerer(model, processor)
        with MetricsLog(args.log or folder / "log", shown=state.is_main_process, extra="fastrm") as log:
            trained = train_head(answerer, items, validation, config, settings, progress=bars, log=log.write)
    if state.is_main_process:
        write_training(folder, trained, settings, items.maps)
        _print_trained(folder, trained, args.json)
    return 0


def _print_trained(folder: Path, trained: Trained, as_json: bool) -> None:
    parameters = sum(parameter.numel() for parameter in trained.head.parameters())
    threshold = trained.head.config.decision_threshold
    if as_json:
        result = {
            "head": str(folder),
            "parameters": parameters,
            "validation_f1": trained.f1,
            "decision_threshold": threshold,
            "epochs": len(trained.history),
        }
        print(json.dumps(result))
        return
    print(
        f"head of {parameters} parameters in {folder}: validation F1 {trained.f1:.3f} at threshold {threshold:.3f}, "
        f"best of {len(trained.history)} epochs"
    )


def _run_evaluate(args: argparse.Namespace) -> int:
    from ..explain.explanation import prepare_directory
    from ..models.checkpoint import load_checkpoint
    from ..models.fingerprint import fingerprint
    from ..prompting.answering import Answerer
    from ..prompting.sources import open_source
    from .evaluate import draw, evaluate_head, table
    from .head import FastRM

    folder = prepare_directory(args.out)
    if args.resamples < 1:
        raise ArgumentError(f"--resamples: expected at least 1, got {args.resamples}")
    head = FastRM.from_pretrained(args.head)
    sources = [open_source(spec) for spec in args.source]
    model, processor, _ = load_checkpoint(args.model, args.device, args.dtype, trust_remote_code=args.trust_remote_code)
    head.check_model(model)
    head.to(args.device)
    own = fingerprint(model)
    result = {}
    for spec in args.maps:
        # A folder's own name may hold the sign.
        title, path = ("", spec) if "=" not in spec or Path(spec).is_dir() else spec.split("=", 1)
        items = _items([Path(path)], sources, own)
        title = title or Path(path).name
        if title in result:
            raise ArgumentError(f"maps: two sets are called {title!r}; name one with NAME=FOLDER")
        with Bars(leave=False) as bars:
            found = evaluate_head(
                head,
                Answerer(model, processor),
                items,
                resamples=args.resamples,
                progress=lambda done, total, title=title: bars(title, done, total),  # type: ignore[misc]
            )
        result[title] = found | {"source": items.maps[0].source_spec, "method": items.maps[0].method}
    write_whole(folder / "fastrm.json", (json.dumps(result, indent=1) + "\n").encode())
    text = table(result)
    write_whole(folder / "fastrm.md", (text + "\n").encode())
    written = ["fastrm.json", "fastrm.md"]
    if draw(result, folder / "fastrm.png"):
        written.append("fastrm.png")
    else:
        say("no plot: matplotlib is not installed (pip install matplotlib)")
    print(json.dumps(result) if args.json else text)
    say(f"written to {folder}: {', '.join(written)}")
    return 0


def _maps_of(spec: str, folder: Path, sources: list[Source], model: Any, processor: Any, bars: Any) -> Path:
    """The folder of a set of maps; those of a source are built in the head's folder, and the source is remembered."""
    from ..prompting.sources import open_source
    from .build import build_maps
    from .shards import INDEX, PATTERN

    path = Path(spec)
    if path.is_dir() and ((path / INDEX).is_file() or any(path.glob(PATTERN))):
        return path
    if not path.exists() and not spec.startswith("scenes:"):
        raise ArgumentError(f"maps: there is no '{spec}'; give a folder of build-maps, or a source with answers")
    source = open_source(spec)
    sources.append(source)
    target = folder / f"maps-{source.digest[:12]}"
    # A person has confirmed or corrected these answers, so it is them that are explained.
    build_maps(
        model,
        processor,
        source,
        target,
        answers="reference",
        progress=lambda done, total: bars("maps", done, total),
    )
    return target


def _items(folders: Sequence[Path], sources: Sequence[Source], fingerprint: str) -> Items:
    from .shards import open_maps
    from .states import Items

    maps: list[MapSet] = [open_maps(folder) for folder in folders]
    for found in maps:
        if found.model_fingerprint != fingerprint:
            raise ArgumentError(
                f"maps: '{found.folder}' holds maps of {found.model} (fingerprint {found.model_fingerprint}), the "
                f"model has {fingerprint}; give --model the one that they were built with"
            )
    return Items(maps, sources)
