"""Model and processor from a folder, for the command line: bad input is one line, and nothing is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, FastXAIError, one_line, printable
from . import SHIPPED
from .weights import load_weights


def load_checkpoint(
    folder: Path | None, device: str = "cpu", dtype: str = "auto", *, trust_remote_code: bool = False
) -> tuple[Any, Any, Path]:
    """Load a model in evaluation mode and its processor; also returns the folder they come from.

    Args:
        folder: as ``save_pretrained`` writes it; None: the shipped LVLM's.
        device: where the model goes, such as "cpu" or "cuda:1".
        dtype: name of a torch dtype, or "auto" for the checkpoint's own (fp32 for the shipped LVLM).
        trust_remote_code: run Python code that lies in the folder, if the checkpoint names it.

    Raises:
        ArgumentError: a device that cannot be used; no checkpoint, one that cannot be loaded, that reads no images, or
            that needs code of its own which is not trusted.
    """
    import torch
    import transformers

    # Advice about optional packages would stand among our own lines.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target = _usable(device)
    source, shown = SHIPPED if folder is None else folder, printable(folder)
    if not (source / "config.json").is_file():
        raise ArgumentError(f"--model: '{shown}' is no folder of a transformers checkpoint: it holds no config.json")
    if dtype == "auto" and folder is None:
        dtype = "float32"
    # Left open, transformers would ask on stdin whether the folder's code may run.
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    auto = transformers.AutoModelForImageTextToText
    try:
        config = transformers.AutoConfig.from_pretrained(source, **safe)
        brings_its_own = trust_remote_code and auto.__name__ in (getattr(config, "auto_map", None) or {})
        if type(config) not in auto._model_mapping and not brings_its_own:
            raise ArgumentError(
                f"--model: '{shown}' holds a {printable(config.model_type)} model, which reads no images; "
                "give an image-text-to-text checkpoint such as LLaVA"
            )
        number_type = "auto" if dtype == "auto" else getattr(torch, dtype)
        model: Any = load_weights(auto, source, number_type, trust_remote_code=trust_remote_code)
        processor = transformers.AutoProcessor.from_pretrained(source, **safe)
    except FastXAIError:
        raise
    # transformers, safetensors and tokenizers raise what they like on damaged or missing files.
    except Exception as error:
        if not trust_remote_code and (files := _files_that_name_code(source)):
            raise ArgumentError(
                f"--model: '{shown}' needs Python code of its own, which {files[0]} names and which is not run; if you "
                "have read it and trust it, add --trust-remote-code"
            ) from error
        raise ArgumentError(f"--model: cannot load '{shown}': {one_line(error)}") from error
    return model.eval().to(target), processor, source


def _usable(device: str) -> Any:
    import torch

    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(f"--device: '{printable(device)}' cannot be used here: {one_line(error)}") from error
    if target.type == "meta":
        raise ArgumentError("--device: 'meta' holds no numbers to compute with; name another, such as cpu or cuda")
    return target


def _files_that_name_code(folder: Path) -> list[str]:
    """Names of the checkpoint's files that name Python code to be run."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(values, dict) and values.get("auto_map"):
            found.append(path.name)
    return found
