"""The operators' shapes, inputs and operations, as data.

A shape is one entry of :data:`CASES`, :data:`BACKWARD_CASES` or :data:`COLUMNS`; an operator on attention's tensors is
one entry of :data:`WORK`, and what it takes is read off its signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROW_BLOCK = 4096  # rows whose scores are held at once while inputs are made


@dataclass(frozen=True)
class Case:
    """Shape of one call; the rows are spread evenly over the keys when there are fewer of them."""

    heads: int
    key_heads: int
    keys: int
    width: int
    dtype: str = "float32"
    targets: int = 1
    rows: int | None = None
    causal: bool = True
    twin: bool = True


CASES = {
    # Decoders' attention: LLaVA-1.5-7B (also at its 576 image tokens + 128 of text), Qwen2.5-VL-7B, SmolLM2-135M,
    # PaliGemma's bidirectional prefix.
    "llava-1.5-7b-1536": Case(32, 32, 1536, 128),
    "llava-1.5-7b-1536-bf16": Case(32, 32, 1536, 128, dtype="bfloat16"),
    "llava-1.5-7b-704": Case(32, 32, 704, 128),
    "qwen2.5-vl-7b-1536": Case(28, 4, 1536, 128),
    "smollm2-135m-1024": Case(9, 3, 1024, 64),
    "smollm2-135m-1024-8-targets": Case(9, 3, 1024, 64, targets=8),
    "paligemma-3b-512": Case(8, 1, 512, 256, causal=False),
    # What a pruned sweep asks for: few rows against all keys.
    "llava-1.5-7b-2048-100-rows": Case(32, 32, 2048, 128, rows=100),
    # Layers of the decoders that the end-to-end suites explain.
    "decoder-704": Case(16, 16, 704, 64),
    "decoder-2048": Case(16, 16, 2048, 64),
    "decoder-2048-4-key-heads": Case(16, 4, 2048, 64),
}
DEFAULT = ("llava-1.5-7b-1536", "llava-1.5-7b-1536-bf16", "llava-1.5-7b-704")

# Where a sweep chooses between the fused backward and torch's own: whole decoders, and the rows that a pruned sweep
# keeps.
BACKWARD_CASES = {
    "llava-1.5-7b-704": Case(32, 32, 704, 128),
    "qwen2.5-vl-7b-704": Case(28, 4, 704, 128),
    "paligemma-3b-512": Case(8, 1, 512, 256, causal=False),
    "smollm2-135m-128": Case(9, 3, 128, 64),
    "smollm2-135m-512": Case(9, 3, 512, 64),
    "smollm2-135m-2048": Case(9, 3, 2048, 64),
    "smollm2-135m-1024-bf16": Case(9, 3, 1024, 64, dtype="bfloat16"),
    "smollm2-135m-512-30-rows": Case(9, 3, 512, 64, rows=30),
    "smollm2-135m-2048-80-rows": Case(9, 3, 2048, 64, rows=80),
    "smollm2-135m-2048-600-rows": Case(9, 3, 2048, 64, rows=600),
    "shipped-196": Case(6, 2, 196, 32),
}


@dataclass(frozen=True)
class Columns:
    """Shape of one call of proxy_relevancy."""

    batch: int
    columns: int
    width: int
    targets: int = 1
    dtype: str = "bfloat16"
    norm: str = "rms"


# LLaVA-1.5-7B's 576 image tokens: a batch while it decodes, one sample, and an answer of 64 tokens at once.
COLUMNS = {
    "llava-1.5-7b-64-samples": Columns(64, 576, 4096),
    "llava-1.5-7b-64-samples-layer-norm": Columns(64, 576, 4096, norm="layer"),
    "llava-1.5-7b-64-samples-fp32": Columns(64, 576, 4096, dtype="float32"),
    "llava-1.5-7b": Columns(1, 576, 4096),
    "llava-1.5-7b-64-targets": Columns(1, 576, 4096, targets=64),
    "llava-1.5-7b-64-targets-fp32": Columns(1, 576, 4096, targets=64, dtype="float32"),
}


@dataclass(frozen=True)
class Work:
    """Matrix products of an operator beside the score, one target's: how many, and over which entries.

    Attributes:
        everywhere: over every entry of the square, not the visible ones alone.
    """

    products: int = 1
    everywhere: bool = False


WORK = {
    "relevancy_product": Work(),
    "glimpse_statistics": Work(everywhere=True),
    "attention_backward_relevancy": Work(products=4),
}


def operations(case: Case, ranges: Any, operator: str = "relevancy_product") -> float:
    """Count floating-point operations: the score of each visible entry, then :data:`WORK` for each target.

    Args:
        ranges: (1, rows, 2) int, the keys that each row sees.
    """
    work = WORK[operator]
    start, end = ranges.unbind(-1)
    visible = (end - start).clamp(min=0).sum().item()
    entries = (start < end).sum().item() * case.keys if work.everywhere else visible
    return 2.0 * case.width * case.heads * (visible + work.products * entries * case.targets)


def arguments_of(operator: str, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    """Choose the tensors that an operator takes, by the names of its parameters, in their order.

    Raises:
        LookupError: it takes one that is not among them.
    """
    from lvlm_fastxai import ops

    parameters = inspect.signature(getattr(ops, operator)).parameters.values()
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    if missing := [name for name in names if name not in tensors]:
        raise LookupError(f"{operator} takes {', '.join(missing)}; benchmarks/ops/cases.py makes {', '.join(tensors)}")
    return tuple(tensors[name] for name in names)


def build(case: Case, device: str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the tensors of a call by name and its options; views of (B, S, H, d) tensors, as transformers passes them.

    Any tensor of its shape does for the output, which enters a row's D only: the query stands in for it.
    """
    import torch

    from lvlm_fastxai import ops

    generator = torch.Generator(device).manual_seed(0)
    rows = case.keys if case.rows is None else case.rows

    def normal(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator, device=device)
        return drawn.to(getattr(torch, case.dtype)).transpose(-3, -2)

    query = normal(1, rows, case.heads, case.width)
    key = normal(1, case.keys, case.key_heads, case.width)
    value = normal(1, case.keys, case.key_heads, case.width)
    grad_output = normal(1, case.targets, rows, case.heads, case.width)
    row = torch.rand(1, case.targets, rows, generator=generator, device=device)
    positions = torch.linspace(0, case.keys - 1, rows, device=device).round().int()[None]
    ranges = ops.key_ranges(1, rows, case.keys, causal=case.causal, query_positions=positions)
    tensors = {"query": query, "key": key, "value": value, "output": query, "grad_output": grad_output}
    return {**tensors, "logsumexp": logsumexp_of(query, key, ranges), "row": row}, {"key_ranges": ranges}


def logsumexp_of(query: Any, key: Any, ranges: Any) -> Any:
    """Compute (1, H, rows) log-sum-exp of the visible scores in fp32, head by head."""
    import torch

    (_, heads, rows, width), group = query.shape, query.shape[1] // key.shape[1]
    result = torch.empty(1, heads, rows, device=query.device)
    columns = torch.arange(key.shape[2], device=query.device)
    for head in range(heads):
        for top in range(0, rows, ROW_BLOCK):
            part = slice(top, top + ROW_BLOCK)
            scores = query[0, head, part].float() @ key[0, head // group].float().T * width**-0.5
            hidden = (columns < ranges[0, part, :1]) | (columns >= ranges[0, part, 1:])
            result[0, head, part] = scores.masked_fill_(hidden, -torch.inf).logsumexp(-1)
    return result


def build_columns(case: Columns) -> tuple[Any, ...]:
    """Make states, queries and offsets of one call of proxy_relevancy."""
    import torch

    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(case.batch, case.columns, case.width, dtype=getattr(torch, case.dtype))
    for sample in hidden:  # float32 states of a whole batch would be most of this machine's memory
        sample.copy_(torch.randn(case.columns, case.width, generator=generator))
    query = torch.randn(case.batch, case.targets, case.width, generator=generator) * case.width**-0.5
    return hidden, query, torch.zeros(case.batch, case.targets)
