"""The LLaVA that comes out of the training: its projector, its processor, and how it is put together and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from . import FOLDER
from . import backbone as tower

IMAGE = "<image>"
# SmolLM2's own turns; a picture goes before its question, without a word between them.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_real_lvlm(folder: Path = FOLDER / "model") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the trained model in fp32 and its processor.

    Raises:
        FileNotFoundError: it has not been trained here.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no model in {folder}: train one with `python -m benchmarks real-lvlm train` (over an hour on one core)"
        )
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), LlavaProcessor.from_pretrained(folder, local_files_only=True)


class Projector(nn.Module):
    """LLaVA's two-layer projector, which starts with inputs of mean 0 and spread 1."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    @torch.no_grad()
    def standardize(self, features: Tensor) -> None:
        """Fold mean and spread of ``features`` (n, inputs) into the first matrix."""
        mean, spread = features.mean(0), features.std(0) + 1e-6
        self.linear_1.weight /= spread
        self.linear_1.bias -= self.linear_1.weight @ mean

    def forward(self, features: Tensor) -> Tensor:
        """Turn (…, inputs) features into (…, width) image tokens."""
        return self.linear_2(F.gelu(self.linear_1(features)))


def build_processor(tokenizer: Any) -> LlavaProcessor:
    """Make the processor. Changes ``tokenizer``: it gets the image token."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    return LlavaProcessor(
        image_processor=tower.image_processor(),
        tokenizer=tokenizer,
        patch_size=tower.PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def assemble(
    backbone: Any, projector: Projector, language_model: LlamaForCausalLM, tokenizer: Any
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Put one LLaVA together, and its processor. ``language_model`` and ``tokenizer`` are changed: they get a token."""
    processor = build_processor(tokenizer)
    # The mean of the others, which nothing is drawn for; the model never sees it, nor has a reason to say it.
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = language_model.get_input_embeddings().weight.data
    rows[-1] = rows[:-1].mean(0)
    config = LlavaConfig(
        vision_config=backbone.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=tower.NUM_IMAGE_TOKENS,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=list(tower.FEATURE_LAYERS),
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(backbone.state_dict())
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.tie_weights()
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), processor
