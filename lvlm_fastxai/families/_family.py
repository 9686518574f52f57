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
        layout_inputs: what the processor gives for the layout alone; the model's forward does not take it.
        suffix_type: token type of an answer's positions, where the processor gives types.
    """

    model_types: tuple[str, ...]
    image_token: str
    layout: Layout
    other_tokens: tuple[str, ...] = ()
    layout_inputs: tuple[str, ...] = ()
    suffix_type: int = 0
