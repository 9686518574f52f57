"""The text of a prompt: a question or a conversation, written out by a chat template."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..errors import ArgumentError, one_line
from .pictures import load_picture

Message = Mapping[str, Any]
DEFAULT_TEMPLATE = "{image}{question}"
_FIELDS = {"{image}", "{question}"}
_EMPTY = "question: expected some text, got an empty question"


@dataclass(frozen=True)
class Prompt:
    """What is asked, before a processor has seen it.

    Attributes:
        messages: transformers' chat format; the contents are lists of parts, and picture parts hold no pictures.
        pictures: RGB, in the order of the picture parts.
        question: the text of the last user's message.
    """

    messages: list[dict[str, Any]]
    pictures: list[Image.Image]
    question: str


def ask(images: Any, prompt: str | Sequence[Message]) -> Prompt:
    """Put pictures and a question, or a conversation, into one form.

    Args:
        images: a picture as `load_picture` takes it, or a list of them. In a conversation they fill the picture parts
            that bring none of their own, in order; None or an empty list where every part brings one.
        prompt: a question, which is asked behind all pictures; or messages in transformers' chat format.

    Raises:
        ArgumentError: no text, a malformed message, more or fewer pictures than picture parts, an unreadable picture.

    Example:
        >>> from PIL import Image
        >>> found = ask(Image.new("RGB", (8, 8)), "what is it?")
        >>> found.messages[0]["content"]
        [{'type': 'image'}, {'type': 'text', 'text': 'what is it?'}]
    """
    given = list(images) if isinstance(images, list | tuple) else [images]
    if not isinstance(prompt, str | list | tuple) or not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ArgumentError(_EMPTY)
    if isinstance(prompt, str):
        if not given:
            raise ArgumentError("image: expected at least one picture, got an empty list")
        pictures = [load_picture(item) for item in given]
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": prompt}]
        return Prompt([{"role": "user", "content": content}], pictures, prompt)
    return _conversation([] if images is None else given, prompt)


def _conversation(given: list[Any], messages: Sequence[Message]) -> Prompt:
    left = iter(given)
    written: list[dict[str, Any]] = []
    pictures: list[Image.Image] = []
    question = ""
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ArgumentError(f"prompt: message {number} has no role; expected {{'role': …, 'content': …}}")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list | tuple):
            raise ArgumentError(f"prompt: message {number} has neither text nor a list of parts as its content")
        own: list[dict[str, Any]] = []
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                own.append({"type": "text", "text": part["text"]})
            elif kind == "image":
                source = next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
                source = next(left, None) if source is None else source
                if source is None:
                    raise ArgumentError("image: the conversation has more picture parts than there are pictures")
                pictures.append(load_picture(source))
                own.append({"type": "image"})
            else:
                raise ArgumentError(f"prompt: message {number} holds a part that is neither text nor an image")
        written.append({"role": message["role"], "content": own})
        if message["role"] == "user":
            question = " ".join(part["text"] for part in own if part["type"] == "text")
    if next(left, None) is not None:
        raise ArgumentError("image: there are more pictures than the conversation has picture parts")
    if not question.strip():
        raise ArgumentError(_EMPTY)
    if not pictures:
        raise ArgumentError("image: the conversation holds no picture")
    return Prompt(written, pictures, question)


def check_template(template: str) -> None:
    """Refuse a prompt template without its two fields, or with others.

    Raises:
        ArgumentError: the template is malformed; the message shows it.

    Example:
        >>> check_template("USER: {image} {question} ASSISTANT:")
    """
    try:
        found = [f"{{{field}}}" for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"prompt_template: {one_line(error)}") from None
    if set(found) != _FIELDS or not all(field in template for field in _FIELDS):
        raise ArgumentError(f"prompt_template: expected the fields {{image}} and {{question}}, got {template!r}")


def has_chat_template(processor: Any) -> bool:
    """Whether the processor, or its tokenizer, says how a conversation is written."""
    return any(getattr(part, "chat_template", None) for part in (processor, getattr(processor, "tokenizer", None)))


def write(processor: Any, prompt: Prompt, template: str | None) -> str:
    """Write a prompt out as the model is to read it, up to where its answer starts.

    Args:
        processor: a transformers processor; its own chat template comes before its tokenizer's.
        prompt: what is asked.
        template: with the fields ``{image}`` and ``{question}``, instead of a chat template; for one user message.

    Raises:
        ArgumentError: a text of the prompt holds a special token or is not valid Unicode; a template that cannot be
            rendered; a conversation and no chat template.
    """
    for text in _texts(prompt.messages):
        check_text(processor, text)
    if template is not None:
        if len(prompt.messages) > 1:
            raise ArgumentError("prompt: a conversation needs a chat template; prompt_template takes one question")
        return template.replace("{image}", _marker(processor) * len(prompt.pictures)).replace(
            "{question}", prompt.question
        )
    own = bool(getattr(processor, "chat_template", None))
    messages = prompt.messages if own else _plain(prompt.messages, _marker(processor))
    holder = processor if own else processor.tokenizer
    try:
        text = holder.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # Templates raise what they like.
        raise ArgumentError(f"the processor's chat template cannot be rendered: {one_line(error)}") from error
    return str(text)


def check_text(processor: Any, text: str, name: str = "question") -> None:
    """Refuse a text that the tokenizer would not read as plain text.

    A special token inside it would open a turn, end one, or stand for a picture that is not there.

    Args:
        processor: with the tokenizer.
        text: a question, an earlier turn, or an answer.
        name: what to call it in the message.

    Raises:
        ArgumentError: a special token or a lone surrogate; the message names it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ArgumentError(
            f"{name}: character {error.start} is half of a surrogate pair, which is not valid text; is it UTF-8?"
        ) from None
    image = getattr(processor, "image_token", None)
    if isinstance(image, str) and image in text:
        raise ArgumentError(f"{name}: leave out the image marker {image!r}, it is added for you")
    tokenizer = processor.tokenizer
    special = _special_tokens(processor)
    written = next((token for token in special.values() if token in text), None)
    if written is None:
        # Normalisation may make a special token of what is spelled otherwise.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        written = next((special[token] for token in ids if token in special and token != tokenizer.unk_token_id), None)
    if written is not None:
        raise ArgumentError(f"{name}: leave out {written!r}, a special token that the model would not read as text")


def _special_tokens(processor: Any) -> dict[int, str]:
    tokenizer = processor.tokenizer
    found = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    found |= {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for name in ("image_token", "video_token"):
        text = getattr(processor, name, None)
        if isinstance(text, str) and text:
            found[tokenizer.convert_tokens_to_ids(text)] = text
    return found


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        yield from (part["text"] for part in message["content"] if part["type"] == "text")


def _marker(processor: Any) -> str:
    return str(getattr(processor, "image_token", None) or "<image>")


def _plain(messages: Sequence[Message], marker: str) -> list[dict[str, str]]:
    """Contents as strings, which is what a tokenizer's own template expects."""
    return [
        {
            "role": message["role"],
            "content": "".join(marker if part["type"] == "image" else part["text"] for part in message["content"]),
        }
        for message in messages
    ]
