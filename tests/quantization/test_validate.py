"""The validator beside graphs that do something it must notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt.bundle import Bundle
from memopt.errors import QuantizationError
from memopt.graphs.openvino import takes_segments
from memopt.graphs.session import open_graph
from memopt.quantization.accuracy.validate import PrecisionValidator
from memopt.quantization.quantize import Samples, float_variant, quantize, read_samples
from memopt.quantization.recipe import Recipe


def test_texts_that_share_rows_are_compared_with_each_alone(
    tiny_copy: Bundle, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that mixes them is refused, and nothing of it is left."""
    recipe = Recipe(method="static", target="openvino")
    base = float_variant(tiny_copy, recipe)
    path = tiny_copy.file(base)
    assert takes_segments(path, "openvino")
    assert not takes_segments(path, "onnx")
    samples = Samples(calibration=texts, samples=16, validation_samples=24)
    _, held_out = read_samples(tiny_copy, samples)
    validator = PrecisionValidator(tiny_copy, base, held_out)
    run = open_graph(path, "openvino", base.output, base.options)
    validator.refuse_mixing(run)

    def mixing(feed: Any) -> Any:
        """Every text of a row after the first gets the vector of the one before it."""
        rows = run(feed)
        return np.roll(rows, 1, axis=0) if feed["attention_mask"].max() > 1 else rows

    with pytest.raises(QuantizationError, match="share rows"):
        validator.refuse_mixing(mixing)

    def refuse(self: PrecisionValidator, run: Any) -> None:
        raise QuantizationError("asked")

    monkeypatch.setattr(PrecisionValidator, "refuse_mixing", refuse)
    before = sorted(tiny_copy.path.rglob("*"))
    with pytest.raises(QuantizationError, match="asked"):
        quantize(tiny_copy, samples, recipe)
    assert sorted(tiny_copy.path.rglob("*")) == before
