"""From pictures and a question to an answer with a relevancy map for each of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from .. import ops
from ..choices import Memory, RowTolerance
from ..errors import ArgumentError
from ..methods import registry
from ..methods.glimpse_options import GlimpseOptions
from ..methods.registry import MethodName
from ..models.fingerprint import model_name
from ..models.lock import holding
from ..prompting.answering import Answerer, check_pair
from ..prompting.inputs import Inputs
from ..prompting.messages import DEFAULT_TEMPLATE, Message, Prompt, ask, has_chat_template
from ..sweep.forward import MEMORY_MODES
from .cost import Estimate, estimate_cost
from .explanation import Explanation
from .heads import Head, predicted_rows
from .reading import Reading
from .recorded_rows import MeasuredRows, explain_from_recording, make_recorder, measure
from .relevancy_rows import RelevancyRows, check_row_tolerance, explain_rows
from .said import Said, generate_and_choose
from .token_choice import check_tokens
from .versions import versions

__all__ = ["Estimate", "Explainer"]

Progress = Callable[[str, int, int], None]


class Explainer:
    """Answer questions about pictures, and say what each word of the answer rests on.

    The model is left exactly as it was found; it may be on any device or several, of any dtype, and wrapped by PEFT or
    ``torch.compile``. Where its heads are split over the ranks of a ``torch.distributed`` group, every rank makes the
    same calls and gets the same. Threads may share an explainer, or a model: their calls wait for each other.

    Args:
        model: a transformers image-text-to-text model with a decoder-only language model.
        processor: its processor (pictures and text).
        method: "chefer" (default), "lvlm_interpret", "glimpse" or "raw_attention"; see `relevancy_rows`. "glimpse"
            weights the answer's tokens and compares its maps with those of "chefer". "fastrm": the maps that `head`
            predicts while the answer is generated; approximate, of the image alone, and without a sweep.
        memory: "fast" keeps activations, "lean" recomputes layer by layer, "min" also keeps layer inputs off the
            device.
        row_tolerance: 0 for the exact sweep, ε > 0 for the pruned one, "auto" for what the dtype's rounding allows; see
            `relevancy_rows`.
        options: `GlimpseOptions` for method "glimpse"; None for its defaults.
        tokens: of the answer, which are explained: "all", "content" (those of content words) or "top:K" (the K most
            probable of these); one backward each.
        head: a `FastRM` head trained for this model. With any method it gives every token the entropy of its predicted
            map; method "fastrm" takes its maps.
        prompt_template: text around image and question, with the fields ``{image}`` and ``{question}``, for a processor
            without a chat template. None: the chat template of the processor or its tokenizer, and
            ``"{image}{question}"`` where there is none.

    Raises:
        ArgumentError: an unknown method or memory mode, a processor without pictures or text, a text-only model.
        ModelMismatchError: the head was trained for another model.

    Example:
        >>> import lvlm_fastxai as fx
        >>> from lvlm_fastxai import tiny
        >>> explainer = fx.Explainer(*fx.load_tiny_lvlm())
        >>> explanation = explainer(tiny.SAMPLE_IMAGE, tiny.SAMPLE_QUESTION)
        >>> len(explanation.tokens) > 0 and explanation.tokens[0].image_map.shape
        (12, 12)
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        method: MethodName = "chefer",
        memory: Memory = "fast",
        row_tolerance: RowTolerance = 0.0,
        options: GlimpseOptions | None = None,
        tokens: str = "all",
        head: Head | None = None,
        prompt_template: str | None = None,
    ) -> None:
        self._traits = registry.find(method)
        self._traits.check_options(options)
        if self._traits.needs_head and head is None:
            raise ArgumentError(
                f"method: {method!r} takes no options, and a head that was trained for the model: "
                "head=fx.FastRM.from_pretrained(folder), or 'shipped' for the shipped model"
            )
        check_tokens(tokens)
        if memory not in MEMORY_MODES:
            raise ArgumentError(f"memory: expected one of {', '.join(MEMORY_MODES)}, got {memory!r}")
        check_row_tolerance(row_tolerance)
        check_pair(model, processor)
        self._notes: list[str] = []
        template = prompt_template
        if template is None and not has_chat_template(processor):
            template = DEFAULT_TEMPLATE
            self._notes.append("The processor has no chat template: the prompt is the image followed by the question.")
        self._answerer = Answerer(model, processor, prompt_template=template)
        if head is not None:
            head.check_model(model)
        self.model: Any = model
        self.processor = processor
        self.method = method
        self.memory = memory
        self.row_tolerance = row_tolerance
        self.options = options
        self.tokens = tokens
        self.head = head
        self.prompt_template = prompt_template

    def __call__(
        self,
        image: Any,
        question: str | Sequence[Message],
        *,
        max_new_tokens: int = 64,
        progress: Progress | None = None,
    ) -> Explanation:
        """Answer the question and explain the tokens of the answer.

        The answer is generated greedily without a graph. Every token's relevancy row starts from what the generation
        computed, so the pictures are looked at once; in memory mode "min", and where the model's generation cannot be
        used, from a teacher-forced pass over prompt and answer. End-of-sequence and other special tokens are not
        explained.

        Args:
            image: a path, a PIL picture, or an array (h, w), (h, w, 3) or (h, w, 4), uint8 or floats in 0 … 1; a list
                of them for a question about several pictures.
            question: plain text, without image markers or other special tokens; or a conversation in transformers' chat
                format, whose picture parts bring their pictures or get those of `image` in turn.
            max_new_tokens: the longest answer, in tokens.
            progress: called as ``progress(stage, done, total)`` with the stages "generate" (tokens) and "explain"
                (layers, of all tokens that go down together).

        Raises:
            ArgumentError: an unreadable picture, an empty question or one that is too long for the model, no image
                token in the prompt, logits that are NaN.
            UnsupportedModelError: the model's attention cannot be registered.
            FastXAIError: the model answers with nothing at all.
        """
        report = progress or (lambda stage, done, total: None)
        with holding(self.model):
            prompt, inputs = self._ask(image, question, max_new_tokens)
            notes = list(self._notes)
            # What can fail without the model fails before it runs.
            backend = self._backend()
            reading = Reading.of(self._answerer, prompt.question, prompt.pictures, inputs, notes)
            said = self._answer(prompt, inputs, max_new_tokens, report)
            rows = self._explain(inputs, said, report)
        notes += said.remarks(self.model, max_new_tokens, rows.found, predicted=not self._traits.sweeps)
        return self._assemble(prompt, reading, said, rows, backend, notes)

    def answer(self, image: Any, question: str | Sequence[Message], *, max_new_tokens: int = 64) -> str:
        """Give the greedy answer alone; arguments and errors as in calling the explainer."""
        with holding(self.model):
            _, inputs = self._ask(image, question, max_new_tokens)
            return self._answerer.decode(self._answerer.answer(inputs, max_new_tokens)[0])

    def estimate(self, image: Any, question: str | Sequence[Message], *, max_new_tokens: int = 64) -> Estimate:
        """Say what an explanation will cost at most, before the model is run.

        An analytic count at rates that a probe of this machine reached (under 0.3 s, once per device and dtype); see
        `explain.cost`. It assumes that the answer takes all of `max_new_tokens`. Bytes are those beyond the weights.
        Time is good to a factor of about three on a machine that does nothing else.

        Arguments and errors are as in calling the explainer.

        Returns:
            Estimate: seconds, bytes, and the seconds' parts.

        Example:
            >>> import lvlm_fastxai as fx
            >>> from lvlm_fastxai import tiny
            >>> explainer = fx.Explainer(*fx.load_tiny_lvlm())
            >>> explainer.estimate(tiny.SAMPLE_IMAGE, tiny.SAMPLE_QUESTION, max_new_tokens=4).seconds > 0
            True
        """
        with holding(self.model):
            _, inputs = self._ask(image, question, max_new_tokens)
        return estimate_cost(
            self.model,
            prompt_length=inputs["input_ids"].shape[1],
            answer_length=max_new_tokens,
            pictures=inputs.get("pixel_values"),
            memory=self.memory,
            method=self.method,
            row_tolerance=self.row_tolerance,
        )

    def _assemble(
        self, prompt: Prompt, reading: Reading, said: Said, rows: MeasuredRows, backend: str, notes: list[str]
    ) -> Explanation:
        companion = self._traits.companion
        return Explanation(
            question=prompt.question,
            answer=self._answerer.decode(said.answer.token_ids),
            tokens=reading.tokens(
                rows.found,
                said.explained(),
                weighted=self._traits.weighs_tokens,
                entropies=said.entropies,
            ),
            prompt_tokens=reading.prompt_tokens,
            images=reading.images,
            method=self.method,
            memory=self.memory,
            row_tolerance=self.row_tolerance,
            backend=backend,
            seconds={"generate": said.seconds, "explain": rows.seconds},
            peak_bytes=rows.peak_bytes,
            model_name=model_name(self.model),
            model_class=type(self.model).__name__,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            sequence_length=said.length,
            prompt_length=said.prompt_length,
            versions=versions(),
            notes=notes,
            options=self._traits.options_in_force(self.options),
            chosen_tokens=self.tokens,
            untouched=said.untouched(),
            comparison=None if companion is None else reading.comparison(rows.found, companion),
        )

    def _ask(self, image: Any, question: str | Sequence[Message], max_new_tokens: int) -> tuple[Prompt, Inputs]:
        prompt = ask(image, question)
        if max_new_tokens < 1:
            raise ArgumentError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        return prompt, self._answerer.encode_asked([prompt])

    def _backend(self) -> str:
        """Name the implementation that will run; BackendUnavailableError if the one asked for cannot."""
        if not self._traits.operators:
            return "torch (no kernel is needed)"
        return str(ops.chosen_backend(self._traits.operators[0], self.model.device, self.model.dtype))

    def _answer(self, prompt: Prompt, inputs: Inputs, max_new_tokens: int, report: Progress) -> Said:
        """Generate the answer and choose its tokens."""
        live = None
        if self.head is not None:
            sizes = [[(picture.height, picture.width) for picture in prompt.pictures]]
            live = self.head.live_maps(
                self.model, inputs, image_sizes=sizes, image_processor=self.processor.image_processor
            )
        return generate_and_choose(
            self._answerer,
            inputs,
            max_new_tokens,
            self.tokens,
            recorder=make_recorder(self.model, self._traits, self.memory, self.row_tolerance, inputs),
            live=live,
            progress=partial(report, "generate"),
        )

    def _explain(self, inputs: Inputs, said: Said, report: Progress) -> MeasuredRows:
        """Compute the rows of the chosen tokens, swept or predicted."""
        joined = self._answerer.join(inputs, [said.answer.token_ids])
        if self._traits.sweeps:
            compute = partial(self._sweep, joined, said, partial(report, "explain"))
        else:
            compute = partial(predicted_rows, said.chosen_steps or [], said.length)
        report("explain", 0, 1)
        rows = measure(compute, joined["input_ids"].device, said.recording)
        report("explain", 1, 1)
        return rows

    def _sweep(self, joined: Inputs, said: Said, progress: Callable[[int, int], None]) -> RelevancyRows:
        explain = partial(
            explain_rows,
            self.model,
            method=self.method,
            memory=self.memory,
            row_tolerance=self.row_tolerance,
            prompt_length=said.prompt_length,
            options=self.options,
            compare=self._traits.companion is not None,
            progress=progress,
        )
        return explain_from_recording(
            explain,
            self.model,
            self._answerer.accepted(joined),
            said.targets,
            prompt_length=said.prompt_length,
            recording=said.recording,
            chosen_by=said.answer.logits,
            all_columns=self._traits.sums_all_columns(self.options),
        )
