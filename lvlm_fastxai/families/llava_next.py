"""LLaVA-NeXT (1.6): overview and tiles at any resolution."""

from ._family import Family
from ._layouts import AnyResolution

FAMILY = Family(
    model_types=("llava_next",),
    image_token="image_token_index",
    layout=AnyResolution(),
)
