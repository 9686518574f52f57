"""What `end-to-end` and `gpu-end-to-end` measure on a decoder: ours, eager relevancy, and the model's own passes.

A variant is one entry of :data:`VARIANTS`. Random weights have no concentrated gradients, so ``pruned`` (ε = 0.1) keeps
most rows of them. ``pruned_5_percent`` forces the share of rows that real weights need (docs/pruned-sweep.md: 1 to 6
%), an assumption about the model, not a measurement: it shows what such a sweep costs, and its map means nothing.
``…_fused`` takes `attention_backward_relevancy` for every layer, whatever `sweep.attention.FUSED_RATIO` knows of the
backend. ``glimpse…`` is that method in the place of chefer, with default options; `benchmarks.sweeps.glimpse` has the
others.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..models.decoders import Target

ROW_TOLERANCE = 0.1
FORCED_SHARE = 0.05


@dataclass(frozen=True)
class Problem:
    """What is explained: a decoder, its input embeddings, and (sample, query row, token) of each logit."""

    model: Any
    inputs: Mapping[str, Any]
    targets: Sequence[Target]

    @property
    def embeddings(self) -> Any:
        """(1, S, width) of the prompt."""
        return self.inputs["inputs_embeds"]

    @property
    def rows(self) -> Any:
        """(N,) query rows, on the embeddings' device."""
        import torch

        return torch.tensor([row for _, row, _ in self.targets], device=self.embeddings.device)

    def run(self, attention: str, embeddings: Any, **options: Any) -> Any:
        """Run transformers' own model with this attention; returns its output, with logits of the query rows only."""
        self.model.set_attn_implementation(attention)
        return self.model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=self.rows, **options)


Variant = Callable[[Problem], Any]


# The model's own passes


def forward(problem: Problem) -> Any:
    """Run the plain forward."""
    import torch

    with torch.no_grad():
        return problem.run("sdpa", problem.embeddings).logits


def forward_backward(problem: Problem) -> Any:
    """Run the forward and, for each target, an activation-only backward."""
    import torch

    leaf = problem.embeddings.detach().requires_grad_()
    logits = problem.run("sdpa", leaf).logits.float()
    last = len(problem.targets) - 1
    for index, (_, _, token) in enumerate(problem.targets):
        (gradient,) = torch.autograd.grad(logits[0, index, token], leaf, retain_graph=index < last)
    return gradient


# Eager relevancy


def full_relevancy(attentions: Sequence[Any], gradients: Sequence[Any]) -> Any:
    """Compute R (S, S) of every layer's attention and its gradient, (1, H, S, S) each, bottom layer first."""
    import torch

    with torch.no_grad():
        relevancy = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
        for attention, gradient in zip(attentions, gradients, strict=True):
            relevancy = relevancy + (attention * gradient)[0].clamp(min=0).mean(0).float() @ relevancy
        return relevancy


def eager(problem: Problem) -> list[Any]:
    """Compute full R as well as eager attention can: parameters frozen."""
    import torch

    output = problem.run("eager", problem.embeddings.detach().requires_grad_(), output_attentions=True)
    found = []
    for index, (_, row, token) in enumerate(problem.targets):
        logit = output.logits[0, index, token].float()
        gradients = torch.autograd.grad(logit, output.attentions, retain_graph=index + 1 < len(problem.targets))
        found.append(full_relevancy(output.attentions, gradients)[row])
    return found


def eager_as_published(problem: Problem) -> list[Any]:
    """Compute full R as LVLM-Interpret does, with ``backward(retain_graph=True)`` on a model as it was loaded.

    Every parameter gets a gradient too, and no activation is let go.
    """
    for parameter in problem.model.parameters():
        parameter.requires_grad_(True)
    try:
        return _relevancy_of_parameters_too(problem)
    finally:
        for parameter in problem.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


def _relevancy_of_parameters_too(problem: Problem) -> list[Any]:
    output = problem.run("eager", problem.embeddings, output_attentions=True)
    for attention in output.attentions:
        attention.retain_grad()
    found = []
    for index, (_, row, token) in enumerate(problem.targets):
        problem.model.zero_grad()
        output.logits[0, index, token].float().backward(retain_graph=True)
        gradients = [attention.grad for attention in output.attentions]
        found.append(full_relevancy(output.attentions, gradients)[row])
        for attention in output.attentions:
            attention.grad = None
    return found


# Ours


def ours(problem: Problem, **options: Any) -> Any:
    """Explain with these options of `relevancy_rows`."""
    import lvlm_fastxai as fx

    return fx.relevancy_rows(problem.model, problem.inputs, problem.targets, **options)


def inside(context: Callable[[], contextlib.AbstractContextManager[None]], variant: Variant) -> Variant:
    """Run a variant inside a context."""

    def run(problem: Problem) -> Any:
        with context():
            return variant(problem)

    return run


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Let ``module.name`` be ``value`` inside."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def forced_rows(share: float = FORCED_SHARE) -> contextlib.AbstractContextManager[None]:
    """Let the pruned sweep keep this share of every layer's rows, those of the largest gradients."""
    import torch

    from lvlm_fastxai.sweep import descent
    from lvlm_fastxai.sweep.pruning import Selection

    select_rows = descent.select_rows

    def select(norms: Any, tolerance: float, **options: Any) -> Selection:
        selection = select_rows(norms, tolerance, **options)  # it takes the time that choosing takes
        count = math.ceil(share * norms.shape[-1])
        rows = norms.topk(count, dim=-1).indices.sort(dim=-1).values
        return Selection(rows, torch.full_like(selection.counts, count), selection.norms)

    return replaced(descent, "select_rows", select)


def forced_fused() -> contextlib.AbstractContextManager[None]:
    """Let every layer's backward be the fused one, whatever has been measured."""
    from lvlm_fastxai import ops
    from lvlm_fastxai.sweep import attention

    return replaced(attention, "FUSED_RATIO", dict.fromkeys(ops.BACKENDS, 0.0))


_FEW_ROWS = inside(forced_rows, partial(ours, row_tolerance=ROW_TOLERANCE))

VARIANTS: dict[str, Variant] = {
    "forward": forward,
    "forward_backward": forward_backward,
    "fast": ours,
    "lean": partial(ours, memory="lean"),
    "min": partial(ours, memory="min"),
    "eager": eager,
    "eager_as_published": eager_as_published,
    "pruned": partial(ours, row_tolerance=ROW_TOLERANCE),
    "pruned_5_percent": _FEW_ROWS,
    "fast_fused": inside(forced_fused, ours),
    "pruned_5_percent_fused": inside(forced_fused, _FEW_ROWS),
    "glimpse": partial(ours, method="glimpse"),
    "glimpse_lean": partial(ours, method="glimpse", memory="lean"),
    "glimpse_pruned_5_percent": inside(forced_rows, partial(ours, method="glimpse", row_tolerance=ROW_TOLERANCE)),
}
DEFAULT = ("forward", "forward_backward", "fast", "lean", "min", "eager", "eager_as_published")
FUSED = ("fast_fused", "pruned_5_percent_fused")
GLIMPSE = ("glimpse", "glimpse_lean", "glimpse_pruned_5_percent")
CHEFER = tuple(name for name in VARIANTS if name not in GLIMPSE)


def work(variant: str, problem: Problem) -> Callable[[], Any]:
    """Prepare the call that is measured."""
    return partial(VARIANTS[variant], problem)
