"""What the operators on an attention's tensors ask of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.ops._backends import SIXTEEN_AND_32_BIT
from lvlm_fastxai.ops.key_ranges import key_ranges as make_key_ranges


@dataclass(frozen=True)
class Arguments:
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

    def refuse(self, name: str, expected: str, got: object) -> NoReturn:
        raise ArgumentError(f"{self.operator}: `{name}` must {expected}, got {got}")

    def scale(self, scale: float | None) -> float:
        """The softmax scale, d**-0.5 by default."""
        return float(self.query.shape[-1]) ** -0.5 if scale is None else float(scale)

    def check(self, *, shared_gradient: bool) -> None:
        """
        Args:
            shared_gradient: whether one gradient may serve all targets.

        Raises:
            ArgumentError: a shape, dtype or device is wrong.
        """
        query, key = self.query, self.key
        outputs = () if self.output is None else (("output", self.output, "(B, H, Sq, d)"),)
        rows = () if self.row is None else (("row", self.row, "(B, N, Sq)"),)
        for name, tensor, axes in (
            ("query", query, "(B, H, Sq, d)"),
            ("key", key, "(B, Hkv, Sk, d)"),
            ("value", self.value, "(B, Hkv, Sk, d)"),
            *outputs,
            ("grad_output", self.grad_output, "(B, N, H, Sq, d)"),
            ("logsumexp", self.logsumexp, "(B, H, Sq)"),
            *rows,
        ):
            if tensor.dim() != axes.count(",") + 1:
                self.refuse(name, f"have shape {axes}", tuple(tensor.shape))
            if tensor.device != query.device:
                self.refuse(name, f"be on {query.device} like `query`", tensor.device)
        if query.dtype not in (*SIXTEEN_AND_32_BIT, torch.float64):
            self.refuse("query", "be float32, bfloat16, float16 or float64", query.dtype)
        like_query = (("key", key), ("value", self.value), ("output", self.output), ("grad_output", self.grad_output))
        for name, other in like_query:
            if other is not None and other.dtype != query.dtype:
                self.refuse(name, f"have dtype {query.dtype} like `query`", other.dtype)
        state_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        for name, tensor in (("logsumexp", self.logsumexp), ("row", self.row)):
            if tensor is not None and tensor.dtype != state_dtype:
                self.refuse(name, f"have dtype {state_dtype}", tensor.dtype)

        batch, heads, query_length, head_width = query.shape
        _, key_heads, key_length, _ = key.shape
        targets = (self.grad_output if self.row is None else self.row).shape[1]
        if head_width == 0:
            self.refuse("query", "have a head width of at least 1", tuple(query.shape))
        if heads == 0:
            self.refuse("query", "have at least one head", tuple(query.shape))
        if key_heads == 0 or heads % key_heads:
            self.refuse("key", f"have a number of heads that divides H = {heads}", key_heads)
        if targets == 0:
            name, of_targets = ("grad_output", self.grad_output) if self.row is None else ("row", self.row)
            self.refuse(name, "hold at least one target", tuple(of_targets.shape))
        for name, other, shape in (
            ("key", key, (batch, key_heads, key_length, head_width)),
            ("value", self.value, (batch, key_heads, key_length, head_width)),
            ("output", self.output, tuple(query.shape)),
            ("logsumexp", self.logsumexp, (batch, heads, query_length)),
            ("row", self.row, (batch, targets, query_length)),
        ):
            if other is not None and other.shape != shape:
                self.refuse(name, f"have shape {shape}", tuple(other.shape))
        expected = [(batch, targets, heads, query_length, head_width)]
        if shared_gradient:
            expected.append((batch, 1, heads, query_length, head_width))
        if tuple(self.grad_output.shape) not in expected:
            shapes = " or ".join(map(str, expected))
            self.refuse("grad_output", f"have shape {shapes}", tuple(self.grad_output.shape))

    def key_ranges(
        self,
        *,
        causal: bool,
        window: int | None,
        query_positions: Tensor | None,
        lengths: Tensor | None,
        key_ranges: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """First key and end (B, Sq) int32 of the range that each row sees; `key_ranges` replaces the other options.

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
        else:
            if not causal or window is not None or query_positions is not None or lengths is not None:
                raise ArgumentError(
                    f"{self.operator}: `key_ranges` replaces causal, window, query_positions and lengths; got it "
                    "together with one"
                )
            if key_ranges.shape != (batch, query_length, 2):
                self.refuse(
                    "key_ranges", f"have shape (B, Sq, 2) = {(batch, query_length, 2)}", tuple(key_ranges.shape)
                )
            if key_ranges.dtype not in (torch.int32, torch.int64):
                self.refuse("key_ranges", "hold int32 or int64", key_ranges.dtype)
        if key_ranges.device != self.query.device:
            self.refuse("key_ranges, query_positions and lengths", f"be on {self.query.device}", key_ranges.device)
        key_start, key_end = key_ranges.to(torch.int32).unbind(-1)
        return key_start, key_end
