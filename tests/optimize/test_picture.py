"""The trade-off picture shows what there is to choose, readably."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from memopt.optimize.picture import Point, tradeoff

POINTS = [
    Point(x=430, y=1 - 2e-7, size=90e6, label="onnx-fp32-fused"),
    Point(x=450, y=1 - 3e-7, size=90e6, label="openvino-fp32"),
    Point(x=860, y=0.99985, size=90e6, label="openvino-bf16"),
    Point(x=1830, y=0.9951, size=23e6, label="onnx-int8-static on openvino"),
    Point(x=1900, y=0.9951, size=23e6, label="openvino-int8-static", style="good"),
    Point(x=1010, y=0.9731, size=23e6, label="onnx-int8-dynamic", style="bad"),
    Point(x=20, y=0.02, size=23e6, label="a & b", style="bad"),
]


def elements(picture: str, kind: str) -> list[ET.Element]:
    space = "{http://www.w3.org/2000/svg}"
    return [item for item in ET.fromstring(picture).iter() if item.tag == space + kind]


def bubbles(picture: str) -> list[ET.Element]:
    return [circle for circle in elements(picture, "circle") if len(circle)]


def test_every_candidate_is_a_bubble_with_its_numbers() -> None:
    """Area follows the size; the name is escaped; pointing at one tells its numbers."""
    picture = tradeoff(POINTS, "items/s", "min cosine", gate=0.98)
    circles = bubbles(picture)
    assert len(circles) == len(POINTS)
    radii = [float(circle.get("r", 0)) for circle in circles]
    assert max(radii) > 1.5 * min(radii)
    titles = [circle[0].text or "" for circle in circles]
    assert any(title.startswith("a & b: 20 items/s, min cosine 0.02") for title in titles)


def test_labels_do_not_lie_on_each_other() -> None:
    """Two neighbours of the same speed and quality are told apart."""
    picture = tradeoff(POINTS, "items/s", "min cosine", gate=0.98)
    boxes = []
    for text in elements(picture, "text"):
        if text.get("class") != "halo":
            continue
        width = 6.0 * len(text.text or "")
        left = float(text.get("x", 0))
        left -= {"start": 0.0, "middle": width / 2, "end": width}[text.get("text-anchor", "start")]
        boxes.append((left, float(text.get("y", 0)), left + width))
    assert len(boxes) == len(POINTS)
    for index, (left, y, right) in enumerate(boxes):
        for other_left, other_y, other_right in boxes[:index]:
            assert abs(y - other_y) >= 12 or right <= other_left or other_right <= left


def test_the_front_leaves_out_what_another_beats() -> None:
    """From the fastest to the most precise; the slower and less precise are not on it."""
    picture = tradeoff(POINTS, "items/s", "min cosine", gate=0.98)
    (front,) = elements(picture, "polyline")
    centres = {(circle.get("cx"), circle.get("cy")) for circle in bubbles(picture)}
    places = [tuple(pair.split(",")) for pair in (front.get("points") or "").split()]
    assert len(places) == 3
    assert set(places) <= centres


def test_a_zone_marks_what_misses_the_gate_and_nothing_is_fetched() -> None:
    """Without a gate there is no zone."""
    picture = tradeoff(POINTS, "items/s", "min cosine", gate=0.98)
    assert "below the gate of 0.98" in picture
    assert 'class="zone"' not in tradeoff(POINTS, "items/s", "min cosine")
    assert not re.search(r"https?://(?!www.w3.org/2000/svg)", picture)
