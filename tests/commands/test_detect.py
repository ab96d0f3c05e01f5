"""``memopt detect``: boxes on the terminal, as JSON and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from memopt.commands.drawing import draw_boxes
from memopt.tasks.boxes import Detection


def test_boxes_are_drawn_and_pictures_of_one_name_do_not_meet(tmp_path: Path) -> None:
    """Each picture has a file of its own, with the box's colour at its edge."""
    taken: set[str] = set()
    things = [Detection("cat", 0.9, (5.0, 5.0, 20.0, 20.0))]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / folder / "one.jpg")
        draw_boxes(tmp_path / folder / "one.jpg", things, tmp_path / "drawn", taken)
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == ["one-2.png", "one.png"]
    with Image.open(tmp_path / "drawn" / "one.png") as drawn:
        assert drawn.size == (40, 30)
        assert drawn.getpixel((5, 12)) != (0, 0, 0) == drawn.getpixel((30, 28))


@pytest.mark.slow
def test_the_command_finds_draws_and_writes(tmp_path: Path) -> None:
    """A line of JSON a picture, in the order given."""
    import transformers
    from typer.testing import CliRunner

    from memopt.cli import app
    from memopt.exporters.base import export
    from memopt.weights.convert import convert

    config = transformers.YolosConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[64, 96],
        num_detection_tokens=5,
    )
    transformers.YolosForObjectDetection(config).save_pretrained(tmp_path / "source")
    edges = {"shortest_edge": 64, "longest_edge": 96}
    transformers.YolosImageProcessorPil(size=edges).save_pretrained(tmp_path / "source")
    export(convert(tmp_path / "source", tmp_path / "bundle"), fused=False)
    paths = []
    for number, size in enumerate(((90, 60), (40, 40))):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", size, "teal").save(paths[-1])
    output = tmp_path / "found.jsonl"
    command = ["detect", str(tmp_path / "bundle"), *paths, "--threshold", "0.001"]
    done = CliRunner().invoke(app, [*command, "-o", str(output), "--draw", str(tmp_path / "drawn")])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["input"] for row in rows] == paths
    assert {len(thing["box"]) for row in rows for thing in row["detections"]} == {4}
    assert len(list((tmp_path / "drawn").iterdir())) == 2
