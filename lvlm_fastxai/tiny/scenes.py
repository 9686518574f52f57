"""Scenes of one to four painted objects, questions about them, and the pixels that decide each answer.

Everything is drawn with numpy and Pillow from an integer seed: the same seed gives the same picture and, with the same
generator state, the same questions. Seeds are split by range (:data:`TRAIN_SEEDS`, :data:`VALIDATION_SEEDS`,
:data:`HELD_OUT_SEEDS`), so training never sees a held-out picture.

Example:
    >>> scene = generate_scene(7)
    >>> questions = generate_questions(scene, numpy.random.default_rng(7))
    >>> questions[0].mask.shape
    (192, 192)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

CANVAS = 192
"""Side of a generated picture, in pixels."""

SHAPES = ("circle", "rectangle", "triangle", "diamond", "star", "cross")
# The first eight are easy-VQA's colours with its names, so that one vocabulary serves both data sets.
COLORS = {
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "red": (240, 15, 15),
    "blue": (15, 30, 240),
    "green": (15, 215, 30),
    "yellow": (250, 240, 15),
    "teal": (0, 130, 130),
    "brown": (160, 50, 42),
    "purple": (160, 45, 215),
    "orange": (255, 140, 0),
}
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "large")
BACKGROUNDS = ("plain", "gradient", "noise", "texture")
DIFFICULTIES = ("plain", "tiny", "occluded", "low contrast")
KINDS = (
    "color",
    "shape",
    "texture",
    "size",
    "exists",
    "count",
    "relation",
    "comparison",
    "position",
    "description",
)

TRAIN_SEEDS = range(500_000_000)
VALIDATION_SEEDS = range(500_000_000, 600_000_000)
HELD_OUT_SEEDS = range(1_000_000_000, 2_000_000_000)

# Radii in pixels. The gap between the two sizes is what makes "small" and "large" unambiguous.
_RADIUS = {"small": (17.0, 23.0), "large": (35.0, 45.0)}
_TINY_RADIUS = (12.0, 15.0)
_HARD_SHARE = 0.12
_LOW_CONTRAST = 0.4
_OBJECT_COUNT_WEIGHTS = (0.16, 0.32, 0.26, 0.26)
# Two centres must differ by this much along an axis before a question may be asked about that axis.
_RELATION_MARGIN = 22.0
_MIN_VISIBLE = 0.6


@dataclass(frozen=True)
class SceneObject:
    """One painted object.

    Attributes:
        shape, color, texture, size: words out of :data:`SHAPES`, :data:`COLORS`, :data:`TEXTURES`, :data:`SIZES`.
        center: (x, y) in pixels, x to the right and y downwards.
        radius: radius in pixels of the circle that the outline is inscribed in.
        mask: (H, W) bool, the pixels of the object that are visible in the picture.
    """

    shape: str
    color: str
    texture: str
    size: str
    center: tuple[float, float]
    radius: float
    mask: np.ndarray

    def attribute(self, name: str) -> str:
        """The word for ``name``, one of "size", "color", "texture", "shape"."""
        return getattr(self, name)

    @property
    def words(self) -> tuple[str, str, str, str]:
        """Size, colour, texture and shape, in the order a description names them."""
        return self.size, self.color, self.texture, self.shape


@dataclass(frozen=True)
class Scene:
    """A picture (RGB, :data:`CANVAS` pixels square) with what is in it.

    Attributes:
        image: the picture.
        objects: what was painted, first to last (a later object may cover an earlier one).
        seed: the seed that gives this scene again.
        background: one of :data:`BACKGROUNDS`.
        difficulty: one of :data:`DIFFICULTIES`.
    """

    image: Image.Image
    objects: tuple[SceneObject, ...]
    seed: int
    background: str
    difficulty: str


@dataclass(frozen=True)
class Question:
    """A question with its one right answer and the pixels that decide it.

    Attributes:
        text: the question in lower-case words.
        answer: the answer; compared word for word.
        kind: one of :data:`KINDS`.
        mask: (H, W) bool, the visible pixels of the objects that decide the answer. False everywhere where the answer
            rests on an absence ("is there a red star?" answered "no", "how many ...?" answered "0").
        word_masks: for a description one (H, W) bool mask per word of the answer, the object the word speaks of (both
            objects for a relation); otherwise None.
    """

    text: str
    answer: str
    kind: str
    mask: np.ndarray
    word_masks: tuple[np.ndarray, ...] | None = None


# Pictures


def _polygon(shape: str, rng: np.random.Generator) -> np.ndarray:
    """Corners (n, 2) of ``shape`` around the origin, inside the unit circle, slightly turned at random."""
    turn = rng.uniform(-0.14, 0.14)
    if shape == "circle":
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        points = np.stack([np.cos(angles), np.sin(angles)], 1)
    elif shape == "rectangle":
        aspect = rng.uniform(0.6, 1.6)
        half = np.array([aspect, 1.0]) / math.hypot(aspect, 1.0)
        points = half * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    elif shape == "triangle":
        angles = -math.pi / 2 + np.arange(3) * 2 * math.pi / 3
        points = np.stack([np.cos(angles), np.sin(angles)], 1) + np.array([0.0, 0.12])
        turn += rng.choice([0.0, math.pi / 2, math.pi, -math.pi / 2])
    elif shape == "diamond":
        points = np.array([[0.0, -1.0], [0.66, 0.0], [0.0, 1.0], [-0.66, 0.0]])
        turn *= 0.5
    elif shape == "star":
        angles = -math.pi / 2 + np.arange(10) * math.pi / 5
        lengths = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        points = np.stack([np.cos(angles), np.sin(angles)], 1) * lengths[:, None]
    elif shape == "cross":
        arm = 0.32
        quarter = np.array([[arm, -1.0], [arm, -arm], [1.0, -arm]])
        turns = [
            np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in np.arange(4) * math.pi / 2
        ]
        points = np.concatenate([quarter @ t.T for t in turns]) * 0.97
    else:
        raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    return points @ rotation.T


def _coverage(points: np.ndarray, left: int, top: int, side: int) -> np.ndarray:
    """Share (side, side) float32 of each pixel of a box that a polygon with corners ``points`` (n, 2) covers."""
    oversampling = 4
    canvas = Image.new("L", (side * oversampling, side * oversampling))
    corners = [(float((x - left) * oversampling), float((y - top) * oversampling)) for x, y in points]
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return np.asarray(canvas.reduce(oversampling), dtype=np.float32) / 255.0


def _pattern(texture: str, radius: float, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Share of the second colour (float32, shape of ``x``) at pixel offsets ``x``, ``y`` from the object's centre."""
    period = 9.0 + 0.12 * radius
    if texture == "solid":
        return np.zeros_like(x)
    if texture == "striped":
        angle = rng.choice(4) * math.pi / 4
        wave = np.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / period + rng.uniform(0, 2 * math.pi))
        return np.clip(0.5 + 2.5 * (wave - 0.1), 0, 1)
    if texture == "dotted":
        period *= 1.05
        u, v = (x + rng.uniform(0, period)) % period - period / 2, (y + rng.uniform(0, period)) % period - period / 2
        return np.clip(period * 0.33 - np.hypot(u, v) + 0.5, 0, 1)
    if texture == "checkered":
        period *= 1.25
        u = np.sin(2 * math.pi * x / period + rng.uniform(0, 2 * math.pi))
        v = np.sin(2 * math.pi * y / period + rng.uniform(0, 2 * math.pi))
        return np.clip(0.5 + 4.0 * u * v, 0, 1)
    raise ValueError(f"texture must be one of {TEXTURES}, got {texture!r}")


def _second_color(color: np.ndarray) -> np.ndarray:
    """A light partner for dark colours and a dark one for light colours, so that a texture shows on both."""
    luminance = float(color @ np.array([0.299, 0.587, 0.114]))
    partner = np.array([250.0, 250.0, 250.0]) if luminance < 140 else np.array([20.0, 20.0, 20.0])
    return 0.85 * partner + 0.15 * color


def _background(rng: np.random.Generator, style: str, colors: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Background (H, W, 3) float32 and its mean colour, away from every colour of ``colors``."""
    base = np.array([235.0, 235.0, 240.0])
    for _ in range(20):
        low, high = [(200, 256), (200, 256), (200, 256), (90, 190), (20, 75)][rng.integers(5)]
        base = rng.uniform(low, high, 3)
        if all(np.linalg.norm(base - c) > 105 for c in colors):
            break
    else:
        base = np.array([235.0, 235.0, 240.0])
    grid_y, grid_x = np.mgrid[0:CANVAS, 0:CANVAS].astype(np.float32) / CANVAS - 0.5
    field = np.zeros((CANVAS, CANVAS), dtype=np.float32)
    noise = np.zeros((CANVAS, CANVAS, 3), dtype=np.float32)
    if style == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        field = rng.uniform(25, 55) * (grid_x * math.cos(angle) + grid_y * math.sin(angle))
    elif style == "noise":
        noise = rng.normal(0, rng.uniform(4, 11), (CANVAS, CANVAS, 3)).astype(np.float32)
    elif style == "texture":
        angle = rng.uniform(0, math.pi)
        frequency = rng.uniform(6, 16)
        phase = 2 * math.pi * frequency * (grid_x * math.cos(angle) + grid_y * math.sin(angle))
        field = rng.uniform(5, 10) * np.sin(phase)
        if rng.random() < 0.5:
            crossing = 2 * math.pi * frequency * (-grid_x * math.sin(angle) + grid_y * math.cos(angle))
            field = field * np.sin(crossing)
    return np.clip(base.astype(np.float32) + field[..., None] + noise, 0, 255), base


def _sample_attributes(rng: np.random.Generator, count: int) -> list[dict[str, str]]:
    """Attributes of ``count`` objects; half of the objects borrow words from earlier ones, so that counts above one
    occur and a question must name more than one attribute to be unambiguous."""
    objects: list[dict[str, str]] = []
    while len(objects) < count:
        words = {
            "shape": str(rng.choice(SHAPES)),
            "color": str(rng.choice(list(COLORS))),
            "texture": str(rng.choice(TEXTURES)),
            "size": "small" if rng.random() < 0.55 else "large",
        }
        if objects and rng.random() < 0.6:
            lender = objects[rng.integers(len(objects))]
            for name in rng.choice(["shape", "color", "texture"], size=rng.integers(1, 3), replace=False):
                words[name] = lender[name]
        if words["size"] == "large" and sum(o["size"] == "large" for o in objects) >= 2:
            words["size"] = "small"
        if words not in objects:
            objects.append(words)
    return objects


def _place(rng: np.random.Generator, radii: Sequence[float], touching: bool) -> list[tuple[float, float]] | None:
    """Centres for circles of ``radii`` that keep apart, the last one overlapping the first where ``touching``."""
    centers: list[tuple[float, float]] = []
    for index, radius in enumerate(radii):
        for attempt in range(60):
            margin = radius + 2
            if touching and index == len(radii) - 1:
                angle = rng.uniform(0, 2 * math.pi)
                reach = rng.uniform(0.75, 0.95) * (radius + radii[0])
                x, y = centers[0][0] + reach * math.cos(angle), centers[0][1] + reach * math.sin(angle)
                if not (margin <= x <= CANVAS - margin and margin <= y <= CANVAS - margin):
                    continue
                others = range(1, index)
            else:
                if index == 0 and attempt == 0 and rng.random() < 0.22:
                    x, y = rng.uniform(CANVAS / 2 - 14, CANVAS / 2 + 14, 2)
                else:
                    x, y = rng.uniform(margin, CANVAS - margin, 2)
                others = range(index)
            if all(math.hypot(x - centers[o][0], y - centers[o][1]) > radius + radii[o] + 5 for o in others):
                centers.append((float(x), float(y)))
                break
        else:
            return None
    return centers


def generate_scene(seed: int, *, num_objects: int | None = None, difficulty: str | None = None) -> Scene:
    """Paint the scene of ``seed``.

    Args:
        seed: any non-negative integer; see the seed ranges of this module.
        num_objects: 1 to 4; drawn from the seed when None.
        difficulty: one of :data:`DIFFICULTIES`; when None, 12 % of the seeds give one of the hard ones.

    Raises:
        ValueError: for an argument outside those.
    """
    if num_objects is not None and num_objects not in (1, 2, 3, 4):
        raise ValueError(f"num_objects must be 1, 2, 3 or 4, got {num_objects}")
    if difficulty is not None and difficulty not in DIFFICULTIES:
        raise ValueError(f"difficulty must be one of {DIFFICULTIES}, got {difficulty!r}")
    rng = np.random.default_rng(seed)
    drawn_count = int(rng.choice(4, p=_OBJECT_COUNT_WEIGHTS)) + 1
    drawn_difficulty = str(rng.choice(DIFFICULTIES[1:])) if rng.random() < _HARD_SHARE else "plain"
    count = num_objects or drawn_count
    level = difficulty or drawn_difficulty
    if level == "occluded" and count == 1:
        count = 2 if num_objects is None else 1
        level = level if count == 2 else "plain"
    while True:
        scene = _try_scene(rng, seed, count, level)
        if scene is not None:
            return scene


def _try_scene(rng: np.random.Generator, seed: int, count: int, level: str) -> Scene | None:
    attributes = _sample_attributes(rng, count)
    radii = [float(rng.uniform(*_RADIUS[words["size"]])) for words in attributes]
    if level == "tiny":
        attributes[0]["size"] = "small"
        if attributes.count(attributes[0]) > 1:
            return None
        radii[0] = float(rng.uniform(*_TINY_RADIUS))
    centers = _place(rng, radii, level == "occluded")
    if centers is None:
        return None
    colors = [np.array(COLORS[words["color"]], dtype=np.float64) for words in attributes]
    colors = [np.clip(color + rng.uniform(-14, 14, 3), 0, 255) for color in colors]
    style = str(rng.choice(BACKGROUNDS))
    canvas, base = _background(rng, style, colors)
    if level == "low contrast":
        colors[0] = (1 - _LOW_CONTRAST) * colors[0] + _LOW_CONTRAST * base
    masks: list[np.ndarray] = []
    areas: list[int] = []
    for words, radius, (x, y), color in zip(attributes, radii, centers, colors, strict=True):
        side = 2 * math.ceil(radius) + 4
        left, top = max(0, round(x) - side // 2), max(0, round(y) - side // 2)
        corners = _polygon(words["shape"], rng) * radius
        outer = _coverage(corners + np.array([x, y]), left, top, side)
        # The rim keeps the main colour, so that the outline shows even where the second colour is the background's.
        inner = _coverage(corners * (1 - 2.2 / radius) + np.array([x, y]), left, top, side)
        rows, columns = np.mgrid[top : top + side, left : left + side].astype(np.float32)
        second = (inner * _pattern(words["texture"], radius, columns - x, rows - y, rng))[..., None]
        paint = color * (1 - second) + _second_color(color) * second
        height, width = canvas[top : top + side, left : left + side].shape[:2]
        alpha = outer[:height, :width, None]
        region = canvas[top : top + height, left : left + width]
        canvas[top : top + height, left : left + width] = region * (1 - alpha) + paint[:height, :width] * alpha
        mask = np.zeros((CANVAS, CANVAS), dtype=bool)
        mask[top : top + height, left : left + width] = alpha[..., 0] > 0.5
        masks = [earlier & ~mask for earlier in masks] + [mask]
        areas.append(int(mask.sum()))
    if any(mask.sum() < _MIN_VISIBLE * area for mask, area in zip(masks, areas, strict=True)):
        return None
    objects = tuple(
        SceneObject(**words, center=center, radius=radius, mask=mask)
        for words, center, radius, mask in zip(attributes, centers, radii, masks, strict=True)
    )
    picture = Image.fromarray(np.clip(canvas + 0.5, 0, 255).astype(np.uint8))
    return Scene(image=picture, objects=objects, seed=seed, background=style, difficulty=level)


# Questions

_NOUN_PHRASES = (
    ("shape",),
    ("color",),
    ("texture",),
    ("size",),
    ("color", "shape"),
    ("texture", "shape"),
    ("size", "shape"),
    ("color", "texture"),
    ("size", "color"),
    ("color", "texture", "shape"),
    ("size", "color", "shape"),
    ("size", "texture", "shape"),
)


def _phrase(words: dict[str, str]) -> str:
    """ "red star" or "small striped object": the attributes in canonical order, "object" where no shape is given."""
    ordered = [words[name] for name in ("size", "color", "texture") if name in words]
    return " ".join([*ordered, words.get("shape", "object")])


def _matching(scene: Scene, words: dict[str, str]) -> list[SceneObject]:
    return [o for o in scene.objects if all(o.attribute(name) == word for name, word in words.items())]


def _referent(
    scene: Scene, target: SceneObject, rng: np.random.Generator, without: Sequence[str] = ()
) -> dict[str, str] | None:
    """Attributes that name ``target`` and no other object, as few as will do (one more, now and then)."""
    if len(scene.objects) == 1 and "shape" in without and rng.random() < 0.4:
        return {}
    unique = []
    for names in _NOUN_PHRASES:
        words = {name: target.attribute(name) for name in names}
        if not set(names) & set(without) and len(_matching(scene, words)) == 1:
            unique.append(words)
    if not unique:
        return None
    shortest = len(unique[0])
    allowed = shortest + (1 if rng.random() < 0.3 else 0)
    candidates = [words for words in unique if len(words) <= allowed]
    return candidates[rng.integers(len(candidates))]


def _union(objects: Sequence[SceneObject]) -> np.ndarray:
    mask = np.zeros((CANVAS, CANVAS), dtype=bool)
    for o in objects:
        mask |= o.mask
    return mask


def _shuffled(items: Sequence, rng: np.random.Generator) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def _ask_attribute(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    templates = {
        "color": ("what color is the {}?", "what is the color of the {}?"),
        "shape": ("what shape is the {}?", "what is the shape of the {}?"),
        "texture": ("what texture is the {}?", "what is the texture of the {}?"),
        "size": ("what size is the {}?", "is the {} small or large?"),
    }[kind]
    for target in _shuffled(scene.objects, rng):
        words = _referent(scene, target, rng, without=(kind,))
        if words is not None:
            text = templates[rng.integers(len(templates))].format(_phrase(words))
            return Question(text, target.attribute(kind), kind, target.mask.copy())
    return None


def _random_words(rng: np.random.Generator, names: Sequence[str]) -> dict[str, str]:
    values = {"shape": SHAPES, "color": tuple(COLORS), "texture": TEXTURES, "size": SIZES}
    return {name: str(rng.choice(values[name])) for name in names}


def _ask_exists(scene: Scene, rng: np.random.Generator) -> Question | None:
    wanted = rng.random() < 0.5
    for _ in range(40):
        names = _NOUN_PHRASES[rng.integers(10)]
        source = scene.objects[rng.integers(len(scene.objects))]
        words = {name: source.attribute(name) for name in names}
        if not wanted:
            # Half of the refusals change a single word of a real object: the hardest ones to refuse.
            changed = [names[rng.integers(len(names))]] if rng.random() < 0.5 else names
            words |= _random_words(rng, changed)
        found = _matching(scene, words)
        if bool(found) == wanted:
            template = ("is there a {}?", "is there a {} in the image?", "does the image contain a {}?")[
                rng.integers(3)
            ]
            return Question(template.format(_phrase(words)), "yes" if wanted else "no", "exists", _union(found))
    return None


def _ask_count(scene: Scene, rng: np.random.Generator) -> Question | None:
    by_count: dict[int, list[dict[str, str]]] = {}
    for names in (("shape",), ("color",), ("texture",), ("size",), ("color", "shape"), ("texture", "shape")):
        for source in scene.objects:
            words = {name: source.attribute(name) for name in names}
            by_count.setdefault(len(_matching(scene, words)), []).append(words)
    absent = [w for w in (_random_words(rng, [n]) for n in ("shape", "color", "texture")) if not _matching(scene, w)]
    if absent:
        by_count[0] = absent
    by_count.setdefault(len(scene.objects), []).append({})
    # Large counts are rare in the scenes; these weights make the answers nearly equally frequent.
    weights = np.array([(0.8, 0.7, 1.5, 4.0, 6.0)[c] for c in by_count])
    count = list(by_count)[rng.choice(len(by_count), p=weights / weights.sum())]
    words = by_count[count][rng.integers(len(by_count[count]))]
    template = ("how many {} are there?", "how many {} are in the image?")[rng.integers(2)]
    plural = {"cross": "crosses"}.get(words.get("shape", "object"), words.get("shape", "object") + "s")
    phrase = " ".join([*_phrase(words).split()[:-1], plural])
    return Question(template.format(phrase), str(count), "count", _union(_matching(scene, words)))


def _pairs(scene: Scene, rng: np.random.Generator) -> list[tuple[SceneObject, SceneObject]]:
    return _shuffled([(a, b) for a in scene.objects for b in scene.objects if a is not b], rng)


_SIDES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}


def _side_phrase(side: str) -> str:
    return f"{side} of" if side in ("left", "right") else side


def _dominant_side(a: SceneObject, b: SceneObject, ratio: float) -> str | None:
    """Where ``a`` stands as seen from ``b``; None unless one axis exceeds the other ``ratio`` times and the margin."""
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    if max(abs(dx), abs(dy)) < max(_RELATION_MARGIN, ratio * min(abs(dx), abs(dy))):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    open_question = rng.random() < 0.4
    wanted = rng.random() < 0.5
    for a, b in _pairs(scene, rng):
        first, second = _referent(scene, a, rng), _referent(scene, b, rng)
        if first is None or second is None:
            continue
        mask = _union((a, b))
        if open_question:
            side = _dominant_side(a, b, 1.5)
            if side is None:
                continue
            text = f"on which side of the {_phrase(second)} is the {_phrase(first)}?"
            return Question(text, side, "relation", mask)
        for side in _shuffled(list(_SIDES), rng):
            axis, sign = _SIDES[side]
            distance = sign * (a.center[axis] - b.center[axis])
            if abs(distance) >= _RELATION_MARGIN and (distance > 0) == wanted:
                text = f"is the {_phrase(first)} {_side_phrase(side)} the {_phrase(second)}?"
                return Question(text, "yes" if wanted else "no", "relation", mask)
    return None


def _ask_comparison(scene: Scene, rng: np.random.Generator) -> Question | None:
    form = rng.choice(["larger", "smaller", "same"], p=[0.3, 0.3, 0.4])
    wanted = rng.random() < 0.5
    which = rng.random() < 0.35
    name = str(rng.choice(["color", "shape", "texture", "size"]))
    for a, b in _pairs(scene, rng):
        without = (name,) if form == "same" else ("size",)
        first, second = _referent(scene, a, rng, without), _referent(scene, b, rng, without)
        if first is None or second is None or not first or not second:
            continue
        mask = _union((a, b))
        one, two = _phrase(first), _phrase(second)
        if form == "same":
            if (a.attribute(name) == b.attribute(name)) != wanted:
                continue
            return Question(
                f"do the {one} and the {two} have the same {name}?", "yes" if wanted else "no", "comparison", mask
            )
        if a.size == b.size:
            continue
        holds = a.size == ("large" if form == "larger" else "small")
        if which:
            return Question(f"which is {form}, the {one} or the {two}?", one if holds else two, "comparison", mask)
        if holds == wanted:
            text = f"is the {one} {form} than the {two}?"
            return Question(text, "yes" if wanted else "no", "comparison", mask)
    return None


def _place_name(o: SceneObject) -> str | None:
    """ "top left" ... "bottom right" or "center"; None near a boundary between them."""
    dx, dy = o.center[0] - CANVAS / 2, o.center[1] - CANVAS / 2
    if max(abs(dx), abs(dy)) <= 15:
        return "center"
    if min(abs(dx), abs(dy)) < 22:
        return None
    return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"


def _ask_position(scene: Scene, rng: np.random.Generator) -> Question | None:
    targets = _shuffled(scene.objects, rng)
    for target in sorted(targets, key=lambda o: _place_name(o) != "center" or rng.random() < 0.3):
        words = _referent(scene, target, rng)
        place = _place_name(target)
        if words is not None and place is not None:
            template = ("where is the {}?", "in which part of the image is the {}?")[rng.integers(2)]
            return Question(template.format(_phrase(words)), place, "position", target.mask.copy())
    return None


def _noun(o: SceneObject) -> list[str]:
    return ["a", *o.words]


def _ask_description(scene: Scene, rng: np.random.Generator) -> Question | None:
    if len(scene.objects) == 1:
        (only,) = scene.objects
        words = _noun(only)
        return Question(
            "describe the image.", " ".join(words), "description", only.mask.copy(), (only.mask.copy(),) * len(words)
        )
    if len(scene.objects) == 2:
        a, b = scene.objects
        side = _dominant_side(a, b, 1.25)
        if side is None:
            return None
        # Canonical order: left to right, or top to bottom where the objects stand above each other.
        if side in ("right", "below"):
            a, b, side = b, a, {"right": "left", "below": "above"}[side]
        relation = _side_phrase(side).split()
        both = _union((a, b))
        words = [*_noun(a), *relation, *_noun(b)]
        masks = [a.mask.copy()] * 5 + [both] * len(relation) + [b.mask.copy()] * 5
        return Question("describe the image.", " ".join(words), "description", both.copy(), tuple(masks))
    for target in _shuffled(scene.objects, rng):
        referent = _referent(scene, target, rng)
        if referent is not None:
            words = _noun(target)
            text = f"describe the {_phrase(referent)}."
            word_masks = (target.mask.copy(),) * len(words)
            return Question(text, " ".join(words), "description", target.mask.copy(), word_masks)
    return None


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    **{kind: partial(_ask_attribute, kind=kind) for kind in KINDS[:4]},
    "exists": _ask_exists,
    "count": _ask_count,
    "relation": _ask_relation,
    "comparison": _ask_comparison,
    "position": _ask_position,
    "description": _ask_description,
}


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """One question of ``kind`` about ``scene``, or None where the scene allows no unambiguous one.

    Raises:
        ValueError: if ``kind`` is not one of :data:`KINDS`.
    """
    if kind not in _ASKERS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    return _ASKERS[kind](scene, rng)


def generate_questions(
    scene: Scene, rng: np.random.Generator, *, kinds: Sequence[str] = KINDS, per_kind: int = 1
) -> list[Question]:
    """Up to ``per_kind`` different questions of each kind that the scene allows, in the order of ``kinds``."""
    questions: dict[str, Question] = {}
    for kind in kinds:
        for _ in range(per_kind):
            question = ask(scene, kind, rng)
            if question is not None:
                questions.setdefault(question.text, question)
    return list(questions.values())


def held_out(n: int, seed: int = 0) -> Iterator[tuple[Image.Image, Question]]:
    """``n`` pictures with one question each, kinds taken in turn, out of :data:`HELD_OUT_SEEDS`.

    ``seed`` (0 to 999) picks a run of scenes that no other ``seed`` shares as long as n stays below about 500 000.
    """
    yield from _question_stream(n, HELD_OUT_SEEDS.start + seed * 1_000_000)


def validation(n: int, seed: int = 0) -> Iterator[tuple[Image.Image, Question]]:
    """Like :func:`held_out`, out of :data:`VALIDATION_SEEDS` (``seed`` 0 to 99): for decisions made during training."""
    yield from _question_stream(n, VALIDATION_SEEDS.start + seed * 1_000_000)


def _question_stream(n: int, first_seed: int) -> Iterator[tuple[Image.Image, Question]]:
    scene_seed = first_seed
    for index in range(n):
        kind = KINDS[index % len(KINDS)]
        question = None
        while question is None:
            scene = generate_scene(scene_seed)
            question = ask(scene, kind, np.random.default_rng([scene_seed, 1]))
            scene_seed += 1
        yield scene.image, question
