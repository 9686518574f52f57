"""Layouts against what the real image processors and the models' own vision code do to a picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import models

from lvlm_fastxai import families
from lvlm_fastxai.errors import ArgumentError, UnknownFamilyError
from lvlm_fastxai.families import ImageLayout, Part

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """A picture of (height, width) pixels, and which of its layout's properties are expected."""

    name: str
    picture: tuple[int, int]
    finest: tuple[int, int]
    parts: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.picture[0]}x{self.picture[1]}" + "".join(f"-{v}" for v in self.config.values())


CROPS = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 16,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
CASES = [
    Case("llava", (240, 240), (4, 4)),
    Case("llava", (240, 400), (4, 4)),
    Case("llava", (500, 240), (4, 4)),
    Case("llava_siglip", (240, 400), (4, 4)),
    Case("llava_siglip", (240, 400), (4, 4), config={"vision_feature_select_strategy": "default"}),
    Case("llava_dinov2", (240, 400), (4, 4)),
    Case("llava_next", (160, 400), (4, 10), 2),
    Case("llava_next", (300, 300), (8, 8), 2),
    Case("llava_next", (600, 220), (10, 4), 2),
    Case("llava_next", (300, 280), (8, 8), 2),
    Case("llava_next", (300, 220), (8, 6), 2),
    Case("llava_next", (320, 276), (8, 6), 2),  # 6.9 cells wide, of which transformers keeps 6
    Case("llava_onevision", (480, 240), (8, 4), 2),
    Case("llava_onevision", (240, 330), (6, 8), 2),
    Case("llava_onevision", (300, 300), (4, 4), 2, config={"vision_aspect_ratio": "anyres_max_1"}),
    Case("llava_onevision", (240, 330), (3, 4), 2, config={"vision_aspect_ratio": "anyres_max_1"}),
    Case("qwen2_vl", (240, 400), (6, 10)),
    Case("qwen2_5_vl", (400, 160), (12, 5)),
    Case("qwen3_vl", (240, 240), (8, 8)),
    Case("idefics3", (300, 450), (4, 6), 2),
    Case("idefics3", (150, 450), (2, 6), 2),
    Case("smolvlm", (450, 150), (6, 2), 2),
    Case("smolvlm", (400, 300), (6, 6), 2),
    Case("smolvlm", (400, 300), (2, 2), 1, settings={"do_image_splitting": False}),
    Case("paligemma", (240, 400), (4, 4)),
    Case("gemma3", (240, 400), (4, 4)),
    Case("gemma3", (240, 600), (4, 12), 2, settings=CROPS),
    Case("gemma3", (500, 240), (8, 4), 2, settings=CROPS),
    Case("internvl", (300, 450), (4, 6), 2),
    Case("internvl", (450, 300), (6, 4), 2),
    Case("internvl", (240, 260), (4, 4), 2),
    Case("internvl", (240, 240), (2, 2), 1, settings={"crop_to_patches": False}),
]


def local_model(name: str, **config: Any) -> torch.nn.Module:
    """The family's model whose vision tower cannot carry anything from one patch to another."""
    model = models.make_model(name, layers=1)
    for key, value in config.items():
        setattr(model.config, key, value)
    mixing = ("out_proj", "attn.proj", "projection_layer", "attention.o_proj", "attention.output.dense")
    mixed = 0
    for path, module in model.named_modules():
        if ("vision" in path or "visual" in path) and ("att" in path) and path.endswith(mixing):
            torch.nn.init.zeros_(module.weight)
            mixed += 1
    assert mixed >= 2, "two tower layers, one output projection each (SigLIP also has a pooling head)"
    return model


def embeddings(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """(B, S, D) what enters the first decoder layer."""
    seen = []
    layers = next(m for p, m in model.named_modules() if p.endswith("layers") and "vision" not in p)
    handle = layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


def grey(size: tuple[int, int], blob: tuple[int, int, int, int] | None = None) -> Image.Image:
    """A grey ramp, on it a bright red rectangle (left, top, right, bottom) in pixels."""
    ramp = np.linspace(60, 120, size[0])[:, None] + np.linspace(0, 60, size[1])[None]
    image = Image.fromarray(ramp.astype(np.uint8)).convert("RGB")
    if blob is not None:
        image.paste((255, 0, 0), blob)
    return image


def cell_box(part: Part, cell: tuple[int, int]) -> np.ndarray:
    left, top, right, bottom = part.box
    (row, column), (height, width) = cell, part.shape
    return np.array(
        [
            left + (right - left) * column / width,
            top + (bottom - top) * row / height,
            left + (right - left) * (column + 1) / width,
            top + (bottom - top) * (row + 1) / height,
        ]
    )


def check_blob(layout: ImageLayout, change: torch.Tensor, blob: np.ndarray) -> None:
    """The strongest change in every part lies under the blob; whatever changes lies near it."""
    placed = np.concatenate([part.columns.ravel() for part in layout.parts])
    stray = change.clone()
    stray[placed[placed >= 0]] = 0
    assert stray.max() == 0, "columns outside the layout changed"
    for part in layout.parts:
        box = np.array(part.box)
        outside = max((blob[:2] - box[2:]).max(), (box[:2] - blob[2:]).max())
        if outside >= 0:  # resampling carries the blob's rim a little further
            assert outside < 0.05 or all(change[c] == 0 for c in part.columns.ravel() if c >= 0)
            continue
        values = np.array([[float(change[c]) if c >= 0 else 0.0 for c in row] for row in part.columns])
        if values.max() == 0:  # only a cell without a token may hide the blob
            hidden = [cell_box(part, cell) for cell in np.argwhere(part.columns < 0)]
            assert any((blob[:2] < b[2:]).all() and (blob[2:] > b[:2]).all() for b in hidden)
            continue
        strongest = cell_box(part, np.unravel_index(values.argmax(), values.shape))
        margin = 0.003 if (part.columns >= 0).all() else 1 / min(part.shape)
        assert (blob[:2] < strongest[2:] + margin).all() and (blob[2:] > strongest[:2] - margin).all()
        cell = np.array([(box[2] - box[0]) / part.shape[1], (box[3] - box[1]) / part.shape[0]])
        for index in np.argwhere(values > 0.05 * values.max()):
            near = cell_box(part, tuple(index))
            assert (blob[:2] < near[2:] + cell).all() and (blob[2:] > near[:2] - cell).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_patch_of_the_picture_changes_its_cell(case: Case) -> None:
    model = local_model(case.name, **case.config)
    height, width = case.picture
    settings = {"text": 4, **case.settings}
    plain = models.make_sample(case.name, model, images=[grey(case.picture)], **settings)
    before = embeddings(model, plain)[0]
    processor = models.image_processor(
        models.RECIPES[case.name].processor, **{**models.RECIPES[case.name].processor_settings, **case.settings}
    )
    (layout,) = families.image_layouts(model.config, plain, image_sizes=[case.picture], image_processor=processor)
    assert layout.shape == case.finest
    assert len(layout.parts) == case.parts
    for x, y in [(0.04, 0.04), (0.93, 0.05), (0.06, 0.94), (0.92, 0.93), (0.3, 0.62), (0.67, 0.21), (0.2, 0.8)]:
        half_width, half_height = max(4, width // 40), max(4, height // 40)
        centre = int(x * width), int(y * height)
        blob = (
            max(0, centre[0] - half_width),
            max(0, centre[1] - half_height),
            min(width, centre[0] + half_width),
            min(height, centre[1] + half_height),
        )
        shown = models.make_sample(case.name, model, images=[grey(case.picture, blob)], **settings)
        change = (embeddings(model, shown)[0] - before).abs().amax(-1)
        check_blob(layout, change, np.array(blob) / np.array([width, height, width, height]))


@pytest.mark.parametrize("case", [c for c in CASES if c.parts > 1], ids=str)
def test_reading_conserves_relevancy(case: Case) -> None:
    model = local_model(case.name, **case.config)
    picture = models.picture(case.picture)
    inputs = models.make_sample(case.name, model, images=[picture], text=4, **case.settings)
    (layout,) = families.image_layouts(model.config, inputs, image_sizes=[case.picture])
    row = torch.rand(inputs["input_ids"].shape[1], dtype=torch.float64)
    columns = np.concatenate([part.columns.ravel() for part in layout.parts])
    assert len(set(columns.tolist())) == len(columns)
    assert (inputs["input_ids"][0, columns] == models.IMAGE).all()
    found = layout.read(row)
    assert found.shape == case.finest
    torch.testing.assert_close(found.sum(), row[columns].sum())
    # One cell of the overview spreads over the fine cells under it and no others.
    coarse = layout.parts[-1]
    row = torch.zeros_like(row)
    row[coarse.columns[0, -1]] = 1.0
    spread = layout.read(row)
    torch.testing.assert_close(spread.sum(), row.sum())
    corner = cell_box(coarse, (0, coarse.shape[1] - 1))
    for index in np.argwhere(spread.numpy() > 0):
        fine = cell_box(layout.parts[0], tuple(index))
        assert (fine[:2] < corner[2:] + 0.03).all() and (fine[2:] > corner[:2] - 0.03).all()


def columns_of(layouts: list[ImageLayout]) -> list[list[np.ndarray]]:
    return [[part.columns for part in layout.parts] for layout in layouts]


@pytest.mark.parametrize("name", models.VISION_NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sample_of_a_batch_is_laid_out_as_if_alone(name: str, side: str) -> None:
    model = models.make_model(name, layers=1)
    sizes = [models.RECIPES[name].picture, (37, 21), (18, 40)]
    samples = [
        models.make_sample(name, model, seed=i, text=4 + 3 * i, images=[models.picture(size, seed=i)])
        for i, size in enumerate(sizes)
    ]
    batch = models.join(name, samples, side)
    length = batch["input_ids"].shape[1]
    for i, single in enumerate(samples):
        shift = length - single["input_ids"].shape[1] if side == "left" else 0
        alone = columns_of(families.image_layouts(model.config, single))
        together = columns_of(families.image_layouts(model.config, batch, i))
        assert len(alone) == len(together) == 1
        for a, b in zip(alone[0], together[0], strict=True):
            np.testing.assert_array_equal(np.where(a >= 0, a + shift, a), b)


@pytest.mark.parametrize("name", [n for n in models.VISION_NAMES if n not in ("llava_onevision", "paligemma")])
def test_several_pictures_of_one_prompt(name: str) -> None:
    model = models.make_model(name, layers=1)
    sizes = [(30, 45), (44, 20)]
    pictures = [models.picture(size, seed=i) for i, size in enumerate(sizes)]
    inputs = models.make_sample(name, model, text=4, images=pictures)
    layouts = families.image_layouts(model.config, inputs)
    assert len(layouts) == 2
    alone = [
        families.image_layouts(model.config, models.make_sample(name, model, text=4, images=[p]))[0] for p in pictures
    ]
    assert [x.shape for x in layouts] == [x.shape for x in alone]
    assert max(p.columns.max() for p in layouts[0].parts) < min(p.columns.min() for p in layouts[1].parts)
    assert sum(p.columns.size for x in layouts for p in x.parts) <= int((inputs["input_ids"] == models.IMAGE).sum())


def test_onevision_sees_several_pictures_untiled_and_padded() -> None:
    model = local_model("llava_onevision")
    sizes = [(300, 200), (200, 400)]
    processor = models.image_processor(
        "LlavaOnevisionImageProcessor", **models.RECIPES["llava_onevision"].processor_settings
    )
    blob = (320, 20, 360, 60)

    def inputs(second: Image.Image) -> dict[str, Any]:
        prepared = dict(processor([[grey(sizes[0]), second]], return_tensors="pt"))
        prepared["pixel_values"] = prepared["pixel_values"].double()
        ids = [1] + [models.IMAGE] * 17 + [5] + [models.IMAGE] * 17 + [6, 7]
        return {"input_ids": torch.tensor([ids]), **prepared}

    before, after = inputs(grey(sizes[1])), inputs(grey(sizes[1], blob))
    change = (embeddings(model, after) - embeddings(model, before))[0].abs().amax(-1)
    layouts = families.image_layouts(model.config, before)
    assert [layout.shape for layout in layouts] == [(4, 4), (4, 4)]
    assert layouts[0].box == pytest.approx((-0.25, 0.0, 1.25, 1.0))
    check_blob(layouts[1], change, np.array(blob) / np.array([400, 200, 400, 200]))


def test_tile_arrangement_is_read_off_the_pixels_where_sizes_are_unknown() -> None:
    for name, settings, shapes in (
        ("internvl", {}, {(300, 450): (4, 6), (450, 300): (6, 4), (100, 600): (2, 12), (600, 100): (12, 2)}),
        ("gemma3", CROPS, {(240, 600): (4, 12), (600, 240): (12, 4)}),
    ):
        model = models.make_model(name, layers=1)
        for size, shape in shapes.items():
            blob = (size[1] // 2, size[0] // 3, size[1], size[0] // 2)
            inputs = models.make_sample(name, model, text=4, images=[grey(size, blob)], **settings)
            if name == "gemma3":
                inputs["num_crops"] = torch.tensor([3])
            (layout,) = families.image_layouts(model.config, inputs)
            assert layout.shape == shape


@pytest.mark.parametrize("kind", ["idefics3", "llava_next"])
def test_the_joint_processor_writes_the_prompt_that_the_layout_expects(kind: str) -> None:
    """Real processors on a character-level tokenizer, where every tag and newline is several tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    import transformers

    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    core = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    recipe = models.RECIPES[kind]
    model = models.make_model(kind, layers=1)
    image_processor = models.image_processor(recipe.processor, **recipe.processor_settings)
    if kind == "idefics3":
        processor = transformers.Idefics3Processor(image_processor, tokenizer, image_seq_len=4)
    else:
        processor = transformers.LlavaNextProcessor(
            image_processor,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    shapes = {
        "idefics3": {(30, 45): (4, 6), (15, 45): (2, 6), (45, 15): (6, 2)},
        "llava_next": {(30, 45): (4, 8), (16, 40): (4, 10), (40, 16): (10, 4)},
    }
    for size in shapes[kind]:
        inputs = processor(images=[models.picture(size)], text=["what <image> is it?"], return_tensors="pt")
        (layout,) = families.image_layouts(model.config, inputs)
        rows, across = layout.shape
        if kind == "idefics3":
            assert layout.shape == shapes[kind][size]
        assert rows > across if size[0] > size[1] else rows < across
        placed = sum(part.columns.size for part in layout.parts)
        newlines = rows if kind == "llava_next" else 0
        assert placed + newlines == int((inputs["input_ids"] == model.config.image_token_id).sum())


def test_prompt_columns_leave_out_images_padding_and_answer() -> None:
    for name in models.NAMES:
        for side in ("left", "right"):
            model, inputs = models.build(name, batch=2, padding=side, layers=1)
            for sample in range(2):
                start = models.answer_targets(inputs, sample)[0][1] + 1
                columns = families.prompt_columns(model.config, inputs, sample, start)
                ids = inputs["input_ids"][sample, columns]
                assert (ids != models.IMAGE).all() and (ids != models.PAD).all()
                kept = int((inputs["input_ids"][sample, :start] != models.IMAGE).sum())
                padding = int((inputs["attention_mask"][sample, :start] == 0).sum())
                assert len(columns) == kept - padding
    with pytest.raises(ArgumentError, match="prompt_length"):
        families.prompt_columns(model.config, inputs, 0, 0)


def test_an_unknown_family_says_what_is_missing() -> None:
    config = SimpleNamespace(model_type="next_lvlm", image_token_id=7, vision_config=SimpleNamespace())
    with pytest.raises(UnknownFamilyError) as raised:
        families.image_layouts(config, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    for part in ("next_lvlm", "image_token_id", "layout rule", "lvlm_fastxai/families/next_lvlm.py", "llava_next"):
        assert part in str(raised.value)
    assert families.image_layouts(models.make_model("llama", layers=1).config, {"input_ids": torch.ones(1, 3)}) == []


def test_inputs_that_do_not_fit_are_refused() -> None:
    model, inputs = models.build("qwen2_vl", layers=1)
    with pytest.raises(ArgumentError, match="image_grid_thw"):
        families.image_layouts(model.config, {"input_ids": inputs["input_ids"]})
    with pytest.raises(ArgumentError, match="image tokens"):
        families.image_layouts(model.config, {**inputs, "input_ids": inputs["input_ids"][:, :10]})
    with pytest.raises(ArgumentError, match="sample"):
        families.image_layouts(model.config, inputs, 1)
    with pytest.raises(ArgumentError, match="row"):
        families.image_layouts(model.config, inputs)[0].read(torch.ones(2, 3))
