"""What a family file holds."""

from __future__ import annotations

from dataclasses import dataclass

from ._layouts import Layout


@dataclass(frozen=True)
class Family:
    """Everything the explainer has to know about a model family.

    Attributes:
        model_types: values of `config.model_type`.
        image_token: configuration attribute with the id of the token that stands for image features.
        layout: the rule that says where those tokens look in the picture.
        other_tokens: configuration attributes with ids of tokens that stand for other media (video).
    """

    model_types: tuple[str, ...]
    image_token: str
    layout: Layout
    other_tokens: tuple[str, ...] = ()
