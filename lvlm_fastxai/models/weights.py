"""A model's weights from a folder: all of them, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ArgumentError


def load_weights(model_class: Any, folder: Path, dtype: Any, *, trust_remote_code: bool = False) -> Any:
    """Load a model, and refuse a checkpoint that lacks weights, which transformers would draw at random.

    Args:
        model_class: whose ``from_pretrained`` is called.
        folder: as ``save_pretrained`` writes it.
        dtype: torch dtype, or "auto".
        trust_remote_code: run Python code that lies in the folder, if the checkpoint names it.

    Raises:
        ArgumentError: weights of the model are not in the checkpoint; the message names one.
    """
    model, found = model_class.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ArgumentError(
            f"'{folder}' lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}, and would be "
            f"explained with random ones; it was saved by transformers {model.config.transformers_version or 'unknown'}"
            ", and the installed one may name them otherwise"
        )
    return model
