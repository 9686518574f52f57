"""How a relevancy row is read: which columns are the pictures' grids, the question's words and the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from .. import families
from ..errors import UnknownFamilyError
from ..prompting.answering import Answerer
from ..prompting.joining import find_question
from .aggregation import aggregate
from .data import Comparison, ExplainedImage, PromptToken, Pruned, TokenExplanation, TokenWeight
from .relevancy_rows import RelevancyRows


@dataclass(frozen=True)
class Explained:
    """The tokens of an answer that have rows: their texts, ids and positions, all of one length."""

    pieces: list[str]
    token_ids: list[int]
    positions: list[int]


@dataclass(frozen=True)
class Reading:
    """Where things stand in one prompt.

    Attributes:
        prompt_length: number of columns before the answer.
        layouts: of the pictures' grids; empty for a family whose grids are not known.
        images: the pictures, and the parts of them under the grids.
        prompt_tokens: the columns of text.
    """

    prompt_length: int
    layouts: list[families.ImageLayout]
    images: list[ExplainedImage]
    prompt_tokens: list[PromptToken]

    @classmethod
    def of(
        cls,
        answerer: Answerer,
        question: str,
        pictures: Sequence[Image.Image],
        inputs: Mapping[str, Any],
        notes: list[str],
    ) -> Reading:
        """Find everything in the inputs of one prompt; `notes` learns what is missing."""
        config = answerer.model.config
        sequence = inputs["input_ids"][0].tolist()
        layouts: list[families.ImageLayout] = []
        try:
            (layouts,) = answerer.image_layouts(dict(inputs), [pictures])
            columns = families.prompt_columns(config, inputs, 0, len(sequence)).tolist()
            regions = [layout.box for layout in layouts]
        except UnknownFamilyError as error:
            notes.append(f"There is no image map: {error}")
            image_token = families.media_tokens(config)[0]
            columns = [column for column, token in enumerate(sequence) if token != image_token]
            regions = [(0.0, 0.0, 1.0, 1.0)] * len(pictures)
        pieces = answerer.pieces([sequence[column] for column in columns])
        inside = find_question(pieces, question)
        return cls(
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

    def tokens(
        self, result: RelevancyRows, explained: Explained, *, weighted: bool, entropies: Sequence[float] | None = None
    ) -> list[TokenExplanation]:
        """Read one `TokenExplanation` off each row of `result`.

        Args:
            result: rows of the tokens.
            explained: the tokens.
            weighted: whether tokens count for more or less in the answer's maps.
            entropies: of the maps that a head predicts.
        """
        columns = [token.position for token in self.prompt_tokens]
        rows = result.rows.detach().float().cpu()  # (N, S)
        logits, probabilities = result.logits.tolist(), result.probabilities.tolist()
        weights = self._weights(result, rows, explained) if weighted else [None] * len(rows)
        return [
            TokenExplanation(
                text=explained.pieces[index],
                token_id=explained.token_ids[index],
                position=position,
                probability=probabilities[index],
                logit=logits[index],
                image_maps=[layout.read(row).numpy() for layout in self.layouts],
                prompt_scores=row[columns].numpy(),
                shares=self._shares(row, position),
                pruned=_pruned(result, index),
                weight=weights[index],
                entropy=None if entropies is None else entropies[index],
            )
            for index, (row, position) in enumerate(zip(rows, explained.positions, strict=True))
        ]

    def comparison(self, result: RelevancyRows, method: str) -> Comparison | None:
        """The companion method's maps, where the sweep has computed them."""
        if result.compared is None:
            return None
        row = result.compared.detach().float().cpu().mean(0)
        columns = [token.position for token in self.prompt_tokens]
        return Comparison(method, [layout.read(row).numpy() for layout in self.layouts], row[columns].numpy())

    def _columns(self) -> tuple[list[int], list[int], list[int]]:
        """Columns of the pictures, of the question and of the template."""
        text = {token.position for token in self.prompt_tokens}
        image = [column for column in range(self.prompt_length) if column not in text]
        question = [token.position for token in self.prompt_tokens if token.in_question]
        template = [token.position for token in self.prompt_tokens if not token.in_question]
        return image, question, template

    def _shares(self, row: Tensor, position: int) -> dict[str, float]:
        image, question, template = self._columns()
        others = row.clone()
        others[position - 1] = 0.0  # the query row's own entry says nothing about the inputs
        return {
            "image": float(others[image].sum()),
            "question": float(others[question].sum()),
            "template": float(others[template].sum()),
            "answer": float(others[self.prompt_length : position].sum()),
        }

    def _weights(self, result: RelevancyRows, rows: Tensor, explained: Explained) -> list[TokenWeight | None]:
        image, question, template = self._columns()
        # The words of the question, or of the prompt where there are none between template and image.
        words = question or sorted(template)
        query_rows = [position - 1 for position in explained.positions]
        found = aggregate(rows, result.probabilities.cpu(), image, words, query_rows=query_rows)
        parts = (
            found.prompt_alignment,
            found.visual_grounding,
            found.image_weights,
            found.prompt_weights,
            found.token_scores,
        )
        return [TokenWeight(*of_token) for of_token in zip(*(part.tolist() for part in parts), strict=True)]


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
