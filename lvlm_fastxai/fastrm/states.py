"""Hidden states that a head reads, for answers that are already known: one forward without a graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..models.decoder import find_decoder_layers
from ..prompting.answering import Answerer, batched
from ..prompting.sources import Sample, Source, open_source
from .shards import MapRecord, MapSet


@dataclass(frozen=True)
class States:
    """What a head learns from, of one answer with T tokens and n image columns.

    Attributes:
        hidden: {layer: (n, D)} hidden states of the image's columns, in the model's dtype, on the CPU.
        state: {layer: (T, D)} of the rows that produced the tokens.
    """

    hidden: dict[int, Tensor]
    state: dict[int, Tensor]


def read_states(
    answerer: Answerer, samples: Sequence[Sample], answers: Sequence[Sequence[int]], layers: Sequence[int], batch: int
) -> list[States]:
    """Read the states at the output of some decoder layers, teacher forced.

    Args:
        answerer: model and processor.
        samples: n questions about pictures.
        answers: their answers' token ids, none empty.
        layers: indices of decoder layers, negative ones from the top.
        batch: samples per pass.
    """
    found: dict[int, States] = {}
    by_length: dict[int, list[int]] = {}
    for place, answer in enumerate(answers):
        by_length.setdefault(len(answer), []).append(place)
    modules = find_decoder_layers(answerer.model)[1]
    for layer in layers:
        if not -len(modules) <= layer < len(modules):
            raise ArgumentError(f"layer: expected {-len(modules)} … {len(modules) - 1}, got {layer}")
    kept: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(modules[layer].register_forward_hook(_keep(kept, layer)).remove)
        for length, members in sorted(by_length.items()):
            for part in batched(members, batch):
                prompts = answerer.encode(
                    [samples[place].picture() for place in part], [samples[place].question for place in part]
                )
                start = prompts["input_ids"].shape[1]
                inputs = answerer.accepted(answerer.join(prompts, [answers[place] for place in part]))
                with torch.no_grad():
                    answerer.model.model(**inputs, use_cache=False)
                for row, place in enumerate(part):
                    columns = answerer.image_columns(prompts, row)
                    rows = range(start - 1, start - 1 + length)
                    found[place] = States(
                        {layer: kept[layer][row, columns].cpu() for layer in layers},
                        {layer: kept[layer][row, rows].cpu() for layer in layers},
                    )
    return [found[place] for place in range(len(samples))]


def _keep(kept: dict[int, Tensor], layer: int) -> Any:
    def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
        kept[layer] = output[0] if isinstance(output, tuple) else output

    return hook


@dataclass(frozen=True)
class Item:
    """A sample, which its source makes when it is asked for, with the maps of its answer."""

    source: Source
    record: MapRecord

    @property
    def sample(self) -> Sample:
        """Question and picture."""
        return self.source[self.record.index]


class Items(Sequence[Item]):
    """The samples of finished sets of maps that have an answer, with their sources; the maps stay in memory.

    Args:
        maps: sets that were built with the same model.
        sources: where their samples come from; those of generated scenes are found by themselves.

    Raises:
        ArgumentError: a set's source is not there, or is not what it was; sets of several models.
    """

    def __init__(self, maps: Sequence[MapSet], sources: Sequence[Source] = ()) -> None:
        known = {source.digest: source for source in sources}
        self._items: list[Item] = []
        self.maps = list(maps)
        if len({found.model_fingerprint for found in maps}) > 1:
            names = ", ".join(f"'{found.folder}' of {found.model}" for found in maps)
            raise ArgumentError(f"maps: they are of several models ({names}); a head is trained for one")
        for found in maps:
            source = known.get(found.source_digest)
            if source is None and found.source_spec.startswith("scenes:"):
                source = open_source(found.source_spec)
            if source is None or source.digest != found.source_digest:
                raise ArgumentError(
                    f"maps: '{found.folder}' was built from {found.source_spec}, which is not among the sources; give "
                    "its path with --source (the file must be what it was then)"
                )
            self._items += [Item(source, record) for record in found.records() if record.token_ids]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        """One `Item`, or those of a slice."""
        return self._items[index]
