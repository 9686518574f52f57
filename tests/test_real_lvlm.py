"""The pure code of the benchmarks' LVLM: where weights go, what packed questions see, what merging adapters gives."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from benchmarks.real_lvlm import report
from benchmarks.real_lvlm.backbone import GRID, IMAGE_SIZE, PATCH_SIZE, RENAMED, backbone_weights
from benchmarks.real_lvlm.decoder import AdaptedDecoder
from benchmarks.real_lvlm.model import load_real_lvlm
from benchmarks.real_lvlm.packing import Block, Packed, pack
from benchmarks.real_lvlm.pictures import ATTRIBUTES, IGNORE, descriptions, patch_labels
from benchmarks.real_lvlm.questions import choose, choose_patches, question_errors
from benchmarks.real_lvlm.words import PatchWords
from lvlm_fastxai.tiny import scenes
from lvlm_fastxai.tiny.data import LABEL_VALUES

pytestmark = pytest.mark.usefixtures("one_thread")

PATCHES = 12


def exported(model: Dinov2Model) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Initialisers and products as the exporter of the saliency network names them."""
    old = {new: former for former, new in RENAMED.items()}
    arrays, products = {"decoder.bn.weight": np.zeros(3)}, {"/decoder/MatMul": "decoder.bn.weight"}
    for number, (name, value) in enumerate(model.state_dict().items()):
        for new, former in old.items():
            name = name.replace(new, former)
        if name.endswith("position_embeddings"):
            arrays["onnx::Concat_1"], arrays["onnx::Reshape_2"] = value[:, :1].numpy(), value[:, 1:].numpy()
        elif value.ndim == 2:
            arrays[f"onnx::MatMul_{number + 9}"] = value.T.numpy()
            products[f"/backbone/{name.removesuffix('.weight').replace('.', '/')}/MatMul"] = (
                f"onnx::MatMul_{number + 9}"
            )
        else:
            arrays[f"backbone.{name}"] = value.numpy()
    return arrays, products


def dinov2(image_size: int) -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=PATCH_SIZE,
        use_mask_token=False,
    )
    return Dinov2Model(config).eval()


def test_every_weight_of_the_onnx_file_has_its_place() -> None:
    model = dinov2(IMAGE_SIZE)
    found = backbone_weights(*exported(model))
    wanted = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_the_position_table_is_resampled_as_dinov2_does() -> None:
    large, small = dinov2(518), dinov2(IMAGE_SIZE)
    small.load_state_dict(backbone_weights(*exported(large)))
    pixels = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.inference_mode():
        torch.testing.assert_close(small(pixels).last_hidden_state, large(pixels).last_hidden_state)


def test_a_missing_position_table_is_said() -> None:
    arrays, products = exported(dinov2(IMAGE_SIZE))
    del arrays["onnx::Concat_1"]
    with pytest.raises(ValueError, match="0 class tokens, 1 tables"):
        backbone_weights(arrays, products)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def packed_case() -> tuple[Packed, torch.Tensor]:
    """Two pictures, the second with half of its patches; blocks of different lengths."""
    patches = torch.tensor([[0, 2, 3, 5, 8, 11], [1, 2, 4, 6, 7, 10]])
    asked = [
        [Block([3, 4, 5, 6], 2), Block([7, 8, 9, 10, 11, 12], 5)],
        [Block([13, 14, 15], 1)],
    ]
    packed = pack([1, 2], PATCHES, patches, asked)
    return packed, torch.randn(packed.images.numel(), 48)


def alone(model: LlamaForCausalLM, packed: Packed, images: torch.Tensor, number: int) -> torch.Tensor:
    """transformers' logits at the answer's rows of one question, asked by itself."""
    places = torch.cat([packed.prefix[packed.picture[number]], packed.blocks[number][packed.filled[number]]])
    embeddings = model.get_input_embeddings()(packed.tokens).index_copy(0, packed.images, images)[places]
    logits = model(inputs_embeds=embeddings[None], position_ids=packed.positions[places][None]).logits[0]
    wanted = packed.rows[packed.question == number]
    return logits[[int((places == row).nonzero()) for row in wanted]]


def test_packed_questions_are_answered_as_each_alone_and_merging_changes_nothing() -> None:
    model = llama()
    decoder = AdaptedDecoder(model.model, model.lm_head.weight, rank=3, dtype=torch.float32)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    merged = copy.deepcopy(model)
    decoder.merge_into(merged.model)
    packed, images = packed_case()
    logits = decoder(images, packed)
    for number in range(len(packed.picture)):
        found = logits[packed.question == number]
        torch.testing.assert_close(found, alone(merged, packed, images, number), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, alone(model, packed, images, number), atol=1e-2)


def test_a_packed_question_does_not_see_the_others() -> None:
    model = llama()
    decoder = AdaptedDecoder(model.model, model.lm_head.weight, rank=0, dtype=torch.float32)
    packed, images = packed_case()
    before = decoder(images, packed)
    packed.tokens[packed.blocks[1][packed.filled[1]]] = 20
    after = decoder(images, packed)
    same = packed.question != 1
    torch.testing.assert_close(after[same], before[same])
    assert not torch.allclose(after[~same], before[~same])


def test_targets_are_the_tokens_behind_the_rows() -> None:
    packed, _ = packed_case()
    assert packed.targets.tolist() == packed.tokens[packed.rows + 1].tolist() == [5, 6, 12, 14, 15]
    assert packed.positions[packed.prefix[1]].tolist() == [0, 1, 3, 4, 6, 8, 9, 12]
    assert {int(packed.positions[row]) for row in packed.blocks[:, 0]} == {2 + PATCHES}
    logits = torch.nn.functional.one_hot(packed.targets, 50).float()
    logits[2] = 0
    assert question_errors(logits, packed.targets, packed.question).tolist() == [0, 1, 0]


def test_patch_labels_say_what_lies_there() -> None:
    scene = scenes.generate_scene(3)
    labels, places = patch_labels(scene)
    side = scenes.CANVAS // GRID
    for each in scene.objects:
        x, y = (int(value) // side for value in each.center)
        cell = y * GRID + x
        if labels[cell, 0] != 1 or not each.mask[y * side : (y + 1) * side, x * side : (x + 1) * side].all():
            continue
        words = [LABEL_VALUES[name][value] for name, value in zip(ATTRIBUTES, labels[cell, 1:], strict=True)]
        assert words == [each.attribute(name) for name in ATTRIBUTES]
        np.testing.assert_allclose((places[cell] + 1) * scenes.CANVAS / 2, each.center, rtol=1e-5)
    assert (labels[labels[:, 0] != 1, 1:] == IGNORE).all()


def test_an_object_is_described_by_what_its_name_leaves_open() -> None:
    scene = scenes.generate_scene(2, num_objects=3)
    labels, _ = patch_labels(scene)
    asked = descriptions(labels, np.random.default_rng(0))
    assert {question.answer for question in asked} == {" ".join(["a", *each.words]) for each in scene.objects}
    for question in asked:
        named = set(question.text.removeprefix("describe the ").strip(".").split()) - {"object"}
        (meant,) = [each for each in scene.objects if named <= set(each.words)]
        assert question.answer == " ".join(["a", *meant.words])
    labels[:, 0] = 0
    assert descriptions(labels, np.random.default_rng(0)) == []


def test_words_of_a_patch_are_those_of_its_object() -> None:
    words = [word for name in ATTRIBUTES for word in LABEL_VALUES[name]]
    known = {word: number for number, word in enumerate([*words, "background", "left", "right", "top", "bottom"])}

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [known[text.strip()]]}

    embeddings = torch.eye(len(known))
    speak = PatchWords(tokenizer, embeddings)
    names = ("star", "teal", "dotted", "small")
    values = [LABEL_VALUES[name].index(word) for name, word in zip(ATTRIBUTES, names, strict=True)]
    labels = torch.tensor([[1, *values], [0, *[IGNORE] * 4]])
    said = speak(labels, torch.tensor([[-1.0, 0.0], [0.0, 0.0]]))
    best = said[0].topk(5).indices.tolist()
    assert {list(known)[number] for number in best} == {*names, "left"}
    assert list(known)[int(said[1].argmax())] == "background"


def test_patches_of_objects_are_kept_first() -> None:
    labels = np.zeros((256, 5), dtype=np.uint8)
    labels[:40, 0] = 1
    kept = choose_patches(labels, 80, np.random.default_rng(0))
    assert len(kept) == 80 and (np.diff(kept) > 0).all()
    assert (kept < 40).sum() > 20  # 12.5 of 80 without preference
    assert choose_patches(labels, 256, np.random.default_rng(0)).tolist() == list(range(256))


def test_questions_of_heavy_kinds_are_asked_more_often() -> None:
    questions = [SimpleNamespace(kind=kind) for kind in ("color", "comparison")]
    rng = np.random.default_rng(0)
    first = [choose(questions, 1, rng)[0].kind for _ in range(200)]
    assert first.count("color") > 150


def test_a_model_that_is_not_there_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("python -m benchmarks real-lvlm train")):
        load_real_lvlm(tmp_path)


@pytest.mark.skipif(not report.RESULTS.is_file(), reason="not measured")
def test_the_document_holds_the_results() -> None:
    table = report.table(json.loads(report.RESULTS.read_text()))
    assert table in report.DOCUMENT.read_text(encoding="utf-8")
