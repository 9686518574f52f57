"""PaliGemma 1 and 2: one square grid from a SigLIP tower."""

from ._family import Family
from ._layouts import SquareGrid

FAMILY = Family(
    model_types=("paligemma",),
    image_token="image_token_index",
    layout=SquareGrid(),
    suffix_type=1,  # attends causally; the prefix, type 0, attends both ways
)
