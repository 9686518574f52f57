"""Model and processor from a folder, for the command line: bad input is one line, and nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FastXAIError, one_line
from . import SHIPPED
from .weights import load_weights


def load_checkpoint(folder: Path | None, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any, Path]:
    """Model in evaluation mode, processor, and the folder they come from; the shipped LVLM when ``folder`` is None.

    Args:
        folder: as ``save_pretrained`` writes it.
        device: where the model goes, such as "cpu" or "cuda:1".
        dtype: name of a torch dtype, or "auto" for the checkpoint's own (fp32 for the shipped LVLM).

    Raises:
        ArgumentError: a device that cannot be used, no checkpoint, one that cannot be loaded or that reads no images.
    """
    import torch
    import transformers

    # Advice about optional packages would stand among our own lines.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(f"--device: '{device}' cannot be used here: {one_line(error)}") from error
    source = SHIPPED if folder is None else folder
    if not (source / "config.json").is_file():
        raise ArgumentError(f"--model: '{source}' is no folder of a transformers checkpoint: it holds no config.json")
    if dtype == "auto" and folder is None:
        dtype = "float32"
    try:
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=True)
        if type(config) not in transformers.AutoModelForImageTextToText._model_mapping:
            raise ArgumentError(
                f"--model: '{source}' holds a {config.model_type} model, which reads no images; "
                "give an image-text-to-text checkpoint such as LLaVA"
            )
        model: Any = load_weights(
            transformers.AutoModelForImageTextToText, source, "auto" if dtype == "auto" else getattr(torch, dtype)
        )
        processor = transformers.AutoProcessor.from_pretrained(source, local_files_only=True)
    except FastXAIError:
        raise
    # transformers, safetensors and tokenizers raise what they like on damaged or missing files.
    except Exception as error:
        raise ArgumentError(f"--model: cannot load '{source}': {one_line(error)}") from error
    return model.eval().to(target), processor, source
