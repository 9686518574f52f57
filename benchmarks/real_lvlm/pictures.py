"""The pictures that the real LVLM is trained on, as features of its frozen tower."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lvlm_fastxai.tiny import data, scenes

from .backbone import GRID, features_of, image_processor, load_backbone

SCENES, EASY_VQA_PICTURES = 2_400, 600
SHARD = 100
IGNORE = 255
ATTRIBUTES = ("shape", "color", "texture", "size")


@dataclass
class Pictures:
    """Pictures as features, what lies under each patch, and what may be asked.

    Attributes:
        features: (N, patches, layers x width) fp16.
        labels: (N, patches, 5) uint8: presence of an object, then its :data:`ATTRIBUTES`; :data:`IGNORE` where unknown.
        places: (N, patches, 2) fp32, the object's centre as seen from the picture's, x and y, edges at ±1.
        questions: per picture.
        seconds: what making them took.
    """

    features: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    questions: list[list[data.Asked]]
    seconds: float

    def __len__(self) -> int:
        return len(self.features)


def patch_labels(scene: scenes.Scene) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels and places (see :class:`Pictures`) of one scene."""
    side = scenes.CANVAS // GRID
    coverage = np.stack([each.mask for each in scene.objects]).reshape(-1, GRID, side, GRID, side).mean((2, 4))
    coverage = coverage.reshape(len(coverage), -1)
    owner, owned = coverage.argmax(0), coverage.max(0) > 0.3
    labels = np.full((GRID * GRID, 1 + len(ATTRIBUTES)), IGNORE, dtype=np.uint8)
    labels[coverage.sum(0) < 0.04, 0] = 0
    labels[owned, 0] = 1
    places = np.zeros((GRID * GRID, 2), dtype=np.float32)
    for number, each in enumerate(scene.objects):
        mine = owned & (owner == number)
        labels[mine, 1:] = [data.LABEL_VALUES[name].index(each.attribute(name)) for name in ATTRIBUTES]
        places[mine] = np.array(each.center) / (scenes.CANVAS / 2) - 1
    return labels, places


def descriptions(labels: np.ndarray, rng: np.random.Generator) -> list[data.Asked]:
    """Ask for a description of each object of a scene, named by as few attributes as tell it from the others.

    Attributes are bound to each other by these many times faster than by questions with one word for an answer: four
    words are looked up for the price of one question.

    Args:
        labels: (patches, 5) of one picture, as :class:`Pictures` has them.
    """
    objects = np.unique(labels[labels[:, 0] == 1, 1:], axis=0)
    asked = []
    for own in objects[(objects != IGNORE).all(1)] if len(objects) > 1 else ():
        words = {name: data.LABEL_VALUES[name][value] for name, value in zip(ATTRIBUTES, own, strict=True)}
        for count in range(1, len(ATTRIBUTES)):
            chosen = [sorted(each) for each in combinations(range(len(ATTRIBUTES)), count)]
            chosen = [each for each in chosen if (objects[:, each] == own[each]).all(1).sum() == 1]
            if chosen:
                names = [ATTRIBUTES[n] for n in chosen[rng.integers(len(chosen))]]
                told = [words[name] for name in ("size", "color", "texture") if name in names]
                phrase = " ".join([*told, words["shape"] if "shape" in names else "object"])
                answer = " ".join(["a", *(words[name] for name in ("size", "color", "texture", "shape"))])
                asked.append(data.Asked(f"describe the {phrase}.", answer, "description"))
                break
    return asked


def training_pictures() -> Iterator[tuple[Image.Image, np.ndarray, np.ndarray, list[data.Asked]]]:
    """Mix scenes and easy-VQA's training pictures evenly; the latter have no patch labels."""
    every = SCENES // EASY_VQA_PICTURES
    nothing = np.full((GRID * GRID, 1 + len(ATTRIBUTES)), IGNORE, dtype=np.uint8)
    easy = data.easy_vqa("train")
    for number in range(SCENES):
        seed = scenes.TRAIN_SEEDS.start + number
        scene = scenes.generate_scene(seed)
        asked = scenes.generate_questions(scene, np.random.default_rng([seed, 2]), per_kind=3)
        yield scene.image, *patch_labels(scene), [data.Asked(q.text, q.answer, q.kind) for q in asked]
        if number % every == every - 1:
            path, questions = next(easy)
            with Image.open(path) as file:
                yield file.convert("RGB"), nothing, np.zeros((GRID * GRID, 2), dtype=np.float32), questions


def make_pictures(folder: Path) -> None:
    """Write the training pictures' features to ``folder``, a shard at a time; shards that are there stay."""
    from tqdm import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    count = -(-(SCENES + EASY_VQA_PICTURES) // SHARD)
    missing = [number for number in range(count) if not (folder / f"{number:03d}.json").is_file()]
    if not missing:
        return
    # A frozen tower in bf16 is off by less than what the projector is trained through anyway, at half the time.
    backbone, processor = load_backbone().to(torch.bfloat16), image_processor()
    stream = training_pictures()
    with tqdm(total=len(missing) * SHARD, desc="features", unit="picture", mininterval=5) as bar:
        for number in range(count):
            started = time.perf_counter()
            rows = [row for _, row in zip(range(SHARD), stream, strict=False)]
            if number not in missing:
                continue
            features = []
            for row in rows:
                pixels = processor(images=row[0], return_tensors="pt")["pixel_values"]
                features.append(features_of(backbone, pixels).half().numpy())
                bar.update(1)
            write_shard(folder, number, np.concatenate(features), rows, started)


def write_shard(folder: Path, number: int, features: np.ndarray, rows: list[Any], started: float) -> None:
    """Write one shard; its JSON comes last, and says that the shard is complete."""
    np.save(folder / f"{number:03d}.features.npy", features)
    np.save(folder / f"{number:03d}.labels.npy", np.stack([row[1] for row in rows]))
    np.save(folder / f"{number:03d}.places.npy", np.stack([row[2] for row in rows]))
    questions = [[(q.text, q.answer, q.kind) for q in row[3]] for row in rows]
    made = {"seconds": time.perf_counter() - started, "questions": questions}
    (folder / f"{number:03d}.json").write_text(json.dumps(made))


def load_pictures(folder: Path) -> Pictures:
    """Load every complete shard of ``folder``."""
    shards = sorted(each for each in folder.glob("*.json") if re.fullmatch(r"\d{3}", each.stem))
    made = [json.loads(shard.read_text()) for shard in shards]

    def joined(name: str) -> Any:
        return np.concatenate([np.load(shard.with_suffix(f".{name}.npy")) for shard in shards])

    return Pictures(
        joined("features"),
        joined("labels"),
        joined("places"),
        [[data.Asked(*question) for question in asked] for each in made for asked in each["questions"]],
        sum(each["seconds"] for each in made),
    )
