"""The review page's addresses, and what each answers.

The page and its data come from this process alone: nothing is loaded from elsewhere, and no path, name or address that
a client sends touches the file system.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import flask
from werkzeug.exceptions import HTTPException

from ..errors import ArgumentError
from ..explain.report import theme
from .bodies import BODY_MOST, UPLOAD_MOST, read_decision, read_text, read_upload
from .features import FEATURES
from .gate import Gate
from .items import Shown
from .overlay import overlay
from .policy import Decision
from .queue import Queue, QueueLostError, StaleDecisionError

__all__ = ["LIST_MOST", "Site"]

LIST_MOST = 200
"""Items in one list; the page says how many more there are."""

PAGES = {"review.css": "text/css", "review.js": "text/javascript"}
LISTED = ("id", "question", "answer", "state", "corrected", "score", "reviewer")
STATUS = {StaleDecisionError: 409, QueueLostError: 500, ArgumentError: 400}

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Site:
    """Answers requests about one queue.

    Args:
        queue: open.
        gate: checks every request, and holds the token of the page's POSTs.
    """

    def __init__(self, queue: Queue, gate: Gate) -> None:
        self._queue = queue
        self._gate = gate
        page = files(__package__).joinpath("pages")
        self._contents = {name: page.joinpath(name).read_bytes() for name in PAGES}
        self._contents["review.css"] = theme().encode() + self._contents["review.css"]
        self._index = page.joinpath("index.html").read_text(encoding="utf-8").replace("{{token}}", gate.token)

    def add_to(self, app: flask.Flask) -> None:
        """Register checks, addresses, headers and errors."""
        app.before_request(self._gate.check)
        for method, rule, view in (
            ("GET", "/", self.home),
            ("GET", "/<any(" + ", ".join(f"'{name}'" for name in PAGES) + "):name>", self.resource),
            ("GET", "/api/version", self.version),
            ("GET", "/api/items", self.listed),
            ("GET", "/api/items/<int:number>", self.detail),
            ("POST", "/api/items/<int:number>/decisions", self.decide),
            ("GET", "/items/<int:number>/picture.png", self.picture),
            ("GET", "/items/<int:number>/map.png", self.map_png),
            ("POST", "/items", self.add),
        ):
            app.add_url_rule(rule, view_func=view, methods=[method])
        app.after_request(_add_headers)
        app.register_error_handler(HTTPException, _http_error)
        for kind in STATUS:
            app.register_error_handler(kind, _own_error)

    def home(self) -> flask.Response:
        return flask.Response(self._index, mimetype="text/html")

    def resource(self, name: str) -> flask.Response:
        return flask.Response(self._contents[name], mimetype=PAGES[name])

    def version(self) -> flask.Response:
        return _json({"version": self._queue.version()})

    def listed(self) -> flask.Response:
        asked = flask.request.args
        if unknown := asked.keys() - {"state", "search", "order"}:
            raise ArgumentError(f"query: unknown {', '.join(sorted(unknown))}")
        state: Any = asked.get("state", "open")
        order: Any = asked.get("order", "oldest")
        # Read before the list: whatever is added between the two is then fetched again, not missed.
        now = self._queue.version()
        found = self._queue.items(
            state=None if state == "all" else state,
            search=read_text(asked, "search", 400, needed=False),
            order=order,
            limit=LIST_MOST + 1,
        )
        shown = [{name: getattr(item, name) for name in LISTED} for item in found[:LIST_MOST]]
        more = len(found) > LIST_MOST
        return _json({"items": shown, "more": more, "counts": self._queue.counts(), "version": now})

    def detail(self, number: int) -> flask.Response:
        item = self._item(number)
        return _json({**asdict(item), "facts": _facts(item)})

    def picture(self, number: int) -> flask.Response:
        self._item(number)
        return flask.Response(self._queue.picture(number), mimetype="image/png")

    def map_png(self, number: int) -> flask.Response:
        item = self._item(number)
        image_map = self._queue.image_map(number)
        if image_map is None:
            flask.abort(404, f"item {number} has no map")
        stream = io.BytesIO()
        region = item.region or (0.0, 0.0, float(item.width), float(item.height))
        overlay(image_map, (item.width, item.height), region).save(stream, "PNG", compress_level=1)
        return flask.Response(stream.getvalue(), mimetype="image/png")

    def decide(self, number: int) -> flask.Response:
        self._item(number)
        decision = self._queue.decide(number, **read_decision(flask.request))
        return _json({"decision": decision}, 201)

    def add(self) -> flask.Response:
        request = flask.request
        request.max_content_length = UPLOAD_MOST
        record, reason = read_upload(request, "service" if request.headers.get("Authorization") else "page")
        decision = Decision("review", math.nan, reason or "Added by hand; no policy has judged it.")
        number, new = self._queue.append(record, decision)
        return _json({"id": number, "new": new}, 201 if new else 200)

    def _item(self, number: int) -> Shown:
        item = self._queue.item(number) if number < 2**63 else None
        if item is None:
            flask.abort(404, f"there is no item {number}")
        return item


def limit_bodies(app: flask.Flask) -> None:
    """Refuse large requests; uploads have a limit of their own."""
    app.config["MAX_CONTENT_LENGTH"] = BODY_MOST
    app.config["MAX_FORM_MEMORY_SIZE"] = BODY_MOST


def _facts(item: Shown) -> list[tuple[str, str]]:
    """Return the features of an item as headings with values: the listed ones in their order, then others."""
    known = [
        (feature.label, feature.shown(item.features[name]) if name in item.features else "–")
        for name, feature in FEATURES.items()
    ]
    return known + [(name, f"{value:.3f}") for name, value in item.features.items() if name not in FEATURES]


def _json(content: Mapping[str, Any], status: int = 200) -> flask.Response:
    # A lone surrogate, as in the name of a file, becomes the escape that JSON has for it.
    text = json.dumps(content, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")
    return flask.Response(text, status, mimetype="application/json")


def _add_headers(response: flask.Response) -> flask.Response:
    response.headers.update(HEADERS)
    return response


def _http_error(error: HTTPException) -> flask.Response:
    return _json({"error": error.description or error.name}, error.code or 500)


def _own_error(error: ArgumentError) -> flask.Response:
    return _json({"error": str(error)}, next(status for kind, status in STATUS.items() if isinstance(error, kind)))
