"""InternVL (transformers' own port): tiles and a thumbnail, pixel-shuffled."""

from ._family import Family
from ._layouts import TilesWithThumbnail

FAMILY = Family(
    model_types=("internvl",),
    image_token="image_token_id",
    layout=TilesWithThumbnail(),
)
