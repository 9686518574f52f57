"""The queue as a local web page, and an endpoint where other services can add answers.

The page and its data come from this process alone: nothing is loaded from elsewhere, and no path, name or address that
a client sends touches the file system. Every request is checked for

* its Host: a name that does not belong to this server means that somebody's DNS points at it (DNS rebinding);
* on POST, its Origin and a token that only the page knows (cross-site request forgery), or the bearer token of another
  service;
* the size of its body, and its content: JSON by name and type, pictures by decoding and encoding them anew.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import json
import math
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..errors import ArgumentError
from ..explain.report import theme
from ..explain.report.colormap import OPACITY_FLOOR, colours, resample
from ..prompting.pictures import load_picture
from .policy import Decision
from .queue import VERDICTS, Queue, Record, Shown, StaleDecisionError

if TYPE_CHECKING:
    from flask import Flask, Request

__all__ = ["create_app", "overlay", "serve"]

BODY_MOST = 64 * 1024
UPLOAD_MOST = 20 * 1024 * 1024
PIXELS_MOST = 40_000_000
SIDE_MOST = 16_384
LIST_MOST = 200
"""Items in one list; the page says how many more there are."""

TEXT_MOST = {"question": 4000, "answer": 20_000, "note": 4000, "reviewer": 200, "reason": 4000, "sample_id": 400}
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")
PAGES = {"review.css": "text/css", "review.js": "text/javascript"}
# Overlays of small pictures are enlarged to the first, those of large ones stay at the second and are stretched.
OVERLAY_LEAST, OVERLAY_MOST = 448, 1024

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


def create_app(
    queue: str | Path, *, names: Sequence[str] = (), addresses: bool = False, service_token: str = ""
) -> Flask:
    """The WSGI application over a queue, which is made if there is none.

    Args:
        queue: path of the SQLite file.
        names: host names that requests may carry besides "localhost" and loopback addresses.
        addresses: also take any literal IP address as Host: right where the server listens beyond this machine, and
            no rebinding, since that needs a name.
        service_token: other services may ``POST /items`` with ``Authorization: Bearer <it>``; "": none may.

    Raises:
        ArgumentError: Flask is not installed, the file is no queue, or the token is short.
    """
    try:
        import flask
        from werkzeug.exceptions import HTTPException
    except ImportError:
        raise ArgumentError("review serve: Flask is not installed (pip install 'lvlm_fastxai[fastrm]')") from None
    if service_token and len(service_token) < 16:
        raise ArgumentError(f"service token: expected 16 characters or more, got {len(service_token)}")
    opened = Queue(queue)
    token = secrets.token_urlsafe(32)
    known = frozenset(name.lower() for name in ("localhost", *names))
    page = files(__package__).joinpath("pages")
    contents = {name: page.joinpath(name).read_bytes() for name in PAGES}
    contents["review.css"] = theme().encode() + contents["review.css"]
    index = page.joinpath("index.html").read_text(encoding="utf-8").replace("{{token}}", token)
    app = flask.Flask(__name__, static_folder=None, template_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = BODY_MOST
    app.config["MAX_FORM_MEMORY_SIZE"] = BODY_MOST

    def json_reply(content: Mapping[str, Any], status: int = 200) -> Any:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
        return flask.Response(text, status, mimetype="application/json")

    @app.before_request
    def guard() -> None:
        request = flask.request
        if not _host_belongs(request.headers.get("Host", ""), known, addresses):
            flask.abort(403, "this name does not belong to the review page; see `review serve --name`")
        if request.method in ("GET", "HEAD"):
            return
        authorization = request.headers.get("Authorization")
        if authorization is not None:
            if request.path != "/items" or not service_token or not _same(authorization, f"Bearer {service_token}"):
                flask.abort(
                    401, "the bearer token is not the one that this server was given, or opens only POST /items"
                )
            return
        origin = request.headers.get("Origin")
        if origin is not None and origin != f"{request.scheme}://{request.headers['Host']}":
            flask.abort(403, "this request comes from another site")
        if request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            flask.abort(403, "this request comes from another site")
        if not _same(request.headers.get("X-Review-Token", ""), token):
            flask.abort(403, "the page is older than the server: load it again")

    @app.after_request
    def headers(response: Any) -> Any:
        response.headers.update(HEADERS)
        return response

    @app.errorhandler(HTTPException)
    def failed(error: HTTPException) -> Any:
        return json_reply({"error": error.description or error.name}, error.code or 500)

    @app.errorhandler(StaleDecisionError)
    def stale(error: StaleDecisionError) -> Any:
        return json_reply({"error": str(error)}, 409)

    @app.errorhandler(ArgumentError)
    def refused(error: ArgumentError) -> Any:
        return json_reply({"error": str(error)}, 400)

    @app.get("/")
    def home() -> Any:
        return flask.Response(index, mimetype="text/html")

    @app.get("/<any(" + ", ".join(f"'{name}'" for name in PAGES) + "):name>")
    def resource(name: str) -> Any:
        return flask.Response(contents[name], mimetype=PAGES[name])

    @app.get("/api/version")
    def version() -> Any:
        return json_reply({"version": opened.version()})

    @app.get("/api/items")
    def listed() -> Any:
        asked = flask.request.args
        if unknown := asked.keys() - {"state", "search", "order"}:
            raise ArgumentError(f"query: unknown {', '.join(sorted(unknown))}")
        state = asked.get("state", "open")
        search = _text(asked, "search", 400, needed=False)
        # Read before the list: whatever is added between the two is then fetched again, not missed.
        now = opened.version()
        found = opened.items(
            state=None if state == "all" else state,
            search=search,
            order=asked.get("order", "oldest"),
            limit=LIST_MOST + 1,
        )
        shown = [
            {
                name: getattr(item, name)
                for name in ("id", "question", "answer", "state", "corrected", "score", "reviewer")
            }
            for item in found[:LIST_MOST]
        ]
        return json_reply({"items": shown, "more": len(found) > LIST_MOST, "counts": opened.counts(), "version": now})

    @app.get("/api/items/<int:number>")
    def detail(number: int) -> Any:
        return json_reply(asdict(_item(opened, number)))

    @app.get("/items/<int:number>/picture.png")
    def picture(number: int) -> Any:
        _item(opened, number)
        return flask.Response(opened.picture(number), mimetype="image/png")

    @app.get("/items/<int:number>/map.png")
    def map_png(number: int) -> Any:
        item = _item(opened, number)
        image_map = opened.image_map(number)
        if image_map is None:
            flask.abort(404, f"item {number} has no map")
        stream = io.BytesIO()
        region = item.region or (0.0, 0.0, float(item.width), float(item.height))
        overlay(image_map, (item.width, item.height), region).save(stream, "PNG", compress_level=1)
        return flask.Response(stream.getvalue(), mimetype="image/png")

    @app.post("/api/items/<int:number>/decisions")
    def decide(number: int) -> Any:
        _item(opened, number)
        body = _json_body(flask.request)
        if unknown := body.keys() - {"verdict", "answer", "note", "reviewer", "seen"}:
            raise ArgumentError(f"body: unknown {', '.join(sorted(unknown))}")
        seen = body.get("seen")
        if "seen" not in body or not (seen is None or (type(seen) is int and seen > 0)):
            raise ArgumentError("seen: expected the number of the decision that was shown, or null")
        if body.get("verdict") not in VERDICTS:
            raise ArgumentError(f"verdict: expected one of {', '.join(VERDICTS)}")
        decision = opened.decide(
            number,
            body["verdict"],
            answer=_text(body, "answer", TEXT_MOST["answer"]) if body.get("answer") is not None else None,
            note=_text(body, "note", TEXT_MOST["note"], needed=False),
            reviewer=_text(body, "reviewer", TEXT_MOST["reviewer"], needed=False),
            seen=seen,
        )
        return json_reply({"decision": decision}, 201)

    @app.post("/items")
    def add() -> Any:
        request = flask.request
        request.max_content_length = UPLOAD_MOST
        form, uploaded = request.form, request.files
        numbers, texts = ("entropy", "probability"), ("question", "answer", "reason", "sample_id")
        if unknown := (form.keys() - {*numbers, *texts}) | (uploaded.keys() - {"picture"}):
            raise ArgumentError(f"form: unknown {', '.join(sorted(unknown))}")
        if len(uploaded.getlist("picture")) != 1:
            raise ArgumentError("picture: expected one file, as multipart/form-data")
        text = {name: _text(form, name, TEXT_MOST[name], needed=name in ("question", "answer")) for name in texts}
        share = {name: _share(form, name) for name in numbers}
        record = Record(
            _uploaded_picture(uploaded["picture"].read()),
            text["question"],
            text["answer"],
            share["entropy"],
            share["probability"],
            sample_id=text["sample_id"],
            extra={"added": "service" if request.headers.get("Authorization") else "page"},
        )
        decision = Decision("review", math.nan, text["reason"] or "Added by hand; no policy has judged it.")
        number, new = opened.append(record, decision)
        return json_reply({"id": number, "new": new}, 201 if new else 200)

    app.extensions["lvlm_fastxai_queue"] = opened
    return app


def serve(
    queue: str | Path,
    host: str = "127.0.0.1",
    port: int = 8765,
    *,
    names: Sequence[str] = (),
    service_token: str = "",
) -> None:
    """Serve the page until Ctrl-C; its address is printed.

    Args:
        queue: path of the SQLite file, made if there is none.
        host: address to listen on; any but a loopback address opens the queue to the network, and a warning says so.
        port: 0 for any that is free.
        names, service_token: as `create_app`.

    Raises:
        ArgumentError: Flask or waitress is not installed, the file is no queue, or the address cannot be listened on.
    """
    try:
        import waitress
    except ImportError:
        raise ArgumentError("review serve: waitress is not installed (pip install 'lvlm_fastxai[fastrm]')") from None
    local = _is_local(host)
    own = () if _address(host) is not None else (host,)
    app = create_app(queue, names=(*names, *own), addresses=not local, service_token=service_token)
    try:
        server = waitress.create_server(
            app,
            listen=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            threads=4,
            ident=None,
            max_request_body_size=UPLOAD_MOST,
            clear_untrusted_proxy_headers=True,
        )
    # waitress raises ValueError for a name that it cannot resolve, Python OverflowError for a port beyond 65535.
    except (OSError, ValueError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ArgumentError(f"review serve: cannot listen on {host}, port {port}: {reason}") from error
    if not local:
        print(
            f"warning: {host} can be reached from other machines, and whoever reaches it sees every picture and can "
            "decide: there is no password and no encryption. Keep it behind a gateway that has both",
            file=sys.stderr,
            flush=True,
        )
    if hasattr(server, "effective_listen"):  # a name with several addresses
        reached = server.effective_listen[0]
    else:
        reached = (server.effective_host, server.effective_port)
    shown = f"[{reached[0]}]" if ":" in reached[0] else reached[0]
    print(f"review page: http://{shown}:{reached[1]}/ (Ctrl-C ends it)", flush=True)
    try:
        server.run()
    finally:
        server.close()
        app.extensions["lvlm_fastxai_queue"].close()


def overlay(
    image_map: NDArray[np.float32], size: tuple[int, int], region: tuple[float, float, float, float]
) -> Image.Image:
    """A map as a transparent picture to lay over the one it explains, coloured from 0 to its maximum.

    Args:
        image_map: (h, w) relevancy.
        size: width and height of the picture.
        region: (left, top, right, bottom) of the picture that the map covers; it may reach beyond it.

    Returns:
        RGBA, in the picture's proportions; opaque at the maximum, less so where the value is smaller.
    """
    longer = max(size)
    factor = max(1.0, OVERLAY_LEAST / longer) if longer <= OVERLAY_MOST else OVERLAY_MOST / longer
    width, height = (max(1, round(edge * factor)) for edge in size)
    left, top, right, bottom = (round(edge * factor) for edge in region)
    values = np.clip(image_map / (image_map.max() or 1.0), 0.0, 1.0).astype(np.float32)
    drawn = np.zeros((height, width, 4), np.float32)
    # Columns and rows of the region that lie in the picture.
    inside = [slice(max(0, -low), max(0, min(high, most) - low)) for low, high, most in
              ((top, bottom, height), (left, right, width))]  # fmt: skip
    smooth = resample(values, max(1, bottom - top), max(1, right - left))[inside[0], inside[1]]
    rows, columns = (
        slice(max(0, low), max(0, low) + count) for low, count in zip((top, left), smooth.shape, strict=True)
    )
    drawn[rows, columns, :3] = colours(smooth)
    drawn[rows, columns, 3] = 255 * (OPACITY_FLOOR + (1 - OPACITY_FLOOR) * smooth)
    return Image.fromarray(drawn.round().astype(np.uint8))


def _item(queue: Queue, number: int) -> Shown:
    import flask

    item = queue.item(number) if number < 2**63 else None
    if item is None:
        flask.abort(404, f"there is no item {number}")
    return item


def _host_belongs(host: str, names: frozenset[str], addresses: bool) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    address = _address(name)
    if address is None:
        return name in names
    return addresses or address.is_loopback


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _is_local(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" if address is None else address.is_loopback


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), expected.encode())


def _json_body(request: Request) -> dict[str, Any]:
    if request.mimetype != "application/json":
        raise ArgumentError("body: expected application/json")
    try:
        body = json.loads(request.get_data())
    # A body of many brackets goes deeper than Python's stack.
    except (ValueError, RecursionError):
        raise ArgumentError("body: expected JSON") from None
    if not isinstance(body, dict):
        raise ArgumentError("body: expected an object")
    return body


def _text(given: Mapping[str, Any], name: str, most: int, *, needed: bool = True) -> str:
    value = given.get(name, "")
    if not isinstance(value, str) or len(value) > most:
        raise ArgumentError(f"{name}: expected text of at most {most} characters")
    if "\0" in value:
        raise ArgumentError(f"{name}: expected text, got a NUL character")
    if needed and not value.strip():
        raise ArgumentError(f"{name}: expected some text, got none")
    return value.strip()


def _share(form: Mapping[str, str], name: str) -> float | None:
    text = form.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise ArgumentError(f"{name}: expected a number in 0 … 1, got {text[:40]!r}")
    return value


def _uploaded_picture(content: bytes) -> Image.Image:
    """The pixels of an uploaded file and nothing else of it."""
    expected = f"picture: expected a {', '.join(UPLOAD_FORMATS[:-1])} or {UPLOAD_FORMATS[-1]} file"
    try:
        with Image.open(io.BytesIO(content), formats=UPLOAD_FORMATS) as probe:
            width, height = probe.size  # from its header: nothing is decoded yet
            if max(width, height) > SIDE_MOST or width * height > PIXELS_MOST:
                raise ArgumentError(f"picture: at most {PIXELS_MOST / 1e6:.0f} megapixels, got {width} × {height}")
            probe.verify()
        with Image.open(io.BytesIO(content), formats=UPLOAD_FORMATS) as opened:
            opened.load()
            return load_picture(ImageOps.exif_transpose(opened))
    except ArgumentError:
        raise
    # Decoders raise what they like on damaged files.
    except Exception as error:
        raise ArgumentError(f"{expected} that can be read") from error
