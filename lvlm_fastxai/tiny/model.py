"""Architecture, vocabulary, prompt and processor of the shipped LVLM: a LLaVA of three million parameters.

A CLIP vision tower reads a 96×96 picture in 8×8 patches, a two-layer projector turns the 144 patch states into image
tokens, and a Llama decoder with grouped-query attention (6 query, 2 key-value heads) answers word by word.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from . import scenes
from .data import GRID, IMAGE_SIZE, PATCH_SIZE

PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT = "<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<user>", "<assistant>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT)
NUM_IMAGE_TOKENS = GRID * GRID

_FUNCTION_WORDS = (
    "a above and are below bottom center color contain describe different do does have how image in is large larger "
    "left many no not object objects of on or part present right same shape side size small smaller than texture the "
    "there top what where which yes 0 1 2 3 4 ? . ,"
)

# Images come first whatever their place in the message: the model was trained on pictures before questions.
CHAT_TEMPLATE = (
    "{{ '" + BOS + "' }}"
    "{% for message in messages %}"
    "{{ '" + USER + "' if message['role'] == 'user' else '" + ASSISTANT + "' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '" + IMAGE + "' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ ' ' + part['text'] + ' ' }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] != 'user' %}{{ '" + EOS + "' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Token ids of the special tokens and of every word that the questions and answers of both data sets use."""
    shapes = [*scenes.SHAPES, *(f"{shape}es" if shape == "cross" else f"{shape}s" for shape in scenes.SHAPES)]
    words = {*shapes, *scenes.COLORS, *scenes.TEXTURES, *scenes.SIZES, *_FUNCTION_WORDS.split()}
    return {token: index for index, token in enumerate([*SPECIAL_TOKENS, *sorted(words)])}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over :func:`vocabulary`: lower-cases, splits at white space and punctuation."""
    tokenizer = Tokenizer(WordLevel(vocabulary(), unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=1024,
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer, image processor (the whole picture squeezed to 96×96, nothing cropped) and chat template."""
    image_processor = CLIPImageProcessor(
        do_center_crop=False,
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int) -> LlavaForConditionalGeneration:
    """The untrained model, its weights drawn from ``seed``; changes torch's global generator."""
    torch.manual_seed(seed)
    ids = vocabulary()
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="gelu",
        projection_dim=160,
    )
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        image_seq_length=NUM_IMAGE_TOKENS,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def save_checkpoint(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the model (fp16 weights that load as fp32) and its processor to ``folder``, for ``from_pretrained``."""
    ids = vocabulary()
    half = LlavaForConditionalGeneration(model.config).half()
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        bos_token_id=ids[BOS], eos_token_id=ids[EOS], pad_token_id=ids[PAD], max_new_tokens=24, do_sample=False
    )
    half.save_pretrained(folder)
    name_as_hub(folder / "model.safetensors")
    # fp16 halves the file; nobody should compute in it on a CPU, so the stored dtype asks for fp32.
    config = LlavaConfig.from_pretrained(folder)
    parts: tuple[Any, ...] = (config, config.text_config, config.vision_config)
    for part in parts:
        part.dtype = "float32"
    config.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
    build_processor().save_pretrained(folder)


def name_as_hub(file: Path) -> None:
    """Give the vision tower's weights the names LLaVA's checkpoints have had from the first. Every transformers renames
    those to its own; those that 5.23 saves, 5.0 leaves unread and draws a random tower instead."""
    weights = load_file(file)
    old, new = "vision_tower.", "vision_tower.vision_model."
    renamed = {name if new in name else name.replace(old, new): weight for name, weight in weights.items()}
    save_file(renamed, file, metadata={"format": "pt"})


def chat(question: str) -> list[dict[str, Any]]:
    """Messages for the processor's chat template: one picture and ``question``."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def answer(model: LlavaForConditionalGeneration, processor: LlavaProcessor, image: Image.Image, question: str) -> str:
    """The model's greedy answer to ``question`` about ``image``."""
    prompt = processor.apply_chat_template(chat(question), add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = cast(Any, model).generate(**inputs)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
