"""The small LVLM that ships with the package: its pictures and questions, its model, its training and its weights.

Importing this module loads neither torch nor transformers; :func:`load_tiny_lvlm` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..models import SHIPPED

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

WEIGHTS = SHIPPED
"""Folder of the shipped checkpoint, in the layout ``from_pretrained`` reads."""

SAMPLE_IMAGE = Path(__file__).parent / "sample.png"
"""A picture to try things on (a scene no training run has seen); :data:`SAMPLE_QUESTION` is about it."""

SAMPLE_QUESTION = "describe the image."


def load_tiny_lvlm(folder: str | Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the shipped LVLM, on the CPU, in fp32 and in evaluation mode, with its processor.

    Both are plain transformers objects. The prompt is built by the processor's chat template::

        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        output = model.generate(**inputs)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    Args:
        folder: a checkpoint of the same layout; the shipped one (:data:`WEIGHTS`) when None.

    Raises:
        FileNotFoundError: if the folder holds no checkpoint.
        ArgumentError: if weights are missing there.

    Example:
        >>> model, processor = load_tiny_lvlm()
        >>> model.training, str(model.dtype)
        (False, 'torch.float32')
    """
    source = Path(folder) if folder is not None else WEIGHTS
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"no checkpoint in {source}: reinstall the package, or train one with `python -m lvlm_fastxai.tiny.train`"
        )

    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from ..models.weights import load_weights

    model = load_weights(LlavaForConditionalGeneration, source, torch.float32)
    processor = LlavaProcessor.from_pretrained(source, local_files_only=True)
    return model.eval(), processor
