"""Training data of the shipped LVLM: a pool of rendered scenes on disk, and the easy-VQA reader.

The pool holds pictures at the model's resolution with one label per patch, so that rendering is paid once and the
vision tower can be taught what lies under each of its patches.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ..files import write_whole
from . import scenes

IMAGE_SIZE = 96
"""Side in pixels of the picture that the vision tower sees."""

PATCH_SIZE = 8
"""Side in pixels of one patch of it."""

SCENES_PER_SEED = 5_000_000
"""Scene seeds that a seed of :func:`render_pool` reserves."""

GRID = IMAGE_SIZE // PATCH_SIZE
IGNORE = 255
"""Label of a patch or attribute that teaches nothing."""

EASY_VQA_KINDS = ("easy-vqa shape", "easy-vqa color", "easy-vqa yes/no")
KINDS = (*scenes.KINDS, *EASY_VQA_KINDS)
LABEL_NAMES = ("presence", "shape", "color", "texture", "size")
LABEL_VALUES = {
    "presence": ("no", "yes"),
    "shape": scenes.SHAPES,
    "color": tuple(scenes.COLORS),
    "texture": scenes.TEXTURES,
    "size": scenes.SIZES,
}

# Share of a patch that an object must cover to be its label, and below which the patch counts as background.
_COVERED = 0.3
_EMPTY = 0.04


@dataclass(frozen=True)
class Asked:
    """A question without its picture: text, answer and kind."""

    text: str
    answer: str
    kind: str


@dataclass
class Pool:
    """Pictures with patch labels and questions, index by index.

    Attributes:
        images: (N, 96, 96, 3) uint8, RGB.
        labels: (N, 12, 12, 5) uint8, class indices in the order of :data:`LABEL_NAMES`, :data:`IGNORE` where unknown.
        offsets: (N, 12, 12, 2) int8, from the patch's centre to its object's, x then y, in pixels of a 192-pixel
            picture; zero where no object is.
        centers: (N, 12, 12) uint8, 1 where an object's centre lies in the patch.
        questions: per picture, what may be asked.
    """

    images: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    centers: np.ndarray
    questions: list[list[Asked]]

    def __len__(self) -> int:
        return len(self.images)


def resize(image: Image.Image) -> np.ndarray:
    """The picture (96, 96, 3) uint8 as the model's image processor resizes it (bicubic, aspect not kept)."""
    return np.array(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def patch_labels(
    masks: np.ndarray, centers: np.ndarray, words: list[dict[str, str]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, offsets and centre flags (see :class:`Pool`) of one picture.

    Args:
        masks: (n, 192, 192) bool, visible pixels of each object.
        centers: (n, 2), x and y in pixels.
        words: per object the known attributes; a missing one becomes :data:`IGNORE`.
    """
    side = scenes.CANVAS // GRID
    coverage = masks.reshape(len(masks), GRID, side, GRID, side).mean((2, 4))
    owner, best = coverage.argmax(0), coverage.max(0)
    owned = best >= _COVERED
    for index, share in enumerate(coverage):
        # A tiny object may cover no patch well enough; its best patch speaks for it all the same.
        row, column = np.unravel_index(share.argmax(), share.shape)
        if not (owned & (owner == index)).any():
            owner[row, column], owned[row, column] = index, True
    labels = np.full((GRID, GRID, len(LABEL_NAMES)), IGNORE, dtype=np.uint8)
    labels[..., 0] = np.where(owned, 1, np.where(coverage.sum(0) < _EMPTY, 0, IGNORE))
    offsets = np.zeros((GRID, GRID, 2), dtype=np.int8)
    flags = np.zeros((GRID, GRID), dtype=np.uint8)
    middle = (np.arange(GRID) + 0.5) * side
    for index, (x, y) in enumerate(centers):
        mine = owned & (owner == index)
        for position, name in enumerate(LABEL_NAMES[1:], start=1):
            if name in words[index]:
                labels[mine, position] = LABEL_VALUES[name].index(words[index][name])
        distance = np.stack(np.broadcast_arrays(x - middle[None, :], y - middle[:, None]), -1)
        offsets[mine] = np.clip(np.rint(distance), -127, 127).astype(np.int8)[mine]
        flags[min(int(y) // side, GRID - 1), min(int(x) // side, GRID - 1)] = 1
    return labels, offsets, flags


def _render_shard(folder: Path, index: int, first_seed: int, count: int) -> None:
    arrays = defaultdict(list)
    questions = []
    for seed in range(first_seed, first_seed + count):
        scene = scenes.generate_scene(seed)
        words = [dict(zip(("size", "color", "texture", "shape"), o.words, strict=True)) for o in scene.objects]
        labels, offsets, centers = patch_labels(
            np.stack([o.mask for o in scene.objects]), np.array([o.center for o in scene.objects]), words
        )
        arrays["images"].append(resize(scene.image))
        arrays["labels"].append(labels)
        arrays["offsets"].append(offsets)
        arrays["centers"].append(centers)
        asked = scenes.generate_questions(scene, np.random.default_rng([seed, 2]), per_kind=2)
        questions.append([(q.text, q.answer, q.kind) for q in asked])
    for name, rows in arrays.items():
        np.save(folder / f"{index:04d}.{name}.npy", np.stack(rows))
    # Written last: its presence says that the shard is complete.
    write_whole(folder / f"{index:04d}.json", json.dumps(questions).encode())


def render_pool(folder: Path, *, num_scenes: int, seed: int, workers: int, shard_size: int = 2500) -> None:
    """Render ``num_scenes`` scenes into ``folder``, skipping shards that are already complete.

    ``seed`` picks a run of :data:`SCENES_PER_SEED` scene seeds; 0 to 99 lie in :data:`scenes.TRAIN_SEEDS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = scenes.TRAIN_SEEDS.start + seed * SCENES_PER_SEED
    jobs = [
        (folder, index, first + start, min(shard_size, num_scenes - start))
        for index, start in enumerate(range(0, num_scenes, shard_size))
        if not (folder / f"{index:04d}.json").is_file()
    ]
    if not jobs:
        return
    with ProcessPoolExecutor(workers) as executor:
        list(tqdm(executor.map(_render_shard, *zip(*jobs, strict=True)), total=len(jobs), desc="rendering scenes"))


def load_pool(folder: Path) -> Pool:
    """Every complete shard of ``folder``, in order.

    Raises:
        FileNotFoundError: if there is none.
    """
    shards = sorted(folder.glob("*.json"))
    if not shards:
        raise FileNotFoundError(f"no rendered scenes in {folder}")
    arrays = {
        name: np.concatenate([np.load(shard.with_suffix(f".{name}.npy")) for shard in shards])
        for name in ("images", "labels", "offsets", "centers")
    }
    questions = [[Asked(*row) for row in rows] for shard in shards for rows in json.loads(shard.read_text())]
    return Pool(**arrays, questions=questions)


def objects_of(pool: Pool, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Attribute values (n, 4) and centres (n, 2), x and y in canvas pixels, of a generated picture's objects.

    Read off the patch labels: no two objects of a scene share all attributes.
    """
    side = scenes.CANVAS / GRID
    labels = pool.labels[row].reshape(GRID * GRID, -1)
    middle = (np.arange(GRID) + 0.5) * side
    patches = np.stack(np.meshgrid(middle, middle), -1).reshape(-1, 2)
    owned = labels[:, 0] == 1
    values, which = np.unique(labels[owned, 1:], axis=0, return_inverse=True)
    places = patches[owned] + pool.offsets[row].reshape(-1, 2)[owned]
    which = which.reshape(-1)
    return values.astype(np.int64), np.stack([places[which == i].mean(0) for i in range(len(values))])


def _ask_more(
    found: list[tuple[np.ndarray, np.ndarray]], known: list[set[str]], kind: str, tries: int, seeds: list[list[int]]
) -> list[list[tuple[str, str, str]]]:
    blank = np.zeros((scenes.CANVAS, scenes.CANVAS), dtype=bool)
    nothing = Image.new("RGB", (1, 1))
    asked: list[list[tuple[str, str, str]]] = []
    for (values, centers), texts, seed in zip(found, known, seeds, strict=True):
        rng = np.random.default_rng(seed)
        objects = []
        for value, (x, y) in zip(values, centers, strict=True):
            words = {name: LABEL_VALUES[name][v] for name, v in zip(LABEL_NAMES[1:], value, strict=True)}
            objects.append(scenes.SceneObject(**words, center=(float(x), float(y)), radius=0.0, mask=blank))
        scene = scenes.Scene(nothing, tuple(objects), 0, "", "")
        questions = [scenes.ask(scene, kind, rng) for _ in range(tries)]
        new = {q.text: (q.text, q.answer, q.kind) for q in questions if q is not None and q.text not in texts}
        asked.append(list(new.values()))
    return asked


def add_questions(pool: Pool, kind: str, tries: int, *, seed: int, workers: int, cache: Path) -> None:
    """Ask up to ``tries`` more questions of ``kind`` about every generated picture of ``pool``, in place.

    A question needs the objects, not the pixels, so a kind that is learnt slowly can be asked more often without
    rendering anything again. ``cache``: a JSON file that keeps the questions.
    """
    if not cache.is_file():
        step = 500
        parts = [range(start, min(start + step, len(pool))) for start in range(0, len(pool), step)]
        with ProcessPoolExecutor(workers) as executor:
            jobs = executor.map(
                _ask_more,
                ([objects_of(pool, row) for row in part] for part in parts),
                ([{question.text for question in pool.questions[row]} for row in part] for part in parts),
                repeat(kind),
                repeat(tries),
                ([[seed, 13, row] for row in part] for part in parts),
            )
            asked = [rows for part in tqdm(jobs, total=len(parts), desc=f"asking {kind}") for rows in part]
        write_whole(cache, json.dumps(asked).encode())
    for questions, rows in zip(pool.questions, json.loads(cache.read_text()), strict=True):
        questions += [Asked(*row) for row in rows]


# easy-VQA


def _easy_vqa() -> ModuleType:
    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError("easy-VQA is not installed: pip install easy-vqa") from error
    return easy_vqa


def _easy_vqa_kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "easy-vqa yes/no"
    return "easy-vqa shape" if answer in scenes.SHAPES else "easy-vqa color"


def easy_vqa(split: str) -> Iterator[tuple[Path, list[Asked]]]:
    """Image path and questions of every picture of a split of the PyPI package easy-vqa, in order of image id.

    Raises:
        ImportError: if easy-vqa is not installed.
        ValueError: if ``split`` is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    package = _easy_vqa()
    texts, answers, ids = package.get_train_questions() if split == "train" else package.get_test_questions()
    paths = package.get_train_image_paths() if split == "train" else package.get_test_image_paths()
    asked = defaultdict(list)
    for text, answer, image_id in zip(texts, answers, ids, strict=True):
        asked[image_id].append(Asked(text, answer, _easy_vqa_kind(answer)))
    for image_id in sorted(paths):
        yield Path(paths[image_id]), asked[image_id]


def _easy_vqa_words(questions: list[Asked]) -> dict[str, str]:
    """What the questions and answers of one picture (it holds one object) say about the object."""
    words = {"texture": "solid"}
    names = {**dict.fromkeys(scenes.SHAPES, "shape"), **dict.fromkeys(scenes.COLORS, "color")}
    for question in questions:
        negated = re.search(r"\b(no|not)\b", question.text) is not None
        if question.answer not in ("yes", "no"):
            stated = [question.answer, *question.text.strip("?").split()]
        elif (question.answer == "yes") != negated:
            stated = question.text.strip("?").split()
        else:
            continue
        words |= {names[word]: word for word in stated if word in names}
    return words


def easy_vqa_pool(split: str) -> Pool:
    """A split of easy-VQA as a :class:`Pool`; patch labels come from the pixels and from the questions alone."""
    columns: list[tuple[NDArray[Any], ...]] = []
    questions = []
    for path, asked in easy_vqa(split):
        with Image.open(path) as file:
            image = file.convert("RGB")
        pixels = np.asarray(image).astype(np.int16)
        # Each picture is one flat shape on one flat colour, and a corner is background in all but a few.
        corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        background = np.median(corners, axis=0)
        mask = np.abs(pixels - background).sum(-1) > 60
        scale = scenes.CANVAS // mask.shape[0]
        rows, cols = np.nonzero(mask)
        center = np.array([[cols.mean() + 0.5, rows.mean() + 0.5]]) * scale
        large = mask.repeat(scale, 0).repeat(scale, 1)[None]
        columns.append((resize(image), *patch_labels(large, center, [_easy_vqa_words(asked)])))
        questions.append(asked)
    images, labels, offsets, centers = (np.stack(column) for column in zip(*columns, strict=True))
    return Pool(images, labels, offsets, centers, questions)
