"""Maps while the model talks: a streamer of ``generate()`` that gives every token its image map as it appears."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from .. import families
from ..errors import ArgumentError
from ..families import ImageLayout
from ..models.decoder import find_decoder_layers
from ..prompting.answers import end_tokens

if TYPE_CHECKING:
    from .head import FastRM, Folded, Prediction


@dataclass(frozen=True)
class LiveToken:
    """One token of one answer, as it appeared.

    Attributes:
        token_id: index in the vocabulary.
        probability, logit: of the raw logits that it was chosen by (temperature 1, no logits processor).
        entropy: of the map as a distribution over the image, in 0 … 1; low where the map is concentrated.
        bernoulli: mean entropy of the columns' own probabilities, in bits.
        image_maps: one (h, w) fp32 map per picture, in 0 … 1.

    Example:
        >>> token = LiveToken(7, 0.9, 4.2, 0.3, 0.5, [np.zeros((12, 12), np.float32)])
        >>> token.image_maps[0].shape
        (12, 12)
    """

    token_id: int
    probability: float
    logit: float
    entropy: float
    bernoulli: float
    image_maps: list[NDArray[np.float32]]


@dataclass(frozen=True)
class LiveStep:
    """One step of ``generate()``: a token of each of B answers. Tensors stay on the model's device until read.

    Attributes:
        index: 0 for the first token of the answers.
        token_ids: (B,) int64, on the CPU as ``generate()`` hands them over.
        open: B times False for what fills up an answer that has ended; the end token itself is True. Answers end
            with the ``eos_token_id`` of the model's own generation_config.
        prediction: map (B, 1, n), entropy and bernoulli (B, 1); the n image columns in the sequence's order.
        negative_logits: (B,) fp32, −1 times the tokens' logits.
        surprisals: (B,) fp32, −log of the tokens' probabilities.

    Example:
        >>> import lvlm_fastxai as fx
        >>> from lvlm_fastxai import tiny
        >>> from PIL import Image
        >>> model, processor = fx.load_tiny_lvlm()
        >>> content = [{"type": "image"}, {"type": "text", "text": tiny.SAMPLE_QUESTION}]
        >>> text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        >>> inputs = processor(images=Image.open(tiny.SAMPLE_IMAGE), text=text, return_tensors="pt")
        >>> head = fx.FastRM.from_pretrained("shipped")
        >>> step = next(fx.fastrm.stream(head, model, inputs, max_new_tokens=2))
        >>> step.index, step.open, step.row().shape == inputs["input_ids"][0].shape
        (0, (True,), True)
    """

    index: int
    token_ids: Tensor
    open: tuple[bool, ...]
    prediction: Prediction
    negative_logits: Tensor
    surprisals: Tensor
    _live: LiveMaps

    @property
    def logits(self) -> Tensor:
        """(B,) fp32, of the tokens: raw, no logits processor."""
        return -self.negative_logits

    @property
    def probabilities(self) -> Tensor:
        """(B,) fp32, of the tokens: temperature 1, no logits processor."""
        return self.surprisals.neg().exp()

    def token(self, sample: int = 0) -> LiveToken:
        """Read this step's token of one answer; UnknownFamilyError where the family's grids are not known."""
        row = self.row(sample)
        return LiveToken(
            token_id=int(self.token_ids[sample]),
            probability=float(self.probabilities[sample]),
            logit=float(self.logits[sample]),
            entropy=self.entropy(sample),
            bernoulli=float(self.prediction.bernoulli[sample, 0]),
            image_maps=[layout.read(row).numpy() for layout in self._live.layouts(sample)],
        )

    def entropy(self, sample: int = 0) -> float:
        """Read the entropy of one answer's map, in 0 … 1."""
        return float(self.prediction.entropy[sample, 0])

    def row(self, sample: int = 0) -> Tensor:
        """Read one answer's map as (prompt length,) fp32 on the CPU: 0 outside the image's columns."""
        live = self._live
        row = torch.zeros(live.prompt_length)
        columns = live.columns(sample)
        row[columns] = self.prediction.map[sample, 0, : len(columns)].float().cpu()
        return row


class LiveMaps:
    """Attaches a FastRM head to one ``generate()`` call: greedy, sampled or batched, of any known family.

    Hidden states of the image's columns are kept once, after the prompt has been read, in the model's dtype; every
    token then costs one pass over them. Nothing of the model is changed but two hooks, which the ``with`` block takes
    away again. Where ``generate()`` reads anything but one token for the next (beam search, assisted decoding, prompt
    lookup, ``guidance_scale``), it raises.

    Args:
        head: trained for this model (`FastRM.check_model`).
        model: a transformers image-text-to-text model.
        inputs: what ``generate()`` is given: the processor's outputs for B prompts, padded on the left.
        image_sizes: per sample, (height, width) of its pictures; see `lvlm_fastxai.families.image_layouts`.
        image_processor: the processor's, for exact grids.
        on_step: called with each `LiveStep` as it appears; without one the steps are kept in `steps`.

    Raises:
        ArgumentError: no input_ids, or a sample without image columns.
        ModelMismatchError: the head belongs to another model.
        UnsupportedModelError: the model's decoder layers cannot be found.

    Example:
        >>> import lvlm_fastxai as fx
        >>> from lvlm_fastxai import tiny
        >>> from PIL import Image
        >>> model, processor = fx.load_tiny_lvlm()
        >>> content = [{"type": "image"}, {"type": "text", "text": tiny.SAMPLE_QUESTION}]
        >>> text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        >>> inputs = processor(images=Image.open(tiny.SAMPLE_IMAGE), text=text, return_tensors="pt")
        >>> head = fx.FastRM.from_pretrained("shipped")
        >>> with fx.LiveMaps(head, model, inputs) as live:
        ...     output = model.generate(**inputs, streamer=live, max_new_tokens=4)
        >>> len(live.steps), live.steps[0].token().image_maps[0].shape
        (4, (12, 12))
    """

    def __init__(
        self,
        head: FastRM,
        model: nn.Module,
        inputs: Mapping[str, Any],
        *,
        image_sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
        image_processor: Any = None,
        on_step: Callable[[LiveStep], None] | None = None,
    ) -> None:
        head.check_model(model)
        _, layers = find_decoder_layers(model)
        if not -len(layers) <= head.config.layer < len(layers):
            raise ArgumentError(f"layer: the head reads layer {head.config.layer} of a model with {len(layers)}")
        tokens = inputs.get("input_ids")
        if not isinstance(tokens, Tensor) or tokens.dim() != 2:
            raise ArgumentError("inputs: 'input_ids' (B, S) are needed to find the image's columns")
        self.head = head
        self.model: Any = model
        self.inputs = inputs
        self.prompt_length: int = tokens.shape[1]
        self._image_sizes = image_sizes
        self._image_processor = image_processor
        self._on_step = on_step
        self._layer = layers[head.config.layer]
        self._layouts: dict[int, list[ImageLayout]] = {}
        self._columns = _image_columns(model, tokens)
        self._ends = end_tokens(model)
        self._hooks = ((self._layer, self._see_layer), (self.model, self._see_logits))
        self._reset()

    def _reset(self) -> None:
        self.steps: list[LiveStep] = []
        self._copies = 1  # answers to each prompt (num_return_sequences)
        self._read = 0  # columns of the prompt that have passed
        self._prompt_given = False
        self._chosen_next = False  # what the next token is chosen by has passed
        self._states: Tensor | None = None  # (B, n, D)
        self._lengths: Tensor | None = None
        self._state: Tensor | None = None  # (B, 1, D)
        self._logits: Tensor | None = None  # (B, V)
        self._open: tuple[bool, ...] = ()
        self._folded: Folded | None = None
        self._count = 0

    def __enter__(self) -> LiveMaps:
        self._reset()
        try:
            for module, hook in self._hooks:
                module.register_forward_hook(hook)
            return self
        except BaseException:
            self._detach()
            raise

    def __exit__(self, *exception: object) -> None:
        try:
            self._detach()
        finally:
            self._detach()  # once more where an interrupt came in between; nothing is left to do otherwise
            self._states = self._state = self._logits = None

    def _detach(self) -> None:
        """Take the hooks away, however many there are.

        They are found by what they call: an interrupt may come after a hook was registered and before its handle is
        stored anywhere.
        """
        for module, hook in self._hooks:
            for key in [key for key, found in module._forward_hooks.items() if found == hook]:
                module._forward_hooks.pop(key, None)

    def columns(self, sample: int = 0) -> Tensor:
        """List the image's columns of one prompt, ascending int64."""
        return self._columns[sample // self._copies]

    def layouts(self, sample: int = 0) -> list[ImageLayout]:
        """Find the grids of one prompt's pictures; UnknownFamilyError where the family's are not known."""
        prompt = sample // self._copies
        if prompt not in self._layouts:
            sizes = None if self._image_sizes is None else self._image_sizes[prompt]
            self._layouts[prompt] = families.image_layouts(
                self.model.config,
                self.inputs,
                prompt,
                image_sizes=sizes,
                image_processor=self._image_processor,
            )
        return self._layouts[prompt]

    @property
    def state_bytes(self) -> int:
        """Bytes of the hidden states that are kept."""
        return 0 if self._states is None else self._states.nbytes

    def _see_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output).detach()
        if hidden.shape[0] % len(self._columns):
            raise ArgumentError(
                f"inputs: generate() runs {hidden.shape[0]} sequences, LiveMaps was given {len(self._columns)} prompts"
            )
        length = hidden.shape[1]
        if self._read < self.prompt_length:
            expected = self._read + length <= self.prompt_length
        else:  # the last token, or without a cache the whole sequence; once
            expected = not self._chosen_next and length in (1, self.prompt_length + self._count)
        if not expected:
            raise ArgumentError(
                "LiveMaps: generate() reads several tokens for one, as assisted decoding, prompt lookup and "
                "guidance_scale make it; leave these out"
            )
        if self._read < self.prompt_length:
            self._keep(hidden)
        self._chosen_next = self._read >= self.prompt_length
        self._state = hidden[:, -1:]

    def _keep(self, hidden: Tensor) -> None:
        """Image columns of a piece of the prompt; a prompt that is read at once is one piece."""
        batch, length, width = hidden.shape
        if self._states is None:
            self._copies = batch // len(self._columns)
            counts = [len(columns) for columns in self._columns for _ in range(self._copies)]
            self._states = hidden.new_zeros(batch, max(counts), width)
            self._lengths = torch.tensor(counts, dtype=torch.int32, device=hidden.device)
        for sample in range(batch):
            columns = self.columns(sample)
            inside = ((columns >= self._read) & (columns < self._read + length)).nonzero()[:, 0]
            if len(inside):
                taken = (columns[inside] - self._read).to(hidden.device)
                self._states[sample, inside[0] : inside[-1] + 1] = hidden[sample, taken]
        self._read += length

    def _see_logits(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._logits = output.logits[:, -1].detach()

    def put(self, value: Tensor) -> None:
        """Take what ``generate()`` hands over, first with the prompt and then with each step's (B,) tokens."""
        if not self._prompt_given:
            self._prompt_given = True
            return
        if self._states is None or self._state is None or self._logits is None:
            raise ArgumentError("LiveMaps: use it as `with LiveMaps(...) as live: model.generate(..., streamer=live)`")
        device = self._states.device
        if self.head.bias.device != device:
            self.head = copy.deepcopy(self.head).to(device)  # the caller's stays where it is
        if self._folded is None or self._folded.bias.device != device:
            self._folded = self.head.fold()
        # Between two passes of the model the caches hold nothing of this, and each of torch's calls, however small,
        # takes long: a dozen fewer took live maps from 3.3 % of decode time to 2.7 % (benchmarks fastrm live).
        prediction = self.head.predict(self._states, self._state, lengths=self._lengths, folded=self._folded)
        tokens = value.reshape(-1)
        logits, on_device = self._logits.float(), tokens.to(self._logits.device)
        negative_logits = functional.nll_loss(logits, on_device, reduction="none")  # a gather in one call
        surprisals = functional.cross_entropy(logits, on_device, reduction="none")
        open_now = self._open or (True,) * len(tokens)
        self._open = tuple(
            was and token not in self._ends for was, token in zip(open_now, tokens.tolist(), strict=True)
        )
        step = LiveStep(self._count, tokens, open_now, prediction, negative_logits, surprisals, self)
        self._count += 1
        self._chosen_next = False
        (self._on_step or self.steps.append)(step)

    def end(self) -> None:
        """What ``generate()`` calls last."""


def stream(
    head: FastRM,
    model: Any,
    inputs: Mapping[str, Any],
    *,
    image_sizes: Sequence[Sequence[tuple[int, int]]] | None = None,
    image_processor: Any = None,
    **generate: Any,
) -> Iterator[LiveStep]:
    """Generate in a thread of its own, and yield each step as it appears.

    The thread ends with the reader: when the steps are exhausted, closed or no longer referred to, or when an error
    passes.

    Args:
        head, model, inputs, image_sizes, image_processor: as for `LiveMaps`.
        generate: further arguments of ``model.generate``, such as max_new_tokens and do_sample.

    Raises:
        ArgumentError, ModelMismatchError, UnsupportedModelError: as `LiveMaps`; what ``generate()`` raises is raised
            here.

    Example:
        >>> import lvlm_fastxai as fx
        >>> from lvlm_fastxai import tiny
        >>> from PIL import Image
        >>> model, processor = fx.load_tiny_lvlm()
        >>> content = [{"type": "image"}, {"type": "text", "text": tiny.SAMPLE_QUESTION}]
        >>> text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        >>> inputs = processor(images=Image.open(tiny.SAMPLE_IMAGE), text=text, return_tensors="pt")
        >>> head = fx.FastRM.from_pretrained("shipped")
        >>> for step in fx.fastrm.stream(head, model, inputs, max_new_tokens=2):
        ...     print(step.index, 0 < step.entropy() < 1)
        0 True
        1 True
    """
    steps: queue.SimpleQueue[LiveStep | BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def hand_over(step: LiveStep) -> None:
        if stopped.is_set():
            raise _Stopped
        steps.put(step)

    live = LiveMaps(head, model, inputs, image_sizes=image_sizes, image_processor=image_processor, on_step=hand_over)

    def run() -> None:
        try:
            # Gradients are a setting of each thread.
            with torch.no_grad(), live:
                model.generate(**inputs, **generate, streamer=live)
            steps.put(None)
        except _Stopped:
            pass
        except BaseException as error:
            steps.put(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        while (step := steps.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            yield step
    finally:
        stopped.set()  # first: from here on the thread ends with its next token, also where the wait is interrupted
        if thread.ident is not None:
            thread.join()


class _Stopped(Exception):
    """The reader of a stream has gone."""


def _image_columns(model: Any, tokens: Tensor) -> list[Tensor]:
    token = families.media_tokens(model.config)[0]
    if token is None:
        raise ArgumentError(f"model: the configuration of {type(model).__name__} names no image token")
    columns = [(row == token).nonzero()[:, 0].cpu() for row in tokens]
    empty = next((sample for sample, found in enumerate(columns) if not len(found)), None)
    if empty is not None:
        raise ArgumentError(f"inputs: sample {empty} has no image token (id {token}), so there is nothing to map")
    return columns
