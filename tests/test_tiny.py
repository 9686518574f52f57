"""The shipped LVLM: its scenes and questions, its packing, its training and its weights."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from lvlm_fastxai.tiny import SAMPLE_IMAGE, SAMPLE_QUESTION, WEIGHTS, load_tiny_lvlm, scenes
from lvlm_fastxai.tiny.scenes import COLORS, KINDS, SHAPES, SIZES, TEXTURES, Question, Scene, SceneObject

SEEDS = range(120)
NAMES = {
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(COLORS, "color"),
    **dict.fromkeys(TEXTURES, "texture"),
    **dict.fromkeys(SIZES, "size"),
}


def asked(seed: int) -> tuple[Scene, list[Question]]:
    scene = scenes.generate_scene(seed)
    return scene, scenes.generate_questions(scene, np.random.default_rng(seed), per_kind=2)


@pytest.fixture(scope="module")
def everything() -> list[tuple[Scene, list[Question]]]:
    return [asked(seed) for seed in SEEDS]


# Scenes


def test_import_is_light():
    code = "import sys, lvlm_fastxai.tiny; print({'torch', 'transformers', 'easy_vqa'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize("seed", [0, 17, scenes.HELD_OUT_SEEDS.start])
def test_same_seed_same_scene_and_questions(seed):
    (one, first), (two, second) = asked(seed), asked(seed)
    assert one.image.tobytes() == two.image.tobytes()
    assert [(q.text, q.answer) for q in first] == [(q.text, q.answer) for q in second]


def test_seed_ranges_do_not_meet(monkeypatch):
    ranges = sorted((r.start, r.stop) for r in (scenes.TRAIN_SEEDS, scenes.VALIDATION_SEEDS, scenes.HELD_OUT_SEEDS))
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ranges))
    drawn = []
    generate = scenes.generate_scene
    monkeypatch.setattr(scenes, "generate_scene", lambda seed: drawn.append(seed) or generate(seed))
    questions = [question for _, question in scenes.held_out(20, seed=3)]
    assert [q.kind for q in questions] == [*KINDS, *KINDS]
    assert drawn and all(seed in scenes.HELD_OUT_SEEDS for seed in drawn)


def test_arguments_are_checked():
    for arguments in ({"num_objects": 5}, {"difficulty": "impossible"}):
        with pytest.raises(ValueError, match="must be"):
            scenes.generate_scene(0, **arguments)
    with pytest.raises(ValueError, match="kind must be"):
        scenes.ask(scenes.generate_scene(0), "smell", np.random.default_rng(0))


def test_objects_are_where_their_masks_say(everything):
    for scene, _ in everything:
        pixels = np.asarray(scene.image).astype(float)
        assert np.sum([o.mask for o in scene.objects], axis=0).max() == 1
        for o in scene.objects:
            rows, columns = np.nonzero(o.mask)
            assert np.hypot(columns + 0.5 - o.center[0], rows + 0.5 - o.center[1]).max() <= o.radius * 1.15 + 1.5
            assert (o.radius < 25) == (o.size == "small")
            if o.texture == "solid" and scene.difficulty != "low contrast":
                assert np.abs(np.median(pixels[o.mask], axis=0) - COLORS[o.color]).max() < 20


def test_hard_scenes_are_a_minority_and_all_kinds_occur():
    levels = Counter(scenes.generate_scene(seed).difficulty for seed in range(400))
    assert set(levels) == set(scenes.DIFFICULTIES)
    assert 0.06 < 1 - levels["plain"] / 400 < 0.2


# Questions: answered again by a reader of the text that shares no code with the generator


def found(scene: Scene, phrase: str) -> list[SceneObject]:
    return matching(scene, {NAMES[word]: word for word in phrase.split() if word in NAMES})


def matching(scene: Scene, words: dict[str, str]) -> list[SceneObject]:
    return [o for o in scene.objects if all(getattr(o, name) == word for name, word in words.items())]


def only(scene: Scene, phrase: str) -> SceneObject:
    (match,) = found(scene, phrase)
    return match


def side_holds(a: SceneObject, side: str, b: SceneObject) -> bool:
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    return {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}[side]


def noun(o: SceneObject) -> str:
    return f"a {o.size} {o.color} {o.texture} {o.shape}"


def solve(scene: Scene, question: Question) -> tuple[str, list[SceneObject]]:
    """The answer, and the objects that decide it."""
    text = question.text.rstrip("?.")
    if question.kind in ("color", "shape", "texture", "size"):
        o = only(scene, text.replace("small or large", "").split(" the ", 1)[-1].replace(f"{question.kind} of", ""))
        return getattr(o, question.kind), [o]
    if question.kind == "exists":
        matches = found(scene, text)
        return "yes" if matches else "no", matches
    if question.kind == "count":
        matches = found(scene, re.sub(r"(\w+[^s])s\b", r"\1", text.replace("crosses", "cross")))
        return str(len(matches)), matches
    if question.kind == "relation":
        if match := re.fullmatch(r"on which side of the (.+) is the (.+)", text):
            b, a = only(scene, match[1]), only(scene, match[2])
            assert side_holds(a, question.answer, b)
            return question.answer, [a, b]
        match = re.fullmatch(r"is the (.+?) (left of|right of|above|below) the (.+)", text)
        a, b = only(scene, match[1]), only(scene, match[3])
        return "yes" if side_holds(a, match[2].split()[0], b) else "no", [a, b]
    if question.kind == "comparison":
        if match := re.fullmatch(r"do the (.+) and the (.+) have the same (\w+)", text):
            a, b = only(scene, match[1]), only(scene, match[2])
            return "yes" if getattr(a, match[3]) == getattr(b, match[3]) else "no", [a, b]
        if match := re.fullmatch(r"which is (larger|smaller), the (.+) or the (.+)", text):
            a, b = only(scene, match[2]), only(scene, match[3])
            return match[2] if (a.radius > b.radius) == (match[1] == "larger") else match[3], [a, b]
        match = re.fullmatch(r"is the (.+) (larger|smaller) than the (.+)", text)
        a, b = only(scene, match[1]), only(scene, match[3])
        return "yes" if (a.radius > b.radius) == (match[2] == "larger") else "no", [a, b]
    if question.kind == "position":
        o = only(scene, text.split(" is the ")[1])
        dx, dy = o.center[0] - scenes.CANVAS / 2, o.center[1] - scenes.CANVAS / 2
        corner = f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"
        return "center" if max(abs(dx), abs(dy)) < 20 else corner, [o]
    assert question.kind == "description"
    if text != "describe the image":
        o = only(scene, text)
        return noun(o), [o]
    if len(scene.objects) == 1:
        return noun(scene.objects[0]), list(scene.objects)
    a, b = scene.objects
    axis = int(abs(a.center[1] - b.center[1]) > abs(a.center[0] - b.center[0]))
    a, b = sorted((a, b), key=lambda o: o.center[axis])
    return f"{noun(a)} {('left of', 'above')[axis]} {noun(b)}", [a, b]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_masks_recomputed(everything, kind):
    checked = 0
    for scene, questions in everything:
        for question in (q for q in questions if q.kind == kind):
            answer, deciding = solve(scene, question)
            assert answer == question.answer, question.text
            expected = np.any([o.mask for o in deciding], axis=0) if deciding else np.zeros_like(question.mask)
            assert question.mask.dtype == bool and np.array_equal(question.mask, expected), question.text
            checked += 1
    assert checked >= 60


def test_word_masks_of_descriptions(everything):
    for scene, questions in everything:
        for question in questions:
            if question.kind != "description":
                assert question.word_masks is None
                continue
            words = question.answer.split()
            assert len(question.word_masks) == len(words)
            for word, mask in zip(words, question.word_masks, strict=True):
                owners = [o for o in scene.objects if np.array_equal(o.mask, mask)]
                if word in NAMES:
                    assert getattr(owners[0], NAMES[word]) == word
                elif word != "a":
                    assert not owners and np.array_equal(mask, question.mask)


def test_answers_are_balanced():
    answers = {kind: Counter() for kind in KINDS}
    for seed in range(400):
        for question in asked(seed)[1]:
            answers[question.kind][question.answer] += 1
    for kind in ("exists", "relation", "comparison"):
        yes, no = answers[kind]["yes"], answers[kind]["no"]
        assert 0.42 < yes / (yes + no) < 0.58, kind
    for kind, ceiling in (("color", 0.2), ("shape", 0.25), ("texture", 0.35), ("count", 0.32), ("position", 0.3)):
        counts = answers[kind]
        assert counts.most_common(1)[0][1] / counts.total() < ceiling, (kind, counts)
    assert set(answers["count"]) == set("01234")
    assert set(answers["position"]) == {"top left", "top right", "bottom left", "bottom right", "center"}


# Vocabulary, prompt and packing


@pytest.fixture(scope="module")
def untrained():
    pytest.importorskip("transformers")
    from lvlm_fastxai.tiny.model import build_model, build_processor

    return build_model(0).eval(), build_processor()


def test_every_word_is_known_and_round_trips(everything, untrained):
    _, processor = untrained
    tokenizer = processor.tokenizer
    for _, questions in everything:
        for question in questions:
            assert tokenizer.unk_token_id not in tokenizer(question.text)["input_ids"], question.text
            assert tokenizer.decode(tokenizer(question.answer)["input_ids"]) == question.answer


def test_easy_vqa_words_are_known_and_labels_agree(untrained):
    pytest.importorskip("easy_vqa")
    from lvlm_fastxai.tiny import data

    tokenizer = untrained[1].tokenizer
    pictures = list(data.easy_vqa("train"))
    assert len(pictures) == 4000 and sum(len(questions) for _, questions in pictures) == 38575
    texts = {f"{q.text} {q.answer}" for _, questions in pictures for q in questions}
    assert all(tokenizer.unk_token_id not in tokenizer(text)["input_ids"] for text in texts)
    for _, questions in pictures[:200]:
        words = data._easy_vqa_words(questions)
        for question in questions:
            if question.kind == "easy-vqa color":
                assert words["color"] == question.answer
            if question.kind == "easy-vqa shape":
                assert words["shape"] == question.answer


def test_processor_sees_what_training_saw(untrained):
    from lvlm_fastxai.tiny.data import GRID, resize
    from lvlm_fastxai.tiny.model import chat
    from lvlm_fastxai.tiny.packing import normalize, prefix_ids

    _, processor = untrained
    image = scenes.generate_scene(5).image
    prompt = processor.apply_chat_template(chat("What color is the star?"), add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    assert (inputs["pixel_values"] - normalize(resize(image)[None])).abs().max() < 1e-5
    ids = inputs["input_ids"][0].tolist()
    assert ids[: len(prefix_ids())] == prefix_ids() and ids.count(processor.image_token_id) == GRID * GRID
    assert processor.tokenizer.decode(ids[len(prefix_ids()) :]) == "what color is the star ? <assistant>"


def small_pool(count: int):
    from lvlm_fastxai.tiny.data import GRID, LABEL_NAMES, Asked, Pool, resize

    images, questions = [], []
    for seed in range(count):
        scene, rows = asked(seed)
        images.append(resize(scene.image))
        questions.append([Asked(q.text, q.answer, q.kind) for q in rows])
    empty = np.zeros((count, GRID, GRID, len(LABEL_NAMES)), dtype=np.uint8)
    return Pool(np.stack(images), empty, empty[..., :2].astype(np.int8), empty[..., 0], questions)


def test_packed_logits_are_those_of_single_questions(untrained):
    import torch

    from lvlm_fastxai.tiny.packing import answer_logits, normalize, pack, prefix_ids, tokenize

    model, _ = untrained
    pool = small_pool(2)
    table = tokenize(pool)
    with torch.inference_mode():
        packed = pack([(table, np.arange(table.first[row], table.first[row + 1])) for row in range(2)])
        logits, _, _ = answer_logits(model, normalize(pool.images), packed)
        at = 0
        for row in range(2):
            for q in range(table.first[row], table.first[row + 1]):
                block = table.tokens[table.start[q] : table.start[q] + table.length[q]]
                single = model(
                    input_ids=torch.tensor([[*prefix_ids(), *block]]),
                    pixel_values=normalize(pool.images[row : row + 1]),
                ).logits[0]
                expected = single[len(prefix_ids()) + table.answer_start[q] - 1 : -1]
                torch.testing.assert_close(logits[at : at + len(expected)], expected, rtol=1e-4, atol=1e-5)
                at += len(expected)
        assert at == len(logits)


def test_patch_labels_follow_the_objects():
    from lvlm_fastxai.tiny.data import GRID, LABEL_NAMES, LABEL_VALUES, patch_labels

    scene = scenes.generate_scene(3, num_objects=3, difficulty="plain")
    words = [{name: getattr(o, name) for name in LABEL_NAMES[1:]} for o in scene.objects]
    masks, centers = np.stack([o.mask for o in scene.objects]), np.array([o.center for o in scene.objects])
    labels, offsets, flags = patch_labels(masks, centers, words)
    side = scenes.CANVAS // GRID
    assert flags.sum() == 3
    for row in range(GRID):
        for column in range(GRID):
            inside = masks[:, row * side : (row + 1) * side, column * side : (column + 1) * side].mean((1, 2))
            owner = inside.argmax()
            if inside[owner] > 0.5:
                assert labels[row, column, 0] == 1
                for position, name in enumerate(LABEL_NAMES[1:], start=1):
                    assert LABEL_VALUES[name][labels[row, column, position]] == words[owner][name]
                middle = np.array([column + 0.5, row + 0.5]) * side
                assert np.abs(middle + offsets[row, column] - centers[owner]).max() <= 0.51
            elif inside.sum() == 0:
                assert labels[row, column, 0] == 0


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A rendered pool and the scenes it was rendered from."""
    from lvlm_fastxai.tiny.data import load_pool, render_pool

    folder = tmp_path_factory.mktemp("pool")
    render_pool(folder, num_scenes=60, seed=0, workers=1)
    return load_pool(folder), [scenes.generate_scene(seed) for seed in range(60)]


def test_objects_are_read_off_the_patch_labels(rendered):
    from lvlm_fastxai.tiny.data import LABEL_NAMES, LABEL_VALUES, objects_of

    pool, pictures = rendered
    for row, scene in enumerate(pictures):
        values, centers = objects_of(pool, row)
        assert len(values) == len(scene.objects)
        found = {
            tuple(LABEL_VALUES[name][v] for name, v in zip(LABEL_NAMES[1:], value, strict=True)): center
            for value, center in zip(values, centers, strict=True)
        }
        for o in scene.objects:
            # Offsets are stored in whole pixels.
            assert np.abs(found[tuple(o.attribute(name) for name in LABEL_NAMES[1:])] - o.center).max() <= 0.51


def test_noun_phrases_are_found_with_what_they_speak_of(rendered):
    """Against the scene's own matching of words; a question about places or two objects names one object a phrase."""
    from lvlm_fastxai.tiny.model import vocabulary
    from lvlm_fastxai.tiny.packing import pack, tokenize
    from lvlm_fastxai.tiny.phrases import ATTRIBUTES, phrase_targets, phrases

    pool, pictures = rendered
    table, words = tokenize(pool), {index: word for word, index in vocabulary().items()}
    chosen = [np.arange(table.first[row], table.first[row + 1]) for row in range(len(pool))]
    packed = pack([(table, questions) for questions in chosen])
    entries = [(pool, row, table, questions) for row, questions in enumerate(chosen)]
    entries[3] = None  # a picture of easy-VQA, whose objects are not known
    targets = phrase_targets(packed, entries)
    flat, at, ambiguous = packed.input_ids.flatten(), 0, 0
    for row, scene in enumerate(pictures):
        for q in chosen[row] if entries[row] else ():
            start = int(table.start[q])
            block = table.tokens[start : start + int(table.answer_start[q])].tolist()
            for end, _ in phrases(block):
                noun = words[block[end]]
                assert flat[targets.rows[at]] == block[end]
                spoken = {NAMES[w]: w for w in words_before(words, block, end)}
                singular = {f"{shape}s": shape for shape in SHAPES} | {"crosses": "cross"}
                if noun not in ("object", "objects"):
                    spoken["shape"] = singular.get(noun, noun)
                fitting = matching(scene, spoken)
                assert targets.count[at] == min(len(fitting), 4)
                assert targets.known[at] == (len(fitting) == 1)
                if len(fitting) == 1:
                    expected = [NAMES_OF[name].index(fitting[0].attribute(name)) for name in ATTRIBUTES]
                    assert targets.values[at].tolist() == expected
                    place = (np.array(fitting[0].center) - scenes.CANVAS / 2) / 32
                    assert np.abs(targets.places[at].numpy() - place).max() <= 0.02
                elif KINDS[table.kind[q]] in ("relation", "comparison", "position"):
                    ambiguous += 1
                at += 1
    assert at == len(targets.rows) > 500 and ambiguous == 0


NAMES_OF = {"shape": SHAPES, "color": tuple(COLORS), "texture": TEXTURES, "size": SIZES}


def words_before(words: dict[int, str], block: list[int], end: int) -> list[str]:
    """Adjectives right before the noun at ``end``."""
    found = []
    while end > 0 and NAMES.get(words[block[end - 1]], "shape") != "shape":
        end -= 1
        found.append(words[block[end]])
    return found


def test_more_questions_are_true_and_new(rendered, tmp_path):
    from dataclasses import replace

    from lvlm_fastxai.tiny.data import add_questions

    pool, pictures = rendered
    more = replace(pool, questions=[list(rows) for rows in pool.questions])
    options = {"seed": 0, "workers": 1, "cache": tmp_path / "more.json"}
    add_questions(more, "comparison", 4, **options)
    added = 0
    for before, after, scene in zip(pool.questions, more.questions, pictures, strict=True):
        assert after[: len(before)] == before
        assert len({q.text for q in after}) == len(after)
        for question in after[len(before) :]:
            added += 1
            assert question.kind == "comparison" and len(scene.objects) > 1
            same = re.fullmatch(r"do the (.*) and the (.*) have the same (\w+)\?", question.text)
            if same:
                one, two = (described(scene, phrase) for phrase in same.groups()[:2])
                truth = one.attribute(same[3]) == two.attribute(same[3])
                assert question.answer == ("yes" if truth else "no")
    assert added > 60
    again = replace(pool, questions=[list(rows) for rows in pool.questions])
    add_questions(again, "comparison", 4, **options)
    assert again.questions == more.questions


def described(scene: Scene, phrase: str) -> SceneObject:
    """The one object that a noun phrase names."""
    (found,) = matching(scene, {NAMES[word]: word for word in phrase.split() if word != "object"})
    return found


def test_guessing_learns_the_most_frequent_answer():
    from lvlm_fastxai.tiny.accuracy import prior, prior_accuracy
    from lvlm_fastxai.tiny.data import Asked

    seen = [Asked("is there a star?", answer, "exists") for answer in ("yes", "no", "no")]
    pool = small_pool(1)
    pool.questions = [[Asked("is there a star?", "no", "exists"), Asked("is there a cross?", "yes", "exists")]]
    assert prior_accuracy(prior(seen), pool) == {"exists": (1, 2)}


def test_training_runs_resumes_and_records(tmp_path):
    pytest.importorskip("transformers")
    from lvlm_fastxai.tiny.train import Settings, train

    settings = {"scenes": 16, "vision_batch": 4, "batch": 4, "parts": 2, "validate_every": 2, "validation_scenes": 4}
    arguments = {"threads": 1, "use_easy_vqa": False}
    output = tmp_path / "output"
    assert train(Settings(**settings, vision_steps=2, steps=2), tmp_path, output, resume=False, **arguments)
    assert train(Settings(**settings, vision_steps=2, steps=4), tmp_path, output, resume=True, **arguments)
    record = json.loads((output / "training.json").read_text())
    assert record["steps"] == 4 and [row["step"] for row in record["validation"]] == [2, 4]
    model, processor = load_tiny_lvlm(output)
    assert not model.training and next(model.parameters()).dtype.is_floating_point
    assert processor.image_token == "<image>"


# The shipped weights

needs_weights = pytest.mark.skipif(not (WEIGHTS / "training.json").is_file(), reason="no weights are packaged")


@pytest.fixture(scope="module")
def shipped():
    return load_tiny_lvlm()


@needs_weights
def test_shipped_model_is_what_it_says(shipped):
    import torch

    model, processor = shipped
    assert type(model).__name__ == "LlavaForConditionalGeneration" and type(processor).__name__ == "LlavaProcessor"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    text = model.config.text_config
    assert text.num_attention_heads > text.num_key_value_heads > 1
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) <= 8_000_000
    assert (
        sum(p.numel() for p in model.parameters()) == json.loads((WEIGHTS / "training.json").read_text())["parameters"]
    )


@needs_weights
def test_generate_agrees_with_packed_scoring(shipped):
    from lvlm_fastxai.tiny.accuracy import packed_accuracy
    from lvlm_fastxai.tiny.model import answer
    from lvlm_fastxai.tiny.packing import tokenize

    model, processor = shipped
    pool = small_pool(2)
    generated = Counter()
    for seed in range(2):
        scene, questions = asked(seed)
        for question in questions:
            generated[question.kind] += answer(model, processor, scene.image, question.text) == question.answer
    scored = packed_accuracy(model, pool, tokenize(pool))
    assert {kind: right for kind, (right, _) in scored.items()} == {kind: generated[kind] for kind in scored}


@needs_weights
def test_recorded_accuracy_is_reproduced(shipped):
    from lvlm_fastxai.tiny.accuracy import held_out_pool, packed_accuracy
    from lvlm_fastxai.tiny.packing import tokenize

    recorded = json.loads((WEIGHTS / "training.json").read_text())["held_out_subset"]
    pool = held_out_pool(recorded["questions"])
    right = sum(count for count, _ in packed_accuracy(shipped[0], pool, tokenize(pool)).values())
    # Another machine's rounding may tip an answer that hangs in the balance.
    assert abs(right - recorded["right"]) <= 2


@needs_weights
def test_sample_is_answered(shipped):
    from PIL import Image

    from lvlm_fastxai.tiny.model import answer

    with Image.open(SAMPLE_IMAGE) as image:
        assert len(answer(*shipped, image.convert("RGB"), SAMPLE_QUESTION).split()) >= 5


def test_missing_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="reinstall"):
        load_tiny_lvlm(tmp_path)


@needs_weights
def test_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(WEIGHTS, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "post_layernorm" not in k}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights of Llava.*post_layernorm"):
        load_tiny_lvlm(tmp_path)
