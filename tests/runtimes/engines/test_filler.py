"""MaskFiller: the tokens that transformers' pipeline fills in, for every mask of any text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import transformers as hf

from memopt.bundle import open_bundle
from memopt.errors import BundleError, ConfigurationError, InputError
from memopt.runtimes.engines.filler import MaskFiller
from tests.runtimes.engines import kit


@pytest.fixture(scope="module", params=kit.KINDS)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MaskFiller]:
    exported = request.param == "wordpiece"
    made = kit.bundle(tmp_path_factory.mktemp("fill"), request.param, "fill", exported)
    with MaskFiller(made, device="cpu" if exported else "torch") as opened:
        yield opened


def test_fillings_are_those_of_transformers(engine: MaskFiller) -> None:
    """Token, id and score, of one mask and of several, beside accents, emoji, CJK and spaces."""
    model, tokenizer = kit.reference(engine.bundle)
    pipeline = hf.pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)
    mask = engine.mask
    texts = [mask, f"{mask}{mask}", f"I live in {mask}, near {mask}."]
    texts += [f"{text[:20]} {mask}" for text in kit.SHORT]
    for text, masks in zip(texts, engine.fill(texts), strict=True):
        right = pipeline(text)
        right = [right] if isinstance(right[0], dict) else right
        assert len(masks) == text.count(mask)
        for found, entries in zip(masks, right, strict=True):
            assert text[found.start : found.end].strip() == mask
            assert list(found.ids) == [entry["token"] for entry in entries]
            assert list(found.tokens) == [entry["token_str"] for entry in entries]
            scores = [entry["score"] for entry in entries]
            np.testing.assert_allclose(found.scores, scores, rtol=1e-3)


def test_masks_of_a_long_text_are_filled_from_afar(engine: MaskFiller) -> None:
    """Every mask, by the window where it is farthest from an edge."""
    model, tokenizer = kit.reference(engine.bundle)
    text = kit.LONG[0].replace("from", engine.mask)
    found = engine.fill([text, engine.mask], 1, stride=9)
    assert [len(masks) for masks in found] == [17, 1]
    cut = tokenizer(
        text, truncation=True, max_length=kit.LENGTH, stride=9, return_overflowing_tokens=True
    )
    last = len(cut["input_ids"]) - 1
    best: dict[int, list[tuple[int, int, int]]] = {}
    for window, ids in enumerate(cut["input_ids"]):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        for place in np.flatnonzero(np.array(ids) == tokenizer.mask_token_id):
            left = place if window else 999
            right = len(ids) - 1 - place if window < last else 999
            token = window * (kit.LENGTH - 2 - 9) + int(place)
            best.setdefault(token, []).append(
                (min(left, right), -window, int(logits[place].argmax()))
            )
    assert [mask.ids[0] for mask in found[0]] == [max(best[token])[2] for token in sorted(best)]


def test_bad_input_names_the_mask(engine: MaskFiller) -> None:
    """A text without a mask says what one is written as, and which text it is."""
    known = engine.mask.replace("[", r"\[")
    with pytest.raises(InputError, match=f"input 1 holds no mask; write {known}"):
        engine.fill([engine.mask, "no gap"])
    with pytest.raises(InputError, match="input 0 holds no mask"):
        engine.fill("")
    with pytest.raises(InputError, match="input 0 is int, not str"):
        engine.fill([3])
    with pytest.raises(ConfigurationError, match="top is 0; give 1 or more"):
        engine.fill(engine.mask, 0)
    assert engine.fill([]) == []
    rows = len(kit.reference(engine.bundle)[1])
    assert len(engine.fill(engine.mask, 10**6)[0][0].ids) == rows


def test_a_tokenizer_without_a_mask_is_named(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A model that was given another's tokenizer.json."""
    made = kit.bundle(tmp_path_factory.mktemp("none"), "bytes", "fill")
    path = made.path / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<mask>", "<gap>"), encoding="utf-8")
    engine = MaskFiller(open_bundle(made.path), device="torch", verify="never")
    with pytest.raises(BundleError, match="has no mask token; name it in tokenizer_config"):
        engine.fill("a <mask>")
    engine.close()
