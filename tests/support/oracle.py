"""The dense definition: post-softmax attention kept, its gradient from autograd, R as an S×S matrix per layer.

Shares no code with the library. Attention is eager's formula, with one difference: in fp64 the softmax is fp64 too
(transformers' eager always takes it in fp32, which alone costs 1e-8).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "dense_oracle"
Target = tuple[int, int, int]


@dataclass
class Kept:
    """One decoder attention: probabilities (B,H,S,S) in the graph, un-repeated value (B,Hkv,S,d), output (B,H,S,d)."""

    probabilities: Tensor
    value: Tensor
    output: Tensor


_kept: list[Kept] | None = None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    assert _kept is not None
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query, keys.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask[..., : keys.shape[-2]]
    wide = torch.promote_types(query.dtype, torch.float32)
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    output = torch.matmul(probabilities, values)
    _kept.append(Kept(probabilities, value, output))
    return output.transpose(1, 2).contiguous(), probabilities


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextlib.contextmanager
def _dense(model: nn.Module) -> Iterator[list[Kept]]:
    global _kept
    text = model.config.get_text_config()
    before = text._attn_implementation
    own = text is model.config
    model.set_attn_implementation(NAME if own else {"text_config": NAME})
    _kept = kept = []
    try:
        yield kept
    finally:
        _kept = None
        model.set_attn_implementation(before if own else {"text_config": before})


def forward(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, list[Kept]]:
    """Logits (B,S,V) and what every decoder layer's attention kept, bottom layer first, all in one graph."""
    with _dense(model) as kept, torch.enable_grad():
        parameters = list(model.parameters())
        frozen = [parameter.requires_grad for parameter in parameters]
        for parameter in parameters:
            parameter.requires_grad_(True)
        logits = model(**inputs, use_cache=False).logits
        for parameter, flag in zip(parameters, frozen, strict=True):
            parameter.requires_grad_(flag)
    return logits, kept


def gradients(logits: Tensor, kept: Sequence[Kept], target: Target, temperature: float = 1.0) -> list[Tensor]:
    """∂z/∂P (H,S,S) of the target's sample, per layer; z is the raw logit over `temperature`."""
    sample, row, token = target
    z = logits[sample, row, token].to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    found = torch.autograd.grad(z, [layer.probabilities for layer in kept], retain_graph=True)
    return [gradient[sample] for gradient in found]


def relevance(kept: Sequence[Kept], dense: Sequence[Tensor], sample: int) -> list[Tensor]:
    """Ā = mean over heads of max(0, dP ∘ P), (S,S) per layer."""
    return [(g * layer.probabilities[sample]).clamp(min=0).mean(0) for g, layer in zip(dense, kept, strict=True)]


def product(layers: Sequence[Tensor]) -> Tensor:
    """R = (I + Ā_L) … (I + Ā_1)."""
    identity = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype)
    relevancy = identity
    for layer in layers:
        relevancy = (identity + layer) @ relevancy
    return relevancy


def chefer_rows(
    model: nn.Module, inputs: Mapping[str, Any], targets: Sequence[Target], temperature: float = 1.0
) -> Tensor:
    """(N, S) rows R[q*, :], in the model's dtype."""
    logits, kept = forward(model, inputs)
    rows = [
        product(relevance(kept, gradients(logits, kept, target, temperature), target[0]))[target[1]]
        for target in targets
    ]
    return torch.stack(rows).detach()


def lvlm_interpret_rows(
    model: nn.Module, inputs: Mapping[str, Any], targets: Sequence[Target], prompt_length: int | Sequence[int]
) -> Tensor:
    """(N, S) generation-time rows; prompt_length: the column at which the answer starts, one or one per sample."""
    logits, kept = forward(model, inputs)
    ids = inputs["input_ids"]
    rows = []
    for sample, query_row, token in targets:
        start = prompt_length if isinstance(prompt_length, int) else prompt_length[sample]

        def of_row(row: int, own: Target = (sample, query_row, token)) -> list[Tensor]:
            target = own if row == own[1] else (own[0], row, int(ids[own[0], row + 1]))
            return relevance(kept, gradients(logits, kept, target), own[0])

        first = of_row(start - 1)
        mixed = [layer.clone() for layer in first]
        for row in range(start, query_row + 1):
            for layer, fresh in zip(mixed, of_row(row), strict=True):
                layer[row] = fresh[row]
        rows.append(post_steps(product(mixed)[query_row], query_row))
    return torch.stack(rows).detach()


def post_steps(row: Tensor, query_row: int) -> Tensor:
    """Identity removed, divided by the sum (a zero sum counts as 1), identity put back."""
    unit = torch.zeros_like(row)
    unit[query_row] = 1
    rest = row - unit
    total = rest.sum()
    return rest / (total if total != 0 else 1) + unit


def raw_attention_rows(model: nn.Module, inputs: Mapping[str, Any], targets: Sequence[Target]) -> Tensor:
    """(N, S) mean over heads of the last layer's attention row."""
    _, kept = forward(model, inputs)
    return torch.stack([kept[-1].probabilities[sample, :, row].mean(0) for sample, row, _ in targets]).detach()


def relative_error(found: Tensor, truth: Tensor) -> Tensor:
    """(N,) L1 distance of each row from the truth, self entry and all, over the truth's L1 norm."""
    return (found.double() - truth.double()).abs().sum(-1) / truth.double().abs().sum(-1)


# Which rows (S,) bool of a layer to keep, from its index, the norms (S,) of the gradient at its output, and the running
# relevancy (S,) above it.
Choose = Callable[[int, Tensor, Tensor], Tensor]
# What a layer's gradient and probabilities (H,S,S) make of it: (S,S).
Matrix = Callable[[Tensor, Tensor], Tensor]


def chefer_matrix(gradient: Tensor, probabilities: Tensor) -> Tensor:
    return (gradient * probabilities).clamp(min=0).mean(0)


def pruned_relevance(
    model: nn.Module, inputs: Mapping[str, Any], target: Target, choose: Choose, matrix: Matrix = chefer_matrix
) -> tuple[list[Tensor], Tensor]:
    """The pruned sweep after its definition: Ā of every layer (S,S), bottom layer first, and the row (S,) they make.

    Going down, a layer's backward is taken of the chosen rows of the gradient at its output; the others are added to
    the gradient at its input as they are. Nothing is left out of any matrix.
    """
    sample, query_row, token = target
    layers = next(m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList))
    entered: list[Tensor] = []
    left: list[Tensor] = []
    handles = []
    for layer in layers:
        handles.append(
            layer.register_forward_pre_hook(
                lambda module, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
        handles.append(
            layer.register_forward_hook(
                lambda module, args, output: left.append(output[0] if isinstance(output, tuple) else output)
            )
        )
    try:
        logits, kept = forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    (gradient,) = torch.autograd.grad(logits[sample, query_row, token], left[-1], retain_graph=True)
    matrices: list[Tensor] = []
    row = torch.zeros_like(gradient[sample, :, 0])
    row[query_row] = 1
    for index in reversed(range(len(layers))):
        mask = choose(index, gradient[sample].norm(dim=-1), row)[:, None]
        probabilities = kept[index].probabilities
        down, of_attention = torch.autograd.grad(
            left[index], (entered[index], probabilities), gradient * mask, retain_graph=True
        )
        gradient = down + gradient * ~mask
        if index > 0 and entered[index] is not left[index - 1]:  # the model changes the states between its layers
            (gradient,) = torch.autograd.grad(entered[index], left[index - 1], gradient, retain_graph=True)
        matrices.insert(0, matrix(of_attention[sample].detach(), probabilities[sample].detach()))
        row = row + row @ matrices[0]
    return matrices, row


def pruned_chefer_row(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: Target,
    tolerance: float,
    rows_kept: Sequence[int] | None = None,
) -> tuple[Tensor, list[int]]:
    """The pruned sweep's row (S,), and how many rows each layer kept, bottom layer first.

    A layer keeps the smallest set of rows that holds a share 1 − `tolerance` of norm_i / Σ norm + 5 · row_i norm_i /
    Σ row · norm (`rows_kept`: as many of the highest as that says).
    """
    counts: list[int] = []

    def choose(index: int, norms: Tensor, row: Tensor) -> Tensor:
        scores = norms / norms.sum() + 5 * row * norms / (row * norms).sum()
        highest = scores.argsort(descending=True)
        held = scores[highest].cumsum(0)
        count = int((held < (1 - tolerance) * held[-1]).sum()) + 1
        if rows_kept is not None:
            assert rows_kept[index] >= count
            count = rows_kept[index]
        counts.insert(0, count)
        return torch.zeros_like(norms, dtype=torch.bool).scatter(0, highest[:count], value=True)

    _, row = pruned_relevance(model, inputs, target, choose)
    return row, counts


def glimpse_rows(
    model: nn.Module,
    inputs: Mapping[str, Any],
    targets: Sequence[Target],
    *,
    propagation: str = "literal",
    stats_domain: str = "full",
    head_temperature: float = 0.5,
    depth_rate: float = 0.2,
    top: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(N, S) rows of GLIMPSE's R = Π (2I + α E) / 2 or Π (I + α E), every matrix made; `top`: how many layers, from
    the top, take part. Padding columns count in no sum."""
    logits, kept = forward(model, inputs)
    mask = inputs.get("attention_mask")
    rows = []
    for target in targets:
        dense = gradients(logits, kept, target, temperature)
        sample, query_row, _ = target
        real = torch.ones(dense[0].shape[-1], dtype=torch.bool) if mask is None else mask[sample].bool()
        layers, strengths = [], []
        for index, gradient in enumerate(dense):
            probabilities = kept[index].probabilities[sample].detach()
            summed = gradient * real
            if stats_domain == "causal":
                summed = gradient * (probabilities > 0)
            relevant = gradient.clamp(min=0) * probabilities  # (H, S, S)
            positive = summed.clamp(min=0).sum((1, 2))
            means = torch.where(positive > 0, relevant.sum((1, 2)) / positive, 0)
            heads = torch.exp(means / head_temperature) / torch.exp(means / head_temperature).sum()
            matrix = torch.einsum("h,hij->ij", heads, relevant)
            sums = matrix.sum(1)
            layers.append(torch.where(sums[:, None] > 0, matrix / sums[:, None], 0))
            strengths.append(summed.sum(0).abs().sum())
        prior = torch.softmax(depth_rate * torch.arange(1, len(layers) + 1, dtype=dense[0].dtype), 0)
        strength = torch.stack(strengths) * prior
        if top is not None:
            strength[: len(layers) - top] = 0
        share = strength / strength.sum()
        identity = torch.eye(len(real), dtype=dense[0].dtype)
        relevancy = identity
        for weight, layer in zip(share, layers, strict=True):
            step = (2 * identity + weight * layer) / 2 if propagation == "literal" else identity + weight * layer
            relevancy = step @ relevancy
        rows.append(relevancy[query_row])
    return torch.stack(rows).detach()


def pruned_glimpse_row(
    model: nn.Module, inputs: Mapping[str, Any], target: Target, tolerance: float
) -> tuple[Tensor, list[int]]:
    """The pruned sweep's GLIMPSE row (S,) with default options, and how many rows each layer kept, bottom layer first.

    Besides q* a layer keeps the smallest set of rows that holds a share 1 − `tolerance` of norm_i / Σ norm + 5 · row_i
    / Σ row, the second over rows with a gradient, rows taken without their identity.
    """
    counts: list[int] = []
    strengths: list[Tensor] = []
    matrices: list[Tensor] = []  # both of the layers so far, top layer first
    query_row = target[1]
    layers = model.config.get_text_config().num_hidden_layers

    def running(size: int, like: Tensor) -> Tensor:
        row = like.new_zeros(size)
        row[query_row] = 1
        for strength, layer in zip(strengths, matrices, strict=True):
            row = row + 0.5 * strength / sum(strengths) * (row @ layer)
        return row

    def choose(index: int, norms: Tensor, _: Tensor) -> Tensor:
        added = running(len(norms), norms)
        added[query_row] -= 1
        added = added * (norms > 0)
        scores = norms / norms.sum() + (5 * added / added.sum() if added.sum() > 0 else 0)
        scores[query_row] = 0
        highest = scores.argsort(descending=True)
        held = scores[highest].cumsum(0)
        # The row that crosses the share is kept too.
        count = int((held < (1 - tolerance) * held[-1]).sum()) + 1 if held[-1] > 0 else 0
        counts.insert(0, count + 1)
        chosen = torch.zeros_like(norms, dtype=torch.bool).scatter(0, highest[:count], value=True)
        chosen[query_row] = True
        return chosen

    def matrix(gradient: Tensor, probabilities: Tensor) -> Tensor:
        relevant = gradient.clamp(min=0) * probabilities
        positive = gradient.clamp(min=0).sum((1, 2))
        means = torch.where(positive > 0, relevant.sum((1, 2)) / positive, 0)
        weighted = torch.einsum("h,hij->ij", torch.softmax(means / 0.5, 0), relevant)
        sums = weighted.sum(1, keepdim=True)
        matrices.append(torch.where(sums > 0, weighted / sums, 0))
        prior = 2.718281828459045 ** (0.2 * (layers - len(matrices)))
        strengths.append(gradient.sum(0).abs().sum() * prior)
        return matrices[-1]

    pruned_relevance(model, inputs, target, choose, matrix)
    return running(len(matrices[0]), matrices[0]), counts
