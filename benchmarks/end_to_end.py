"""Whole explanations: ours against eager relevancy, the bare forward + backward, and the plain forward.

Time: every variant once per round, all in one process, ratios taken within a round, medians over the rounds.
Memory: every variant in a process of its own, peak resident memory above what the loaded model takes.

Two eager baselines: with frozen parameters, the best it can be, and as published tools run it.

Random weights have no concentrated gradients, so ``pruned`` (ε = 0.1) keeps most rows of them. ``pruned_5_percent``
forces the share of rows that real weights need (docs/pruned-sweep.md: 1 to 6 %), an assumption about the model, not a
measurement: it shows what such a sweep costs, and its map means nothing. ``…_fused`` takes
`attention_backward_relevancy` for every layer, whatever `sweep.attention.FUSED_RATIO` knows of the backend.
``glimpse…`` is that method in the place of chefer.

Predictions, written before the first run (decoder 8 x 1024, 16 heads, S = 704, fp32, one target): a layer's matrix
products are 18 GFLOP each way, its attention 1.0 forward and 2.5 backward, the relevancy product 1.0. So fast mode
should cost 1.03x of forward + backward, and lean mode, which runs the forward twice, 1.5x. Memory: fast 1.0x of theirs;
lean one layer's activations of eight and eight layer inputs, 18 %.

Measured at commit a2ce71d: 1.03x, 1.50x, 1.00x as predicted; lean takes 24 %, because the backward through a layer's
MLP holds three gradients of its width beside its activations, which the prediction left out.

Predicted for the fused backward, which takes half of the time of torch's alone: 0.88x and 1.28x. Measured
(results/end-to-end.json): 0.98x and 1.44x at S = 704, 0.93x and 1.45x at S = 4096. Attention's backward is a smaller
part of the whole than the prediction took it for.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import machine


@dataclass(frozen=True)
class Case:
    """A decoder and a sequence; the prompt is given as embeddings, as a vision tower's output would be."""

    layers: int
    width: int
    heads: int
    key_heads: int
    intermediate: int
    columns: int
    targets: int = 1
    dtype: str = "float32"
    architecture: str = "Llama"
    vocabulary: int = 32000


ROW_TOLERANCE = 0.1
FORCED_SHARE = 0.05
CASES = {
    # The shape of the acceptance test: an eight-layer decoder at LLaVA-1.5's 576 image tokens + 128 of text.
    "decoder-704": Case(8, 1024, 16, 16, 2816, 704),
    # In the dtype of a GPU: how many (S, width) tensors a layer keeps carries over to a 7B model.
    "decoder-704-bf16": Case(8, 1024, 16, 16, 2816, 704, dtype="bfloat16"),
    "decoder-4096": Case(8, 1024, 16, 16, 2816, 4096),
    "decoder-704-16-targets": Case(8, 1024, 16, 16, 2816, 704, targets=16),
    # SmolLM2-135M's decoder (the language model of SmolVLM-256M) at 1024 columns.
    "smollm2-135m-1024": Case(30, 576, 9, 3, 1536, 1024),
}
DEFAULT_VARIANTS = ("forward", "forward_backward", "fast", "lean", "min", "eager", "eager_as_published")
FUSED = ("fast_fused", "pruned_5_percent_fused")
VARIANTS = (*DEFAULT_VARIANTS, "pruned", "pruned_5_percent", *FUSED)
# With default options; `benchmarks.glimpse` has the others.
GLIMPSE = ("glimpse", "glimpse_lean", "glimpse_pruned_5_percent")


def build(case: Case, device: str) -> tuple[Any, dict[str, Any], list[tuple[int, int, int]]]:
    """A random model of the case's shape, its inputs and the explained logits."""
    import torch

    torch.manual_seed(0)
    model = build_model(case, device)
    return model, *build_inputs(case, device)


def build_model(case: Case, device: str) -> Any:
    """A random decoder, made on the device in its dtype: a 7B model takes its 13 GiB there, and nothing on the host."""
    import torch
    import transformers

    config = getattr(transformers, f"{case.architecture}Config")(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_heads,
        max_position_embeddings=max(32768, case.columns),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, case.dtype))
    try:
        with torch.device(device):
            model = getattr(transformers, f"{case.architecture}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def build_inputs(case: Case, device: str) -> tuple[dict[str, Any], list[tuple[int, int, int]]]:
    """Embeddings, and the explained logits: of the last rows."""
    import torch

    embeddings = torch.randn(1, case.columns, case.width, device=device, dtype=getattr(torch, case.dtype))
    rows = [case.columns - 1 - index for index in range(case.targets)]
    return {"inputs_embeds": embeddings}, [(0, row, (7 + row) % case.vocabulary) for row in rows]


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """``module.name`` is ``value`` inside."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def forced_rows(share: float) -> contextlib.AbstractContextManager[None]:
    """The pruned sweep keeps this share of every layer's rows, those of the largest gradients, whatever they hold."""
    import torch

    from lvlm_fastxai.sweep import descent as sweep
    from lvlm_fastxai.sweep.pruning import Selection

    select_rows = sweep.select_rows

    def select(norms: Any, tolerance: float, **options: Any) -> Selection:
        selection = select_rows(norms, tolerance, **options)  # it takes the time that choosing takes
        count = math.ceil(share * norms.shape[-1])
        rows = norms.topk(count, dim=-1).indices.sort(dim=-1).values
        return Selection(rows, torch.full_like(selection.counts, count), selection.norms)

    return replaced(sweep, "select_rows", select)


def forced_fused() -> contextlib.AbstractContextManager[None]:
    """Every layer's backward is the fused one, whatever has been measured."""
    from lvlm_fastxai import ops
    from lvlm_fastxai.sweep import attention

    return replaced(attention, "FUSED_RATIO", dict.fromkeys(ops.BACKENDS, 0.0))


def full_relevancy(attentions: Any, gradients: Any) -> Any:
    """R (S, S) of every layer's attention and its gradient, (1, H, S, S) each, bottom layer first."""
    import torch

    with torch.no_grad():
        relevancy = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
        for attention, gradient in zip(attentions, gradients, strict=True):
            relevancy = relevancy + (attention * gradient)[0].clamp(min=0).mean(0).float() @ relevancy
        return relevancy


def work(variant: str, model: Any, inputs: dict[str, Any], targets: list[tuple[int, int, int]]) -> Callable[[], object]:
    """The call that is measured."""
    import torch

    import lvlm_fastxai as fx

    embeddings = inputs["inputs_embeds"]
    rows = torch.tensor([row for _, row, _ in targets], device=embeddings.device)

    def forward() -> Any:
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            return model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=rows).logits

    def forward_backward() -> Any:
        model.set_attn_implementation("sdpa")
        leaf = embeddings.detach().requires_grad_()
        logits = model(inputs_embeds=leaf, use_cache=False, logits_to_keep=rows).logits.float()
        last = len(targets) - 1
        for index, (_, _, token) in enumerate(targets):
            (gradient,) = torch.autograd.grad(logits[0, index, token], leaf, retain_graph=index < last)
        return gradient

    def eager() -> Any:
        model.set_attn_implementation("eager")
        leaf = embeddings.detach().requires_grad_()
        output = model(inputs_embeds=leaf, use_cache=False, output_attentions=True, logits_to_keep=rows)
        found = []
        for index, (_, row, token) in enumerate(targets):
            logit = output.logits[0, index, token].float()
            gradients = torch.autograd.grad(logit, output.attentions, retain_graph=index + 1 < len(targets))
            found.append(full_relevancy(output.attentions, gradients)[row])
        return found

    def eager_as_published() -> Any:
        # LVLM-Interpret takes backward(retain_graph=True) on a model as it was loaded: every parameter gets a gradient
        # too, and no activation is let go.
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        try:
            return relevancy_of_parameters_too()
        finally:
            for parameter in model.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None

    def relevancy_of_parameters_too() -> Any:
        model.set_attn_implementation("eager")
        output = model(inputs_embeds=embeddings, use_cache=False, output_attentions=True, logits_to_keep=rows)
        for attention in output.attentions:
            attention.retain_grad()
        found = []
        for index, (_, _, token) in enumerate(targets):
            model.zero_grad()
            output.logits[0, index, token].float().backward(retain_graph=True)
            gradients = [attention.grad for attention in output.attentions]
            found.append(full_relevancy(output.attentions, gradients)[rows[index]])
            for attention in output.attentions:
                attention.grad = None
        return found

    def ours() -> Any:
        return fx.relevancy_rows(model, inputs, targets, memory=variant)

    def pruned() -> Any:
        return fx.relevancy_rows(model, inputs, targets, row_tolerance=ROW_TOLERANCE)

    def pruned_5_percent() -> Any:
        with forced_rows(FORCED_SHARE):
            return pruned()

    def glimpse(**how: Any) -> Any:
        return fx.relevancy_rows(model, inputs, targets, method="glimpse", **how)

    def glimpse_lean() -> Any:
        return glimpse(memory="lean")

    def glimpse_pruned_5_percent() -> Any:
        with forced_rows(FORCED_SHARE):
            return glimpse(row_tolerance=ROW_TOLERANCE)

    def fast_fused() -> Any:
        with forced_fused():
            return fx.relevancy_rows(model, inputs, targets)

    def pruned_5_percent_fused() -> Any:
        with forced_fused():
            return pruned_5_percent()

    others = {
        "forward": forward,
        "forward_backward": forward_backward,
        "eager": eager,
        "eager_as_published": eager_as_published,
        "pruned": pruned,
        "pruned_5_percent": pruned_5_percent,
        "glimpse": glimpse,
        "glimpse_lean": glimpse_lean,
        "glimpse_pruned_5_percent": glimpse_pruned_5_percent,
        "fast_fused": fast_fused,
        "pruned_5_percent_fused": pruned_5_percent_fused,
    }
    return others.get(variant, ours)


def measure_time(case: Case, variants: list[str], rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Median seconds, and the median over rounds of the ratio to forward + backward in the same round."""
    model, inputs, targets = build(case, device)
    calls = {variant: work(variant, model, inputs, targets) for variant in variants}
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant, call in calls.items():
            taken[variant].append(machine.seconds(call, device))
    base = taken["forward_backward"]
    return {
        variant: {
            "seconds": statistics.median(times),
            "time_ratio": statistics.median(a / b for a, b in zip(times, base, strict=True)),
            "time_ratio_min": min(a / b for a, b in zip(times, base, strict=True)),
            "time_ratio_max": max(a / b for a, b in zip(times, base, strict=True)),
        }
        for variant, times in taken.items()
    }


def measure_memory(name: str, variant: str, device: str) -> int | str:
    """Peak extra bytes of one variant in a fresh process, or ``OUT_OF_MEMORY``."""
    return machine.in_fresh_process("benchmarks.end_to_end", name, variant, device)


def _memory_worker(name: str, variant: str, device: str) -> int:
    case = CASES[name]
    model, inputs, targets = build(case, device)
    if device == "cpu":
        machine.limit_memory()
    # The second run is measured: what libraries and thread pools keep for good is not part of an explanation.
    work(variant, model, inputs, targets)()
    return machine.peak_extra_bytes(work(variant, model, inputs, targets), device)


def run(names: list[str], variants: list[str], rounds: int, device: str) -> dict[str, Any]:
    """All figures of the named cases."""
    results: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        memory = {variant: measure_memory(name, variant, device) for variant in variants}
        fits = [variant for variant in variants if memory[variant] != machine.OUT_OF_MEMORY]
        times = measure_time(case, fits, rounds, device)
        results[name] = {
            "case": case.__dict__ | {},
            "variants": {
                variant: {**times.get(variant, {"seconds": machine.OUT_OF_MEMORY}), "extra_bytes": memory[variant]}
                for variant in variants
            },
        }
        add_memory_ratios(results[name]["variants"])
        print(table(name, results[name]), flush=True)
    return results


def add_memory_ratios(figures: dict[str, dict[str, Any]]) -> None:
    """Each variant's memory over that of forward + backward, where both are known."""
    base = figures["forward_backward"]["extra_bytes"]
    for found in figures.values():
        if isinstance(found["extra_bytes"], str):
            found["memory_ratio"] = found["extra_bytes"]
        elif not isinstance(base, str) and base > 0:
            found["memory_ratio"] = found["extra_bytes"] / base


def table(name: str, result: dict[str, Any]) -> str:
    """One case as text: ratios to forward + activation-only backward."""
    lines = [name, f"  {'variant':24}{'seconds':>10}{'x fwd+bwd':>11}{'extra MiB':>11}{'x fwd+bwd':>11}"]
    for variant, figures in result["variants"].items():
        if figures["extra_bytes"] == machine.OUT_OF_MEMORY:
            lines.append(f"  {variant:24}{machine.OUT_OF_MEMORY:>14}")
            continue
        # Where forward + backward itself does not fit there is nothing to compare with.
        time_ratio, memory_ratio = figures.get("time_ratio", math.nan), figures.get("memory_ratio", math.nan)
        lines.append(
            f"  {variant:24}{figures['seconds']:10.3f}{time_ratio:11.3f}"
            f"{figures['extra_bytes'] / 2**20:11.1f}{memory_ratio:11.3f}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable; default decoder-704")
    parser.add_argument(
        "--variant", action="append", choices=(*VARIANTS, *GLIMPSE), help="repeatable; default the exact ones"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="results file (JSON)")


def main(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(args.threads)
    variants = args.variant or list(DEFAULT_VARIANTS)
    if "forward_backward" not in variants:
        variants = ["forward_backward", *variants]
    head = machine.describe()
    results = run(args.case or ["decoder-704"], variants, args.rounds, args.device)
    if args.out:
        machine.write_results(args.out, head, results)
    return 0


if __name__ == "__main__":
    worker = argparse.ArgumentParser()
    worker.add_argument("--worker", nargs=3, required=True, metavar=("CASE", "VARIANT", "DEVICE"))
    print(_memory_worker(*worker.parse_args().worker))
