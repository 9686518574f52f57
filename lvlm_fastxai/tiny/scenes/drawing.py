"""Paint a scene from its seed, with numpy and Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from .scene import BACKGROUNDS, CANVAS, COLORS, DIFFICULTIES, SHAPES, TEXTURES, Scene, SceneObject

# Radii in pixels. The gap between the two sizes is what makes "small" and "large" unambiguous.
_RADIUS = {"small": (17.0, 23.0), "large": (35.0, 45.0)}
_TINY_RADIUS = (12.0, 15.0)
_HARD_SHARE = 0.12
_LOW_CONTRAST = 0.4
_OBJECT_COUNT_WEIGHTS = (0.16, 0.32, 0.26, 0.26)
_MIN_VISIBLE = 0.6


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
        difficulty: one of `DIFFICULTIES`; when None, 12 % of the seeds give one of the hard ones.

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
    """A scene drawn from ``rng``; None where its objects do not fit, or hide too much of each other."""
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
    for words, radius, center, color in zip(attributes, radii, centers, colors, strict=True):
        mask = _paint(canvas, words, center, radius, color, rng)
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


def _paint(
    canvas: np.ndarray,
    words: dict[str, str],
    center: tuple[float, float],
    radius: float,
    color: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Paint one object over ``canvas`` (H, W, 3) in place; returns the pixels it covers, (H, W) bool."""
    x, y = center
    side = 2 * math.ceil(radius) + 4
    left, top = max(0, round(x) - side // 2), max(0, round(y) - side // 2)
    corners = _polygon(words["shape"], rng) * radius
    outer = _coverage(corners + np.array([x, y]), left, top, side)
    # The rim keeps the main colour, so that the outline shows even where the second colour is the background's.
    inner = _coverage(corners * (1 - 2.2 / radius) + np.array([x, y]), left, top, side)
    ys, xs = np.mgrid[top : top + side, left : left + side].astype(np.float32)
    second = (inner * _pattern(words["texture"], radius, xs - x, ys - y, rng))[..., None]
    paint = color * (1 - second) + _second_color(color) * second
    height, width = canvas[top : top + side, left : left + side].shape[:2]
    alpha = outer[:height, :width, None]
    region = canvas[top : top + height, left : left + width]
    canvas[top : top + height, left : left + width] = region * (1 - alpha) + paint[:height, :width] * alpha
    mask = np.zeros((CANVAS, CANVAS), dtype=bool)
    mask[top : top + height, left : left + width] = alpha[..., 0] > 0.5
    return mask
