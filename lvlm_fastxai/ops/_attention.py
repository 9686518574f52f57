"""The arguments of operators on an attention's tensors: one kind of arguments among others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.ops._arguments import as_int32, check_axes, check_dtypes, check_integers, check_sizes, refuse
from lvlm_fastxai.ops.key_ranges import key_ranges as make_key_ranges

KIND = "attention"


@dataclass(frozen=True)
class AttentionArguments:
    """Tensors of one call of `operator`: query (B,H,Sq,d) · key, value (B,Hkv,Sk,d) · grad_output (B,N,H,Sq,d) ·
    logsumexp (B,H,Sq) · row (B,N,Sq) and output (B,H,Sq,d) where the operator takes one."""

    operator: str
    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    logsumexp: Tensor
    row: Tensor | None = None
    output: Tensor | None = None

    def scale(self, scale: float | None) -> float:
        """Return the softmax scale, d**-0.5 by default."""
        return float(self.query.shape[-1]) ** -0.5 if scale is None else float(scale)

    def check(self, *, shared_gradient: bool) -> None:
        """Refuse tensors that do not describe one attention.

        Args:
            shared_gradient: whether one gradient may serve all targets.

        Raises:
            ArgumentError: a shape, dtype or device is wrong.
        """
        matrices = {
            "query": (self.query, "B H Sq d"),
            "key": (self.key, "B Hkv Sk d"),
            "value": (self.value, "B Hkv Sk d"),
        }
        if self.output is not None:
            matrices["output"] = self.output, "B H Sq d"
        states = {"logsumexp": (self.logsumexp, "B H Sq")}
        if self.row is not None:
            states["row"] = self.row, "B N Sq"
        gradients = {"grad_output": (self.grad_output, "B N H Sq d")}

        check_axes(self.operator, matrices | gradients | states)
        check_dtypes(
            self.operator,
            {name: tensor for name, (tensor, _) in (matrices | gradients).items()},
            {name: tensor for name, (tensor, _) in states.items()},
        )
        if shared_gradient and self.grad_output.shape[1] == 1:
            gradients = {"grad_output": (self.grad_output, "B 1 H Sq d")}
        counted = self.grad_output if self.row is None else self.row
        if counted.shape[1] == 0:
            name = "grad_output" if self.row is None else "row"
            refuse(self.operator, name, "hold at least one target", tuple(counted.shape))
        sizes = check_sizes(self.operator, matrices | states | gradients)
        if sizes["d"] == 0:
            refuse(self.operator, "query", "have a head width of at least 1", tuple(self.query.shape))
        if sizes["H"] == 0:
            refuse(self.operator, "query", "have at least one head", tuple(self.query.shape))
        if sizes["Hkv"] == 0 or sizes["H"] % sizes["Hkv"]:
            refuse(self.operator, "key", f"have a number of heads that divides H = {sizes['H']}", sizes["Hkv"])

    def key_ranges(
        self,
        *,
        causal: bool,
        window: int | None,
        query_positions: Tensor | None,
        lengths: Tensor | None,
        key_ranges: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the first key and the end, (B, Sq) int32, of the range that each row sees.

        `key_ranges` replaces the other options. What lies outside the keys is left to the backends, which all cut it.

        Raises:
            ArgumentError: a shape, dtype, device, value or combination is wrong.
        """
        batch, _, query_length, _ = self.query.shape
        if key_ranges is None:
            key_ranges = make_key_ranges(
                batch,
                query_length,
                self.key.shape[2],
                causal=causal,
                window=window,
                query_positions=query_positions,
                lengths=lengths,
                device=self.query.device,
            )
            if key_ranges.device != self.query.device:
                expected = f"be on {self.query.device}"
                refuse(self.operator, "query_positions` and `lengths", expected, key_ranges.device)
            key_start, key_end = key_ranges.unbind(-1)
            return key_start, key_end
        if not causal or window is not None or query_positions is not None or lengths is not None:
            raise ArgumentError(
                f"{self.operator}: `key_ranges` replaces causal, window, query_positions and lengths; got it "
                "together with one"
            )
        shape = (batch, query_length, 2)
        check_integers(self.operator, "key_ranges", key_ranges, [shape], "(B, Sq, 2)", self.query.device)
        key_start, key_end = as_int32(self.operator, "key_ranges", key_ranges).unbind(-1)
        return key_start, key_end
