"""The review page in a real browser: the keyboard's way through a queue, and what a person sees."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.answers import HOSTILE, picture, png, record
from support.browser import CONTRAST

from lvlm_fastxai.review import Decision, Policy, Queue, Record, server

make_server = pytest.importorskip("werkzeug.serving", reason="Flask is not installed").make_server
Open = Callable[..., Any]


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    policy = Policy(
        ("entropy", "probability"), (0.5, 3.0), (0.1, 2.0), (-1.0, 2.0), 1.0, 0.95, 0.95, 0.05,
        {"entropy": 0.45, "probability": 0.98},
    )  # fmt: skip
    with Queue(tmp_path / "queue.sqlite") as opened:
        for number in range(1, 7):
            opened.append(record(number), policy.decide({"entropy": 0.5 + 0.05 * number, "probability": 0.3}))
        yield opened


@pytest.fixture
def open_page(driver: Any, queue: Queue) -> Iterator[Open]:
    """Serves the queue and opens it; afterwards nothing may have been asked of others or written to the console."""
    app = server.create_app(queue.path)
    serving = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=serving.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{serving.server_port}/{app.extensions['lvlm_fastxai_secret']}/"

    def open_page(width: int = 1100, scheme: str = "light", path: str = "", errors: bool = False) -> Any:
        media = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.get("about:blank")
        driver.get(address + path)
        until(driver, "return document.body.dataset.ready === 'true'")
        open_page.errors = errors  # type: ignore[attr-defined]
        return driver

    for kind in ("browser", "performance"):
        driver.get_log(kind)
    open_page.errors = False  # type: ignore[attr-defined]
    yield open_page
    logged = driver.get_log("browser")
    assert open_page.errors or logged == []  # type: ignore[attr-defined]
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            assert re.match(re.escape(address) + "|data:|about:|chrome:", message["params"]["request"]["url"])
    driver.get("about:blank")
    serving.shutdown()
    thread.join()
    serving.server_close()
    app.extensions["lvlm_fastxai_queue"].close()


def until(page: Any, script: str, seconds: float = 15) -> Any:
    """What a script returns once it is something."""
    end = time.monotonic() + seconds
    while not (found := page.execute_script(script)):
        assert time.monotonic() < end, f"{script}: still {found!r}; status: {status(page)}"
        time.sleep(0.02)
    return found


def status(page: Any) -> str:
    return page.execute_script("return document.getElementById('status')?.textContent")


def said(page: Any, text: str) -> None:
    until(page, f"return document.getElementById('status').textContent.includes({json.dumps(text)})")


def at(page: Any, number: int) -> None:
    """Waits until an item is shown."""
    until(page, f"return document.body.dataset.item === '{number}' && !document.getElementById('item').hidden")


def press(page: Any, *keys: str) -> None:
    actions = pytest.importorskip("selenium.webdriver").ActionChains(page)
    for key in keys:
        actions.send_keys(key)
    actions.perform()


def text(page: Any, name: str) -> str:
    return page.execute_script("return document.getElementById(arguments[0]).textContent", name)


def listed(page: Any) -> list[int]:
    return page.execute_script("return Array.from(document.querySelectorAll('#list button'), (b) => +b.dataset.item)")


def counts(page: Any) -> list[int]:
    """Open, confirmed, corrected, rejected, all."""
    return page.execute_script("return Array.from(document.querySelectorAll('#states b'), (b) => +b.textContent)")


def test_the_keyboard_through_confirm_correct_reject_undo_and_export(open_page, queue, tmp_path):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    page = open_page()
    at(page, 1)
    page.find_element("id", "reviewer").send_keys("Ann", keys.TAB)
    page.execute_script("document.getElementById('item').focus()")
    press(page, "y")
    at(page, 2)
    said(page, "Confirmed: item 1. 5 open.")
    press(page, "c")
    edit = page.switch_to.active_element
    assert edit.get_attribute("id") == "right-answer" and edit.get_attribute("value") == "a square 2"
    press(page, "a disc, y n", keys.ENTER)  # the field opens with the answer selected; letters there are text
    at(page, 3)
    said(page, "Corrected: item 2.")
    press(page, "n")
    at(page, 4)
    said(page, "Rejected: item 3.")
    press(page, "y")
    at(page, 5)
    press(page, "u")
    at(page, 4)
    said(page, "Taken back: item 4 is open again.")
    assert listed(page) == [4, 5, 6] and counts(page) == [3, 1, 1, 1, 6]
    assert queue.counts() == {"open": 3, "confirm": 1, "correct": 1, "reject": 1}
    assert [queue.item(number).reviewer for number in (1, 2, 3)] == ["Ann"] * 3
    queue.export(tmp_path / "labels.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [(line["verdict"], line.get("answer"), line["right"]) for line in lines] == [
        ("confirm", "a square 1", True),
        ("correct", "a disc, y n", False),
        ("reject", None, False),
    ]


def test_undo_goes_back_step_by_step_and_then_takes_back_the_item_shown(open_page, queue):
    queue.decide(6, "reject", reviewer="Bo")
    page = open_page()
    for number, key in ((1, "y"), (2, "n")):
        at(page, number)
        press(page, key)
    at(page, 3)
    for number in (2, 1):
        press(page, "u")
        at(page, number)
        said(page, f"Taken back: item {number}")
    press(page, "u")
    said(page, "nothing to undo")
    page.find_element("css selector", "[data-state=reject]").click()
    at(page, 6)
    assert "Rejected by Bo" in text(page, "decided")
    page.execute_script("document.getElementById('item').focus()")
    press(page, "u")
    said(page, "Taken back: item 6")
    assert queue.counts()["open"] == 6 and queue.version()[1] == 6


def test_walking(open_page):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    page = open_page()
    at(page, 1)
    expected = [
        (keys.ARROW_DOWN, 2),
        ("j", 3),
        (keys.ARROW_RIGHT, 4),
        (keys.ARROW_LEFT, 3),
        ("k", 2),
        (keys.ARROW_UP, 1),
    ]
    for key, number in expected:
        press(page, key)
        at(page, number)
        current = page.find_elements("css selector", "#list [aria-current=true]")
        assert [button.get_attribute("data-item") for button in current] == [str(number)]
    press(page, "k")
    said(page, "This is the first one.")
    assert page.current_url.endswith("#1")
    # With the focus in the list it stays in the list.
    page.find_element("css selector", "#list button[data-item='3']").click()
    at(page, 3)
    press(page, "j")
    at(page, 4)
    assert page.switch_to.active_element.get_attribute("data-item") == "4"
    press(page, "y")
    at(page, 5)
    assert page.execute_script("return document.activeElement !== document.body")
    assert open_page(path="#6").current_url.endswith("#6")
    at(page, 6)


def test_item_with_picture_and_map(open_page, queue):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    page = open_page()
    at(page, 1)
    until(page, "return [...document.querySelectorAll('.frame img')].every((i) => i.complete && i.naturalWidth)")
    boxes = page.execute_script(
        "return ['picture', 'map'].map((n) => { const b = document.getElementById(n).getBoundingClientRect();"
        " return [b.left, b.top, b.width, b.height].map(Math.round); })"
    )
    assert boxes[0] == boxes[1] and boxes[0][2] / boxes[0][3] == pytest.approx(60 / 40, rel=0.02)
    assert text(page, "question") == "what is in picture 1?" and text(page, "answer") == "a square 1"
    assert text(page, "reason") == queue.item(1).reason and "spread" in text(page, "reason")
    facts = text(page, "facts")
    assert "0.500" in facts and "25.0%" in facts and f"{100 * queue.item(1).score:.1f}%" in facts
    opacity = "return getComputedStyle(document.getElementById('map')).opacity"
    assert page.execute_script(opacity) == "0.7"
    # Arrows move the slider while it has the focus, and items otherwise.
    page.execute_script("document.getElementById('opacity').focus()")
    press(page, keys.ARROW_RIGHT, keys.ARROW_RIGHT)
    assert page.execute_script(opacity) == "0.72" and page.execute_script("return document.body.dataset.item") == "1"
    press(page, "m")
    assert page.execute_script(opacity) == "0"
    press(page, "m")
    assert page.execute_script(opacity) == "0.72"
    number, _ = queue.append(Record(picture(), "no map?", "none"))
    open_page(path=f"#{number}")
    at(page, number)
    assert not page.find_element("id", "map").is_displayed()
    assert not page.find_element("id", "controls").is_displayed()


def test_editing_can_be_left_and_says_what_is_wrong(open_page, queue):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    page = open_page(errors=True)  # Chromium logs every refused request
    at(page, 1)
    press(page, "c", "something else", keys.ESCAPE)
    assert not page.find_element("id", "edit").is_displayed() and queue.version()[1] == 0
    assert page.execute_script("return document.activeElement.id") == "item"
    press(page, "c", keys.ENTER)  # unchanged
    said(page, "confirm it instead")
    assert page.find_element("id", "edit").is_displayed() and queue.version()[1] == 0
    press(page, keys.ESCAPE)
    page.find_element("id", "note").send_keys("y n u", keys.ENTER)
    press(page, "n")
    at(page, 2)
    assert queue.item(1).note == "y n u" and queue.version()[1] == 1


def test_what_others_decide_meanwhile(open_page, queue):
    page = open_page(errors=True)
    at(page, 1)
    queue.decide(1, "correct", answer="a lamp", reviewer="Bo")
    queue.decide(2, "confirm", reviewer="Bo")
    queue.append(record(7), Decision("review", 0.5, "New."))
    said(page, "Corrected meanwhile by Bo.")
    assert "Corrected by Bo" in text(page, "decided") and "a lamp" in text(page, "decided")
    assert listed(page) == [3, 4, 5, 6, 7] and counts(page) == [5, 1, 1, 0, 7]
    press(page, "j")
    at(page, 3)
    # Between two looks of the page at the queue: the decision is refused, and the other one shown.
    page.execute_script("Object.defineProperty(document, 'hidden', {value: true})")
    time.sleep(0.3)  # a look that is under way
    queue.decide(3, "reject", reviewer="Cy")
    press(page, "y")
    said(page, "somebody else has decided about it meanwhile: reject")
    assert "Rejected by Cy" in text(page, "decided") and queue.item(3).state == "reject"
    press(page, "y")  # now it is known, and may be overruled
    at(page, 4)
    assert queue.item(3).state == "confirm"


def test_filters_search_and_order(open_page, queue):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    queue.decide(2, "confirm", reviewer="Bo")
    page = open_page()
    at(page, 1)
    page.find_element("css selector", "[data-state=confirm]").click()
    at(page, 2)
    assert listed(page) == [2]
    page.find_element("css selector", "[data-state=correct]").click()
    until(page, "return document.getElementById('item').hidden")
    assert text(page, "nothing") == "Nothing corrected yet."
    page.find_element("css selector", "[data-state=all]").click()
    at(page, 1)
    page.execute_script("document.getElementById('item').focus()")
    press(page, "/", "picture 5", keys.ENTER)
    at(page, 5)
    assert listed(page) == [5] and page.execute_script("return document.activeElement.id") == "item"
    page.find_element("id", "search").clear()
    page.find_element("css selector", "option[value=doubtful]").click()
    until(page, "return document.querySelectorAll('#list button').length === 6")
    scores = {shown.id: shown.score for shown in queue.items()}
    until(page, f"return document.querySelector('#list button').dataset.item === '{min(scores, key=scores.get)}'")
    assert listed(page) == sorted(scores, key=lambda number: scores[number])


def test_until_nothing_is_open(open_page, queue):
    for number in (1, 2, 3, 4):
        queue.decide(number, "confirm")
    page = open_page()
    at(page, 5)
    press(page, "y")
    at(page, 6)
    press(page, "n")
    until(page, "return document.getElementById('item').hidden")
    assert text(page, "nothing") == "Nothing is open. All looked at."
    assert page.execute_script("return document.activeElement.id") == "nothing"
    press(page, "u")
    at(page, 6)
    assert queue.counts()["open"] == 1


def test_help_and_an_upload(open_page, queue, tmp_path):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    page = open_page(errors=True)
    at(page, 1)
    press(page, "?")
    assert page.find_element("id", "help").is_displayed()
    press(page, "n")
    press(page, keys.ESCAPE)
    assert not page.find_element("id", "help").is_displayed() and queue.version()[1] == 0
    page.find_element("id", "open-help").click()
    page.find_element("css selector", "#help button").click()
    assert not page.find_element("id", "help").is_displayed()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "picture.png").write_bytes(png())
    page.find_element("id", "open-add").click()
    form = page.find_element("id", "add-form")
    for name, value in (("picture", str(tmp_path / "text.png")), ("question", "what?"), ("answer", "yes")):
        form.find_element("name", name).send_keys(value)
    form.submit()
    until(page, "return document.getElementById('add-error').textContent.includes('PNG, JPEG or WEBP')")
    form.find_element("name", "picture").send_keys(str(tmp_path / "picture.png"))
    form.submit()
    at(page, 7)
    said(page, "Added: item 7.")
    assert queue.item(7).answer == "yes" and not page.find_element("id", "add").is_displayed()


def test_hostile_text_is_shown_and_not_run(open_page, queue):
    number, _ = queue.append(
        record(9, question=HOSTILE, answer=HOSTILE, sample_id=HOSTILE), Decision("review", 0, HOSTILE)
    )
    queue.decide(number, "correct", answer=HOSTILE + "!", note=HOSTILE, reviewer=HOSTILE)
    page = open_page(path=f"#{number}")
    at(page, number)
    for name in ("question", "answer", "reason"):
        assert text(page, name) == HOSTILE
    assert HOSTILE in text(page, "decided") and HOSTILE in text(page, "facts")
    page.find_element("css selector", "[data-state=all]").click()
    until(page, "return document.querySelectorAll('#list button').length === 7")
    assert len(page.find_elements("css selector", "img")) == 2


@pytest.mark.parametrize("width", [390, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_and_has_contrast(open_page, queue, width, scheme):
    queue.append(record(8, question="w" * 300, answer="x" * 300), Decision("review", 0.5, "z" * 400))
    queue.decide(2, "correct", answer="a disc", reviewer="Ann")
    page = open_page(width, scheme, path="#7")
    at(page, 7)
    page.find_element("css selector", "[data-state=all]").click()
    said(page, "7 listed.")
    press(page, "c")
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    found = page.execute_script(CONTRAST)
    assert len(found) > 40 and min(found)[0] >= 4.5, min(found)
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 150) is (scheme == "dark")
    small = page.execute_script(
        "return [...document.querySelectorAll('.actions button, .states button')].filter((b) => b.offsetParent)"
        ".map((b) => b.getBoundingClientRect().height)"
    )
    assert min(small) >= (36 if width == 390 else 32)


def test_every_control_has_a_name(open_page):
    page = open_page()
    at(page, 1)
    press(page, "c")
    tree = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "textbox", "searchbox", "slider", "combobox", "img", "image"}
    controls = [
        (n["role"]["value"], n["name"]["value"]) for n in tree if not n["ignored"] and n["role"]["value"] in roles
    ]
    assert len(controls) > 15 and all(name for _, name in controls)
    assert {"Opacity of the map", "Search questions and answers", "Right answer", "Help: keys"} <= {
        n for _, n in controls
    }


def test_a_server_that_has_gone_is_said(open_page, queue):
    page = open_page(errors=True)
    at(page, 1)
    page.execute_script("window.fetch = async () => { throw new TypeError('Failed to fetch'); }")
    press(page, "y")
    said(page, "The server does not answer")
    assert queue.version()[1] == 0
