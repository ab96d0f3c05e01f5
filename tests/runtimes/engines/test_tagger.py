"""TokenClassifier: the spans that transformers' pipeline finds, over texts of any length."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from memopt.bundle import open_bundle
from memopt.errors import BundleError, ConfigurationError, DeviceError, InputError
from memopt.runtimes.engines.classifier import Classifier
from memopt.runtimes.engines.tagger import TokenClassifier
from memopt.tasks.spans import Span
from tests.runtimes.engines import kit


@pytest.fixture(scope="module", params=kit.KINDS)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TokenClassifier]:
    exported = request.param == "wordpiece"
    made = kit.bundle(tmp_path_factory.mktemp("tag"), request.param, "tag", exported)
    with TokenClassifier(made, device="cpu" if exported else "torch") as opened:
        yield opened


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Characters without the spaces around them."""
    match = re.search(r"\S(.*\S)?", text[start:end], re.DOTALL)
    return (start + match.start(), start + match.end()) if match else (start, end)


def same(found: list[Span], expected: list[dict[str, Any]], text: str) -> None:
    label = "entity" if expected and "entity" in expected[0] else "entity_group"
    assert [(s.label, s.start, s.end) for s in found] == [
        (e[label], *trimmed(text, e["start"], e["end"])) for e in expected
    ]
    assert [s.text for s in found] == [text[s.start : s.end] for s in found]
    np.testing.assert_allclose(
        [s.score for s in found], [e["score"] for e in expected], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("aggregation", ["simple", "first", "max", "average", "none"])
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_spans_are_those_of_transformers(engine: TokenClassifier, aggregation: str) -> None:
    """Label, characters and score of each, on accents, emoji, CJK, spaces and no text at all."""
    model, tokenizer = kit.reference(engine.bundle)
    pipeline = hf.pipeline(
        "token-classification",
        model=model,
        tokenizer=tokenizer,
        aggregation_strategy=aggregation,
    )
    texts = [text for text in [*kit.SHORT, ""] if len(tokenizer(text)["input_ids"]) <= kit.LENGTH]
    assert len(texts) > 3
    found = engine.tag(texts, aggregation)
    assert found[-1] == []
    assert sum(map(len, found)) > 5
    for text, spans in zip(texts, found, strict=True):
        same(spans, pipeline(text), text)


def farthest(engine: TokenClassifier, text: str, stride: int) -> list[tuple[Any, ...]]:
    """Label and characters of each token, by the window where it is farthest from an edge."""
    model, tokenizer = kit.reference(engine.bundle)
    cut = tokenizer(
        text,
        truncation=True,
        max_length=kit.LENGTH,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    step, best = kit.LENGTH - 2 - stride, {}
    for window in range(len(cut["input_ids"])):
        ids = cut["input_ids"][window]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        own = [i for i, special in enumerate(cut["special_tokens_mask"][window]) if not special]
        for place, i in enumerate(own):
            left = place if window else 10**6
            right = len(own) - 1 - place if window + 1 < len(cut["input_ids"]) else 10**6
            label = kit.LABELS[logits[i].argmax()]
            offset = trimmed(text, *cut["offset_mapping"][window][i])
            edge = min(left, right)
            if edge > best.get(window * step + place, (-1,))[0]:
                best[window * step + place] = (edge, label, *offset)
    return [best[token][1:] for token in sorted(best)]


@pytest.mark.parametrize("stride", [0, 25])
def test_every_token_of_a_long_text_is_looked_at_from_afar(
    engine: TokenClassifier, stride: int
) -> None:
    """Its label is that of the window where it is farthest from an edge, in batches of any size."""
    for batch_size in (None, 3):
        found = engine.tag(kit.LONG, "none", ignore=(), stride=stride, batch_size=batch_size)
        for text, spans in zip(kit.LONG, found, strict=True):
            expected = farthest(engine, text, stride)
            assert [(s.label, s.start, s.end) for s in spans] == expected
            assert spans[-1].end == len(text)


def test_a_span_goes_on_over_the_edge_of_a_window(engine: TokenClassifier) -> None:
    """Windows are put together before spans are made of tokens."""
    text = kit.LONG[0]
    tokens = engine.tag([text], "none", ignore=())[0]
    names = [token.label[2:] for token in tokens]
    edges = sum(
        token.label.startswith("B") or name != before
        for token, name, before in zip(tokens, names, ["?", *names], strict=False)
    )
    assert len(engine.tag([text], ignore=())[0]) == edges


def test_bad_input_is_named(engine: TokenClassifier) -> None:
    """By its position, with what to do; nothing is left out in silence."""
    with pytest.raises(InputError, match="input 1 is int, not str; correct it"):
        engine.tag(["a", 3])
    with pytest.raises(InputError, match="input 0 holds a lone surrogate at position 1"):
        engine.tag("a\ud800")
    with pytest.raises(ConfigurationError, match=r"aggregation 'simpel'.*mean 'simple'"):
        engine.tag("a", "simpel")
    with pytest.raises(ConfigurationError, match="stride is 38, and a window holds 38 tokens"):
        engine.tag("a", stride=38)
    assert engine.tag([]) == []
    assert engine.labels == kit.LABELS


def test_another_task_names_the_engine_and_a_closed_engine_says_so(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A tagger is no classifier."""
    made = kit.bundle(tmp_path_factory.mktemp("other"), "bytes", "tag")
    with pytest.raises(BundleError, match=r"tagger\.TokenClassifier, or run: memopt tag"):
        Classifier(open_bundle(made.path))
    engine = TokenClassifier(made, device="torch")
    engine.close()
    with pytest.raises(DeviceError, match="closed"):
        engine.tag("Rome")
