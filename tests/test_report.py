"""The report: overlays, the page's text, and the page in a real browser."""

from __future__ import annotations

import base64
import errno
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.browser import CONTRAST

import lvlm_fastxai.explain.report
from lvlm_fastxai.errors import ArgumentError
from lvlm_fastxai.explain.data import (
    ANSWER_DEFINITION,
    WEIGHTED_DEFINITION,
    Comparison,
    ExplainedImage,
    PromptToken,
    TokenExplanation,
    TokenWeight,
    UntouchedToken,
)
from lvlm_fastxai.explain.explanation import Explanation
from lvlm_fastxai.explain.report import overlay, render_html
from lvlm_fastxai.explain.report.colormap import colours, resample
from lvlm_fastxai.methods import GlimpseOptions

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&$title ${style}"


def make(
    texts: tuple[str, ...] = ("a", " red", " cir", "cle"),
    question: str = "what is left of the square ?",
    size: tuple[int, int] = (300, 200),
    region: tuple[float, float, float, float] | None = None,
    maps: bool = True,
    pictures: int = 1,
) -> Explanation:
    """An explanation whose token k has its largest value in cell k of a 4 × 6 grid."""
    words = ["<user>", *(" " + word for word in question.split()), " <assistant>"]
    prompt = [PromptToken(w, 10 + i, i, 0 < i < len(words) - 1) for i, w in enumerate(words)]
    tokens = []
    for index, text in enumerate(texts):
        image_map = np.full((4, 6), 1e-3, np.float32)
        image_map.flat[index % 24] = 0.01 * (index + 1)
        scores = np.linspace(0, 2e-3 * (index + 1), len(prompt), dtype=np.float32)
        scores[-1] = 1.5 if index == 0 else 1e-4  # the first token's own query row
        position = len(words) + 24 + index
        shares = {"image": float(image_map.sum()), "question": 0.01, "template": 0.005, "answer": 0.001 * index}
        prompt[-1] = PromptToken(words[-1], 99, len(words) + 23, False)
        tokens.append(
            TokenExplanation(
                text, 40 + index, position, 0.9 - 0.1 * (index % 8), 5.0, [image_map] * pictures * maps, scores, shares
            )
        )
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    return Explanation(
        question=question,
        answer="".join(texts),
        tokens=tokens,
        prompt_tokens=prompt,
        images=[ExplainedImage(picture, region or (0.0, 0.0, float(size[0]), float(size[1])))] * pictures,
        method="chefer",
        memory="fast",
        row_tolerance=0.0,
        backend="cpu",
        seconds={"generate": 0.2, "explain": 0.1},
        peak_bytes=12_500_000,
        model_name="a model",
        model_class="LlavaForConditionalGeneration",
        device="cpu",
        dtype="float32",
        sequence_length=60,
        prompt_length=50,
        versions={"lvlm_fastxai": "0.1.0"},
        command="lvlm-fastxai explain picture.png 'what?'",
    )


def make_weighted(
    texts: tuple[str, ...] = ("a", " red", " cir", "cle"), untouched: tuple[int, ...] = ()
) -> Explanation:
    """The same with token weights, and another method's maps whose largest value is in cell 23 and 1000 times larger.

    Args:
        untouched: indices of the texts that were not explained.
    """
    explanation = make(texts)
    generator = np.random.default_rng(1)
    alignment, grounding = generator.random((2, len(texts))) * [[1e-4], [3e-3]]
    probability = np.array([token.probability for token in explanation.tokens])
    for_image, for_prompt = probability * alignment, probability * grounding
    kept = [index for index in range(len(texts)) if index not in untouched]
    for_image, for_prompt = for_image / for_image[kept].sum(), for_prompt / for_prompt[kept].sum()
    numbers = np.stack([alignment, grounding, for_image, for_prompt, for_image * for_prompt], axis=1)
    tokens = [
        replace(token, weight=TokenWeight(*map(float, of_token)))
        for token, of_token in zip(explanation.tokens, numbers, strict=True)
    ]
    compared = np.full((4, 6), 0.5, np.float32)
    compared[-1, -1] = 40
    scores = np.linspace(8, 3, len(explanation.prompt_tokens), dtype=np.float32)
    return replace(
        explanation,
        method="glimpse",
        options=asdict(GlimpseOptions(layers="top:0.6")),
        tokens=[tokens[index] for index in kept],
        untouched=[
            UntouchedToken(texts[i], tokens[i].token_id, tokens[i].position, tokens[i].probability) for i in untouched
        ],
        chosen_tokens="content" if untouched else "all",
        comparison=Comparison("chefer", [compared] * len(explanation.image_maps), scores),
    )


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text of its scripts and style."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is not None:
            self.raw[-1] += data


def test_page_refers_to_nothing_outside_itself():
    page = Page(render_html(make()))
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action"):
                assert value is not None and value.startswith("data:")
    style, data, script = page.raw
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"fetch|XMLHttpRequest|import\(|eval|innerHTML|https?:", script)
    json.loads(data)


def test_content_policy_allows_exactly_this_style_and_script():
    page = Page(render_html(make()))
    (policy,) = (a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'") and "unsafe" not in policy
    style, _, script = page.raw
    for text in (style, script):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_every_text_is_escaped():
    plain, hostile = make(), make(texts=(HOSTILE, HOSTILE), question=HOSTILE)
    hostile.model_name = hostile.command = HOSTILE
    hostile.notes.append(HOSTILE)
    source = render_html(hostile)
    before = [tag for tag, _ in Page(render_html(plain)).elements]
    after = Page(source)
    assert [tag for tag, _ in after.elements].count("script") == before.count("script") == 2
    assert [tag for tag, _ in after.elements].count("img") == before.count("img") == 1
    data = json.loads(after.raw[1])
    assert data["entries"][1]["label"] == HOSTILE
    assert "$title" in source and "${style}" in source  # texts are no templates


def test_data_holds_raw_values():
    explanation = make()
    data = json.loads(Page(render_html(explanation)).raw[1])
    for entry, token in zip(data["entries"][1:], explanation.tokens, strict=True):
        np.testing.assert_allclose(entry["maps"][0], token.image_map.ravel(), rtol=1e-5)
        assert entry["probability"] == token.probability
        np.testing.assert_allclose(entry["words"], token.prompt_scores[1:-1], rtol=1e-5)
    np.testing.assert_allclose(data["entries"][0]["maps"][0], explanation.image_map.ravel(), rtol=1e-5)


def test_data_of_a_weighted_answer():
    explanation = make_weighted()
    data = json.loads(Page(render_html(explanation)).raw[1])
    whole, compared, *tokens = data["entries"]
    assert [e["kind"] for e in data["entries"]] == ["whole", "comparison", *["token"] * 4]
    np.testing.assert_allclose(whole["maps"][0], explanation.image_map.ravel(), rtol=1e-5)
    np.testing.assert_allclose(whole["words"], explanation.prompt_scores[1:-1], rtol=1e-5)
    weights = [token.weight.image_weight for token in explanation.tokens]
    np.testing.assert_allclose(whole["maps"][0], np.array(weights) @ [t["maps"][0] for t in tokens], rtol=1e-4)
    assert explanation.comparison is not None
    np.testing.assert_allclose(compared["maps"][0], explanation.comparison.image_maps[0].ravel(), rtol=1e-5)
    np.testing.assert_allclose(compared["words"], explanation.comparison.prompt_scores[1:-1], rtol=1e-5)
    assert compared["shares"] is None


def test_own_query_row_of_the_compared_method_does_not_outshine_the_words():
    explanation = make_weighted()
    explanation.prompt_tokens[:] = [replace(token, in_question=True) for token in explanation.prompt_tokens]
    assert explanation.comparison is not None
    explanation.comparison.prompt_scores[-1] = 1 / 4 + 1e-3  # one of four rows starts there
    compared = json.loads(Page(render_html(explanation)).raw[1])["entries"][1]
    assert compared["words"][-1] == pytest.approx(1e-3, rel=1e-3)


WEIGHTS = ("prompt_alignment", "visual_grounding", "image_weight", "prompt_weight", "score")


@pytest.mark.parametrize("count", [1, 4, 64])
def test_table_holds_every_tokens_weights(count):
    explanation = make_weighted(tuple(f" word{i}" for i in range(count)))
    source = render_html(explanation)
    found = [float(value) for value in re.findall(r'<data value="([^"]+)">', source)]
    expected = [[t.probability, *(getattr(t.weight, name) for name in WEIGHTS)] for t in explanation.tokens]
    np.testing.assert_allclose(np.reshape(found, (count, 6)), expected, rtol=1e-5)
    widths = np.reshape([float(w) for w in re.findall(r'<rect width="([^"]+)"', source)], (count, 6))
    full = np.max(expected, axis=0)
    full[0] = 1  # a probability's bar ends at 1
    np.testing.assert_allclose(widths, 100 * np.array(expected) / full, atol=0.01)


def test_numbers_are_in_the_unit_of_their_column():
    source = render_html(make_weighted())
    units = re.findall(r"</b><small>([^<]*)</small>", source)
    assert units[:5] == ["%", "×\u202f10⁻⁵", "×\u202f10⁻³", "%", "%"] and units[5].startswith("×\u202f10⁻")
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    powers = [0.01 if unit == "%" else 10.0 ** int(unit.removeprefix("×\u202f10").translate(digits)) for unit in units]
    cells = re.findall(r'<data value="([^"]+)">([^<]+)</data>', source)
    assert len(cells) == 24
    for index, (value, text) in enumerate(cells):
        column = index % 6
        rounding = 0.05 if units[column] == "%" else 0.005
        assert float(text) * powers[column] == pytest.approx(float(value), abs=1.001 * rounding * powers[column])


def test_weights_of_zero_are_said():
    explanation = make_weighted()
    assert "No token has any" not in render_html(explanation)
    nothing = TokenWeight(0.0, 1e-3, 0.0, 0.25, 0.0)
    explanation.tokens[:] = [replace(token, weight=nothing) for token in explanation.tokens]
    source = render_html(explanation)
    assert "No token has any prompt alignment" in source and "visual grounding, so" not in source


def test_definitions_are_the_explanations_own():
    weighted, plain = (html.unescape(render_html(explanation)) for explanation in (make_weighted(), make()))
    assert WEIGHTED_DEFINITION in weighted and WEIGHTED_DEFINITION not in plain
    assert f"maps and scores are the {ANSWER_DEFINITION}" in plain
    assert f"maps and scores are the {ANSWER_DEFINITION}" not in weighted
    assert f"The comparison is the {ANSWER_DEFINITION} by Chefer" in weighted


def test_options_are_among_the_facts():
    source = render_html(make_weighted(untouched=(0, 3)))
    for name, value in (
        ("Propagation", "literal"),
        ("Stats domain", "full"),
        ("Head temperature", "0.5"),
        ("Depth rate", "0.2"),
        ("Layers", "top:0.6"),
        ("Route", "one_sweep"),
        ("Tokens", "content: 2 of 4"),
    ):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in source


def test_untouched_tokens_stand_in_their_places():
    source = render_html(make_weighted(untouched=(0, 3)))
    answer = re.search(r'id="tokens".*?<p class="hint">', source, re.DOTALL)
    assert answer is not None
    found = re.findall(r'<(button|span)[^>]* class="(?:token|untouched)( joined)?".*?class="text">([^<]+)<', answer[0])
    assert found == [("span", "", "a"), ("button", "", "red"), ("button", "", "cir"), ("span", " joined", "cle")]
    share = (0.9 + 0.6) / (0.9 + 0.8 + 0.7 + 0.6)
    assert (
        f"2 of 4 tokens, with a dashed border, were not explained (tokens: content). They hold {share:.1%}"[:-1]
        in source
    )


def test_other_methods_show_nothing_of_it():
    page = Page(render_html(make()))
    assert not {tag for tag, _ in page.elements} & {"table", "svg", "data", "sup"}
    assert not any({"data-when", "abbr"} & attributes.keys() for _, attributes in page.elements)
    source = re.sub(r"<(style|script).*?</\1>", "", render_html(make()), flags=re.DOTALL)
    assert not re.search(r"GLIMPSE|glimpse|weight|β|γ|dashed|by Chefer", source)


def test_own_query_row_does_not_outshine_the_words():
    explanation = make()
    for index, token in enumerate(explanation.prompt_tokens):
        explanation.prompt_tokens[index] = PromptToken(token.text, token.token_id, token.position, True)
    data = json.loads(Page(render_html(explanation)).raw[1])
    assert data["entries"][1]["words"][-1] == 0 and data["entries"][0]["words"][-1] < 1


def test_tokens_of_a_word_are_one_word():
    explanation = make(question="un believ able ?")
    explanation.prompt_tokens[2:4] = [
        PromptToken(t.text.strip(), t.token_id, t.position, True) for t in explanation.prompt_tokens[2:4]
    ]
    source = render_html(explanation)
    assert "<span>unbelievable</span>" in source and "<span>?</span>" in source
    entry = json.loads(Page(source).raw[1])["entries"][1]
    assert entry["words"][0] == pytest.approx(explanation.tokens[0].prompt_scores[1:4].sum(), rel=1e-5)


def test_save_writes_a_picture_for_the_answer_and_every_token(tmp_path):
    explanation = make(texts=("a/b", "", " \n", " café"), pictures=2)
    paths = explanation.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html", "explanation.json", "answer.png", "answer_image2.png", "tokens",
    }  # fmt: skip
    names = sorted(path.name for path in paths["tokens"].iterdir())
    assert names[::2] == ["00_ab.png", "01_id41.png", "02_id42.png", "03_café.png"]
    make(texts=("one",)).save(tmp_path)
    assert [path.name for path in paths["tokens"].iterdir()] == ["00_one.png"]


def test_save_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArgumentError, match="output folder"):
            make().save(folder)


def test_save_touches_no_file_that_no_explanation_wrote(tmp_path):
    (tmp_path / "tokens").mkdir()
    own = [tmp_path / "tokens" / "00_holiday.png", tmp_path / "tokens" / "01_me.png", tmp_path / "notes.txt"]
    for path in own:
        path.write_bytes(b"mine")
    make(texts=("one", "two")).save(tmp_path)
    make(texts=("three",)).save(tmp_path)
    assert all(path.read_bytes() == b"mine" for path in own)
    drawn = {path.name for path in (tmp_path / "tokens").iterdir()} - {path.name for path in own}
    assert drawn == {"00_three.png"}


@pytest.mark.parametrize("name", ["report.html", "explanation.json", "answer.png", "tokens/00_one.png"])
def test_save_refuses_to_replace_a_file_that_no_explanation_wrote(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    with pytest.raises(ArgumentError, match="no explanation wrote it"):
        make(texts=("one",)).save(tmp_path)
    assert path.read_bytes() == b"mine"
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]


def test_save_writes_through_no_link(tmp_path):
    own, out = tmp_path / "own", tmp_path / "out"
    own.mkdir()
    out.mkdir()
    (own / "picture.png").write_bytes(b"mine")
    (out / "tokens").symlink_to(own)
    (out / ".lvlm-fastxai-write-test").symlink_to(own / "picture.png")
    with pytest.raises(ArgumentError, match="is a link"):
        make().save(out)
    assert [path.name for path in own.iterdir()] == ["picture.png"]
    assert (own / "picture.png").read_bytes() == b"mine" and (out / ".lvlm-fastxai-write-test").is_symlink()


def test_an_explanation_stays_whole_where_the_next_cannot_be_written(tmp_path, monkeypatch):
    make(texts=("one",)).save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*unused: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lvlm_fastxai.explain.report, "write_overlays", full)
    with pytest.raises(ArgumentError, match="disk full"):
        make(texts=("two", "three")).save(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_names_that_are_not_utf8_are_spelled_out(tmp_path):
    explanation = make()
    explanation.command = "lvlm-fastxai explain \udcff.png"
    paths = explanation.save(tmp_path)
    assert json.loads(paths["json"].read_text(encoding="utf-8"))["command"] == explanation.command
    assert "\\udcff.png" in paths["report"].read_text(encoding="utf-8")


def test_notebook_gets_the_whole_page_in_a_frame():
    frame = make()._repr_html_()
    assert frame.startswith("<iframe srcdoc=") and 'sandbox="allow-scripts"' in frame
    assert Page(frame).elements[0][1]["srcdoc"] == render_html(make())


def test_colours_run_from_dark_to_bright():
    values = np.linspace(0, 1, 256, dtype=np.float32)
    luminance = colours(values) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all() and luminance[0] < 2 and luminance[-1] > 240
    np.testing.assert_array_equal(colours(np.array([-1.0, 2.0])), colours(np.array([0.0, 1.0])))


def test_resampling_keeps_the_cells_values():
    values = np.random.default_rng(0).random((5, 7)).astype(np.float32)
    cells = resample(values, 50, 70, smooth=False)
    np.testing.assert_array_equal(cells[5::10, 5::10], values)
    smooth = resample(values, 45, 63)
    np.testing.assert_allclose(smooth[4::9, 4::9], values, atol=1e-6)
    assert smooth.min() >= values.min() and smooth.max() <= values.max()
    np.testing.assert_allclose(resample(np.full((3, 3), 2.0, np.float32), 10, 11), 2.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("region", "touched"),
    [
        ((0, 0, 600, 300), (slice(None), slice(None))),
        ((150, 0, 450, 300), (slice(None), slice(150, 450))),  # a centred crop
        ((0, -150, 600, 450), (slice(None), slice(None))),  # padded to a square
    ],
)
def test_overlay_lies_on_the_region(region, touched):
    picture = Image.new("RGB", (600, 300), (255, 255, 255))
    bright = np.ones((4, 4), np.float32)
    drawn = np.asarray(overlay(ExplainedImage(picture, region), bright)).astype(int)
    changed = (drawn != 255).any(-1)
    assert changed[touched].all()
    outside = np.ones_like(changed)
    outside[touched] = False
    assert not changed[outside].any()


def test_overlay_of_padding_shows_only_what_lies_on_the_picture():
    picture = Image.new("RGB", (600, 300), (255, 255, 255))
    image_map = np.zeros((4, 1), np.float32)
    image_map[1] = 1  # rows 0 and 3 are padding, row 1 is the picture's upper half
    image = ExplainedImage(picture, (0, -150, 600, 450))
    drawn = np.asarray(overlay(image, image_map, smooth=False)).astype(int)
    assert (drawn[:150] == drawn[0, 0]).all() and (drawn[150:] == drawn[-1, 0]).all()
    assert drawn[0, 0].sum() > drawn[-1, 0].sum()


Open = Callable[..., Any]


@pytest.fixture
def open_page(driver: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a report; afterwards nothing may have been asked of the network or written to the console."""

    def open_page(
        explanation: Explanation | None = None,
        width: int = 1200,
        scheme: str = "light",
        touch: bool = False,
    ) -> Any:
        path = tmp_path / "report.html"
        path.write_text(render_html(explanation or make()), encoding="utf-8")
        media = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": touch}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
        driver.get(path.as_uri())
        assert driver.execute_script("return document.body.dataset.ready") == "true"
        return driver

    for kind in ("browser", "performance"):
        driver.get_log(kind)
    yield open_page
    assert driver.get_log("browser") == []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            assert message["params"]["request"]["url"].startswith(("file:", "data:", "chrome:"))


# Reading pixels back from a canvas that is being painted makes the browser warn; the page itself never reads.
COPY = """
const copy = (canvas) => {
  const twin = Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
  const pen = twin.getContext("2d", { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  return pen;
};
"""


def shown(driver: Any) -> dict[str, Any]:
    """What the page displays now; `peak` is the map's brightest cell of the 4 × 6 grid, as painted."""
    return driver.execute_script(
        COPY
        + """
        const canvas = document.querySelector(".frame canvas");
        let peak = null;
        if (canvas) {
          const pixels = copy(canvas).getImageData(0, 0, canvas.width, canvas.height).data;
          let most = -1;
          for (let row = 0; row < 4; row++) for (let column = 0; column < 6; column++) {
            const x = Math.floor((column + 0.5) * canvas.width / 6), y = Math.floor((row + 0.5) * canvas.height / 4);
            const at = 4 * (y * canvas.width + x);
            const light = pixels[at] + pixels[at + 1] + pixels[at + 2];
            if (light > most) { most = light; peak = 6 * row + column; }
          }
        }
        const buttons = Array.from(document.querySelectorAll(".token"));
        const text = (id) => document.getElementById(id).textContent;
        return {
          peak,
          entry: Number(document.body.dataset.shown),
          checked: buttons.findIndex((button) => button.getAttribute("aria-checked") === "true"),
          words: Array.from(document.querySelectorAll(".words li")).map((w) => Number(w.dataset.value)),
          tints: Array.from(document.querySelectorAll(".words li")).map((w) => w.style.backgroundColor),
          label: text("chosen-text"), probability: text("chosen-probability"), live: text("live"), most: text("most"),
          focus: buttons.indexOf(document.activeElement),
        };
        """
    )


def tokens(driver: Any) -> list[Any]:
    return driver.find_elements("css selector", ".token")


def press(driver: Any, *keys: str) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    webdriver.ActionChains(driver).send_keys(*keys).perform()


def test_hover_shows_a_token_and_leaving_restores(open_page):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = open_page()
    start = shown(driver)
    assert start["entry"] == 0 and start["label"] == "Whole answer" and "%" in start["probability"]
    for index in (1, 3):
        webdriver.ActionChains(driver).move_to_element(tokens(driver)[index]).perform()
        now = shown(driver)
        assert now["entry"] == index and now["peak"] == index - 1 and now["checked"] == 0
        assert now["words"] == pytest.approx(make().tokens[index - 1].prompt_scores[1:-1].tolist(), rel=1e-4)
        assert len(set(now["tints"])) == len(now["tints"])
    assert now["label"] == "“cir”" and "70.0" in now["probability"]
    webdriver.ActionChains(driver).move_to_element(driver.find_element("css selector", "h1")).perform()
    assert shown(driver) == start


def test_click_pins_a_token(open_page):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = open_page()
    tokens(driver)[2].click()
    webdriver.ActionChains(driver).move_to_element(driver.find_element("css selector", "h1")).perform()
    now = shown(driver)
    assert now["entry"] == now["checked"] == 2 and now["peak"] == 1


def test_tap_shows_a_token(open_page):
    driver = open_page(width=375, touch=True)
    for index in (2, 4):
        box = driver.execute_script(
            "const t = document.querySelectorAll('.token')[arguments[0]]; t.scrollIntoView({block: 'end'});"
            "const b = t.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2, b.width, b.height];",
            index,
        )
        assert min(box[2:]) >= 44  # a fingertip
        driver.execute_cdp_cmd(
            "Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": box[0], "y": box[1]}]}
        )
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        now = shown(driver)
        assert now["entry"] == now["checked"] == index and now["peak"] == index - 1


def test_keyboard_walks_through_the_answer(open_page):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    driver = open_page()
    press(driver, keys.TAB)
    assert (shown(driver)["focus"], shown(driver)["entry"]) == (-1, 0)  # the display's controls come first
    press(driver, keys.TAB, keys.TAB, keys.TAB)
    assert shown(driver)["focus"] == 0
    press(driver, keys.ARROW_RIGHT, keys.ARROW_RIGHT)
    now = shown(driver)
    assert now["focus"] == now["entry"] == now["checked"] == 2 and now["peak"] == 1
    assert "red" in now["live"] and "%" in now["live"]
    press(driver, keys.ARROW_LEFT)
    assert shown(driver)["entry"] == 1
    press(driver, keys.END)
    assert shown(driver)["entry"] == 4
    press(driver, keys.ARROW_RIGHT)
    assert shown(driver)["entry"] == 0
    press(driver, keys.HOME, keys.ARROW_LEFT)
    assert shown(driver)["entry"] == 4
    press(driver, keys.ESCAPE)
    now = shown(driver)
    assert now["focus"] == now["entry"] == now["checked"] == 0
    outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineWidth")
    assert outline == "3px"
    # One stop for the whole group: the next Tab leaves the answer.
    press(driver, keys.TAB)
    assert shown(driver)["focus"] == -1


def test_focus_alone_shows_a_token(open_page):
    driver = open_page()
    driver.execute_script("document.querySelectorAll('.token')[3].focus()")
    assert shown(driver)["entry"] == 3 and shown(driver)["peak"] == 2


def test_controls(open_page):
    driver = open_page()
    tokens(driver)[1].click()
    own = shown(driver)["most"]
    driver.find_element("id", "common").click()
    assert shown(driver)["most"] != own and shown(driver)["most"].startswith("4.00")
    driver.find_element("id", "common").click()
    assert shown(driver)["most"] == own

    def pixel(x: float, y: float) -> list[int]:
        script = "const c = document.querySelector('.frame canvas'), [x, y] = arguments;"
        script += "return Array.from(copy(c).getImageData(c.width * x, c.height * y, 1, 1).data);"
        return driver.execute_script(COPY + script, x, y)

    # In the raw grid a cell is one colour up to its border.
    driver.find_element("id", "grid").click()
    assert pixel(0.02, 0.02) == pixel(0.16, 0.24) != pixel(0.17, 0.24)
    driver.find_element("id", "grid").click()
    assert pixel(0.02, 0.02) != pixel(0.16, 0.24)
    driver.execute_script(
        "const o = document.getElementById('opacity'); o.value = 0; o.dispatchEvent(new Event('input'))"
    )
    assert pixel(0.08, 0.12)[3] == 0


def test_pointing_at_the_image_reads_the_raw_value(open_page):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = open_page()
    tokens(driver)[2].click()
    canvas = driver.find_element("css selector", ".frame canvas")
    width, height = canvas.size["width"], canvas.size["height"]
    move = webdriver.ActionChains(driver)
    move.move_to_element_with_offset(canvas, int(width * (1.5 / 6 - 0.5)), int(height * (0.5 / 4 - 0.5))).perform()
    text = driver.find_element("id", "readout").text
    assert "Row 1, column 2" in text and "2.00" in text and "10⁻²" in text


@pytest.mark.parametrize("width", [375, 820, 1200])
@pytest.mark.parametrize("size", [(300, 200), (120, 400)])
def test_page_never_scrolls_sideways(open_page, width, size):
    long = (*(f" word{i}" for i in range(30)), "x" * 200)
    driver = open_page(make(texts=long, question="a " * 30 + "y" * 120, size=size), width=width, touch=width == 375)
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert driver.execute_script("return document.querySelector('.frame').getBoundingClientRect().height") < 640


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(open_page, scheme):
    driver = open_page(scheme=scheme)
    driver.execute_script("document.querySelector('details').open = true")
    tokens(driver)[2].click()
    found = driver.execute_script(CONTRAST)
    assert len(found) > 30
    assert min(found)[0] >= 4.5, min(found)


def test_light_and_dark_differ(open_page):
    grounds = []
    for scheme in ("light", "dark"):
        driver = open_page(scheme=scheme)
        grounds.append(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert sum(map(int, re.findall(r"\d+", grounds[0]))) > 700 > 150 > sum(map(int, re.findall(r"\d+", grounds[1])))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_of_a_weighted_answer_has_contrast(open_page, scheme):
    driver = open_page(make_weighted(untouched=(0, 2)), scheme=scheme)
    driver.execute_script("document.querySelector('details').open = true")
    for index in (1, 2):
        tokens(driver)[index].click()
        found = driver.execute_script(CONTRAST)
        assert len(found) > 60
        assert min(found)[0] >= 4.5, min(found)


def table(driver: Any) -> dict[str, Any]:
    """The rows of the token weights: which is highlighted, which is marked as chosen, which of them Tab would reach."""
    return driver.execute_script(
        """
        const box = document.getElementById("weights"), rows = Array.from(box.querySelectorAll("tbody tr"));
        const picks = rows.map((row) => row.querySelector("button"));
        const ground = (row) => getComputedStyle(row.cells[1]).backgroundColor;
        const seen = (row) => {
          const own = row.getBoundingClientRect(), head = box.querySelector("thead").getBoundingClientRect();
          return own.top >= head.bottom - 1 && own.bottom <= box.getBoundingClientRect().bottom + 1;
        };
        const where = (test) => rows.flatMap((row, index) => test(row, index) ? [index] : []);
        return {
          tinted: where((row) => ground(row) !== "rgba(0, 0, 0, 0)"),
          current: where((_, index) => picks[index].getAttribute("aria-current") === "true"),
          stops: where((_, index) => picks[index].tabIndex === 0),
          focus: picks.indexOf(document.activeElement),
          seen: where(seen),
          page: window.scrollY,
        };
        """
    )


def rows(driver: Any) -> list[Any]:
    return driver.find_elements("css selector", "#weights tbody tr")


def away(driver: Any) -> None:
    """The pointer off everything that shows a token."""
    webdriver = pytest.importorskip("selenium.webdriver")
    webdriver.ActionChains(driver).move_to_element(driver.find_element("css selector", "h1")).perform()


def test_row_of_the_table_chooses_its_token(open_page):
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = open_page(make_weighted())
    assert table(driver)["tinted"] == table(driver)["current"] == []
    webdriver.ActionChains(driver).move_to_element(rows(driver)[2]).perform()
    now = shown(driver)
    assert (now["entry"], now["checked"], now["peak"]) == (4, 0, 2) and table(driver)["tinted"] == [2]
    away(driver)
    assert shown(driver)["entry"] == 0 and table(driver)["tinted"] == []
    rows(driver)[1].find_element("css selector", "td:last-child").click()
    away(driver)
    now = shown(driver)
    assert now["entry"] == now["checked"] == 3 and now["peak"] == 1 and "red" in now["live"]
    assert table(driver)["tinted"] == table(driver)["current"] == table(driver)["stops"] == [1]
    tokens(driver)[5].click()
    assert table(driver)["tinted"] == table(driver)["current"] == [3]


def test_keyboard_walks_through_the_table(open_page):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    driver = open_page(make_weighted())
    tokens(driver)[0].click()
    press(driver, keys.TAB)
    assert table(driver)["focus"] == 0 and shown(driver)["entry"] == 0  # passing by chooses nothing
    press(driver, keys.ENTER)
    assert shown(driver)["entry"] == shown(driver)["checked"] == 2 and table(driver)["focus"] == 0
    press(driver, keys.ARROW_DOWN, keys.ARROW_DOWN)
    assert shown(driver)["entry"] == 4 and table(driver)["focus"] == 2 and table(driver)["stops"] == [2]
    press(driver, keys.END, keys.ARROW_DOWN)
    assert shown(driver)["entry"] == 5 and table(driver)["focus"] == 3
    press(driver, keys.HOME)
    assert shown(driver)["entry"] == 2 and table(driver)["focus"] == 0
    press(driver, keys.ESCAPE)
    assert shown(driver)["entry"] == 0 and table(driver)["current"] == []
    # One stop for all rows.
    press(driver, keys.TAB)
    assert table(driver)["focus"] == -1


@pytest.mark.parametrize("width", [390, 1200])
def test_long_table_scrolls_to_the_token_and_the_page_stays(open_page, width):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    driver = open_page(make_weighted((*(f" word{i}" for i in range(63)), "x" * 200)), width=width)
    assert 3 <= len(table(driver)["seen"]) < 32
    for index in (60, 20, 63, 0):
        driver.execute_script(
            "document.querySelectorAll('.token')[arguments[0]].focus({preventScroll: true})", index + 2
        )
        now = table(driver)
        assert now["tinted"] == [index] and index in now["seen"] and now["page"] == 0
    driver.execute_script("document.querySelector('#weights button').focus({preventScroll: true})")
    press(driver, keys.END)
    assert 63 in table(driver)["seen"] and table(driver)["page"] == 0
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width


def test_comparison_has_a_scale_of_its_own(open_page):
    explanation = make_weighted()
    driver = open_page(explanation)
    weighted = shown(driver)
    assert weighted["words"] == pytest.approx(explanation.prompt_scores[1:-1].tolist(), rel=1e-4)

    def notes() -> list[str]:
        return [e.text for e in driver.find_elements("css selector", "[data-when]") if e.is_displayed()]

    assert notes() == ["Weighted by βV.", ", weighted by βP"]
    tokens(driver)[1].click()
    compared = shown(driver)
    assert compared["peak"] == 23 and compared["checked"] == 1 and compared["label"] == "Whole answer by Chefer"
    assert explanation.comparison is not None
    assert compared["words"] == pytest.approx(explanation.comparison.prompt_scores[1:-1].tolist(), rel=1e-4)
    assert compared["most"].startswith("4.00") and "10¹" in compared["most"]
    assert notes() == ["Chefer’s mean.", ", Chefer’s mean"]
    assert compared["tints"][0] == "rgba(226, 104, 22, 0.5)"  # its own largest word
    assert driver.find_element("id", "share-image").text == "–" and "NaN" not in compared["live"]
    # One scale for all tokens neither takes the other method's values in nor applies to them.
    driver.find_element("id", "common").click()
    assert shown(driver)["most"] == compared["most"]
    tokens(driver)[3].click()
    assert shown(driver)["most"].startswith("4.00") and "10⁻²" in shown(driver)["most"] and notes() == []
    press(driver, pytest.importorskip("selenium.webdriver.common.keys").Keys.ESCAPE)
    driver.find_element("id", "common").click()
    away(driver)
    assert {**shown(driver), "live": "", "focus": 0} == {**weighted, "live": "", "focus": 0}


def test_arrows_reach_the_comparison_and_pass_by_untouched_tokens(open_page):
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    driver = open_page(make_weighted(untouched=(0, 2)))
    tokens(driver)[0].click()
    labels = []
    for _ in range(4):
        press(driver, keys.ARROW_RIGHT)
        labels.append(shown(driver)["label"])
    assert labels == ["Whole answer by Chefer", "“red”", "“cle”", "Whole answer"]
    driver.find_element("css selector", ".untouched").click()
    assert shown(driver)["entry"] == 0


def test_map_of_zeros_has_a_scale_of_zero(open_page):
    explanation = make_weighted()
    nothing = TokenWeight(0.0, 1e-3, 0.0, 0.25, 0.0)
    explanation.tokens[:] = [replace(token, weight=nothing) for token in explanation.tokens]
    assert shown(open_page(explanation))["most"].startswith("0.00")


def test_weighted_answer_without_a_grid_or_question_words(open_page):
    explanation = make_weighted()
    assert explanation.comparison is not None
    explanation.comparison = replace(explanation.comparison, image_maps=[])
    explanation.tokens[:] = [replace(token, image_maps=[]) for token in explanation.tokens]
    explanation.prompt_tokens[:] = [replace(token, in_question=False) for token in explanation.prompt_tokens]
    driver = open_page(explanation)
    rows(driver)[1].click()
    tokens(driver)[1].click()
    assert shown(driver)["peak"] is None and shown(driver)["entry"] == 1
    assert "mean" not in driver.find_element("id", "question-title").text


def test_frame_of_a_notebook_shows_the_page(driver, tmp_path):
    path = tmp_path / "notebook.html"
    path.write_text("<!DOCTYPE html>" + make_weighted()._repr_html_(), encoding="utf-8")
    driver.get(path.as_uri())
    driver.switch_to.frame(driver.find_element("css selector", "iframe"))
    try:
        assert driver.execute_script("return document.body.dataset.ready") == "true"
        tokens(driver)[3].click()
        assert shown(driver)["peak"] == 1 and table(driver)["current"] == [1]
    finally:
        driver.switch_to.default_content()


def test_hostile_text_is_shown_and_not_run(open_page):
    driver = open_page(make(texts=(HOSTILE, " b"), question=HOSTILE))
    tokens(driver)[1].click()
    assert HOSTILE in shown(driver)["label"]
    assert len(driver.find_elements("css selector", "img")) == 1
    driver = open_page(make_weighted((HOSTILE, HOSTILE, " b"), untouched=(1,)))
    rows(driver)[0].click()
    assert HOSTILE in shown(driver)["label"]
    assert len(driver.find_elements("css selector", "img")) == 1


def test_page_without_a_grid_still_shows_the_words(open_page):
    driver = open_page(make(maps=False))
    tokens(driver)[2].click()
    now = shown(driver)
    assert now["entry"] == 2 and now["peak"] is None and max(now["words"]) > 0
    assert not driver.find_element("css selector", ".controls").is_displayed()


def test_several_pictures(open_page):
    driver = open_page(make(pictures=2), width=375, touch=True)
    assert len(driver.find_elements("css selector", ".frame canvas")) == 2
    tokens(driver)[3].click()
    assert shown(driver)["peak"] == 2
