"""A model and its processor, asked: prompts in, greedy answers out, and both as one teacher-forced input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image

from .. import families
from ..errors import ArgumentError, UnsupportedModelError
from . import joining
from .answers import Answer, end_tokens, generate, same_answer
from .inputs import Inputs, accepted, encode, to_model
from .messages import Message, Prompt, ask, check_template, check_text, has_chat_template, write

__all__ = ["Answer", "Answerer", "Inputs", "batched", "check_pair", "same_answer"]


class Answerer:
    """Ask a model questions about pictures, one or many at a time: the only way in which this package does.

    Args:
        model: a transformers image-text-to-text model, perhaps wrapped; left as it was found.
        processor: its processor.
        prompt_template: text around image and question, with the fields ``{image}`` and ``{question}``; None for the
            chat template of the processor or its tokenizer.

    Raises:
        ArgumentError: neither a chat template nor a prompt template, or a malformed one; a model that reads no images;
            a processor without tokenizer or image processor.
        UnsupportedModelError: not a transformers model that generates text.

    Example:
        >>> import lvlm_fastxai as fx
        >>> from lvlm_fastxai import tiny
        >>> from lvlm_fastxai.prompting.pictures import load_picture
        >>> answerer = Answerer(*fx.load_tiny_lvlm())
        >>> inputs = answerer.encode([load_picture(tiny.SAMPLE_IMAGE)], [tiny.SAMPLE_QUESTION])
        >>> len(answerer.answer(inputs, max_new_tokens=4)[0])
        4
    """

    def __init__(self, model: Any, processor: Any, *, prompt_template: str | None = None) -> None:
        check_pair(model, processor)
        if prompt_template is not None:
            check_template(prompt_template)
        elif not has_chat_template(processor):
            raise ArgumentError(f"processor: {type(processor).__name__} has no chat template to ask questions with")
        self.model = model
        self.processor = processor
        self.prompt_template = prompt_template

    @property
    def ends(self) -> frozenset[int]:
        """Ids of the tokens that end an answer."""
        return end_tokens(self.model, self.processor.tokenizer)

    def encode(
        self, images: Sequence[Any], prompts: Sequence[str | Sequence[Message]], names: Sequence[str] | None = None
    ) -> Inputs:
        """Processor outputs of B prompts, padded on the left so that every prompt ends at the same column.

        Args:
            images: of each prompt a picture, or a list of them; see `prompting.messages.ask`.
            prompts: of each a question, or messages in transformers' chat format.
            names: of the prompts, for error messages.

        Raises:
            ArgumentError: a prompt that cannot be asked.
        """
        asked = []
        for number, (own, prompt) in enumerate(zip(images, prompts, strict=True)):
            try:
                found = ask(own, prompt)
                asked.append((found, write(self.processor, found, self.prompt_template)))
            except ArgumentError as error:
                raise error if names is None else ArgumentError(f"{names[number]}: {error}") from error
        return self.encode_asked([prompt for prompt, _ in asked], [text for _, text in asked])

    def encode_asked(self, prompts: Sequence[Prompt], texts: Sequence[str] | None = None) -> Inputs:
        """As `encode`, of prompts in their common form; `texts` where they are written out already."""
        if texts is None:
            texts = [write(self.processor, prompt, self.prompt_template) for prompt in prompts]
        return encode(self.model, self.processor, texts, [prompt.pictures for prompt in prompts])

    def encode_images(self, images: Sequence[Image.Image]) -> Inputs:
        """The processor's outputs for pictures alone."""
        return to_model(self.model, self.processor.image_processor(images=list(images), return_tensors="pt"))

    def encode_answer(self, text: str, name: str = "answer") -> list[int]:
        """Token ids of an answer that is given, not generated.

        Raises:
            ArgumentError: it holds a special token, or is not valid Unicode.
        """
        check_text(self.processor, text, name)
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    def accepted(self, inputs: Inputs) -> Inputs:
        """The inputs that the model's forward takes; see `prompting.inputs.accepted`."""
        return accepted(self.model, inputs)

    def generate(
        self,
        inputs: Inputs,
        max_new_tokens: int,
        *,
        keep_logits: bool = False,
        recorder: AbstractContextManager[Any] | None = None,
        streamer: Any = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Answer]:
        """Greedy answers of B prompts; see `prompting.answers.generate`."""
        return generate(
            self.model,
            inputs,
            max_new_tokens,
            ends=self.ends,
            keep_logits=keep_logits,
            recorder=recorder,
            streamer=streamer,
            progress=progress,
        )

    def answer(self, inputs: Inputs, max_new_tokens: int, streamer: Any = None) -> list[list[int]]:
        """Greedy answers of B prompts as token ids, up to the end token; `streamer` sees them appear."""
        return [found.token_ids for found in self.generate(inputs, max_new_tokens, streamer=streamer)]

    def spoken(self, tokens: Sequence[int]) -> list[int]:
        """Places of an answer's tokens that are text: all but special tokens, which nobody asks an explanation of."""
        special = set(self.processor.tokenizer.all_special_ids)
        return [place for place, token in enumerate(tokens) if token not in special]

    def join(self, inputs: Inputs, answers: Sequence[Sequence[int]]) -> Inputs:
        """Prompts and their answers, all of one length, as teacher-forced inputs."""
        return joining.join(self.model.config, inputs, answers)

    def question_columns(self, prompts: Inputs, sample: int, question: str) -> list[int]:
        """Columns of a prompt that spell the question."""
        tokens = prompts["input_ids"][sample].tolist()
        columns = families.prompt_columns(self.model.config, prompts, sample, len(tokens)).tolist()
        inside = joining.find_question(self.pieces([tokens[column] for column in columns]), question)
        return [column for place, column in enumerate(columns) if place in inside]

    def image_columns(self, prompts: Inputs, sample: int) -> list[int]:
        """Columns of a prompt that hold neither text nor padding."""
        tokens = prompts["input_ids"]
        mask = prompts.get("attention_mask", torch.ones_like(tokens))
        text = set(families.prompt_columns(self.model.config, prompts, sample, tokens.shape[1]).tolist())
        return [column for column in mask[sample].nonzero()[:, 0].tolist() if column not in text]

    def image_layouts(self, prompts: Inputs, pictures: Sequence[Sequence[Image.Image]]) -> list[Any]:
        """For each prompt a list with the grid of each of its pictures, `families.ImageLayout`.

        Raises:
            UnknownFamilyError: the grids of the model's family are not known.
        """
        return [
            families.image_layouts(
                self.model.config,
                prompts,
                sample,
                image_sizes=[(picture.height, picture.width) for picture in own],
                image_processor=self.processor.image_processor,
            )
            for sample, own in enumerate(pictures)
        ]

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token's own text; joined, they are the text of all."""
        return joining.pieces(self.processor.tokenizer, tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special tokens and without space around it."""
        return joining.decode(self.processor.tokenizer, tokens).strip()

    def word_of_token(self, tokens: Sequence[int]) -> list[int]:
        """For each token the index of the white-space separated word of the answer that it belongs to."""
        return [len(self.decode(tokens[: place + 1]).split()) - 1 for place in range(len(tokens))]


def check_pair(model: Any, processor: Any) -> None:
    """Refuse a model that answers no questions about pictures, and a processor that reads only one of both.

    Raises:
        ArgumentError: a text-only model, a processor without tokenizer or image processor.
        UnsupportedModelError: not a transformers model that generates text.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model that generates text")
    if getattr(config, "vision_config", None) is None and str(config.model_type) not in families.known():
        raise ArgumentError(
            f"model: {type(model).__name__} ({config.model_type}) reads no images, its configuration has no "
            "vision part; give an image-text-to-text model such as LLaVA"
        )
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise ArgumentError(
                f"processor: {type(processor).__name__} has no {part}; give the model's own processor "
                "(AutoProcessor.from_pretrained)"
            )


def batched(indices: Sequence[int], size: int) -> Iterator[list[int]]:
    """``indices`` in runs of at most ``size``.

    Example:
        >>> list(batched(range(5), 2))
        [[0, 1], [2, 3], [4]]
    """
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])
