"""The review page's server: what it answers, and every check that stands before it; then the page in a real browser."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.answers import picture, png, record

from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.explain.report.colormap import OPACITY_FLOOR, colours
from lvlm_fastxai.review import FEATURES, Decision, Feature, Queue, Record

flask = pytest.importorskip("flask", reason="Flask is not installed")
from flask.testing import FlaskClient  # noqa: E402

from lvlm_fastxai.review import server, site  # noqa: E402
from lvlm_fastxai.review.bodies import UPLOAD_MOST  # noqa: E402
from lvlm_fastxai.review.overlay import overlay  # noqa: E402

SERVICE = "a token of another service"


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    with Queue(tmp_path / "queue.sqlite") as opened:
        for number in range(1, 6):
            decision = Decision("review", 0.1 * number, f"Estimated chance of being right: {10 * number}%.")
            opened.append(record(number), decision)
        yield opened


@pytest.fixture
def client(queue: Queue) -> Iterator[Any]:
    app = server.create_app(queue.path, service_token=SERVICE)
    yield opened(app)
    app.extensions["lvlm_fastxai_queue"].close()


def opened(app: Any) -> Any:
    """A client whose paths begin with the application's secret, as the page's do."""

    class Opened(FlaskClient):
        def open(self, path: str, *arguments: Any, **options: Any) -> Any:
            return super().open(f"/{app.extensions['lvlm_fastxai_secret']}{path}", *arguments, **options)

    app.test_client_class = Opened
    return app.test_client()


def a_stranger(client: Any) -> Any:
    """Another client of the same application, which does not know the secret."""
    return FlaskClient(client.application)


def token(client: Any) -> str:
    found = re.search(r'name="review-token" content="([\w-]{40,})"', client.get("/").text)
    assert found is not None
    return found[1]


def decide(client: Any, number: int = 1, body: Any = None, **options: Any) -> Any:
    """POST a decision as the page does; headers set to None are left out."""
    body = {"verdict": "confirm", "seen": None} if body is None else body
    headers = {"X-Review-Token": token(client), "Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    headers |= options.pop("headers", {})
    options.setdefault("data", json.dumps(body))
    options.setdefault("content_type", "application/json")
    given = {name: value for name, value in headers.items() if value is not None}
    return client.post(f"/api/items/{number}/decisions", headers=given, **options)


def upload(client: Any, headers: dict[str, str] | None = None, **form: Any) -> Any:
    headers = {"X-Review-Token": token(client)} if headers is None else headers
    fields = {"picture": png(), "question": "what?", "answer": "this", **form}
    data = {
        name: [(io.BytesIO(part), "any/../name") for part in value] if isinstance(value, list)
        else (io.BytesIO(value), "any/../name") if isinstance(value, bytes) else value
        for name, value in fields.items()
        if value is not None
    }  # fmt: skip
    return client.post("/items", data=data, headers=headers, content_type="multipart/form-data")


def test_page_is_whole_and_refers_to_nothing_outside(client):
    home = client.get("/")
    assert home.status_code == 200 and home.mimetype == "text/html"
    assert set(re.findall(r'(?:src|href|action)="([^"]*)"', home.text)) == {"data:,", "review.css", "review.js"}
    assert not re.search(r"\son\w+=|style=|<style|<script>", home.text)
    style, script = client.get("/review.css"), client.get("/review.js")
    assert (style.mimetype, script.mimetype) == ("text/css", "text/javascript")
    assert "url(" not in style.text and "@import" not in style.text
    assert not re.search(r"innerHTML|insertAdjacent|eval|import\(|https?:", script.text)


@pytest.mark.parametrize("path", ["/", "/review.js", "/api/items", "/items/1/map.png", "/none", "/api/items/99"])
def test_every_answer_has_the_security_headers(client, path):
    headers = client.get(path).headers
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy and "base-uri 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers and "Set-Cookie" not in headers


def test_list_with_filters_and_counts(client, queue):
    queue.decide(2, "correct", answer="a disc", reviewer="Ann")
    queue.decide(3, "reject")
    found = client.get("/api/items").json
    assert [item["id"] for item in found["items"]] == [1, 4, 5] and not found["more"]
    assert found["counts"] == {"open": 3, "confirm": 0, "correct": 1, "reject": 1} and found["version"] == [5, 2]
    (corrected,) = client.get("/api/items?state=correct").json["items"]
    assert (corrected["corrected"], corrected["reviewer"]) == ("a disc", "Ann")
    assert [item["id"] for item in client.get("/api/items?state=all&order=newest").json["items"]] == [5, 4, 3, 2, 1]
    assert [item["id"] for item in client.get("/api/items?state=all&search=DISC").json["items"]] == [2]
    assert client.get("/api/version").json == {"version": [5, 2]}
    for query in ("state=closed", "order=random", "limit=5", "search=" + "x" * 500):
        assert client.get(f"/api/items?{query}").status_code == 400


def test_long_lists_are_cut_and_say_so(client, queue, monkeypatch):
    monkeypatch.setattr(site, "LIST_MOST", 3)
    found = client.get("/api/items").json
    assert [item["id"] for item in found["items"]] == [1, 2, 3] and found["more"]


def test_item(client, queue):
    item = client.get("/api/items/2").json
    assert (item["question"], item["answer"], item["state"]) == ("what is in picture 2?", "a square 2", "open")
    assert (item["width"], item["height"], item["has_map"], item["score"]) == (60, 40, True, 0.2)
    reply = client.get("/items/2/picture.png")
    assert reply.mimetype == "image/png"
    with Image.open(io.BytesIO(reply.data)) as found:
        assert found.tobytes() == picture(2).tobytes()
    with Image.open(io.BytesIO(client.get("/items/2/map.png").data)) as found:
        assert found.mode == "RGBA" and found.size == (448, 299)
        values = np.asarray(found)
    row, column = np.unravel_index(values[..., 3].argmax(), values.shape[:2])
    assert abs(row - 299 * 1.5 / 4) < 8 and abs(column - 448 * 2.5 / 6) < 8  # the middle of its largest cell


def test_an_item_without_a_map(client, queue):
    number, _ = queue.append(Record(picture(), "what?", "that"))
    assert client.get(f"/api/items/{number}").json["has_map"] is False
    assert client.get(f"/items/{number}/map.png").status_code == 404
    assert client.get(f"/items/{number}/picture.png").status_code == 200


@pytest.mark.parametrize("number", ["99", "0", str(2**63), str(10**30)])
@pytest.mark.parametrize("path", ["/api/items/{}", "/items/{}/picture.png", "/items/{}/map.png"])
def test_items_that_are_not_there(client, path, number):
    reply = client.get(path.format(number))
    assert reply.status_code == 404 and reply.json["error"]
    assert decide(client, int(number)).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/items/-1/picture.png",
        "/items/1e0/picture.png",
        "/items/x/picture.png",
        "/items/1/../../etc/passwd",
        "/items/%2e%2e%2fqueue.sqlite",
        "/../queue.sqlite",
        "/queue.sqlite",
        "/static/review.js",
        "/pages/index.html",
        "/index.html",
    ],
)
def test_no_path_reaches_a_file(client, path):
    assert client.get(path).status_code == 404


def test_decisions(client, queue):
    reply = decide(client, 1, {"verdict": "confirm", "seen": None, "reviewer": " Ann ", "note": "sure"})
    assert reply.status_code == 201
    shown = queue.item(1)
    assert (shown.state, shown.reviewer, shown.note, shown.decision) == (
        "confirm",
        "Ann",
        "sure",
        reply.json["decision"],
    )
    assert decide(client, 2, {"verdict": "correct", "answer": "a disc", "seen": None}).status_code == 201
    assert queue.item(2).corrected == "a disc"
    assert decide(client, 1, {"verdict": "reopen", "seen": shown.decision}).status_code == 201
    assert queue.item(1).state == "open"


def test_a_decision_about_what_another_decided_is_refused(client, queue):
    queue.decide(1, "reject", reviewer="Bo")
    reply = decide(client, 1, {"verdict": "confirm", "seen": None})
    assert reply.status_code == 409 and "meanwhile: reject" in reply.json["error"]
    assert queue.item(1).reviewer == "Bo"


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        "confirm",
        {"verdict": "confirm"},
        {"verdict": "confirm", "seen": "1"},
        {"verdict": "confirm", "seen": True},
        {"verdict": "confirm", "seen": -1},
        {"verdict": "perhaps", "seen": None},
        {"verdict": ["confirm"], "seen": None},
        {"verdict": "confirm", "seen": None, "answer": "x"},
        {"verdict": "correct", "seen": None},
        {"verdict": "correct", "seen": None, "answer": "  "},
        {"verdict": "correct", "seen": None, "answer": 5},
        {"verdict": "correct", "seen": None, "answer": "x" * 20_001},
        {"verdict": "correct", "seen": None, "answer": "a\0b"},
        {"verdict": "correct", "seen": None, "answer": "half \ud83d"},
        {"verdict": "correct", "seen": None, "answer": "A  SQUARE 1"},
        {"verdict": "confirm", "seen": None, "note": None},
        {"verdict": "confirm", "seen": None, "reviewer": "x" * 201},
        {"verdict": "confirm", "seen": None, "path": "/etc/passwd"},
    ],
)
def test_bodies_that_are_not_decisions(client, queue, body):
    reply = decide(client, 1, body)
    assert reply.status_code == 400 and reply.json["error"]
    assert queue.version() == (5, 0)


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"data": "{", "content_type": "application/json"}, 400),
        ({"data": b"\xff\xfe", "content_type": "application/json"}, 400),
        ({"data": "[" * 60_000, "content_type": "application/json"}, 400),
        ({"content_type": "text/plain"}, 400),
        ({"data": "verdict=confirm", "content_type": "application/x-www-form-urlencoded"}, 400),
        ({"data": " " * 65_537, "content_type": "application/json"}, 413),
    ],
)
def test_bodies_that_are_not_json_or_too_long(client, queue, options, status):
    assert decide(client, 1, **options).status_code == status
    assert queue.version() == (5, 0)


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Review-Token": None},
        {"X-Review-Token": "x" * 43},
        {"X-Review-Token": "ü"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://localhost"},
        {"Origin": "http://localhost:81"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_decisions_from_other_sites_are_refused(client, queue, headers):
    assert decide(client, headers=headers).status_code == 403
    assert (
        upload(client, headers={"X-Review-Token": token(client)} | {k: v or "" for k, v in headers.items()}).status_code
        == 403
    )
    assert queue.version() == (5, 0)


def test_a_client_without_a_browser_needs_the_token_only(client):
    assert decide(client, headers={"Origin": None, "Sec-Fetch-Site": None}).status_code == 201


HOSTS = {
    "localhost": True,
    "LOCALHOST:8765": True,
    "127.0.0.1:8765": True,
    "127.0.0.2": True,
    "[::1]:8765": True,
    "evil.example": False,
    "localhost.evil.example": False,
    "127.0.0.1.evil.example": False,
    "localhost@evil.example": False,
    "192.168.1.5": False,
    "0.0.0.0": False,
    "": False,
    "[::1": False,
    "review.lan": False,
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("path", ["/", "/api/items", "/items/1/picture.png"])
def test_names_that_are_not_this_servers_are_refused(client, host, path):
    """A page of evil.example whose DNS now points here would otherwise be of the same origin."""
    reply = client.get(path, headers={"Host": host})
    assert (reply.status_code == 200) is HOSTS[host]
    assert reply.status_code in (200, 400, 403)


def test_names_and_addresses_that_were_allowed(queue):
    app = server.create_app(queue.path, names=("Review.lan",), addresses=True)
    expected = {"review.lan:80": 200, "192.168.1.5": 200, "[fe80::1]": 200, "evil.example": 403}
    assert {host: opened(app).get("/", headers={"Host": host}).status_code for host in expected} == expected


def test_other_methods_are_refused(client, queue):
    for method in ("put", "patch", "delete"):
        reply = getattr(client, method)("/api/items/1", headers={"X-Review-Token": token(client)})
        assert reply.status_code == 405
    assert client.get("/items").status_code == 405


def test_every_start_has_a_token_of_its_own(client, queue):
    other = opened(server.create_app(queue.path))
    assert token(client) == token(client) != token(other)
    assert decide(client, headers={"X-Review-Token": token(other)}).status_code == 403


PATHS = ("/", "/review.css", "/review.js", "/api/version", "/api/items", "/api/items/1", "/items/1/picture.png", "/no")


@pytest.mark.parametrize("prefix", ["", "/" + "x" * 43, "/%00", "/.", "/?secret="])
def test_nothing_is_answered_without_the_secret(client, queue, prefix):
    """As by another user of this machine, who finds the port but not the address that was printed."""
    stranger = a_stranger(client)
    for path in PATHS:
        reply = stranger.get(f"{prefix}{path}")
        assert reply.status_code == 403 and "review serve" in reply.json["error"]
    headers = {"X-Review-Token": token(client)}
    body = {"verdict": "confirm", "seen": None}
    assert stranger.post("/api/items/1/decisions", json=body, headers=headers).status_code == 403
    assert stranger.post("/items", headers=headers).status_code == 403
    assert queue.version() == (5, 0)


def test_the_secret_is_the_whole_first_part_of_the_path(client):
    secret = client.application.extensions["lvlm_fastxai_secret"]
    assert len(secret) == 43
    stranger = a_stranger(client)
    for path in (f"/{secret}", f"/{secret[:-1]}/", f"/{secret}x/", f"/x/{secret}/", f"/?{secret}"):
        assert stranger.get(path).status_code == 403
    assert stranger.get(f"/{secret}/").status_code == 200
    # It is nowhere in what the page is made of: neither a picture's address nor a saved page gives it away.
    assert all(secret.encode() not in client.get(path).data for path in PATHS)


def test_a_service_needs_its_token_and_not_the_secret(client, queue):
    stranger = a_stranger(client)
    data = {"picture": (io.BytesIO(png()), "x.png"), "question": "what?", "answer": "this"}
    reply = stranger.post("/items", data=data, headers={"Authorization": f"Bearer {SERVICE}"})
    assert reply.status_code == 201 and queue.version() == (6, 0)
    assert stranger.get("/api/items", headers={"Authorization": f"Bearer {SERVICE}"}).status_code == 403


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be deleted")
def test_a_decision_about_a_deleted_queue_is_not_taken(client, queue):
    assert decide(client, 1).status_code == 201
    queue.path.unlink()
    for reply in (decide(client, 2), upload(client), client.get("/api/items"), client.get("/api/version")):
        assert reply.status_code == 500 and "has been deleted, moved or replaced" in reply.json["error"]


def test_features_are_shown_by_name(client, queue, monkeypatch):
    """A listed one with its heading and as its kind is written, one that nobody has listed under its own name."""
    number, _ = queue.append(record(9, features={"probability": 0.5, "trust": 0.25}))
    facts = client.get(f"/api/items/{number}").json["facts"]
    assert facts == [["Entropy of the map", "–"], ["Probability", "50.0%"], ["trust", "0.250"]]
    monkeypatch.setitem(FEATURES, "trust", Feature("Trust", "confidence", "value", "percentage", "", ""))
    assert client.get(f"/api/items/{number}").json["facts"][2] == ["Trust", "25.0%"]
    assert upload(client, trust="0.75").status_code == 201
    assert queue.item(number + 1).features == {"trust": 0.75}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_upload(client, queue, kind):
    reply = upload(client, picture=png(kind=kind), entropy="0.5", probability=" 0.25 ", reason="It seems odd.")
    assert reply.status_code == 201 and reply.json == {"id": 6, "new": True}
    shown = queue.item(6)
    assert (shown.question, shown.answer, shown.reason) == ("what?", "this", "It seems odd.")
    assert (shown.features, shown.score) == ({"entropy": 0.5, "probability": 0.25}, None)
    assert shown.extra == {"added": "page"}
    with Image.open(io.BytesIO(queue.picture(6))) as found:
        assert found.format == "PNG"
        assert np.abs(np.asarray(found).astype(int) - np.asarray(picture())).mean() < 5
    again = upload(client, picture=png(kind=kind))
    assert (again.status_code, again.json) == (200, {"id": 6, "new": False})


def test_only_the_pixels_of_an_upload_are_kept(client, queue):
    """Neither metadata nor what is appended to a file; the orientation is applied."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    exif[0x010E] = "secret place"
    content = png(kind="JPEG", exif=exif) + b"<script>appended</script>"
    assert upload(client, picture=content).status_code == 201
    kept = queue.picture(6)
    assert b"secret" not in kept and b"appended" not in kept
    assert (queue.item(6).width, queue.item(6).height) == (40, 60)


def header_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data does not have."""
    import struct
    import zlib

    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    parts = (chunk, data, b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )


def tagged_bmp() -> bytes:
    return png(kind="BMP")


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"picture": None}, 400),
        ({"picture": b""}, 400),
        ({"picture": b"GIF89a" + bytes(50)}, 400),
        ({"picture": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, 400),
        ({"picture": png()[:150]}, 400),
        ({"picture": png(kind="JPEG")[:400]}, 400),
        ({"picture": tagged_bmp()}, 400),
        ({"picture": header_of(9000, 9000)}, 400),
        ({"picture": header_of(17_000, 1)}, 400),
        ({"picture": header_of(100, 100)}, 400),
        ({"picture": [png(), png()]}, 400),
        ({"picture": "no file"}, 400),
        ({"picture": bytes(UPLOAD_MOST + 1)}, 413),
        ({"question": None}, 400),
        ({"question": " "}, 400),
        ({"answer": "x" * 20_001}, 400),
        ({"answer": "x" * 70_000}, 413),
        ({"entropy": "1.5"}, 400),
        ({"entropy": "nan"}, 400),
        ({"probability": "much"}, 400),
        ({"path": "/etc/passwd"}, 400),
        ({"map": b"x"}, 400),
    ],
)
def test_uploads_that_are_refused(client, queue, form, status):
    reply = upload(client, **form)
    assert reply.status_code == status and reply.json["error"]
    assert queue.version() == (5, 0)


def test_refused_pictures_are_refused_in_words(client):
    assert "PNG, JPEG or WEBP" in upload(client, picture=png(kind="BMP")).json["error"]
    assert "9000 × 9000 pixels are more than 64 million" in upload(client, picture=header_of(9000, 9000)).json["error"]


def test_another_service_adds_answers_and_can_do_nothing_else(client, queue):
    bearer = {"Authorization": f"Bearer {SERVICE}"}
    assert upload(client, headers=bearer).status_code == 201
    assert queue.item(6).extra == {"added": "service"}
    for wrong in ("Bearer nonsense", f"Basic {SERVICE}", SERVICE, ""):
        assert upload(client, headers={"Authorization": wrong}).status_code == 401
    assert decide(client, headers=bearer).status_code == 401
    assert upload(client, headers=bearer | {"Host": "evil.example"}).status_code == 403
    assert queue.version() == (6, 0)


def test_without_a_service_token_no_bearer_is_one(queue):
    client = opened(server.create_app(queue.path))
    for wrong in ("Bearer ", "Bearer", "Bearer x"):
        assert upload(client, headers={"Authorization": wrong}).status_code == 401
    with pytest.raises(ArgumentError, match="16 characters"):
        server.create_app(queue.path, service_token="short")


def test_a_queue_that_fails_is_said(client, queue, monkeypatch):
    def broken(*arguments: Any, **options: Any) -> None:
        raise ArgumentError("queue: cannot write 'queue.sqlite': disk I/O error")

    monkeypatch.setattr(Queue, "decide", broken)
    reply = decide(client)
    assert reply.status_code == 400 and "disk I/O error" in reply.json["error"]


def test_overlay_colours_the_region_and_nothing_else():
    image_map = np.array([[0.0, 2.0]], np.float32)
    values = np.asarray(overlay(image_map, (500, 600), (100.0, -50.0, 300.0, 200.0)))
    assert values.shape == (600, 500, 4)
    assert (values[200:] == 0).all() and (values[:, :100] == 0).all() and (values[:, 300:] == 0).all()
    inside = values[:200, 100:300]
    assert (inside[:, 0, 3] == round(255 * OPACITY_FLOOR)).all() and (inside[:, -1, 3] == 255).all()
    np.testing.assert_array_equal(inside[0, -1, :3], colours(np.ones((), np.float32)).round())
    # Beyond the picture on all sides, as a padding processor's is; and large pictures are not drawn larger.
    assert np.asarray(overlay(image_map, (5000, 100), (-10.0, -2000.0, 5010.0, 3000.0))).shape == (20, 1024, 4)
    assert (np.asarray(overlay(np.zeros((2, 2), np.float32), (9, 9), (0, 0, 9, 9)))[..., 3] == 115).all()
    assert (np.asarray(overlay(image_map, (500, 500), (600.0, 0.0, 700.0, 100.0))) == 0).all()


def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """`review serve` in a process of its own, and the address that it prints."""
    program = (
        "import argparse, sys; from lvlm_fastxai.review import commands; parser = argparse.ArgumentParser(); "
        "commands.add_arguments(parser); sys.exit(commands.run(parser.parse_args()))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found is not None, process.communicate()[1]
    return process, found[0]


def test_served_on_a_free_port_of_this_machine(queue):
    process, address = start(str(queue.path), "--port", "0")
    try:
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*/[\w-]{43}/", address)
        with urllib.request.urlopen(address, timeout=20) as reply:
            assert reply.status == 200 and "Server" not in reply.headers
        with urllib.request.urlopen(f"{address}items/1/picture.png", timeout=20) as reply:
            assert reply.read() == queue.picture(1)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.parse.urljoin(address, "/"), timeout=20)
    finally:
        process.send_signal(2)  # Ctrl-C
        printed, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and errors == ""
    assert printed == ""  # the address once, and no log of requests


def test_a_warning_where_others_can_reach_it(queue):
    process, address = start(str(queue.path), "--port", "0", "--host", "0.0.0.0")
    process.send_signal(2)
    _, errors = process.communicate(timeout=20)
    assert address.startswith("http://0.0.0.0:")
    assert errors.startswith("warning: 0.0.0.0 can be reached from other machines")


def test_addresses_that_cannot_be_listened_on(queue):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for host, number in (("127.0.0.1", port), ("no.such.name.invalid", 0), ("203.0.113.7", 0)):
            with pytest.raises(ArgumentError, match="cannot listen on"):
                server.serve(queue.path, host, number)
