"""An explanation that can be saved and shown."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, printable
from ..files import check_writable, writing_folder
from . import report
from .data import SCHEMA, ExplanationData

__all__ = ["Explanation", "prepare_directory"]

REPORT, STORED, TOKENS = "report.html", "explanation.json", "tokens"


class Explanation(ExplanationData):
    """An answer with the relevancy of every token of it; `ExplanationData` lists what it holds.

    Example:
        >>> import lvlm_fastxai as fx
        >>> from lvlm_fastxai import tiny
        >>> explainer = fx.Explainer(*fx.load_tiny_lvlm())
        >>> explanation = explainer(tiny.SAMPLE_IMAGE, tiny.SAMPLE_QUESTION)
        >>> explanation.image_map.shape == explanation.tokens[0].image_map.shape
        True
    """

    def save(self, directory: str | Path) -> dict[str, Path]:
        """Write `report.html`, `explanation.json`, and overlay pictures for the answer and every token.

        Args:
            directory: created if absent. The files of an earlier explanation are replaced when all new ones are
                complete; other files are never touched.

        Returns:
            {"report": …, "json": …, "answer": …, "tokens": directory of the tokens' pictures}.

        Raises:
            ArgumentError: the directory cannot be written, or holds a file of such a name that no explanation wrote.

        Example:
            >>> import lvlm_fastxai as fx, tempfile
            >>> from lvlm_fastxai import tiny
            >>> explanation = fx.Explainer(*fx.load_tiny_lvlm())(tiny.SAMPLE_IMAGE, tiny.SAMPLE_QUESTION)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     explanation.save(folder)["report"].name
            'report.html'
        """
        folder = prepare_directory(directory)
        before = _written_before(folder)
        names = [REPORT, STORED]
        if self.images and self.image_maps:
            tokens = [(token.text, token.token_id) for token in self.tokens]
            names += [name for of_image in report.overlay_names(tokens, len(self.images)) for name in of_image]
        _check_places(folder, names, before)
        with writing_folder(folder, remove=sorted(before - set(names))) as scratch:
            # A name that is not UTF-8 stands in the command; its bytes are spelled out as JSON does it.
            stored = json.dumps(self.to_dict(), ensure_ascii=False) + "\n"
            (scratch / STORED).write_bytes(stored.encode("utf-8", "backslashreplace"))
            (scratch / REPORT).write_bytes(report.render_html(self).encode("utf-8", "backslashreplace"))
            report.write_overlays(self, scratch)
        paths = {"report": folder / REPORT, "json": folder / STORED}
        if len(names) > len(paths):
            paths |= {"answer": folder / "answer.png", "tokens": folder / TOKENS}
        return paths

    def _repr_html_(self) -> str:
        # A frame of its own: the report's style, script and content policy must not meet the notebook's.
        document = html.escape(report.render_html(self), quote=True)
        return (
            f'<iframe srcdoc="{document}" sandbox="allow-scripts" title="Relevancy report" '
            'style="width:100%;height:760px;border:0"></iframe>'
        )


def prepare_directory(directory: str | Path) -> Path:
    """Create a folder for results and prove that a file can be written in it.

    Raises:
        ArgumentError: it cannot be created or written.
    """
    folder = Path(directory)
    check_writable(folder, argument="output folder")
    return folder


def _written_before(folder: Path) -> set[str]:
    """Name the files that an earlier explanation wrote there; empty where there was none."""
    try:
        stored: Any = json.loads((folder / STORED).read_bytes())
        if stored["schema"] != SCHEMA:
            return set()
        tokens = [(str(token["text"]), int(token["token_id"])) for token in stored["tokens"]]
        pictures = report.overlay_names(tokens, len(stored["images"]))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return set()
    return {REPORT, STORED, *(name for of_image in pictures for name in of_image)}


def _check_places(folder: Path, names: list[str], before: set[str]) -> None:
    """Refuse to replace what no explanation wrote, and to write through a link into another folder."""
    if (folder / TOKENS).is_symlink():
        raise ArgumentError(f"output folder: '{printable(folder / TOKENS)}' is a link; name another folder")
    for name in names:
        place = folder / name
        if name not in before and (place.exists() or place.is_symlink()):
            raise ArgumentError(
                f"output folder: '{printable(place)}' is there already and no explanation wrote it; move it, or name "
                "another folder"
            )
