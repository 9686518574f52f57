"""The FastRM head (arXiv 2412.01487): predicts an explained token's relevancy map from hidden states alone."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from ..choices import Activation, Norm
from ..errors import ArgumentError, ModelMismatchError, printable
from ..files import finish_folder, writing_folder
from ..models.fingerprint import fingerprint, is_outdated
from ..ops.proxy_relevancy import ACTIVATIONS, NORMS

if TYPE_CHECKING:
    from .live import LiveMaps

SCHEMA = "lvlm-fastxai/fastrm/2"
EARLIER = "; it was trained by an earlier version, which kept no checksum: train it again: lvlm-fastxai fastrm train"
CONFIG, WEIGHTS = "fastrm.json", "fastrm.safetensors"
SHIPPED = Path(__file__).parent / "shipped"
"""Folder of the head for the LVLM that ships with the package."""


@dataclass(frozen=True)
class FastRMConfig:
    """What a head is and which model it belongs to.

    Where the paper says nothing, the choice is ours: docs/fastrm.md has the ablation.

    Attributes:
        hidden_size: D, width of the model's hidden states.
        layer: index of the decoder layer whose output is read, before the model's final norm; −1 is the last.
        dim: d_p, width of the head's query and keys.
        query_width: width of a GELU layer between the normalised state and the query; 0 for the plain projection.
        norm: "rms" or "layer", with weights of its own.
        activation: "sigmoid" (each column for itself) or "softmax" (over the columns).
        eps: of the norm.
        binarisation: share of the min–max normalised relevancy above which a column is a positive target.
        decision_threshold: values of the map above it count as predicted positive, for a softmax after min–max.
        method: whose maps it was trained on.
        model_name, model_fingerprint: of the model; `lvlm_fastxai.models.fingerprint.fingerprint`.
        trained_on: sources of its maps.
        version: of this package.

    Raises:
        ArgumentError: a value outside these.

    Example:
        >>> FastRMConfig(hidden_size=192, activation="softmax").dim
        64
    """

    hidden_size: int
    layer: int = -2
    dim: int = 64
    query_width: int = 256
    norm: Norm = "layer"
    activation: Activation = "sigmoid"
    eps: float = 1e-6
    binarisation: float = 0.3
    decision_threshold: float = 0.5
    method: str = "chefer"
    model_name: str = ""
    model_fingerprint: str = ""
    trained_on: tuple[str, ...] = ()
    version: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "trained_on", tuple(self.trained_on))
        for name, least in (("hidden_size", 1), ("dim", 1), ("query_width", 0)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name, known in (("norm", NORMS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ArgumentError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.eps > 0:
            raise ArgumentError(f"eps: expected a positive number, got {self.eps}")
        for name in ("binarisation", "decision_threshold"):
            if not 0 < getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected a number between 0 and 1, got {getattr(self, name)}")


class Prediction(NamedTuple):
    """map (B, N, S) in 0 … 1, 0 at padding · entropy (B, N) of the map as a distribution over the columns, 0 on one
    column and 1 on all alike · bernoulli (B, N), mean entropy of the columns' own probabilities, in bits.

    Example:
        >>> head = FastRM(FastRMConfig(hidden_size=8))
        >>> prediction = head.predict(torch.randn(1, 5, 8), torch.randn(1, 1, 8))
        >>> prediction.map.shape, prediction.entropy.shape
        (torch.Size([1, 1, 5]), torch.Size([1, 1]))
    """

    map: Tensor
    entropy: Tensor
    bernoulli: Tensor


class Folded(NamedTuple):
    """A linear map from the head's query to the operator's query and offset: weight (D + 1, d_p), bias (D + 1,)."""

    weight: Tensor
    bias: Tensor


class FastRM(nn.Module):
    """Normalisation and single-head attention over the image's columns; trains unfolded, infers folded.

        U = norm(X),   q = U[q*] W_q,   k_j = U_j W_k,   s_j = q · k_j / √d_p + b,   m_j = sigmoid(s_j)

    `forward` computes this as it is written. `predict` folds W_k and the norm's weights into the query, so that all
    that is left per column is one dot product with its hidden state: `lvlm_fastxai.ops.proxy_relevancy`.

    Args:
        config: see `FastRMConfig`.

    Example:
        >>> import torch
        >>> head = FastRM(FastRMConfig(hidden_size=8, dim=4))
        >>> hidden, state = torch.randn(1, 5, 8), torch.randn(1, 2, 8)
        >>> torch.allclose(head(hidden, state).sigmoid(), head.predict(hidden, state).map, atol=1e-5)
        True
    """

    mean_map: Tensor
    norm_bias: nn.Parameter | None

    def __init__(self, config: FastRMConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.norm_weight = nn.Parameter(torch.ones(size))
        self.norm_bias = nn.Parameter(torch.zeros(size)) if config.norm == "layer" else None
        width = config.query_width
        self.query_layer = nn.Linear(size, width) if width else None
        self.query = nn.Linear(width or size, config.dim, bias=bool(width))
        self.key = nn.Linear(size, config.dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(()))
        # What a head without eyes would say, the baseline: mean of the training maps after min–max, where they all
        # have one number of columns.
        self.register_buffer("mean_map", torch.zeros(0))

    def forward(self, hidden: Tensor, state: Tensor) -> Tensor:
        """Compute the scores s (B, N, S), before the activation; differentiable.

        Args:
            hidden: (B, S, D) hidden states of the image's columns.
            state: (B, N, D) of the rows that produced the explained tokens.
        """
        query = self._query(state) * self.config.dim**-0.5
        return query @ self.key(self._normalised(hidden)).mT + self.bias

    @torch.no_grad()
    def fold(self) -> Folded:
        """Fold everything behind the query into one linear map, which holds until the weights change.

        Its first D rows give the folded query g ∘ W_kᵀ q / √d_p, the last the offset c · W_kᵀ q / √d_p + b.
        """
        key = self.key.weight.T * self.config.dim**-0.5  # (D, d_p)
        offset = torch.zeros_like(key[0]) if self.norm_bias is None else self.norm_bias @ key
        weight = torch.cat((key * self.norm_weight[:, None], offset[None]))
        bias = torch.zeros_like(weight[:, 0])
        bias[-1] = self.bias
        return Folded(weight, bias)

    @torch.no_grad()
    def predict(
        self,
        hidden: Tensor,
        state: Tensor,
        *,
        lengths: Tensor | None = None,
        folded: Folded | None = None,
        backend: ops.BackendName | None = None,
    ) -> Prediction:
        """Predict maps and their entropies, in one pass over the hidden states.

        Args:
            hidden: (B, S, D) hidden states of the image's columns, any floating dtype.
            state: (B, N, D) of the rows that produced the explained tokens.
            lengths: (B,) columns of each sample, padding behind them; default all S.
            folded: what `fold` gives; keep it where you predict often.
            backend: of `lvlm_fastxai.ops.proxy_relevancy`.

        Raises:
            ArgumentError: shapes do not fit each other or the head.
            BackendUnavailableError: the backend that was asked for cannot serve the call.
        """
        if hidden.shape[-1] != self.config.hidden_size or state.shape[-1] != self.config.hidden_size:
            raise ArgumentError(
                f"hidden: this head reads states of width {self.config.hidden_size}, got {hidden.shape[-1]} and "
                f"{state.shape[-1]}"
            )
        both = functional.linear(self._query(state), *(folded or self.fold()))
        both = both.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)
        config = self.config
        return Prediction(
            *ops.proxy_relevancy(
                *(hidden, both[..., :-1], both[..., -1]),
                norm=config.norm,
                activation=config.activation,
                eps=config.eps,
                lengths=lengths,
                backend=backend,
            )
        )

    def positive(self, relevancy: Tensor) -> Tensor:
        """Find the columns (…, S) bool that a map (…, S) calls relevant."""
        if self.config.activation == "softmax":
            relevancy = min_max(relevancy)
        return relevancy > self.config.decision_threshold

    def _query(self, state: Tensor) -> Tensor:
        state = self._normalised(state)
        if self.query_layer is not None:
            state = functional.gelu(self.query_layer(state))
        return self.query(state)

    def _normalised(self, states: Tensor) -> Tensor:
        states = states.to(self.norm_weight.dtype)
        if self.config.norm == "layer":
            return functional.layer_norm(states, states.shape[-1:], self.norm_weight, self.norm_bias, self.config.eps)
        return functional.rms_norm(states, states.shape[-1:], self.norm_weight, self.config.eps)

    def live_maps(self, model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> LiveMaps:
        """Attach this head to one ``generate()`` call; arguments as of `LiveMaps`."""
        from .live import LiveMaps

        return LiveMaps(self, model, inputs, **options)

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the head was not trained for.

        Raises:
            ModelMismatchError: the model's weights are others; any device and dtype of the same weights will do.
            UnsupportedModelError: its weights are not in memory.
        """
        config: Any = getattr(model, "config", None)
        if config is not None:
            size = config.get_text_config().hidden_size
            if size != self.config.hidden_size:
                raise ModelMismatchError(
                    f"this FastRM head was trained for {self.config.model_name or 'a model'} with hidden states of "
                    f"width {self.config.hidden_size}, this model's have {size}; train one for it: "
                    "lvlm-fastxai fastrm train"
                )
        found = fingerprint(model)
        if found != self.config.model_fingerprint:
            if is_outdated(self.config.model_fingerprint):
                raise ModelMismatchError(
                    f"this FastRM head knows its model by the fingerprint {self.config.model_fingerprint} of an "
                    "earlier version, which read a part of the weights only: train one again: lvlm-fastxai fastrm train"
                )
            raise ModelMismatchError(
                f"this FastRM head was trained for {self.config.model_name or 'another model'} (fingerprint "
                f"{self.config.model_fingerprint or 'not recorded'}), and this model's weights are others ({found}): "
                "its maps would be noise; train one for this model: lvlm-fastxai fastrm train"
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``fastrm.json`` and ``fastrm.safetensors``, which `from_pretrained` reads.

        A head that is there already stays as it is until both files of the new one are complete.

        Raises:
            ArgumentError: the folder cannot be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     FastRM(FastRMConfig(hidden_size=8)).save_pretrained(folder)
            ...     FastRM.from_pretrained(folder).config.hidden_size
            8
        """
        with writing_folder(folder, argument="folder") as scratch:
            self.write_files(scratch)

    def write_files(self, folder: Path) -> None:
        """Write the head's two files to a folder that nobody reads yet; `save_pretrained` for one that may be read."""
        from safetensors.torch import save

        weights = save({name: value.contiguous().cpu() for name, value in self.state_dict().items() if value.numel()})
        settings = {"schema": SCHEMA, **json.loads(json.dumps(asdict(self.config)))}
        settings["sha256"] = _digest(settings, weights)
        (folder / WEIGHTS).write_bytes(weights)
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FastRM:
        """Load the head in a folder: on the CPU, in evaluation mode.

        Args:
            folder: as `save_pretrained` wrote it; "shipped" names the head of the LVLM in the package.

        Raises:
            ArgumentError: there is no head, its files are damaged, of another version, or not of one head.
        """
        source = SHIPPED if str(folder) == "shipped" else Path(folder)
        try:
            return cls._load(source)
        except ArgumentError:
            finish_folder(source)  # where the process that wrote them was killed while both took their places
            return cls._load(source)

    @classmethod
    def _load(cls, source: Path) -> FastRM:
        from safetensors.torch import load

        if not (source / CONFIG).is_file():
            raise ArgumentError(
                f"'{printable(source)}' holds no FastRM head ({CONFIG}); train one: lvlm-fastxai fastrm train"
            )
        try:
            values = json.loads((source / CONFIG).read_bytes())
            data = (source / WEIGHTS).read_bytes()
            schema = values.get("schema")
            if schema != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}" + EARLIER * (schema == "lvlm-fastxai/fastrm/1"))
            digest = values.pop("sha256", None)
            whole = digest == _digest(values, data)
            del values["schema"]
            unknown = values.keys() - {field.name for field in fields(FastRMConfig)}
            if unknown:
                raise ValueError(f"unknown settings {', '.join(sorted(unknown))}")
            head = cls(FastRMConfig(**values))
            if not whole:
                raise ValueError(
                    f"{CONFIG} and {WEIGHTS} are not as they were written together; copy both anew, or train again"
                )
            # Empty tensors are not written; the mean map is of any length.
            weights = {name: own for name, own in head.state_dict().items() if not own.numel()}
            weights |= load(data)
            head.mean_map = weights["mean_map"]
            head.load_state_dict(weights)
        except ArgumentError:
            raise
        except Exception as error:  # json, safetensors and torch raise what they like on damaged files
            # All of torch's lines: the first does not say which weights do not fit.
            reason = printable(" ".join(str(error).split())) or type(error).__name__
            raise ArgumentError(f"cannot load the FastRM head in '{printable(source)}': {reason}") from error
        return head.eval()

    @property
    def fingerprint(self) -> str:
        """Of the head's own weights, for policies that were fitted with it."""
        return fingerprint(self)


def _digest(settings: Mapping[str, Any], weights: bytes) -> str:
    """SHA-256 of a head's two files, hexadecimal; the settings as values, so that white space does not count."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(weights)
    return digest.hexdigest()


def min_max(relevancy: Tensor) -> Tensor:
    """Scale a map (…, S) to 0 … 1; one that is constant becomes 0."""
    low, high = relevancy.aminmax(dim=-1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (relevancy - low) / torch.where(spread > 0, spread, 1), 0)


def initial_bias(positive_share: float) -> float:
    """Find the b at which every column's sigmoid is the share of positive columns: training starts from the prior."""
    share = min(max(positive_share, 1e-4), 1 - 1e-4)
    return math.log(share / (1 - share))
