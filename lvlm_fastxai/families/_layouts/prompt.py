"""What a layout rule is given: processor outputs of a batch, and what they tell of one sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import ArgumentError
from .image import WHOLE, Box, Size


@dataclass(frozen=True)
class Prompt:
    """What a rule is given: one batch of processor outputs and the sample to lay out.

    Attributes:
        config: the model's configuration.
        inputs: processor outputs of the whole batch.
        sample: index of the sample.
        tokens: (B, S) int64 input ids.
        image_columns: per sample of the batch, the ascending columns of its image tokens.
        image_sizes: original sizes of this sample's pictures, where the caller knows them.
        image_processor: the processor that prepared them, where the caller has it.
    """

    config: Any
    inputs: Mapping[str, Any]
    sample: int
    tokens: np.ndarray
    image_columns: tuple[np.ndarray, ...]
    image_sizes: tuple[Size, ...] | None = None
    image_processor: Any = None

    def number(self, path: str) -> Any:
        """The attribute `path` ("vision_config.image_size") of the configuration."""
        return attribute(self.config, path)

    def side(self, path: str) -> int:
        """A length in pixels that configurations write as n or (n, n)."""
        value = self.number(path)
        if isinstance(value, list | tuple):
            if len(set(value)) != 1:
                raise ArgumentError(f"config.{path}: expected a square, got {value}")
            value = value[0]
        return int(value)

    def input(self, name: str) -> np.ndarray | None:
        """Processor output `name` as an array, None where it is missing."""
        value = self.inputs.get(name)
        if value is None:
            return None
        return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)

    def required(self, name: str) -> np.ndarray:
        """Processor output `name`; raises ArgumentError where it is missing."""
        value = self.input(name)
        if value is None:
            raise ArgumentError(f"inputs: {name!r} is needed to place the image tokens of {self.config.model_type!r}")
        return value

    def size(self, image: int) -> Size | None:
        """Original size of this sample's picture `image`, None where unknown."""
        if self.image_sizes is None:
            return None
        if image >= len(self.image_sizes):
            raise ArgumentError(
                f"image_sizes: the prompt holds at least {image + 1} pictures, sizes came for {len(self.image_sizes)}"
            )
        return self.image_sizes[image]

    def runs(self, sample: int | None = None) -> list[np.ndarray]:
        """The sample's image columns, split where they are not adjacent."""
        columns = self.image_columns[self.sample if sample is None else sample]
        return [run for run in np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1) if len(run)]

    def divide(self, count: Callable[[int], int]) -> list[tuple[int, np.ndarray]]:
        """(index in the batch, columns) of each picture of the sample; count(index) is its number of tokens."""
        image = 0
        for sample, columns in enumerate(self.image_columns[: self.sample + 1]):
            found = []
            start = 0
            while start < len(columns):
                stop = start + count(image)
                if stop > len(columns):
                    raise ArgumentError(
                        f"inputs: sample {sample} holds {len(columns)} image tokens, but its pictures up to number "
                        f"{image} of the batch take {stop}"
                    )
                found.append((image, columns[start:stop]))
                image, start = image + 1, stop
        return found


def attribute(holder: Any, path: str) -> Any:
    """holder.a.b for the path "a.b"."""
    for name in path.split("."):
        holder = getattr(holder, name)
    return holder


def seen_box(image_processor: Any, size: Size | None) -> Box:
    """The part of a picture that is left after padding to a square, resizing the shorter edge and cropping the centre.

    The whole picture where size or processor are unknown, and where the processor only stretches it.
    """
    if image_processor is None or size is None:
        return WHOLE
    height, width = size
    left = top = 0.0
    seen_height, seen_width = float(height), float(width)
    if getattr(image_processor, "do_pad", False) and hasattr(image_processor, "pad_to_square"):
        seen_height = seen_width = float(max(size))
        left, top = -((max(size) - width) // 2), -((max(size) - height) // 2)
    target = getattr(image_processor, "size", None) or {}
    scale_down, scale_across = 1.0, 1.0
    if getattr(image_processor, "do_resize", False):
        edge, resized_height, resized_width = (_entry(target, n) for n in ("shortest_edge", "height", "width"))
        if edge:
            other = int(edge * max(seen_height, seen_width) / min(seen_height, seen_width))
            resized = (edge, other) if seen_height <= seen_width else (other, edge)
        elif resized_height and resized_width:
            resized = (resized_height, resized_width)
        else:
            return WHOLE
        scale_down, scale_across = resized[0] / seen_height, resized[1] / seen_width
    if getattr(image_processor, "do_center_crop", False):
        crop = getattr(image_processor, "crop_size", None) or {}
        crop_height, crop_width = _entry(crop, "height"), _entry(crop, "width")
        if crop_height and crop_width:
            cropped_height, cropped_width = crop_height / scale_down, crop_width / scale_across
            left, top = left + (seen_width - cropped_width) / 2, top + (seen_height - cropped_height) / 2
            seen_height, seen_width = cropped_height, cropped_width
    return left / width, top / height, (left + seen_width) / width, (top + seen_height) / height


def _entry(sizes: Any, name: str) -> int | None:
    value = sizes.get(name) if isinstance(sizes, Mapping) else getattr(sizes, name, None)
    return None if value is None else int(value)
