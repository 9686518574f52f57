"""From an image and a question to an answer with a relevancy map for each of its tokens."""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import math
import os
import platform
import string
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from .. import families, ops
from ..errors import ArgumentError, FastXAIError, UnknownFamilyError, UnsupportedModelError, one_line
from ..methods import GlimpseOptions, registry
from ..models.fingerprint import model_name
from ..prompting.joining import ANSWER_FILL, SUFFIX_TYPE_FAMILIES, find_question
from ..prompting.pictures import load_picture
from ..sweep.descent import MEMORY_MODES, Recording
from ..sweep.pruning import tolerances
from ..sweep.recording import Recorder, logits_agree, saves_a_forward
from ..sweep.sharding import find_ranks
from .aggregation import aggregate
from .cost import Estimate, estimate_cost
from .explanation import (
    Comparison,
    ExplainedImage,
    Explanation,
    PromptToken,
    Pruned,
    TokenExplanation,
    TokenWeight,
    UntouchedToken,
)
from .relevancy_rows import RelevancyRows, check_row_tolerance, explain_rows
from .token_choice import check_tokens, choose_tokens

if TYPE_CHECKING:
    from ..fastrm.head import FastRM
    from ..fastrm.live import LiveMaps, LiveStep

__all__ = ["Estimate", "Explainer"]

Progress = Callable[[str, int, int], None]

# Maps by a head that was trained for the model: no sweep, so it is not among the methods of `relevancy_rows`.
PROXY = "fastrm"


class Explainer:
    """Answers questions about pictures and says what each word of the answer rests on.

    The model is left exactly as it was found; it may be on any device or several, and of any dtype. Where its heads
    are split over the ranks of a ``torch.distributed`` group, every rank makes the same calls and gets the same.

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
            without a chat template. None: the chat template, and ``"{image}{question}"`` where there is none.

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
        method: str = "chefer",
        memory: str = "fast",
        row_tolerance: float | str = 0.0,
        options: GlimpseOptions | None = None,
        tokens: str = "all",
        head: FastRM | None = None,
        prompt_template: str | None = None,
    ) -> None:
        if method != PROXY:
            registry.find(method).check_options(options)
        elif head is None or options is not None:
            raise ArgumentError(
                "method: 'fastrm' takes no options, and a head that was trained for the model: "
                "head=fx.FastRM.from_pretrained(folder), or 'shipped' for the shipped model"
            )
        check_tokens(tokens)
        if memory not in MEMORY_MODES:
            raise ArgumentError(f"memory: expected one of {', '.join(MEMORY_MODES)}, got {memory!r}")
        check_row_tolerance(row_tolerance)
        if prompt_template is not None and not {"{image}", "{question}"} <= set(_fields(prompt_template)):
            raise ArgumentError(
                f"prompt_template: expected the fields {{image}} and {{question}}, got {prompt_template!r}"
            )
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "generate"):
            raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model that generates text")
        if getattr(config, "vision_config", None) is None and str(config.model_type) not in families.known():
            raise ArgumentError(
                f"model: {type(model).__name__} ({config.model_type}) reads no images, its configuration has no "
                "vision part; give an image-text-to-text model such as LLaVA"
            )
        for part in ("tokenizer", "image_processor"):
            if getattr(processor, part, None) is None:
                raise ArgumentError(
                    f"processor: {type(processor).__name__} has no {part}; give the model's own processor "
                    "(AutoProcessor.from_pretrained)"
                )
        self.model: Any = model
        self.processor = processor
        self.method = method
        self.memory = memory
        self.row_tolerance = row_tolerance
        self.options = options
        self.tokens = tokens
        if head is not None:
            head.check_model(model)
        self.head = head
        self.prompt_template = prompt_template

    def __call__(
        self,
        image: Any,
        question: str,
        *,
        max_new_tokens: int = 64,
        progress: Progress | None = None,
    ) -> Explanation:
        """Answer the question and explain the tokens of the answer.

        The answer is generated greedily without a graph; then one teacher-forced pass over prompt and answer gives
        every token's relevancy row. In memory mode "lean", and with a row tolerance in "fast", the sweep starts from
        what the generation computed instead of that pass. End-of-sequence and other special tokens are not explained.

        Args:
            image: a path, a PIL picture, or an array (h, w), (h, w, 3) or (h, w, 4), uint8 or floats in 0 … 1; a list
                of them for a question about several pictures.
            question: plain text, without image markers.
            max_new_tokens: the longest answer, in tokens.
            progress: called as ``progress(stage, done, total)`` with the stages "generate" (tokens) and "explain"
                (layers, of all tokens that go down together).

        Raises:
            ArgumentError: an unreadable picture, an empty question, no image token in the prompt, logits that are NaN.
            UnsupportedModelError: the model's attention cannot be registered.
            FastXAIError: the model answers with nothing at all.
        """
        report = progress or (lambda stage, done, total: None)
        pictures, inputs, notes = self._prepare(image, question, max_new_tokens)
        prompt_length = inputs["input_ids"].shape[1]
        # What can fail without the model fails before it runs.
        backend = self._backend()
        reading = self._reading(question, pictures, inputs, notes)

        started = time.perf_counter()
        recorder, live = self._recorder(inputs), self._live(inputs, pictures)
        generated, probabilities, chosen_by = self._generate(inputs, max_new_tokens, report, recorder, live)
        generate_seconds = time.perf_counter() - started
        ends = self._end_tokens()
        if generated and generated[-1] in ends:
            generated = generated[:-1]
        elif len(generated) >= max_new_tokens:
            notes.append(f"The answer was cut at {max_new_tokens} tokens (max_new_tokens).")
        skipped = ends | set(self.processor.tokenizer.all_special_ids)
        kept = [index for index, token in enumerate(generated) if token not in skipped]
        if not kept:
            raise FastXAIError("the model answered with nothing: there is no token to explain; ask differently")

        joined = self._join(inputs, generated)
        recording = None if recorder is None else recorder.recording()[0]
        pieces = self._pieces([generated[index] for index in kept])
        chosen = choose_tokens(pieces, [probabilities[index] for index in kept], self.tokens)
        untouched = [
            UntouchedToken(pieces[place], generated[index], prompt_length + index, probabilities[index])
            for place, index in enumerate(kept)
            if place not in chosen
        ]
        explained = [kept[place] for place in chosen]
        targets = [(0, prompt_length + index - 1, generated[index]) for index in explained]
        report("explain", 0, 1)
        started = time.perf_counter()
        with _peak_memory(joined["input_ids"].device) as peak:
            if self.method == PROXY and live is not None:
                result = _predicted([live.steps[index] for index in explained], joined["input_ids"].shape[1])
                notes.append("The FastRM head maps the image alone: prompt and earlier tokens have no values.")
            else:
                result = self._explain(joined, targets, prompt_length, recording, chosen_by, partial(report, "explain"))
        explain_seconds = time.perf_counter() - started
        report("explain", 1, 1)
        _check_finite(result)
        if result.fallback is not None:
            notes.append(f"Every layer was swept whole, row_tolerance had no effect. {result.fallback}.")
        return Explanation(
            question=question,
            answer=self._decode(generated).strip(),
            tokens=reading.tokens(
                result,
                [pieces[place] for place in chosen],
                [generated[index] for index in explained],
                [prompt_length + index for index in explained],
                weighted=self.method == "glimpse",
                entropies=None if live is None else [live.steps[index].entropy() for index in explained],
            ),
            prompt_tokens=reading.prompt_tokens,
            images=reading.images,
            method=self.method,
            memory=self.memory,
            row_tolerance=self.row_tolerance,
            backend=backend,
            seconds={"generate": generate_seconds, "explain": explain_seconds},
            peak_bytes=None if peak.bytes is None else peak.bytes + (recording.nbytes if recording else 0),
            model_name=model_name(self.model),
            model_class=type(self.model).__name__,
            device=str(self.model.device),
            dtype=str(self.model.dtype).removeprefix("torch."),
            sequence_length=joined["input_ids"].shape[1],
            prompt_length=prompt_length,
            versions=_versions(),
            notes=notes,
            options=registry.find(self.method).options_in_force(self.options),
            chosen_tokens=self.tokens,
            untouched=untouched,
            comparison=reading.comparison(result),
        )

    def answer(self, image: Any, question: str, *, max_new_tokens: int = 64) -> str:
        """The greedy answer alone; arguments and errors as in calling the explainer."""
        _, inputs, _ = self._prepare(image, question, max_new_tokens)
        generated, *_ = self._generate(inputs, max_new_tokens, lambda stage, done, total: None)
        return self._decode(generated).strip()

    def estimate(self, image: Any, question: str, *, max_new_tokens: int = 64) -> Estimate:
        """What an explanation will cost at most, before the model is run.

        An analytic count, not a measurement: operations and weight bytes of the vision tower, of reading the prompt, of
        `max_new_tokens` steps of generation, of one teacher-forced pass, and of one activation-only backward with its
        relevancy product per answer token; each at the rate that a probe of this machine reached (matrix product, bytes
        read, time of one small call; under 0.3 s, once per device and dtype). Bytes are the activations of the memory
        mode beyond the weights. It assumes that the answer takes all of `max_new_tokens`; a shorter answer costs less.
        Time is good to a factor of about three on a machine that does nothing else.

        Args:
            image, question, max_new_tokens: as in calling the explainer.

        Returns:
            Estimate: seconds, bytes, and the seconds' parts.

        Raises:
            ArgumentError: as in calling the explainer.

        Example:
            >>> import lvlm_fastxai as fx
            >>> from lvlm_fastxai import tiny
            >>> explainer = fx.Explainer(*fx.load_tiny_lvlm())
            >>> explainer.estimate(tiny.SAMPLE_IMAGE, tiny.SAMPLE_QUESTION, max_new_tokens=4).seconds > 0
            True
        """
        _, inputs, _ = self._prepare(image, question, max_new_tokens)
        return estimate_cost(
            self.model,
            prompt_length=inputs["input_ids"].shape[1],
            answer_length=max_new_tokens,
            pictures=inputs.get("pixel_values"),
            memory=self.memory,
            method=self.method,
            row_tolerance=self.row_tolerance,
        )

    def _prepare(
        self, image: Any, question: str, max_new_tokens: int
    ) -> tuple[list[Image.Image], dict[str, Any], list[str]]:
        if not isinstance(question, str) or not question.strip():
            raise ArgumentError("question: expected some text, got an empty question")
        if max_new_tokens < 1:
            raise ArgumentError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        marker = getattr(self.processor, "image_token", None)
        if isinstance(marker, str) and marker in question:
            raise ArgumentError(f"question: leave out the image marker {marker!r}, it is added for you")
        several = isinstance(image, list | tuple)
        if several and not image:
            raise ArgumentError("image: expected at least one picture, got an empty list")
        pictures = [load_picture(item) for item in (image if several else [image])]
        text, notes = self._prompt(question, len(pictures))
        # A template that writes the first token itself must not get it twice.
        first = self.processor.tokenizer.bos_token
        settings = {"add_special_tokens": False} if first and text.startswith(first) else {}
        try:
            encoded = self.processor(images=list(pictures), text=[text], return_tensors="pt", **settings)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise ArgumentError(f"the processor cannot prepare image and question: {one_line(error)}") from error
        device, dtype = self.model.device, self.model.dtype
        inputs: dict[str, Any] = {}
        for name, value in encoded.items():
            if isinstance(value, Tensor):
                value = value.to(device, dtype) if value.is_floating_point() else value.to(device)
            inputs[name] = value
        self._check_image_tokens(inputs, len(pictures))
        return pictures, inputs, notes

    def _prompt(self, question: str, pictures: int) -> tuple[str, list[str]]:
        template = self.prompt_template
        notes: list[str] = []
        if template is None and getattr(self.processor, "chat_template", None):
            content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), notes
        if template is None:
            template = "{image}{question}"
            notes.append("The processor has no chat template: the prompt is the image followed by the question.")
        marker = getattr(self.processor, "image_token", None) or "<image>"
        return template.replace("{image}", str(marker) * pictures).replace("{question}", question), notes

    def _check_image_tokens(self, inputs: Mapping[str, Any], pictures: int) -> None:
        token = families.media_tokens(self.model.config)[0]
        if token is not None and not bool((inputs["input_ids"] == token).any()):
            raise ArgumentError(
                f"the prompt holds no image token (id {token}) although {pictures} picture(s) came: the processor's "
                "chat template, or prompt_template, must put the image into the prompt"
            )

    def _accepted(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The processor's outputs that the model's forward takes; some are for the layout alone."""
        names = inspect.signature(self.model.forward).parameters
        return {name: value for name, value in inputs.items() if name in names}

    def _live(self, inputs: Mapping[str, Any], pictures: Sequence[Image.Image]) -> LiveMaps | None:
        """What will give every token its predicted map; None without a head."""
        if self.head is None:
            return None
        sizes = [[(picture.height, picture.width) for picture in pictures]]
        return self.head.live_maps(
            self.model, inputs, image_sizes=sizes, image_processor=self.processor.image_processor
        )

    def _recorder(self, inputs: Mapping[str, Any]) -> Recorder | None:
        """What will keep the pass of `generate` for the sweep; None where that saves nothing."""
        if self.method == PROXY:
            return None
        method = registry.find(self.method)
        tried = tolerances(method.tolerance(self.row_tolerance), self.model.dtype, inputs["input_ids"].shape[1])
        if not saves_a_forward(method.needs_gradient, self.memory, tried):
            return None
        try:
            return Recorder(self.model)
        except UnsupportedModelError:
            return None

    def _explain(
        self,
        joined: Mapping[str, Any],
        targets: list[tuple[int, int, int]],
        prompt_length: int,
        recording: Recording | None,
        chosen_by: Tensor | None,
        progress: Callable[[int, int], None],
    ) -> RelevancyRows:
        """Rows of the targets, from what `generate` has computed where that can be used, else from a forward."""
        accepted = self._accepted(joined)
        explain = partial(
            explain_rows,
            self.model,
            method=self.method,
            memory=self.memory,
            row_tolerance=self.row_tolerance,
            prompt_length=prompt_length,
            options=self.options,
            compare=self.method == "glimpse",
            progress=progress,
        )
        columns = accepted["input_ids"].shape[1]
        # An answer cut at its longest has a last token that `generate` chose but never read. No row depends on it, but
        # where gradients are summed over all columns.
        cut = recording is not None and recording.columns < columns
        all_columns = self.method == "glimpse" and (self.options or GlimpseOptions()).stats_domain == "full"
        if recording is None or chosen_by is None or (cut and all_columns):
            return explain(accepted, targets)
        read = {
            name: value[:, : recording.columns] if isinstance(value, Tensor) and value.shape == (1, columns) else value
            for name, value in accepted.items()
        }
        steps = [row - prompt_length + 1 for _, row, _ in targets]
        result = explain(read, targets, recording=recording)
        token_ids = torch.tensor([token for _, _, token in targets])
        own = chosen_by[steps].gather(1, token_ids[:, None])[:, 0]
        agree = logits_agree(result.logits, own, chosen_by[steps].abs().max(), self.model.dtype)
        ranks = find_ranks(self.model, self.model.config.get_text_config())
        if not bool(ranks.agree(torch.tensor([agree]))):
            return explain(accepted, targets)
        missing = (0, columns - recording.columns)
        compared = None if result.compared is None else nn.functional.pad(result.compared, missing)
        return replace(result, rows=nn.functional.pad(result.rows, missing), compared=compared)

    def _generate(
        self,
        inputs: Mapping[str, Any],
        max_new_tokens: int,
        report: Progress,
        recorder: Recorder | None = None,
        live: LiveMaps | None = None,
    ) -> tuple[list[int], list[float], Tensor | None]:
        """Tokens of the greedy answer; their probabilities, NaN where no choice rests on them; and, with a recorder,
        the (steps, V) fp32 logits that they were chosen by."""
        prompt_length = inputs["input_ids"].shape[1]

        # A model that writes an image marker would ask, in the teacher-forced pass, for a picture that is not there.
        media = [token for token in families.media_tokens(self.model.config) if token is not None]

        class Watch(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                # The largest of logits that hold a NaN is a token like any other: without this the answer is noise.
                if bool(scores.isnan().any()):
                    raise ArgumentError(
                        "model: its logits are NaN; check the weights and the dtype (fp16 overflows, bf16 does not)"
                    )
                report("generate", input_ids.shape[1] - prompt_length, max_new_tokens)
                markers = torch.tensor(media, device=scores.device, dtype=torch.long)
                return scores.index_fill(-1, markers, -torch.inf)

        report("generate", 0, max_new_tokens)
        wanted = recorder is not None or self.tokens != "all"
        with recorder or _evaluating(self.model), live or contextlib.nullcontext(), torch.no_grad():
            output = self.model.generate(
                **self._accepted(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                # Sampling settings of the checkpoint would only cause warnings about having no effect.
                temperature=None,
                top_p=None,
                top_k=None,
                logits_processor=LogitsProcessorList([Watch()]),
                return_dict_in_generate=True,
                output_logits=wanted,
                **({} if live is None else {"streamer": live}),
            )
        generated = output.sequences[0, prompt_length:].tolist()
        if not wanted:
            return generated, [math.nan] * len(generated), None
        logits = torch.cat(output.logits).float().cpu()
        probabilities = logits.softmax(-1)[range(len(generated)), generated].tolist()
        return generated, probabilities, None if recorder is None else logits

    def _end_tokens(self) -> set[int]:
        ends: set[int] = set()
        for holder in (self.model.generation_config, self.model.config, self.processor.tokenizer):
            value = getattr(holder, "eos_token_id", None)
            ends.update(value if isinstance(value, list | tuple) else [value] if value is not None else [])
        return ends

    def _join(self, inputs: Mapping[str, Any], answer: Sequence[int]) -> dict[str, Any]:
        """The teacher-forced inputs: prompt and answer, with every per-position input extended likewise."""
        joined = dict(inputs)
        tokens = inputs["input_ids"]
        joined["input_ids"] = torch.cat([tokens, torch.tensor([answer], dtype=tokens.dtype, device=tokens.device)], 1)
        for name, fill in ANSWER_FILL.items():
            value = inputs.get(name)
            if not isinstance(value, Tensor) or value.shape != tokens.shape:
                continue
            if name == "token_type_ids" and self.model.config.model_type in SUFFIX_TYPE_FAMILIES:
                fill = 1
            joined[name] = torch.cat([value, value.new_full((1, len(answer)), fill)], 1)
        return joined

    def _decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.processor.tokenizer.decode(
            list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token's own text, which depends on its neighbours; joined, they are the text of all."""
        pieces, before = [], ""
        for end in range(1, len(tokens) + 1):
            after = self._decode(tokens[:end], skip_special_tokens=False)
            # A character of several byte tokens appears whole at its last token.
            complete = after.rstrip("\ufffd") if end < len(tokens) else after
            complete = complete if complete.startswith(before) else after
            pieces.append(complete[len(before) :] if complete.startswith(before) else complete)
            before = complete
        return pieces

    def _backend(self) -> str:
        """Name of the implementation that will run; BackendUnavailableError if the one asked for cannot."""
        if self.method == "raw_attention":
            return "torch (no kernel is needed)"
        operator = "proxy_relevancy" if self.method == PROXY else "relevancy_product"
        return ops.chosen_backend(operator, self.model.device, self.model.dtype)

    def _reading(
        self, question: str, pictures: list[Image.Image], inputs: Mapping[str, Any], notes: list[str]
    ) -> _Reading:
        """How rows will be read: which columns are the picture's grid, the question's words and the template."""
        config = self.model.config
        sequence = inputs["input_ids"][0].tolist()
        layouts: list[families.ImageLayout] = []
        try:
            layouts = families.image_layouts(
                config,
                inputs,
                0,
                image_sizes=[(picture.height, picture.width) for picture in pictures],
                image_processor=self.processor.image_processor,
            )
            columns = families.prompt_columns(config, inputs, 0, len(sequence)).tolist()
            regions = [layout.box for layout in layouts]
        except UnknownFamilyError as error:
            notes.append(f"There is no image map: {error}")
            image_token = families.media_tokens(config)[0]
            columns = [column for column, token in enumerate(sequence) if token != image_token]
            regions = [(0.0, 0.0, 1.0, 1.0)] * len(pictures)
        pieces = self._pieces([sequence[column] for column in columns])
        inside = find_question(pieces, question)
        return _Reading(
            prompt_length=len(sequence),
            layouts=layouts,
            images=[
                ExplainedImage(p, (r[0] * p.width, r[1] * p.height, r[2] * p.width, r[3] * p.height))
                for p, r in zip(pictures, regions, strict=True)
            ],
            prompt_tokens=[
                PromptToken(piece, sequence[column], column, index in inside)
                for index, (piece, column) in enumerate(zip(pieces, columns, strict=True))
            ],
        )


@dataclass(frozen=True)
class _Reading:
    """Where things stand in the prompt, and how a relevancy row is split among them."""

    prompt_length: int
    layouts: list[families.ImageLayout]
    images: list[ExplainedImage]
    prompt_tokens: list[PromptToken]

    def tokens(
        self,
        result: RelevancyRows,
        pieces: Sequence[str],
        token_ids: Sequence[int],
        positions: Sequence[int],
        *,
        weighted: bool,
        entropies: Sequence[float] | None = None,
    ) -> list[TokenExplanation]:
        """One TokenExplanation per row of `result`; `weighted`: with what the tokens count for in the answer's maps;
        `entropies`: of the maps that a head predicts."""
        columns = [token.position for token in self.prompt_tokens]
        question = [token.position for token in self.prompt_tokens if token.in_question]
        template = [token.position for token in self.prompt_tokens if not token.in_question]
        image = sorted(set(range(self.prompt_length)) - set(columns))
        rows = result.rows.detach().float().cpu()  # (N, S)
        logits, probabilities = result.logits.tolist(), result.probabilities.tolist()
        weights: list[TokenWeight | None] = [None] * len(rows)
        if weighted:
            query_rows = [position - 1 for position in positions]
            # The words of the question, or of the prompt where there are none between template and image.
            found = aggregate(rows, result.probabilities.cpu(), image, question or columns, query_rows=query_rows)
            numbers = zip(
                *(
                    part.tolist()
                    for part in (
                        found.prompt_alignment,
                        found.visual_grounding,
                        found.image_weights,
                        found.prompt_weights,
                        found.token_scores,
                    )
                ),
                strict=True,
            )
            weights = [TokenWeight(*of_token) for of_token in numbers]
        explained = []
        for index, (row, position) in enumerate(zip(rows, positions, strict=True)):
            others = row.clone()
            others[position - 1] = 0.0  # the query row's own entry says nothing about the inputs
            explained.append(
                TokenExplanation(
                    text=pieces[index],
                    token_id=token_ids[index],
                    position=position,
                    probability=probabilities[index],
                    logit=logits[index],
                    image_maps=[layout.read(row).numpy() for layout in self.layouts],
                    prompt_scores=row[columns].numpy(),
                    shares={
                        "image": float(others[image].sum()),
                        "question": float(others[question].sum()),
                        "template": float(others[template].sum()),
                        "answer": float(others[self.prompt_length : position].sum()),
                    },
                    pruned=_pruned(result, index),
                    weight=weights[index],
                    entropy=None if entropies is None else entropies[index],
                )
            )
        return explained

    def comparison(self, result: RelevancyRows) -> Comparison | None:
        """The other method's maps, where the sweep has computed them."""
        if result.compared is None:
            return None
        row = result.compared.detach().float().cpu().mean(0)
        columns = [token.position for token in self.prompt_tokens]
        return Comparison("chefer", [layout.read(row).numpy() for layout in self.layouts], row[columns].numpy())


def _predicted(steps: Sequence[LiveStep], columns: int) -> RelevancyRows:
    """Rows of the steps' tokens, as a sweep would give them; nothing but the image's columns has a value."""
    rows = torch.stack([step.row() for step in steps])
    return RelevancyRows(
        nn.functional.pad(rows, (0, columns - rows.shape[1])),
        torch.cat([step.logits for step in steps]).cpu(),
        torch.cat([step.probabilities for step in steps]).cpu(),
    )


def _pruned(result: RelevancyRows, index: int) -> Pruned | None:
    """What the sweep kept for row `index`; None where it left nothing out."""
    certificate = result.certificate
    if certificate is None or not bool(certificate.dropped[index].any()):
        return None
    return Pruned(
        rows_kept=certificate.rows_kept[index].tolist(),
        dropped=certificate.dropped[index].tolist(),
        estimated_error=float(certificate.error[index]),
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


class _Peak:
    """Bytes that were allocated at the most, beyond those at the start; None where that cannot be read."""

    bytes: int | None = None


@contextlib.contextmanager
def _peak_memory(device: torch.device) -> Iterator[_Peak]:
    peak = _Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    statistics = Path("/proc/self/statm")
    if device.type != "cpu" or not statistics.exists():
        yield peak
        return
    # Resident memory, sampled: the only reading on a CPU that needs no allocator of our own and resets no counter that
    # others may be using. Heap that is free already would hide the first megabytes, so it is handed back before.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    stop = threading.Event()
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(statistics.read_text().split()[1]) * page

    before = most = resident()

    def watch() -> None:
        nonlocal most
        while not stop.wait(0.002):
            most = max(most, resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
    peak.bytes = max(most, resident()) - before


def _check_finite(result: RelevancyRows) -> None:
    if not bool(torch.isfinite(result.logits).all() and torch.isfinite(result.rows).all()):
        raise ArgumentError("model: logits or relevancy are NaN or infinite; check the weights and the dtype")


def _fields(template: str) -> list[str]:
    try:
        return [f"{{{field}}}" for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ArgumentError(f"prompt_template: {error}") from None


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("lvlm_fastxai", "torch", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            from .. import __version__

            versions[name] = __version__
    return {**versions, "python": platform.python_version()}
