"""Questions about a scene, each with its one right answer and the pixels that decide it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from .scene import CANVAS, COLORS, KINDS, SHAPES, SIZES, TEXTURES, Question, Scene, SceneObject

T = TypeVar("T")

# Two centres must differ by this much along an axis before a question may be asked about that axis.
_RELATION_MARGIN = 22.0

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


def _shuffled(items: Sequence[T], rng: np.random.Generator) -> list[T]:
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
        ValueError: if ``kind`` is not one of `KINDS`.
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
