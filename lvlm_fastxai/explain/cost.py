"""What an explanation will cost: an analytic count, at rates that a short probe of the machine gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..choices import Memory, RowTolerance
from ..methods import registry
from ..methods._base import GRADIENT_BUDGET_BYTES
from ..methods.registry import MethodName
from ..sweep.pruning import plan_sweep

__all__ = ["Estimate", "MachineRates", "estimate_cost", "machine_rates"]

# Small tensor operations that a decoder layer issues forward (norms, rotary embedding, projections, attention,
# residuals); for tiny models they, not the arithmetic, are the time.
CALLS_PER_LAYER = 60
BACKWARD_CALLS_PER_LAYER = 90
# The same for one step of `generate` outside the layers: cache, masks, stopping, choice of the token.
CALLS_PER_STEP = 200
# One op of the probe is timed back to back; inside a model each also pays for modules and Python around it.
CALL_OVERHEAD_FACTOR = 3.0
# A backward without weight gradients has one product per product of the forward; flash attention's has 5 for 2.
ATTENTION_BACKWARD = 2.5
# Share of a layer's rows that a pruned sweep keeps at most, by the least tolerance for which that holds: the largest of
# 42 to 78 targets of SmolLM2 at S = 136 … 1024 (benchmarks/results/pruned.json). Longer sequences keep a smaller share.
ROWS_KEPT = ((0.3, 0.03), (0.2, 0.04), (0.1, 0.15), (0.05, 0.29), (0.03, 0.39), (0.02, 0.72), (0.01, 0.89))


@dataclass(frozen=True)
class Estimate:
    """Expected cost of one explanation.

    Attributes:
        seconds: wall time, all of `parts` together.
        bytes: memory at the peak beyond the model's weights.
        operations: floating point operations of all matrix products over more than one position.
        parts: seconds of "vision", "prompt", "answer", "forward" (teacher-forced) and "backward" (all targets).
        sequence_length: positions of prompt and the longest answer.
    """

    seconds: float
    bytes: int
    parts: dict[str, float]
    operations: float
    sequence_length: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for `json.dump`."""
        return {
            "seconds": self.seconds,
            "bytes": self.bytes,
            "parts": self.parts,
            "operations": self.operations,
            "sequence_length": self.sequence_length,
        }


@dataclass(frozen=True)
class MachineRates:
    """What a probe reached: `operations` of a matrix product per second, `bytes` of weights read by a matrix–vector
    product per second, and seconds of one small `call`."""

    operations: float
    bytes: float
    call: float


@dataclass(frozen=True)
class _Work:
    """Floating point operations, bytes of weights that are read for a single row, and small calls."""

    operations: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: _Work) -> _Work:
        return _Work(self.operations + other.operations, self.bytes + other.bytes, self.calls + other.calls)

    def __mul__(self, times: float) -> _Work:
        return _Work(self.operations * times, self.bytes * times, self.calls * times)

    def seconds(self, rates: MachineRates) -> float:
        calls = CALL_OVERHEAD_FACTOR * self.calls * rates.call
        return self.operations / rates.operations + self.bytes / rates.bytes + calls


@cache
def machine_rates(device: torch.device, dtype: torch.dtype) -> MachineRates:
    """Probe this machine once per process, device and dtype; under 0.3 s on a CPU.

    Means, not bests: a machine that is busy with other things is as slow for the explanation as for the probe.
    """
    with torch.inference_mode():
        side = 1024 if device.type == "cpu" else 4096
        square = torch.randn(side, side, device=device).to(dtype)
        product = _mean(lambda: square @ square, device, 0.1)
        # 16 MiB in fp32 on a CPU: more than one core's own caches hold.
        tall = torch.randn(4 * side, side, device=device).to(dtype)
        vector = tall[0]
        reading = _mean(lambda: tall @ vector, device, 0.05)
        small = square[:8, :64].contiguous()
        call = _mean(lambda: small + small, device, 0.02)
    return MachineRates(2 * side**3 / product, tall.nbytes / reading, call)


def _mean(run: Callable[[], Tensor], device: torch.device, budget: float) -> float:
    run()
    _wait(device)
    count, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < budget or count == 0:
        run()
        count += 1
        if count % 16 == 0:
            _wait(device)
    _wait(device)
    return max(spent, time.perf_counter() - started) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def estimate_cost(
    model: Any,
    *,
    prompt_length: int,
    answer_length: int,
    pictures: Tensor | None = None,
    memory: Memory = "fast",
    method: MethodName = "chefer",
    row_tolerance: RowTolerance = 0.0,
) -> Estimate:
    """Estimate what it costs to generate and explain an answer.

    Args:
        model: a transformers image-text-to-text model.
        prompt_length: positions of the prompt, image tokens included.
        answer_length: tokens of the answer, each of them explained.
        pictures: the processor's pixel_values, (…, channels, h, w) or (patches, values); None: no vision tower runs.
        memory, method, row_tolerance: as in `Explainer`.

    Example:
        >>> import lvlm_fastxai as fx
        >>> model, _ = fx.load_tiny_lvlm()
        >>> estimate_cost(model, prompt_length=160, answer_length=4).sequence_length
        164
    """
    sizes, traits, total = _Sizes.of(model), registry.find(method), prompt_length + answer_length
    plan = plan_sweep(
        row_tolerance,
        memory,
        model.dtype,
        total,
        needs_gradient=traits.needs_gradient,
        prunes_by_itself=traits.prunes_by_itself,
    )
    # A FastRM head reads what the generation leaves, in passes over one layer's states: nothing beside the rest.
    records = plan.records or not traits.sweeps
    vision = sizes.vision(model.config, pictures)
    backward = _Work()
    if traits.needs_gradient:
        passes = ATTENTION_BACKWARD + traits.attention_passes
        backward = sizes.backward(total, answer_length, passes, plan.tolerances, recomputes=records or memory != "fast")
    work = {
        "vision": vision,
        "prompt": sizes.forward(prompt_length, 1),
        "answer": sizes.step() * (answer_length - 1),
        "forward": _Work() if records else vision + sizes.forward(total, answer_length),
        "backward": backward,
    }
    rates = machine_rates(model.device, model.dtype)
    parts = {name: part.seconds(rates) for name, part in work.items()}
    explaining = sizes.kept(total, memory, pruned=plan.tolerances != (0.0,))
    explaining += sizes.held(total, answer_length if traits.needs_gradient else 0)
    explaining += sizes.transient(total) + answer_length * sizes.vocabulary * 4
    return Estimate(
        seconds=sum(parts.values()),
        bytes=int(max(explaining, sizes.generating(total))),
        parts=parts,
        operations=sum(part.operations for part in work.values()),
        sequence_length=total,
    )


@dataclass(frozen=True)
class _Sizes:
    """A model's sizes, and what its passes cost; `item`: bytes of a number, `middle`: width inside the MLP."""

    layers: int
    width: int
    heads: int
    groups: int
    head: int
    middle: int
    vocabulary: int
    item: int
    decoder_weights: int
    head_weights: int
    vision_weights: int

    @classmethod
    def of(cls, model: Any) -> _Sizes:
        text, decoder = model.config.get_text_config(), model.get_decoder()
        decoder_weights = _weights(decoder, but=decoder.get_input_embeddings())
        head_weights = _weights(model.get_output_embeddings())
        return cls(
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            heads=text.num_attention_heads,
            groups=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            middle=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            vocabulary=text.vocab_size,
            item=torch.empty((), dtype=model.dtype).element_size(),
            decoder_weights=decoder_weights,
            head_weights=head_weights,
            vision_weights=max(0, _weights(model, but=model.get_input_embeddings()) - decoder_weights - head_weights),
        )

    def attention(self, length: int) -> float:
        return 2 * length**2 * self.heads * self.head * self.layers  # 4·S²·d·H, and the causal half of it

    def forward(self, length: int, rows: int) -> _Work:
        products = 2 * self.decoder_weights * length + 2 * self.head_weights * rows
        return _Work(products + self.attention(length), calls=self.layers * CALLS_PER_LAYER)

    def vision(self, config: Any, pictures: Tensor | None) -> _Work:
        patches, layers = _patches(config, pictures)
        return _Work(2 * self.vision_weights * patches, calls=layers * CALLS_PER_LAYER)

    def step(self) -> _Work:
        """One step of ``generate()``: every weight is read for one row."""
        read = (self.decoder_weights + self.head_weights) * self.item
        return _Work(0.0, read, self.layers * CALLS_PER_LAYER + CALLS_PER_STEP)

    def backward(
        self, total: int, targets: int, passes: float, tolerances: tuple[float, ...], *, recomputes: bool
    ) -> _Work:
        """All targets' way down; `passes` of attention: flash attention's own backward, and the method's products."""
        products = 2 * self.decoder_weights * total + passes * self.attention(total)
        whole = _Work(products, calls=self.layers * BACKWARD_CALLS_PER_LAYER) * targets
        work = _Work()
        # "auto" may try in vain; at most, all of its attempts are made.
        for tolerance in tolerances:
            if tolerance == 0:
                work += whole + self.forward(total, 0) if recomputes else whole
                continue
            # Each target recomputes its own rows; keys and values are computed for all rows once, and every target's
            # gradient goes through them.
            of_rows = (whole + self.forward(total, 0) * targets) * _rows_kept(tolerance)
            keys = 4 * self.layers * self.width * self.groups * self.head * total
            work += of_rows + _Work(keys, calls=self.layers * CALLS_PER_LAYER) * (targets + 1)
        return work

    def kept(self, total: int, memory: Memory, *, pruned: bool) -> int:
        """Bytes that stand from the forward to the last layer of the way down."""
        # What one layer keeps for its backward: residuals and normalised states, queries, keys, values and the
        # attention's output, the MLP's three inner states. Linear layers with frozen weights keep nothing of their own.
        attention = 2 * (self.heads + self.groups) * self.head
        of_layer = total * (8 * self.width + attention + 3 * self.middle) * self.item
        inputs = 0 if memory == "min" else self.layers * total * self.width * self.item
        # A recomputed layer stands beside its own temporaries.
        if pruned:
            # Keys and values with the normalised states that their graph starts from; of all layers in fast mode.
            keys_of_layer = total * (2 * self.width + 2 * self.groups * self.head) * self.item
            # Targets go through a layer in groups with no more rows than it has.
            return inputs + keys_of_layer * (self.layers if memory == "fast" else 1) + 2 * of_layer
        return self.layers * of_layer if memory == "fast" else inputs + 2 * of_layer

    def held(self, total: int, targets: int) -> int:
        """Bytes per target: the gradient above and below a layer, its dO, and the copy of all dO that kernels read."""
        gradients = min(2 * targets * total * self.width * self.item, GRADIENT_BUDGET_BYTES)
        return gradients + 2 * targets * total * self.heads * self.head * self.item

    def transient(self, total: int) -> int:
        return 2 * total * (2 * self.middle + 4 * self.width) * self.item

    def generating(self, total: int) -> int:
        cache = 2 * self.layers * self.groups * self.head * total * self.item
        return cache + self.transient(total) + self.vocabulary * 4


def _rows_kept(tolerance: float) -> float:
    return next((share for least, share in ROWS_KEPT if tolerance >= least), 1.0)


def _weights(module: nn.Module | None, but: nn.Module | None = None) -> int:
    """Parameters that take part in products, those of `but` left out."""
    if module is None:
        return 0
    left_out = {id(parameter) for parameter in but.parameters()} if but is not None else set()
    return sum(p.numel() for p in module.parameters() if p.dim() > 1 and id(p) not in left_out)


def _patches(config: Any, pictures: Tensor | None) -> tuple[int, int]:
    """Patches that the vision tower reads, and its number of layers."""
    vision = getattr(config, "vision_config", None)
    if pictures is None or vision is None:
        return 0, 0
    layers = getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", None) or 0
    if pictures.dim() < 4:
        return pictures.shape[-2], layers
    patch = getattr(vision, "patch_size", 14)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    return pictures[..., 0, 0, 0].numel() * (pictures.shape[-2] // patch) * (pictures.shape[-1] // patch), layers
