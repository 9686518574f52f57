"""The one way to ask a model: prompts, inputs, answers, and what is refused before the model runs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lvlm_fastxai as fx
from lvlm_fastxai import Explainer, cli
from lvlm_fastxai.errors import ArgumentError, printable
from lvlm_fastxai.explain import peak_memory as peaks
from lvlm_fastxai.fastrm.build import build_maps
from lvlm_fastxai.prompting.answering import Answerer
from lvlm_fastxai.prompting.answers import end_tokens
from lvlm_fastxai.prompting.inputs import accepted
from lvlm_fastxai.prompting.messages import ask, check_template
from lvlm_fastxai.prompting.sources import open_source
from lvlm_fastxai.tiny.model import build_model, build_processor

QUESTION = "what color is the small circle?"


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="module")
def shared() -> Any:
    return build_model(0).eval()


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))


# Messages


def test_a_question_is_a_conversation_of_one_turn(shared: Any, processor: Any, picture: Image.Image) -> None:
    answerer = Answerer(shared, processor)
    plain = answerer.encode([picture], [QUESTION])
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]}]
    for images, prompt in ((None, messages), ([], messages)):
        written = answerer.encode([images], [prompt])
        assert torch.equal(plain["input_ids"], written["input_ids"])
        assert torch.equal(plain["pixel_values"], written["pixel_values"])
    explainer = Explainer(shared, processor)
    one, other = explainer(picture, QUESTION, max_new_tokens=2), explainer(None, messages, max_new_tokens=2)
    np.testing.assert_array_equal(one.image_map, other.image_map)
    assert other.question == QUESTION and other.answer == one.answer


def test_earlier_turns_stand_before_the_question(shared: Any, processor: Any, picture: Image.Image) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what shape is the circle?"}]},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": QUESTION},
    ]
    ids = Answerer(shared, processor).encode([picture], [messages])["input_ids"][0]
    text = processor.tokenizer.decode(ids[ids != shared.config.image_token_index])
    assert text.replace(" ", "") == (
        f"<bos><user>whatshapeisthecircle?<assistant>aredcircle<eos><user>{QUESTION}<assistant>".replace(" ", "")
    )
    assert ask(picture, messages).question == QUESTION


@pytest.mark.parametrize(
    ("images", "prompt", "message"),
    [
        (None, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], "more picture parts"),
        (True, [{"role": "user", "content": "what?"}], "more pictures than"),
        (None, [{"role": "user", "content": "what?"}], "no picture"),
        (None, [{"content": "what?"}], "no role"),
        (None, [{"role": "user", "content": 3}], "neither text nor"),
        (None, [{"role": "user", "content": [{"type": "audio"}]}], "neither text nor an image"),
        (None, [{"role": "user", "content": " "}], "empty question"),
        (None, [], "empty question"),
    ],
)
def test_malformed_conversations(picture: Image.Image, images: Any, prompt: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ask(picture if images else None, prompt)


def test_a_tokenizers_own_chat_template(shared: Any, processor: Any, picture: Image.Image) -> None:
    expected = Answerer(shared, processor).encode([picture], [QUESTION])["input_ids"]
    processor.chat_template = None
    with pytest.raises(ArgumentError, match="no chat template"):
        Answerer(shared, processor)
    processor.tokenizer.chat_template = (
        "<bos>{% for m in messages %}<user>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>"
        "{% endif %}"
    )
    assert torch.equal(Answerer(shared, processor).encode([picture], [QUESTION])["input_ids"], expected)


# What is refused


@pytest.mark.parametrize("token", ["<eos>", "<user>", "<bos>", "<image>", "<assistant>", "<unk>"])
def test_special_tokens_in_a_question_make_no_turns(
    shared: Any, processor: Any, picture: Image.Image, token: str
) -> None:
    question = f"what is it? {token} red"
    for ask_it in (Explainer(shared, processor), Answerer(shared, processor).encode):
        given: Any = ([picture], [question]) if not isinstance(ask_it, Explainer) else (picture, question)
        with pytest.raises(ArgumentError, match=f"leave out.*{token}") as caught:
            ask_it(*given)
        assert "\n" not in str(caught.value)


def test_unknown_words_are_no_special_tokens(shared: Any, processor: Any, picture: Image.Image) -> None:
    assert Explainer(shared, processor)(picture, "is it phlogiston?", max_new_tokens=1).tokens


def test_special_tokens_of_a_source_are_refused_with_their_sample(
    shared: Any, processor: Any, picture: Image.Image, tmp_path: Path
) -> None:
    picture.save(tmp_path / "picture.png")
    for line, where, settings in (
        ('{"image": "picture.png", "question": "what? <eos>", "id": "seven"}', "sample seven", {}),
        (
            '{"image": "picture.png", "question": "what?", "answer": "<image>", "id": "seven"}',
            "sample seven",
            {"answers": "reference"},
        ),
        # The source itself refuses half a character, and names the line.
        (
            '{"image": "picture.png", "question": "\\\\ud800?", "id": "seven"}'.replace("\\\\", "\\"),
            "line 1.*surrogate",
            {},
        ),
    ):
        (tmp_path / "source.jsonl").write_text(line)
        with pytest.raises(ArgumentError, match=where) as caught:
            build_maps(shared, processor, open_source(str(tmp_path / "source.jsonl")), tmp_path / "maps", **settings)
        assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_told_in_one_line(shared: Any, processor: Any, picture: Image.Image) -> None:
    with pytest.raises(ArgumentError, match="surrogate"):
        Explainer(shared, processor)(picture, "what is \udce9?")
    with pytest.raises(ArgumentError, match="surrogate"):
        Answerer(shared, processor).encode_answer("a \ud800 circle")


def test_a_question_beyond_the_models_length(shared: Any, processor: Any, picture: Image.Image) -> None:
    with pytest.raises(ArgumentError, match="positions, and the model 1024") as caught:
        Explainer(shared, processor)(picture, "red " * 1000)
    assert "\n" not in str(caught.value)
    config = shared.config.text_config
    before = config.max_position_embeddings
    try:
        config.max_position_embeddings = 160
        found = Explainer(shared, processor)(picture, "what is it?", max_new_tokens=30)
        assert any(f"{found.sequence_length} positions, and the model was made for 160" in n for n in found.notes)
    finally:
        config.max_position_embeddings = before


@pytest.mark.parametrize(
    "template", ["{image", "{question}", "{image}{question}{x}", "{image!r}{question}", "{}{image}{question}", "}{"]
)
def test_broken_prompt_templates(template: str) -> None:
    with pytest.raises(ArgumentError, match="prompt_template"):
        check_template(template)


@pytest.mark.parametrize("template", ["{{ messages[7]['x']['y'] }}", "{% for %}", "{{ raise_exception('no') }}"])
def test_broken_chat_templates(shared: Any, processor: Any, picture: Image.Image, template: str) -> None:
    processor.chat_template = template
    with pytest.raises(ArgumentError, match="template cannot be rendered") as caught:
        Explainer(shared, processor)(picture, QUESTION)
    assert "\n" not in str(caught.value)


def test_escape_sequences_are_not_printed_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x1b]0;title\x07\tb\nc\x9b2J\u202e\udc80"
    assert printable(text, keep="\t\n") == "a\\x1b]0;title\\x07\tb\nc\\x9b2J\\u202e\\x80"
    assert printable(text).isprintable()
    assert cli.main(["explain", "absent\x1b[2J.png", "what?", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told and "absent\\x1b[2J.png" in told


# Inputs


def test_inputs_that_the_model_does_not_take_are_named(shared: Any, processor: Any, picture: Image.Image) -> None:
    inputs = Answerer(shared, processor).encode([picture], [QUESTION])
    taken = accepted(shared, {**inputs, "token_type_ids": inputs["attention_mask"]})
    assert taken.keys() == inputs.keys()
    with pytest.raises(ArgumentError, match="takes no 'flattened_patches'"):
        accepted(shared, {**inputs, "flattened_patches": inputs["pixel_values"]})
    with pytest.raises(ArgumentError, match="no pixels"):
        accepted(shared, {name: value for name, value in inputs.items() if name != "pixel_values"})


def hidden_signature(model: Any) -> Any:
    """The model inside one more module whose forward names nothing, as adapters and compilers do."""

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.base_model(*args, **kwargs)

        def get_base_model(self) -> Any:
            return self.base_model

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.base_model, name)

    return Wrapper()


def test_a_wrapper_loses_no_input(shared: Any, processor: Any, picture: Image.Image) -> None:
    wrapped = hidden_signature(shared)
    inputs = Answerer(shared, processor).encode([picture], [QUESTION])
    assert accepted(wrapped, inputs).keys() == inputs.keys()


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_lora_adapter_answers_and_maps_as_the_merged_model(
    processor: Any, picture: Image.Image, task: str | None
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type=task, init_lora_weights=False
    )
    wrapped = peft.get_peft_model(build_model(0), config).eval()
    found = Explainer(wrapped, processor)(picture, QUESTION, max_new_tokens=4)
    answer = Explainer(wrapped, processor).answer(picture, QUESTION, max_new_tokens=4)
    plain = Explainer(build_model(0), processor)(picture, QUESTION, max_new_tokens=4)
    merged = Explainer(wrapped.merge_and_unload(), processor)(picture, QUESTION, max_new_tokens=4)
    assert found.answer == merged.answer == answer
    assert np.abs(merged.image_map - plain.image_map).max() > 0.1 * merged.image_map.max()  # the adapter tells
    np.testing.assert_allclose(found.image_map, merged.image_map, rtol=1e-3, atol=1e-5 * merged.image_map.max())


# Answers


def test_a_batch_of_one_is_a_single_call(shared: Any, processor: Any, picture: Image.Image) -> None:
    answerer = Answerer(shared, processor)
    questions = ["what is it?", QUESTION]
    single = [answerer.generate(answerer.encode([picture], [q]), 4, keep_logits=True)[0] for q in questions]
    both = answerer.generate(answerer.encode([picture, picture], questions), 4, keep_logits=True)
    assert [found.token_ids for found in both] == [found.token_ids for found in single]
    for one, other in zip(single, both, strict=True):
        np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-4)
    assert single[0].token_ids == [
        token.token_id for token in Explainer(shared, processor)(picture, questions[0], max_new_tokens=4).tokens
    ]


def test_no_batch_answers_with_image_tokens_or_noise(processor: Any, picture: Image.Image) -> None:
    model = build_model(0).eval()
    answerer = Answerer(model, processor)
    inputs = answerer.encode([picture, picture], ["what?", QUESTION])
    image = model.config.image_token_index
    handle = model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([image]), 1e4)
    )
    assert not any(image in answer for answer in answerer.answer(inputs, 3))
    handle.remove()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ArgumentError, match="NaN"):
        answerer.answer(inputs, 3)


def test_answers_end_where_generate_ends_them() -> None:
    class Holder:
        def __init__(self, eos: Any) -> None:
            self.eos_token_id = eos
            self.generation_config = self

    assert end_tokens(Holder([2, 7]), Holder(9)) == {2, 7}
    assert end_tokens(Holder(2)) == {2}
    assert end_tokens(Holder(None), Holder(9)) == {9}
    assert end_tokens(Holder(None), Holder(None)) == frozenset()


# Several callers, and what a run leaves behind


def test_threads_share_an_explainer(picture: Image.Image) -> None:
    model, processor = fx.load_tiny_lvlm()
    questions = ["what color is the circle?", "what shape is red?", "is there a star?"]
    explainer = Explainer(model, processor)
    expected = {question: explainer(picture, question, max_new_tokens=1) for question in questions}
    before = [module.training for module in model.modules()], model.config.text_config._attn_implementation
    wrong: list[Any] = []

    def run(start: int) -> None:
        for number in range(72):
            question = questions[(start + number) % 3]
            try:
                found = explainer(picture, question, max_new_tokens=1)
                if found.answer != expected[question].answer or not np.array_equal(
                    found.image_map, expected[question].image_map
                ):
                    wrong.append(question)
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=run, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert ([m.training for m in model.modules()], model.config.text_config._attn_implementation) == before
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def polling() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "peak-memory"]


def ended() -> bool:
    for thread in polling():
        thread.join(2)
    return not polling()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory cannot be read here")
def test_no_polling_thread_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with peaks.peak_memory(cpu) as peak:
        assert polling()
        held = torch.ones(2**24)
    assert peak.bytes is not None and peak.bytes > 0.9 * held.nbytes and ended()
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), peaks.peak_memory(cpu):
            raise error
        assert ended()
    # Interrupted before the block could tell it to stop: the watch goes with the frame that held it.
    block = peaks.peak_memory(cpu)
    block.__enter__()
    assert polling()
    monkeypatch.setattr(peaks._Watch, "__setattr__", lambda *unused: pytest.fail("told to stop"), raising=False)
    with pytest.raises(pytest.fail.Exception):
        block.__exit__(None, None, None)
    monkeypatch.undo()
    del block
    assert ended()
