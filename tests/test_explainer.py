"""The explainer end to end on a random tiny LVLM: answers, maps, scores, cost, and what bad input does."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.models import ANSWER, IMAGE, SEQUENCE_KEYS, VIDEO, VISION_NAMES, build
from torch.utils.flop_counter import FlopCounterMode

from lvlm_fastxai import Explainer, families, relevancy_rows
from lvlm_fastxai.errors import ArgumentError, BackendUnavailableError, FastXAIError, UnsupportedModelError
from lvlm_fastxai.explain.cost import estimate_cost
from lvlm_fastxai.explain.relevancy_rows import explain_rows
from lvlm_fastxai.ops import use_backend
from lvlm_fastxai.prompting.answers import end_tokens, generate
from lvlm_fastxai.prompting.inputs import accepted
from lvlm_fastxai.prompting.joining import join
from lvlm_fastxai.sweep.recording import Recorder
from lvlm_fastxai.tiny.model import build_model, build_processor

QUESTION = "what color is the small circle?"


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_processor()


@pytest.fixture
def model() -> Any:
    model = build_model(0)
    # transformers hangs hooks of its own on the vision tower in the first forward, whoever calls it.
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, *[4] * 144, 6]]), pixel_values=torch.zeros(1, 3, 96, 96))
    return model


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def state(model: torch.nn.Module) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "dtype": [parameter.dtype for parameter in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "attention": [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
        "generation": model.generation_config.to_dict(),
        "sum": sum(float(parameter.detach().double().sum()) for parameter in model.parameters()),
    }


def test_maps_and_scores_are_the_relevancy_rows(model, processor, picture):
    explainer = Explainer(model, processor)
    explanation = explainer(picture, QUESTION, max_new_tokens=4)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    inputs = dict(processor(images=picture, text=prompt, return_tensors="pt", add_special_tokens=False))
    start = inputs["input_ids"].shape[1]
    with Recorder(model) as recorder, torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    recording, _ = recorder.recording()
    answer = output[0, start:].tolist()
    assert [token.token_id for token in explanation.tokens] == answer
    assert (
        explanation.answer
        == processor.tokenizer.decode(answer)
        == explainer.answer(picture, QUESTION, max_new_tokens=4)
    )
    assert "".join(token.text for token in explanation.tokens).strip() == explanation.answer

    inputs["input_ids"] = output
    inputs["attention_mask"] = torch.ones_like(output)
    targets = [(0, start + i - 1, token) for i, token in enumerate(answer)]
    # What `generate` has read: all but the last token, which no row depends on.
    read = {name: value[:, :-1] if name != "pixel_values" else value for name, value in inputs.items()}
    rows = explain_rows(model, read, targets, recording=recording).rows
    own_forward = relevancy_rows(model, inputs, targets)
    torch.testing.assert_close(rows, own_forward[:, :-1], rtol=1e-4, atol=1e-7)
    logits = model(**inputs).logits[0].detach().softmax(-1)
    (layout,) = families.image_layouts(model.config, inputs)
    columns = families.prompt_columns(model.config, inputs, 0, start)
    for index, (token, row) in enumerate(zip(explanation.tokens, rows, strict=True)):
        assert token.image_map.dtype == token.prompt_scores.dtype == np.float32
        np.testing.assert_array_equal(token.image_map, layout.read(row).numpy())
        np.testing.assert_array_equal(token.prompt_scores, row[columns].numpy())
        assert token.probability == pytest.approx(float(logits[start + index - 1, token.token_id]), rel=1e-4)
        others = float(row.sum()) - float(row[token.position - 1])
        assert sum(token.shares.values()) == pytest.approx(others, rel=1e-3, abs=1e-5)
    maps = [token.image_map for token in explanation.tokens]
    np.testing.assert_allclose(explanation.image_map, np.mean(maps, axis=0), rtol=1e-6)
    assert len(explanation.prompt_scores) == len(explanation.prompt_tokens)
    probabilities = [token.probability for token in explanation.tokens]
    assert explanation.confidence == pytest.approx(float(np.prod(probabilities)) ** (1 / 4))
    assert explanation.backend in ("cpu", "reference")
    assert explanation.peak_bytes is None or explanation.peak_bytes >= 0


def test_question_words_are_found_in_the_prompt(model, processor, picture):
    tokens = Explainer(model, processor)(picture, "What color\nis the Circle?", max_new_tokens=1).prompt_tokens
    assert [token.text.strip() for token in tokens if token.in_question] == [
        "what",
        "color",
        "is",
        "the",
        "circle",
        "?",
    ]
    assert [token.text.strip() for token in tokens if not token.in_question] == ["<bos>", "<user>", "<assistant>"]


@pytest.mark.parametrize("method", ["lvlm_interpret", "raw_attention"])
@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_every_method_explains(model, processor, picture, method, memory):
    explanation = Explainer(model, processor, method=method, memory=memory)(picture, QUESTION, max_new_tokens=3)
    assert explanation.method == method and explanation.memory == memory
    assert np.isfinite(explanation.image_map).all() and explanation.image_map.max() > 0


def make_say(model: Any, monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """While it generates, the model's logits are highest at these tokens, one after the other."""
    generate = model.generate

    def forced(**settings: Any) -> Any:
        answer = iter(ids)
        handle = model.lm_head.register_forward_hook(
            lambda module, args, logits: logits.index_fill(-1, torch.tensor([next(answer)]), 1e4)
        )
        try:
            return generate(**settings)
        finally:
            handle.remove()

    monkeypatch.setattr(model, "generate", forced)


def test_end_of_sequence_and_special_tokens_are_not_explained(model, processor, picture, monkeypatch):
    ids = processor.tokenizer.convert_tokens_to_ids(["red", "<user>", "circle", "<eos>"])
    explainer = Explainer(model, processor)
    make_say(model, monkeypatch, ids)
    explanation = explainer(picture, QUESTION, max_new_tokens=8)
    assert [token.text.strip() for token in explanation.tokens] == ["red", "circle"]
    assert explanation.answer == "red circle"
    # <user> stays in the teacher-forced sequence, <eos> does not.
    assert explanation.sequence_length == explanation.prompt_length + 3
    assert [token.position - explanation.prompt_length for token in explanation.tokens] == [0, 2]
    assert not explanation.notes
    monkeypatch.undo()
    make_say(model, monkeypatch, ids[-1:])
    with pytest.raises(FastXAIError, match="answered with nothing"):
        explainer(picture, QUESTION)


@pytest.mark.parametrize("name", VISION_NAMES)
def test_teacher_forcing_repeats_what_was_generated(name):
    """Every per-position input of every family is extended so that the joined pass gives generation's own choices."""
    model, inputs = build(name)
    prompt = {k: v[:, :-ANSWER] if k in SEQUENCE_KEYS else v for k, v in inputs.items()}
    start = prompt["input_ids"].shape[1]
    (found,) = generate(model, prompt, 5, ends=end_tokens(model))
    answer = found.token_ids
    joined = join(model.config, prompt, [answer])
    assert {joined[key].shape for key in SEQUENCE_KEYS if key in joined} == {(1, start + 5)}
    logits = model(**accepted(model, joined)).logits[0].index_fill(-1, torch.tensor([IMAGE, VIDEO]), -torch.inf)
    assert logits[start - 1 : -1].argmax(-1).tolist() == answer


def test_every_form_of_picture(model, processor, picture, tmp_path):
    explainer = Explainer(model, processor)
    picture.save(tmp_path / "picture.png")
    expected = explainer(picture, QUESTION, max_new_tokens=1)
    pixels = np.asarray(picture)
    for given in (str(tmp_path / "picture.png"), tmp_path / "picture.png", pixels, pixels / 255, torch.tensor(pixels)):
        found = explainer(given, QUESTION, max_new_tokens=1)
        np.testing.assert_array_equal(found.image_map, expected.image_map)
    for given in (picture.convert("L"), pixels[..., 0], pixels[..., :1], picture.convert("RGBA"), picture.convert("P")):
        assert explainer(given, QUESTION, max_new_tokens=1).images[0].picture.mode == "RGB"


def test_transparent_is_white_and_turned_pictures_stand_upright(model, processor, tmp_path):
    explainer = Explainer(model, processor)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert explainer(clear, QUESTION, max_new_tokens=1).images[0].picture.getpixel((4, 4)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert explainer(tmp_path / "turned.jpg", QUESTION, max_new_tokens=1).images[0].picture.size == (20, 40)


def test_several_pictures_have_a_map_each(model, processor, picture):
    explanation = Explainer(model, processor)([picture, picture.rotate(180)], QUESTION, max_new_tokens=2)
    assert len(explanation.image_maps) == len(explanation.images) == len(explanation.tokens[0].image_maps) == 2
    np.testing.assert_array_equal(explanation.image_map, explanation.image_maps[0])
    assert not np.array_equal(*explanation.image_maps)


def test_map_lies_on_the_part_that_the_processor_kept(model, picture):
    processor = build_processor()
    processor.image_processor.do_center_crop = True
    processor.image_processor.size = {"shortest_edge": 96}
    region = Explainer(model, processor)(picture, QUESTION, max_new_tokens=1).images[0].region
    assert region == pytest.approx((16, 0, 80, 64))


def test_json_reads_back_bit_for_bit(model, processor, picture, tmp_path):
    explanation = Explainer(model, processor)(picture, QUESTION, max_new_tokens=2)
    paths = explanation.save(tmp_path / "new" / "folder")
    read = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert read == json.loads(json.dumps(explanation.to_dict()))
    for token, stored in zip(explanation.tokens, read["tokens"], strict=True):
        np.testing.assert_array_equal(np.array(stored["image_maps"][0], np.float32), token.image_map)
        np.testing.assert_array_equal(np.array(stored["prompt_scores"], np.float32), token.prompt_scores)
    assert read["answer"] == explanation.answer and read["schema"].endswith("/1")


def test_unknown_family_gives_rows_and_says_what_is_missing(model, processor, picture, monkeypatch):
    known = dict(families.known())
    del known["llava"]
    monkeypatch.setattr(families, "known", lambda: known)
    explanation = Explainer(model, processor)(picture, QUESTION, max_new_tokens=1)
    assert explanation.image_maps == [] and len(explanation.prompt_scores) == len(explanation.prompt_tokens)
    assert any("image grid" in note for note in explanation.notes)
    with pytest.raises(ArgumentError, match="no known patch grid"):
        _ = explanation.image_map
    assert "<html" in explanation._repr_html_() or "&lt;html" in explanation._repr_html_()


def test_model_is_left_as_it_was(model, processor, picture):
    model.train()
    model.model.vision_tower.eval()
    model.lm_head.weight.requires_grad_(False)
    before = state(model)
    Explainer(model, processor)(picture, QUESTION, max_new_tokens=2)
    assert state(model) == before


@pytest.mark.parametrize("stage", ["generate", "explain"])
def test_interrupted_run_leaves_the_model_as_it_was(model, processor, picture, stage):
    model.train()
    before = state(model)

    def interrupt(module: Any, args: Any) -> None:
        if torch.is_grad_enabled() == (stage == "explain"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    handle = model.model.language_model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        Explainer(model, processor)(picture, QUESTION, max_new_tokens=2)
    handle.remove()
    assert state(model) == before


@pytest.mark.parametrize(
    ("image", "question", "message"),
    [
        ("absent.png", QUESTION, "no file 'absent.png'"),
        (__file__, QUESTION, "as a picture"),
        (str(Path(__file__).parent), QUESTION, "Is a directory"),
        (np.zeros((3, 8, 8), np.uint8), QUESTION, "expected a path"),
        (np.full((8, 8, 3), 2.0), QUESTION, "outside 0"),
        (np.full((8, 8, 3), np.nan), QUESTION, "outside 0"),
        (np.zeros((0, 8, 3), np.uint8), QUESTION, "empty"),
        (None, QUESTION, "expected a path"),
        ([], QUESTION, "at least one picture"),
        ("fine", "", "empty question"),
        ("fine", " \n", "empty question"),
        ("fine", None, "empty question"),
        ("fine", "what is <image>?", "image marker"),
    ],
)
def test_bad_input_is_told_in_one_line(model, processor, picture, image, question, message):
    before = state(model)
    explainer = Explainer(model, processor)
    for call in (explainer, explainer.answer, explainer.estimate):
        with pytest.raises(ArgumentError, match=message) as caught:
            call(picture if isinstance(image, str) and image == "fine" else image, question)
        assert "\n" not in str(caught.value)
    assert state(model) == before


def test_truncated_picture(model, processor, picture, tmp_path):
    path = tmp_path / "cut.png"
    picture.save(path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ArgumentError, match="as a picture"):
        Explainer(model, processor)(path, QUESTION)


def test_bad_settings(model, processor, picture):
    for settings, message in (
        ({"method": "lime"}, "method"),
        ({"memory": "none"}, "memory"),
        ({"row_tolerance": 1.5}, "row_tolerance"),
        ({"prompt_template": "{question}"}, "prompt_template"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Explainer(model, processor, **settings)
    with pytest.raises(ArgumentError, match="processor"):
        Explainer(model, processor.tokenizer)
    with pytest.raises(ArgumentError, match="max_new_tokens"):
        Explainer(model, processor)(picture, QUESTION, max_new_tokens=0)
    language, _ = build("llama", torch.float32)
    with pytest.raises(ArgumentError, match="reads no images"):
        Explainer(language, processor)
    with pytest.raises(UnsupportedModelError):
        Explainer(torch.nn.Linear(2, 2), processor)


def test_prompt_without_the_image(model, picture):
    processor = build_processor()
    processor.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    with pytest.raises(ArgumentError, match=r"no image token|cannot prepare"):
        Explainer(model, processor)(picture, QUESTION)


def test_prompt_template_stands_in_for_a_chat_template(model, picture):
    processor = build_processor()
    processor.chat_template = None
    plain = Explainer(model, processor)(picture, QUESTION, max_new_tokens=1)
    assert any("no chat template" in note for note in plain.notes)
    own = Explainer(model, processor, prompt_template="<user>{image} {question} <assistant>")
    explanation = own(picture, QUESTION, max_new_tokens=1)
    assert not any("no chat template" in note for note in explanation.notes)
    assert explanation.prompt_tokens[-1].text.strip() == "<assistant>"


@pytest.mark.parametrize("method", ["chefer", "raw_attention"])
def test_logits_that_are_not_numbers(model, processor, picture, method):
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    before = [module.training for module in model.modules()]
    with pytest.raises(ArgumentError, match=r"NaN|nan"):
        Explainer(model, processor, method=method)(picture, QUESTION)
    assert [module.training for module in model.modules()] == before


def test_attention_that_cannot_be_registered(model, processor, picture, monkeypatch):
    attention = type(model.model.language_model.layers[0].self_attn)

    def own_attention(self: Any, hidden_states: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, None]:
        return self.o_proj(self.q_proj(hidden_states)), None

    monkeypatch.setattr(attention, "forward", own_attention)
    before = state(model)
    with pytest.raises(UnsupportedModelError, match="attention") as caught:
        Explainer(model, processor)(picture, QUESTION, max_new_tokens=1)
    assert "\n" not in str(caught.value)
    assert state(model) == before


def test_absent_backend_is_refused_before_the_model_runs(model, processor, picture, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda **unused: pytest.fail("the model ran"))
    if torch.cuda.is_available():
        pytest.skip("the cuda backend may be present")
    with use_backend("cuda"), pytest.raises(BackendUnavailableError):
        Explainer(model, processor)(picture, QUESTION)


def test_estimate_runs_no_model_and_grows(model, processor, picture, monkeypatch):
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("the model ran"))
    explainer = Explainer(model, processor)
    short, long = (explainer.estimate(picture, QUESTION, max_new_tokens=n) for n in (2, 20))
    assert short.seconds < long.seconds and short.bytes < long.bytes
    assert long.seconds == pytest.approx(sum(long.parts.values()))
    lean, least, pruned = (
        Explainer(model, processor, **settings).estimate(picture, QUESTION, max_new_tokens=2)
        for settings in ({"memory": "lean"}, {"memory": "min"}, {"row_tolerance": 0.3})
    )
    assert least.bytes < lean.bytes < short.bytes
    # "min" runs the layers twice more; the others once more, from what generate() computed, without the vision tower.
    assert least.operations > short.operations == lean.operations
    assert short.parts["forward"] == lean.parts["forward"] == pruned.parts["forward"] == 0 < least.parts["forward"]
    assert pruned.parts["backward"] < lean.parts["backward"] and pruned.operations < lean.operations
    assert short.sequence_length == long.sequence_length - 18


@pytest.mark.parametrize("answer", [1, 4])
def test_estimated_operations_are_those_that_run(model, answer):
    """The vision tower, the prompt and the teacher-forced pass, counted by torch."""
    inputs = {
        "input_ids": torch.tensor([[1, 5, *[4] * 144, *[20] * 30, 6]]),
        "pixel_values": torch.randn(1, 3, 96, 96),
    }
    total = inputs["input_ids"].shape[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(**inputs, logits_to_keep=answer)

    def operations(**pictures: torch.Tensor) -> float:
        return estimate_cost(
            model, prompt_length=total - answer, answer_length=answer, method="raw_attention", **pictures
        ).operations

    text = model.config.text_config
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.dim() > 1)
    attention = 2 * (total - answer) ** 2 * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    prompt = 2 * weights * (total - answer) + attention + 2 * model.lm_head.weight.numel()
    vision = (operations(pictures=inputs["pixel_values"]) - operations()) / 2  # it runs for the answer, and again
    assert operations() - prompt + vision == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_estimated_cost_is_of_the_right_size(model, processor, picture):
    """Time within a factor of 6 in the best of four tries (the machine may be busy), memory within a factor of 3."""
    ratios = []
    for memory in ("fast", "lean"):
        explainer = Explainer(model, processor, memory=memory)
        estimate = explainer.estimate(picture, QUESTION, max_new_tokens=4)
        runs = [explainer(picture, QUESTION, max_new_tokens=4) for _ in range(2)]
        ratios += [sum(run.seconds.values()) / estimate.seconds for run in runs]
        if runs[0].peak_bytes is not None and len(runs[0].tokens) == 4:
            assert 1 / 3 < max(run.peak_bytes for run in runs) / estimate.bytes < 3
    assert any(1 / 6 < ratio < 6 for ratio in ratios)
