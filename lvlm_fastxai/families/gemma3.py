"""Gemma 3: pooled tokens, pan-and-scan crops."""

from ._family import Family
from ._layouts import PooledWithCrops

FAMILY = Family(
    model_types=("gemma3",),
    image_token="image_token_index",
    layout=PooledWithCrops(),
    layout_inputs=("num_crops",),
)
