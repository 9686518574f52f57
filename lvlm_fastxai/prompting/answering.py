"""The model and its processor in batches: prompts, greedy answers, and answers put back behind their prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import families
from ..errors import ArgumentError
from .joining import ANSWER_FILL, SUFFIX_TYPE_FAMILIES, find_question

Inputs = dict[str, Any]


class Answerer:
    """Asks a model many questions at a time.

    Args:
        model: a transformers image-text-to-text model, in evaluation mode.
        processor: its processor, with a chat template.

    Raises:
        ArgumentError: the processor has no chat template.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        if not getattr(processor, "chat_template", None):
            raise ArgumentError(f"processor: {type(processor).__name__} has no chat template to ask questions with")
        self.model = model
        self.processor = processor
        self._accepted = inspect.signature(model.forward).parameters
        ends = model.generation_config.eos_token_id
        self._special = {*processor.tokenizer.all_special_ids, *(ends if isinstance(ends, list) else [ends])}

    def encode(self, images: Sequence[Image.Image], questions: Sequence[str]) -> Inputs:
        """Processor outputs of B prompts, padded on the left so that every prompt ends at the same column."""
        texts = [
            self.processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for question in questions
        ]
        first = self.processor.tokenizer.bos_token
        # A template that writes the first token itself must not get it twice.
        settings = {"add_special_tokens": False} if first and texts[0].startswith(first) else {}
        return self._to_model(
            self.processor(
                images=[[image] for image in images],
                text=texts,
                return_tensors="pt",
                padding=True,
                padding_side="left",
                **settings,
            )
        )

    def encode_images(self, images: Sequence[Image.Image]) -> Inputs:
        """The processor's outputs for pictures alone."""
        return self._to_model(self.processor.image_processor(images=list(images), return_tensors="pt"))

    def _to_model(self, encoded: Any) -> Inputs:
        device, dtype = self.model.device, self.model.dtype
        return {
            name: (value.to(device, dtype) if value.is_floating_point() else value.to(device))
            if isinstance(value, Tensor)
            else value
            for name, value in encoded.items()
        }

    def accepted(self, inputs: Inputs) -> Inputs:
        """The inputs that the model's forward takes; some are for the image layout alone."""
        return {name: value for name, value in inputs.items() if name in self._accepted}

    def answer(self, inputs: Inputs, max_new_tokens: int, streamer: Any = None) -> list[list[int]]:
        """Greedy answers of B prompts as token ids, up to the first special token; `streamer` sees them appear."""
        with torch.inference_mode():
            output = self.model.generate(
                **self.accepted(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                streamer=streamer,
            )
        answers = []
        for generated in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(generated) if token in self._special), len(generated))
            answers.append(generated[:end])
        return answers

    def join(self, inputs: Inputs, answers: Sequence[Sequence[int]]) -> Inputs:
        """Prompts and their answers, all of one length, as teacher-forced inputs."""
        tokens = inputs["input_ids"]
        tail = torch.tensor(answers, dtype=tokens.dtype, device=tokens.device)
        joined = {**inputs, "input_ids": torch.cat([tokens, tail], 1)}
        for name, fill in ANSWER_FILL.items():
            value = inputs.get(name)
            if isinstance(value, Tensor) and value.shape == tokens.shape:
                if name == "token_type_ids" and self.model.config.model_type in SUFFIX_TYPE_FAMILIES:
                    fill = 1
                joined[name] = torch.cat([value, torch.full_like(tail, fill, dtype=value.dtype)], 1)
        return joined

    def question_columns(self, prompts: Inputs, sample: int, question: str) -> list[int]:
        """Columns of a prompt that spell the question, as `Explainer` finds them."""
        tokens = prompts["input_ids"][sample].tolist()
        columns = families.prompt_columns(self.model.config, prompts, sample, len(tokens)).tolist()
        inside = find_question([self.processor.tokenizer.decode([tokens[column]]) for column in columns], question)
        return [column for place, column in enumerate(columns) if place in inside]

    def image_columns(self, prompts: Inputs, sample: int) -> list[int]:
        """Columns of a prompt that hold neither text nor padding."""
        length = prompts["input_ids"].shape[1]
        text = set(families.prompt_columns(self.model.config, prompts, sample, length).tolist())
        return [column for column in prompts["attention_mask"][sample].nonzero()[:, 0].tolist() if column not in text]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer."""
        return self.processor.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        ).strip()

    def word_of_token(self, tokens: Sequence[int]) -> list[int]:
        """For each token the index of the white-space separated word of the answer that it belongs to."""
        return [len(self.decode(tokens[: place + 1]).split()) - 1 for place in range(len(tokens))]


def batched(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """``indices`` in runs of at most ``size``."""
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


def same_answer(answer: str, reference: str) -> bool:
    """Whether two answers are the same, white space and case aside."""
    return answer.casefold().split() == reference.casefold().split()
