"""The few rules by which image tokens lie in a prompt; a family file names one and gives its parameters.

A rule follows what the model's own code in transformers does to a picture (tiling, merging of patches, separators), so
that every column of the sequence can be put back where it looks in the original picture. Sizes are (height, width),
boxes (left, top, right, bottom), in shares of the original picture's width and height.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError

Box = tuple[float, float, float, float]
Size = tuple[int, int]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Part:
    """One grid of image tokens and the part of the picture it looks at.

    Attributes:
        columns: int64 array (h, w), the sequence column of each cell in the orientation of the original picture
            (row 0 is the top, column 0 the left); -1 where a cell has no token.
        box: (left, top, right, bottom) in shares of the original picture. It reaches outside 0..1 where the model saw
            padding around the picture, and covers less than 0..1 where the picture was cropped.
    """

    columns: np.ndarray
    box: Box

    @property
    def shape(self) -> Size:
        """(h, w) of the grid."""
        return self.columns.shape[0], self.columns.shape[1]


@dataclass(frozen=True)
class ImageLayout:
    """Where one picture's tokens stand in the sequence.

    Attributes:
        parts: the finest grid first, then coarser views of the same picture (overview, thumbnail, uncropped picture).
    """

    parts: tuple[Part, ...]

    @property
    def box(self) -> Box:
        """The part of the original picture under the grid that `read` returns."""
        return self.parts[0].box

    @property
    def shape(self) -> Size:
        """(h, w) of the grid that `read` returns."""
        return self.parts[0].shape

    def read(self, row: Tensor) -> Tensor:
        """Relevancy of every cell of the finest grid.

        Cells of coarser parts share their relevancy among the fine cells under them, by area; what lies outside the
        finest grid goes to the nearest cell, so the sum over the map equals the sum over all columns of the picture.

        Args:
            row: (S,) relevancy of every position, floating point.

        Returns:
            (h, w) tensor on `row`'s device, in its dtype.
        """
        if row.dim() != 1:
            raise ArgumentError(f"row: expected shape (S,), got {tuple(row.shape)}")
        finest = self.parts[0]
        total = _values(finest, row)
        for part in self.parts[1:]:
            down = _overlap(part.box[1::2], part.shape[0], finest.box[1::2], finest.shape[0])
            across = _overlap(part.box[0::2], part.shape[1], finest.box[0::2], finest.shape[1])
            down, across = down.to(row), across.to(row)
            total = total + down.T @ _values(part, row) @ across
        return total


def _values(part: Part, row: Tensor) -> Tensor:
    columns = torch.from_numpy(part.columns).to(row.device)
    return row[columns.clamp(min=0)].masked_fill(columns < 0, 0.0)


def _overlap(source: Sequence[float], sources: int, target: Sequence[float], targets: int) -> Tensor:
    """(sources, targets) shares of each interval of `source` that fall on those of `target`; every row sums to 1."""
    left = np.linspace(source[0], source[1], sources + 1)
    right = np.linspace(target[0], target[1], targets + 1)
    low = np.maximum(left[:-1, None], right[None, :-1])
    high = np.minimum(left[1:, None], right[None, 1:])
    share = np.clip(high - low, 0.0, None)
    for index in np.flatnonzero(share.sum(1) <= 1e-9 * (left[1] - left[0])):
        centre = (left[index] + left[index + 1]) / 2
        share[index] = 0.0
        share[index, np.abs((right[:-1] + right[1:]) / 2 - centre).argmin()] = 1.0
    return torch.from_numpy(share / share.sum(1, keepdims=True))


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


def _tower_cells(prompt: Prompt, patches: int, strategy: str | None, class_token_towers: tuple[str, ...]) -> np.ndarray:
    """Patch index of every token a vision tower hands over, -1 for its class token.

    The strategy "default" drops the first token whatever it is: with a tower that has no class token this is a patch.
    """
    has_class_token = prompt.number("vision_config").model_type in class_token_towers
    cells = np.arange(-1 if has_class_token else 0, patches)
    return cells[1:] if strategy is not None and prompt.number(strategy) == "default" else cells


def _grid(columns: np.ndarray, cells: np.ndarray, shape: Size) -> np.ndarray:
    grid = np.full(shape[0] * shape[1], -1, dtype=np.int64)
    grid[cells[cells >= 0]] = columns[cells >= 0]
    return grid.reshape(shape)


def _mosaic(tiles: np.ndarray, rows: int, across: int) -> np.ndarray:
    """(rows·across, h, w) tiles, left to right and then down, as one (rows·h, across·w) array."""
    _, height, width = tiles.shape
    return tiles.reshape(rows, across, height, width).swapaxes(1, 2).reshape(rows * height, across * width)


class Layout(ABC):
    """A rule; its fields name attributes of the configuration and processor outputs."""

    @abstractmethod
    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        """One layout per picture of the sample, in the order of the prompt."""


@dataclass(frozen=True)
class SquareGrid(Layout):
    """Every picture gives one square grid, row-major: LLaVA-1.5, PaliGemma.

    Attributes:
        image_size, patch_size: configuration attributes, in pixels.
        strategy: configuration attribute that says whether the tower's first token is dropped; None: never.
        class_token_towers: model types of vision towers that put a class token before the patches.
    """

    image_size: str = "vision_config.image_size"
    patch_size: str = "vision_config.patch_size"
    strategy: str | None = None
    class_token_towers: tuple[str, ...] = ()

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        side = prompt.side(self.image_size) // prompt.side(self.patch_size)
        cells = _tower_cells(prompt, side * side, self.strategy, self.class_token_towers)
        return [
            ImageLayout((Part(_grid(run, cells, (side, side)), seen_box(prompt.image_processor, prompt.size(number))),))
            for number, (_, run) in enumerate(prompt.divide(lambda _: len(cells)))
        ]


@dataclass(frozen=True)
class MergedGrid(Layout):
    """The grid comes with the inputs as (frames, h, w) patches; merge × merge patches give one token: Qwen-VL.

    Attributes:
        grid: processor output (pictures, 3).
        merge: configuration attribute, patches per side of a token.
    """

    grid: str = "image_grid_thw"
    merge: str = "vision_config.spatial_merge_size"

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        merge = int(prompt.number(self.merge))
        grids = prompt.required(self.grid)

        def shape(image: int) -> tuple[int, int, int]:
            if image >= len(grids):
                raise ArgumentError(f"inputs: {self.grid!r} describes {len(grids)} pictures, the prompt holds more")
            frames, height, width = (int(n) for n in grids[image])
            return frames, height // merge, width // merge

        return [
            ImageLayout(tuple(Part(frame, WHOLE) for frame in run.reshape(shape(image))))
            for image, run in prompt.divide(lambda image: math.prod(shape(image)))
        ]


@dataclass(frozen=True)
class AnyResolution(Layout):
    """Overview, then tiles reassembled, freed of padding, each row ended by a newline column: LLaVA-NeXT, OneVision.

    Attributes:
        pinpoints: configuration attribute, the (height, width) canvases that pictures may be fitted into.
        image_size, patch_size: configuration attributes of the vision tower, in pixels.
        image_sizes: processor output (pictures, 2), original sizes.
        most_tiles: configuration attribute "anyres_max_<n>": beyond 1.1² n tiles' worth of cells the grid is
            interpolated down; None: never.
        pictures_per_sample: processor output (B,): samples with several pictures see each as one tile, padded to a
            square and followed by one newline column; None: all pictures are tiled.
    """

    pinpoints: str = "image_grid_pinpoints"
    image_size: str = "vision_config.image_size"
    patch_size: str = "vision_config.patch_size"
    image_sizes: str = "image_sizes"
    most_tiles: str | None = None
    pictures_per_sample: str | None = None

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        tile = prompt.side(self.image_size)
        side = tile // prompt.side(self.patch_size)
        sizes = prompt.required(self.image_sizes).reshape(-1, 2)
        tiled = self._tiled(prompt, len(sizes))

        def canvas(image: int) -> Canvas:
            if image >= len(sizes):
                raise ArgumentError(f"inputs: {self.image_sizes!r} describes {len(sizes)} pictures, there are more")
            height, width = (int(n) for n in sizes[image])
            most = None
            if self.most_tiles is not None:
                most = int(str(prompt.number(self.most_tiles)).removeprefix("anyres_max_"))
            return Canvas.of((height, width), prompt.number(self.pinpoints), tile, side, most)

        def count(image: int) -> int:
            if image < len(tiled) and not tiled[image]:
                return side * side + 1
            rows, across = canvas(image).cells
            return side * side + rows * (across + 1)

        found = []
        for image, run in prompt.divide(count):
            overview = run[: side * side].reshape(side, side)
            if not tiled[image]:
                height, width = (int(n) for n in sizes[image])
                left, top = (max(height, width) - width) // 2 / width, (max(height, width) - height) // 2 / height
                square = (-left, -top, max(height, width) / width - left, max(height, width) / height - top)
                found.append(ImageLayout((Part(overview, square),)))
                continue
            rows, across = canvas(image).cells
            with_newlines = run[side * side :].reshape(rows, across + 1)
            found.append(ImageLayout((Part(with_newlines[:, :-1], canvas(image).box), Part(overview, WHOLE))))
        return found

    def _tiled(self, prompt: Prompt, pictures: int) -> list[bool]:
        counts = None if self.pictures_per_sample is None else prompt.input(self.pictures_per_sample)
        if counts is None:
            return [True] * pictures
        return [int(count) == 1 for count in counts.reshape(-1) for _ in range(int(count))]


@dataclass(frozen=True)
class Canvas:
    """A picture fitted into a canvas of whole tiles: its grid of cells without padding, and what that grid covers."""

    cells: Size
    box: Box

    @classmethod
    def of(cls, size: Size, pinpoints: Sequence[Sequence[int]], tile: int, side: int, most_tiles: int | None) -> Canvas:
        """Fit a picture of `size` pixels; a tile has `side` × `side` cells and `tile` × `tile` pixels."""
        height, width = size
        canvas = cls._best(size, pinpoints)
        down, across = canvas[0] // tile * side, canvas[1] // tile * side
        # The padding is measured twice by transformers: in pixels when the picture is pasted (rounded up), and in
        # cells when the features are cut (rounded down). The grid therefore may keep a sliver of padding.
        if canvas[1] / width < canvas[0] / height:
            pasted = (min(math.ceil(height * canvas[1] / width), canvas[0]), canvas[1])
        else:
            pasted = (canvas[0], min(math.ceil(width * canvas[0] / height), canvas[1]))
        cut_down = cut_across = 0
        if width / height > across / down:
            cut_down = (down - int(round(height * (across / width), 7))) // 2
        else:
            cut_across = (across - int(round(width * (down / height), 7))) // 2
        top, bottom = cls._share(down, cut_down, canvas[0], pasted[0])
        left, right = cls._share(across, cut_across, canvas[1], pasted[1])
        down, across = down - 2 * cut_down, across - 2 * cut_across
        if most_tiles is not None:
            ratio = math.sqrt(down * across / (most_tiles * side**2))
            if ratio > 1.1:
                down, across = int(down // ratio), int(across // ratio)
        return cls((down, across), (left, top, right, bottom))

    @staticmethod
    def _best(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
        """The canvas that keeps most of the picture's pixels and, among those, wastes least."""
        height, width = size

        def merit(canvas: Sequence[int]) -> tuple[int, int]:
            scale = min(canvas[1] / width, canvas[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - canvas[0] * canvas[1]

        best = max(pinpoints, key=merit)
        return int(best[0]), int(best[1])

    @staticmethod
    def _share(cells: int, cut: int, canvas: int, pasted: int) -> tuple[float, float]:
        cell = canvas / cells
        offset = (canvas - pasted) // 2
        return (cut * cell - offset) / pasted, ((cells - cut) * cell - offset) / pasted


@dataclass(frozen=True)
class TilesWithOverview(Layout):
    """rows × columns tiles, each between marker tokens, then the whole picture as a last tile: Idefics3, SmolVLM.

    A row of tiles ends with a newline token, the overview is followed by the marker that opens every tile, and all
    overviews carry the same tag, so rows and pictures can be told apart without the tokenizer. Processor outputs "rows"
    and "cols" (nested per sample), where present, are used instead.

    Attributes:
        image_size, patch_size: configuration attributes, in pixels.
        merge: configuration attribute, patches per side of a token.
    """

    image_size: str = "vision_config.image_size"
    patch_size: str = "vision_config.patch_size"
    merge: str = "scale_factor"

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        side = prompt.side(self.image_size) // prompt.side(self.patch_size) // int(prompt.number(self.merge))
        runs = prompt.runs()
        for run in runs:
            if len(run) != side * side:
                raise ArgumentError(f"inputs: a tile has {side * side} tokens, the prompt holds a run of {len(run)}")
        found, start = [], 0
        for rows, across in self._arrangements(prompt, runs):
            stop = start + rows * across + 1
            if stop > len(runs):
                raise ArgumentError(
                    f"inputs: the pictures' tiles up to this one are {stop}, tokens came for {len(runs)}"
                )
            tiles = np.stack(runs[start:stop]).reshape(-1, side, side)
            overview = Part(tiles[-1], WHOLE)
            found.append(
                ImageLayout((Part(_mosaic(tiles[:-1], rows, across), WHOLE), overview) if rows else (overview,))
            )
            start = stop
        if start != len(runs):
            raise ArgumentError(f"inputs: the pictures take {start} tiles, the prompt holds {len(runs)}")
        return found

    def _arrangements(self, prompt: Prompt, runs: list[np.ndarray]) -> list[Size]:
        if prompt.inputs.get("rows") is not None and prompt.inputs.get("cols") is not None:
            rows, across = prompt.inputs["rows"][prompt.sample], prompt.inputs["cols"][prompt.sample]
            return [(int(r), int(c)) for r, c in zip(rows, across, strict=True)]
        if not runs:
            return []
        tokens = prompt.tokens[prompt.sample]
        if runs[-1][-1] + 1 >= len(tokens):
            raise ArgumentError("inputs: the prompt ends inside a picture, the marker token after its tiles is missing")
        marker = tokens[runs[-1][-1] + 1]
        overview_tag = self._tag(tokens, runs[-1][0], marker)
        arrangements, tiles, rows = [], 0, 0
        for run in runs:
            if self._tag(tokens, run[0], marker) == overview_tag:
                if rows and tiles % rows:
                    raise ArgumentError(f"inputs: {tiles} tiles of a picture do not fill {rows} rows")
                arrangements.append((rows, tiles // rows if rows else 0))
                tiles = rows = 0
                continue
            tiles += 1
            rows += int(tokens[run[-1] + 1] != marker)
        return arrangements

    @staticmethod
    def _tag(tokens: np.ndarray, start: int, marker: int) -> tuple[int, ...]:
        before = np.flatnonzero(tokens[:start] == marker)
        return tuple(tokens[before[-1] if len(before) else start : start].tolist())


@dataclass(frozen=True)
class TilesWithThumbnail(Layout):
    """rows × columns tiles and then a thumbnail, all in one run; a single tile has no thumbnail: InternVL.

    The arrangement is the one whose aspect is nearest the picture's. Where the picture's size is unknown, it is the one
    whose tiles, put together, look most like the thumbnail.

    Attributes:
        image_size, patch_size: configuration attributes, in pixels.
        ratio: configuration attribute, tokens per patch along one side (pixel shuffle, 0.5).
        pixels: processor output (tiles of the batch, channels, height, width).
    """

    image_size: str = "vision_config.image_size"
    patch_size: str = "vision_config.patch_size"
    ratio: str = "downsample_ratio"
    pixels: str = "pixel_values"

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        side = int(prompt.side(self.image_size) // prompt.side(self.patch_size) * prompt.number(self.ratio))
        seen = sum(len(columns) for columns in prompt.image_columns[: prompt.sample]) // (side * side)
        found = []
        for number, run in enumerate(prompt.runs()):
            if len(run) % (side * side):
                raise ArgumentError(f"inputs: a picture's {len(run)} image tokens are no whole tiles of {side * side}")
            tiles = run.reshape(-1, side, side)
            if len(tiles) == 1:
                found.append(ImageLayout((Part(tiles[0], WHOLE),)))
            else:
                rows, across = self._arrangement(prompt, number, seen, len(tiles) - 1)
                found.append(ImageLayout((Part(_mosaic(tiles[:-1], rows, across), WHOLE), Part(tiles[-1], WHOLE))))
            seen += len(tiles)
        return found

    def _arrangement(self, prompt: Prompt, image: int, first_tile: int, tiles: int) -> Size:
        candidates = [(tiles // across, across) for across in range(1, tiles + 1) if tiles % across == 0]
        size = prompt.size(image)
        if size is not None:
            return min(candidates, key=lambda grid: abs(size[1] / size[0] - grid[1] / grid[0]))
        pixels = prompt.required(self.pixels)[first_tile : first_tile + tiles + 1]
        return likeliest(pixels[:-1], pixels[-1], candidates)


def likeliest(tiles: np.ndarray, whole: np.ndarray, candidates: Sequence[Size]) -> Size:
    """The (rows, columns) arrangement of tiles (n, channels, h, w) that looks most like the whole (channels, h, w)."""

    def shrink(picture: np.ndarray) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(np.ascontiguousarray(picture)).float(), 16)

    def distance(grid: Size) -> float:
        mosaic = np.stack([_mosaic(tiles[:, channel], *grid) for channel in range(tiles.shape[1])])
        return float((shrink(mosaic) - shrink(whole)).square().sum())

    return min(candidates, key=distance)


@dataclass(frozen=True)
class PooledWithCrops(Layout):
    """The tower's patches pooled to a square of tokens; a long picture may be followed by crops of it: Gemma 3.

    Crops ("pan and scan") lie side by side along the longer edge. How many belong to each picture comes from the
    processor output "num_crops" (pictures of the batch), which transformers' processor drops, or follows from
    `image_sizes` where the sample holds a single picture; without either every run of tokens counts as a picture.

    Attributes:
        tokens: configuration attribute, tokens per picture or crop, a square.
        crops: processor output (pictures of the batch,).
        pixels: processor output (pictures and crops of the batch, channels, height, width).
    """

    tokens: str = "mm_tokens_per_image"
    crops: str = "num_crops"
    pixels: str = "pixel_values"

    def layouts(self, prompt: Prompt) -> list[ImageLayout]:
        side = math.isqrt(int(prompt.number(self.tokens)))
        views = [run.reshape(side, side) for _, run in prompt.divide(lambda _: side * side)]
        found, start = [], 0
        for number, crops in enumerate(self._crops(prompt, len(views), side)):
            whole, *cut = views[start : start + crops + 1]
            parts: tuple[Part, ...] = (Part(whole, WHOLE),)
            if cut:
                rows, across = self._arrangement(prompt, number, start, crops, side)
                parts = (Part(_mosaic(np.stack(cut), rows, across), WHOLE), *parts)
            found.append(ImageLayout(parts))
            start += crops + 1
        return found

    def _crops(self, prompt: Prompt, views: int, side: int) -> list[int]:
        counts = prompt.input(self.crops)
        if counts is not None:
            left = [int(n) for n in counts.reshape(-1)]
            for columns in prompt.image_columns[: prompt.sample + 1]:
                mine, room = [], len(columns) // (side * side)
                while room > 0 and left:
                    mine.append(left.pop(0))
                    room -= mine[-1] + 1
                if room:
                    raise ArgumentError(f"inputs: {self.crops!r} does not fit the number of image tokens in the prompt")
            return mine
        pictures = views if prompt.image_sizes is None else len(prompt.image_sizes)
        if pictures == views:
            return [0] * views
        if pictures == 1:
            return [views - 1]
        raise ArgumentError(
            f"inputs: {self.crops!r} is needed: {views} pictures and crops came for {pictures} pictures, "
            "the image processor (not the joint processor) returns it"
        )

    def _arrangement(self, prompt: Prompt, image: int, view: int, crops: int, side: int) -> Size:
        size = prompt.size(image)
        if size is not None:
            return (1, crops) if size[1] >= size[0] else (crops, 1)
        first = sum(len(columns) for columns in prompt.image_columns[: prompt.sample]) // (side * side) + view
        pixels = prompt.required(self.pixels)
        return likeliest(pixels[first + 1 : first + 1 + crops], pixels[first], [(1, crops), (crops, 1)])
