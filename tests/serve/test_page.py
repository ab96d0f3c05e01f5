"""The page at / in a real Chromium: live numbers, forms that answer, nothing from elsewhere."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from memopt.bundle import Bundle
from memopt.serve.guard import Admission
from tests.serve.conftest import running

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY = "k" * 24
# Texts on a background that they cannot be read on: WCAG's contrast below 4.5.
FAINT = """() => {
  const parts = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = parts(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll("body *")].filter((node) =>
    node.checkVisibility() && [...node.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  return [texts.length, texts.filter((node) => !node.disabled).filter((node) => {
    const pair = [light(parts(getComputedStyle(node).color)), light(behind(node))];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05) < 4.5;
  }).map((node) => node.outerHTML.slice(0, 80))];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright."""
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="pip install memopt[dev]")
    with driver.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


def opened(browser: Any, client: httpx.Client, **options: Any) -> tuple[Any, list[str], list[str]]:
    """The page, its complaints on the console, and the addresses that it asked."""
    page = browser.new_page(**options)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(str(client.base_url))
    return page, said, asked


def answer(page: Any, form: str) -> str:
    """What a form shows once it is sent."""
    page.click(f"#{form} button >> nth=0")
    page.wait_for_selector(f"#{form} output > *")
    return str(page.inner_text(f"#{form} output"))


def test_the_playground_answers(browser: Any, served: httpx.Client) -> None:
    """Each form shows its model's own numbers; the chat comes as it is written."""
    page, said, asked = opened(browser, served)
    page.wait_for_selector("#status.live")
    text = page.input_value("#embed textarea")
    vector = served.post("/embed", json={"inputs": text}).json()[0]
    shown = answer(page, "embed")
    assert shown.startswith(f"{vector[0]:.4f}")
    assert f"{len(vector)} numbers" in shown
    pair = [page.input_value(f"#compare [name={name}]") for name in ("first", "second")]
    body = {"inputs": {"source_sentence": pair[0], "sentences": pair[1:]}}
    assert f"{served.post('/similarity', json=body).json()[0]:.3f}" in answer(page, "compare")
    documents = page.input_value("#rerank textarea").split("\n")
    assert all(document in answer(page, "rerank") for document in documents)
    best = served.post("/predict", json={"inputs": page.input_value("#classify textarea")}).json()
    assert best[0]["label"] in answer(page, "classify")
    page.fill("#chat textarea", "hello")
    page.fill("#chat [name=tokens]", "5")
    assert "a second" in answer(page, "chat")
    assert page.locator("#said p").count() == 2
    assert said == []
    assert {httpx.URL(url).netloc for url in asked} == {served.base_url.netloc}
    page.close()


def test_numbers_move_and_the_table_names_what_runs(browser: Any, served: httpx.Client) -> None:
    """A request shows in the rate; looking itself does not count."""
    page, said, _ = opened(browser, served)
    page.wait_for_selector("#status.live")
    for _ in range(20):
        served.post("/embed", json={"inputs": "a cat"}).raise_for_status()
    # Not by a script of the test's: the page's policy lets none be evaluated.
    for _ in range(100):
        if float(page.inner_text("[data-of=requests]").replace(",", "") or 0) >= 1:
            break
        page.wait_for_timeout(100)
    else:
        pytest.fail("the rate did not move")
    assert page.inner_text("[data-of=p50]").endswith("ms")
    row = page.inner_text("#models tr:has(th:text-is('minilm'))")
    about = next(m for m in served.get("/state").json()["models"] if m["name"] == "minilm")
    assert all(about[key] in row for key in ("task", "device", "variant", "runtime"))
    assert said == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_can_be_read(browser: Any, served: httpx.Client, width: int, scheme: str) -> None:
    """No sideways scrolling, and every text stands out from what is behind it."""
    size = {"width": width, "height": 900}
    page, _, _ = opened(browser, served, viewport=size, color_scheme=scheme)
    page.wait_for_selector("#status.live")
    for form in ("embed", "compare", "rerank", "classify"):
        answer(page, form)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    count, faint = page.evaluate(FAINT)
    assert count > 40
    assert faint == []
    page.close()


def test_a_key_is_asked_for_and_sent(browser: Any, small: dict[str, Bundle]) -> None:
    """Without a key the page says so and asks no more; with it, forms of what is here appear."""
    keys = {hashlib.sha256(KEY.encode()).digest(): "me"}
    with running({"labels": small["labels"].path}, access=Admission(keys=keys)) as (client, _):
        page, _, asked = opened(browser, client)
        page.wait_for_selector("#status.lost")
        assert "asks for an API key" in page.inner_text("#status")
        page.wait_for_timeout(2500)
        assert sum(url.endswith("/state") for url in asked) == 1
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#status.live")
        assert page.is_visible("#classify")
        assert not page.is_visible("#embed")
        page.close()
