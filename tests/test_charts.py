"""The charts of reports show what there is to choose, readably, and a page holds all it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from memopt.charts import Bar, Point, bars, histogram, spec, tradeoff
from memopt.errors import MissingExtra
from memopt.pages import command, page, table

POINTS = [
    Point(number=1, x=1900, y=0.9951, size=23e6, label="openvino-int8-static", style="good"),
    Point(number=2, x=1830, y=0.9951, size=23e6, label="onnx-int8-static on openvino"),
    Point(number=3, x=1010, y=0.9731, size=23e6, label="onnx-int8-dynamic", style="bad"),
    Point(number=4, x=860, y=0.99985, size=90e6, label="openvino-bf16", y_low=0.9997),
    Point(number=5, x=450, y=1 - 3e-7, size=90e6, label="openvino-fp32", x_low=440, x_high=470),
    Point(number=6, x=430, y=1 - 2e-7, size=90e6, label="onnx-fp32-fused"),
    Point(number=7, x=20, y=0.02, size=23e6, label="a & b <script>alert(1)</script>", style="bad"),
]
LABEL = "encoder.layer.11.attention.self.query.weight"


def rows(chart: Any, field: str) -> list[dict[str, Any]]:
    """Return the rows of the data of a chart that have a field."""
    drawn = spec(chart, "")
    parts = [drawn, *(layer for layer in drawn["layer"])]
    parts += [inner for layer in drawn["layer"] for inner in layer.get("layer", [])]
    tables = [part["data"]["values"] for part in parts if "data" in part]
    return next(table for table in tables if field in table[0])


def marks(chart: Any) -> list[str]:
    layers = spec(chart, "")["layer"]
    flat = [inner for layer in layers for inner in layer.get("layer", [layer])]
    return [layer["mark"]["type"] for layer in flat]


def whole() -> str:
    """Return a page with every chart."""
    lost = [Bar(label=LABEL, value=0.01), Bar(label="encoder.layer.0", value=0.0)]
    speeds = [
        Bar(label="a", value=1900, low=1850, high=1960, style="good"),
        Bar(label="b", value=9),
    ]
    return page(
        "memopt <b>",
        {
            "model": "<i>m</i>",
            "date": "2026-11-27T12:00:00Z",
            "command": "",
            "calibration": "c.csv",
        },
        [
            ("Trade-off", [tradeoff(POINTS, "items/s", "min cosine", gate=0.98)]),
            ("Speed", ["<p>with intervals</p>", bars(speeds, "items/s")]),
            ("Errors", [bars(lost, shares=True)]),
            ("Lost", [bars(lost, gate=0.02)]),
            ("Cosines", [histogram([0.99, 0.998, 0.9999, 1.0], "cosine", gate=0.95)]),
            ("Table", [table(["a", "b", "c"], [["<b>", 1, 2.5]])]),
        ],
    )


def test_every_candidate_is_a_bubble_with_its_numbers() -> None:
    """Area follows the size; pointing at one tells its name and numbers."""
    bubbles = rows(tradeoff(POINTS, "items/s", "min cosine", gate=0.98), "megabytes")
    assert [bubble["number"] for bubble in bubbles] == [1, 2, 3, 4, 5, 6, 7]
    assert [bubble["megabytes"] for bubble in bubbles][:4] == [23.0, 23.0, 23.0, 90.0]
    assert bubbles[6]["title"] == "7  a & b <script>alert(1)</script>"
    drawn = spec(tradeoff(POINTS, "items/s", "min cosine", gate=0.98), "")["layer"]
    (circles,) = (layer for layer in drawn if "size" in layer.get("encoding", {}))
    told = [tip["field"] for tip in circles["encoding"]["tooltip"]]
    assert told == ["title", "x", "y", "megabytes", "beside"]


def test_bubbles_at_one_place_are_told_apart() -> None:
    """Their numbers stand around them, none on another, and each names the others."""
    bubbles = rows(tradeoff(POINTS, "items/s", "min cosine"), "megabytes")
    same = [replaced for replaced in bubbles if replaced["number"] in (1, 2)]
    assert [bubble["beside"] for bubble in same] == [POINTS[1].label, POINTS[0].label]
    crowd = [Point(number=n, x=100, y=0.99, label=str(n)) for n in range(6)]
    places = [(b["dx"], b["dy"]) for b in rows(tradeoff(crowd, "x", "y"), "megabytes")]
    for (x, y), (other_x, other_y) in combinations(places, 2):
        assert abs(x - other_x) > 8 or abs(y - other_y) >= 12
    assert (bubbles[3]["dx"], bubbles[3]["dy"], bubbles[3]["beside"]) == (0, 0, "-")


def test_the_front_leaves_out_what_another_beats() -> None:
    """From the fastest to the most precise; the slower and less precise are not on it."""
    bubbles = rows(tradeoff(POINTS, "items/s", "min cosine", gate=0.98), "megabytes")
    assert [bubble["number"] for bubble in bubbles if bubble["front"]] == [1, 4, 5]


def test_a_zone_marks_what_misses_the_gate() -> None:
    """Without a gate there is no zone."""
    gated = tradeoff(POINTS, "items/s", "min cosine", gate=0.98)
    assert rows(gated, "text") == [{"gate": 1.698970004, "text": "below the gate of 0.98"}]
    assert "rect" in marks(gated)
    assert "rect" not in marks(tradeoff(POINTS, "items/s", "min cosine"))


def test_the_histogram_has_the_gate_and_every_input() -> None:
    """Also where all inputs are far from it, or one is below it."""
    for gate in (0.5, 0.95, 0.9999):
        chart = histogram([-0.2, 0.99, 0.998, 0.9999, 1.0], "cosine", gate=gate)
        assert sum(row["count"] for row in rows(chart, "count")) == 5
        (line,) = rows(chart, "gate")
        low, high = spec(chart, "")["layer"][0]["encoding"]["x"]["scale"]["domain"]
        assert low < line["gate"] < high


def test_intervals_are_whiskers() -> None:
    """A chart without intervals has none."""
    plain = [Bar(label="a", value=1.0), Bar(label="b", value=2.0)]
    assert "rule" not in marks(bars(plain))
    assert "rule" in marks(bars([*plain, Bar(label="c", value=3.0, low=2.5, high=3.5)]))
    assert marks(tradeoff(POINTS, "items/s", "min cosine")).count("rule") == 2


def test_the_scale_of_layer_errors_tells_the_cosine_they_leave() -> None:
    """An exact layer, with an error of 0, has its place too."""
    chart = bars([Bar(label="a", value=0.01), Bar(label="b", value=0.0)], shares=True)
    assert [row["shown"] for row in rows(chart, "shown")] == ["1 %", "0 %"]
    x = spec(chart, "")["layer"][0]["encoding"]["x"]
    assert x["scale"]["type"] == "log"
    assert "sqrt" in x["axis"]["labelExpr"]
    assert all(row["at"] >= x["scale"]["domain"][0] > 0 for row in rows(chart, "at"))


def test_a_page_is_the_same_each_time_and_fetches_nothing() -> None:
    """Its policy forbids it, its own part holds no address, and foreign text is escaped."""
    text = whole()
    assert text == whole()
    assert "default-src 'none'" in text
    assert "<script>alert" not in text
    own = re.sub("<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?://|src=|href=|url\(|@import", own)
    assert "<dd>&lt;i&gt;m&lt;/i&gt;</dd>" in own
    assert "<dt>command</dt>" not in own


def test_without_altair_the_command_to_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, before anything slow."""
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(MissingExtra, match=r"pip install .*\[report\]'"):
        bars([Bar(label="a", value=1.0)])


def test_the_command_is_told_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report made from Python has none."""
    monkeypatch.setattr(sys, "argv", ["/usr/bin/memopt", "bench", "my model"])
    assert command() == "memopt bench 'my model'"
    monkeypatch.setattr(sys, "argv", ["notebook.py"])
    assert command() == ""


class Drawn(HTMLParser):
    """Counts the pictures in a page, collects their words and the sizes of their letters."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures, self.words, self.sizes, self.inside = 0, list[str](), set[str](), False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "svg"
        self.inside = tag == "text" or (self.inside and tag == "tspan")
        if tag == "text":
            self.sizes.add(dict(attrs)["font-size"] or "")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "text"


@pytest.mark.integration
@pytest.mark.parametrize("width", [400, 1400])
def test_a_browser_without_a_network_draws_the_page(tmp_path: Path, width: int) -> None:
    """Every chart, in letters of 12 pixels, labels over bars; where a Chromium is there."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine")
    target = tmp_path / "report.html"
    target.write_text(whole(), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900"]
    options += ["--proxy-server=127.0.0.1:9", "--virtual-time-budget=20000", "--dump-dom"]
    result = subprocess.run(
        [browser, *options, target.as_uri()], capture_output=True, text=True, timeout=120
    )
    drawn = Drawn(result.stdout)
    assert drawn.pictures == 5, result.stderr[-2000:]
    assert drawn.sizes == {"12px"}
    assert {LABEL, "1,900 items/s", "1 %", "gate 0.95", "below the gate of 0.98"} <= set(
        drawn.words
    )
