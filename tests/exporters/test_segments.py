"""Graphs that take several texts in a row, and models that cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memopt.errors import ExportError
from memopt.exporters import segments
from memopt.exporters.check import TOLERANCES
from memopt.runtimes.segments import together
from tests.exporters.kit import built, prepared

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize(
    ("config", "model", "pooling", "further"),
    [
        ("BertConfig", "BertModel", "mean", {}),
        ("BertConfig", "BertModel", "cls", {}),
        ("BertConfig", "BertModel", "last", {}),
        ("RobertaConfig", "RobertaModel", "cls", {}),
        ("XLMRobertaConfig", "XLMRobertaModel", "mean", {}),
        ("MPNetConfig", "MPNetModel", "mean", {}),
        ("ElectraConfig", "ElectraModel", "mean", {"embedding_size": 32}),
        ("DistilBertConfig", "DistilBertModel", "mean", {"dim": 32, "hidden_dim": 48}),
        ("T5Config", "T5EncoderModel", "mean", T5),
    ],
)
def test_texts_that_share_rows_are_answered_as_alone(
    config: str, model: str, pooling: str, further: dict[str, Any]
) -> None:
    """Attention, positions and pooling stay within each text; the module is compared with torch."""
    loaded, signature, cases = prepared(built(config, model, **further), pooling)
    assert segments.segmented(loaded, "embedding", signature, cases) is not None


@pytest.mark.parametrize(
    ("config", "model", "pooling", "further"),
    [
        ("BertConfig", "BertModel", "max", {}),  # every text would need its tokens apart
        ("BertConfig", "BertModel", "model", {}),  # its pooler takes the row's first token
        ("ModernBertConfig", "ModernBertModel", "mean", {"global_attn_every_n_layers": 2}),
        ("Qwen3Config", "Qwen3Model", "last", {"num_key_value_heads": 2, "head_dim": 8}),
    ],
)
def test_other_models_get_one_text_a_row(
    config: str, model: str, pooling: str, further: dict[str, Any]
) -> None:
    """Nothing is offered that was not thought through."""
    loaded, signature, cases = prepared(built(config, model, **further), pooling)
    assert segments.segmented(loaded, "embedding", signature, cases) is None


def test_a_model_whose_answers_would_differ_gets_one_text_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positions that go on from text to text are found out by the comparison."""
    loaded, signature, cases = prepared(built("BertConfig", "BertModel"), "mean")
    module = segments.segmented(loaded, "embedding", signature, cases)
    assert module is not None
    positions = type(module)._positions
    monkeypatch.setattr(type(module), "_positions", lambda self, columns, *_: columns + 0 * _[0])
    assert segments.segmented(loaded, "embedding", signature, cases) is None
    monkeypatch.setattr(type(module), "_positions", positions)


def test_a_graph_that_mixes_texts_is_refused() -> None:
    """The file itself is compared too, not only the module it was made of."""
    loaded, signature, cases = prepared(built("BertConfig", "BertModel"), "mean")
    module = segments.segmented(loaded, "embedding", signature, cases)
    run = segments._runner(module, signature)

    def mixing(feeds: Any) -> Any:
        return {name: values[::-1] for name, values in run(feeds).items()}

    segments.compare_shared(run, cases, TOLERANCES["fp32"], "right")
    with pytest.raises(ExportError, match="texts that share rows"):
        segments.compare_shared(mixing, cases, TOLERANCES["fp32"], "wrong")


def test_a_row_of_padding_among_shared_ones_changes_nothing() -> None:
    """It has a vector of its own, which is finite."""
    loaded, signature, cases = prepared(built("BertConfig", "BertModel"), "mean")
    module = segments.segmented(loaded, "embedding", signature, cases)
    run = segments._runner(module, signature)
    ids = np.random.default_rng(0).integers(2, 99, (3, 10))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed["token_type_ids"] = np.zeros_like(ids)
    packed, order = together(feed, 24)
    assert packed["input_ids"].shape == (2, 24)
    right = run(packed)["sentence_embedding"]
    more = {name: np.pad(value, ((0, 1), (0, 0))) for name, value in packed.items()}
    vectors = run(more)["sentence_embedding"]
    assert len(right) == len(order) == 3
    np.testing.assert_allclose(vectors[:3], right, atol=1e-6)
    assert np.isfinite(vectors).all()
