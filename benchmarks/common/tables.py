"""Write figures into documents: Markdown tables, where they come from, and the places that hold them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any


def percent(value: float) -> str:
    """Write a share, to a tenth of a percent where it is small.

    >>> percent(0.034), percent(0.34)
    ('3.4%', '34%')
    """
    return f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table whose first column is text and whose others are numbers."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(head: Mapping[str, Any]) -> str:
    """Say in one line where the figures come from."""
    where = head["gpu"] or f"{head['processor']}, {head['threads']} threads"
    return (
        f"{where}, torch {head['torch']}, transformers {head['transformers']}, {head['date']}, commit {head['commit']}"
    )


def written(document: str, sections: Mapping[str, str]) -> str:
    """Put each section between the comments of the document that name it.

    Raises:
        SystemExit: the document has no place for one.
    """
    for part, text in sections.items():
        place = re.compile(rf"(<!-- {part}: written by .*? -->\n).*?(<!-- end of {part} -->)", re.DOTALL)
        if not place.search(document):
            raise SystemExit(f"the document has no place for {part!r}")
        # Through a function, so that no backslash in the text is taken for an escape.
        document = place.sub(partial(_filled, text), document)
    return document


def _filled(text: str, place: re.Match[str]) -> str:
    return f"{place[1]}\n{text}\n\n{place[2]}"
