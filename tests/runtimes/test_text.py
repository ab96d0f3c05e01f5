"""Texts become the tokens that sentence-transformers makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt.bundle import Bundle, open_bundle
from memopt.errors import BundleError
from memopt.positions import position_limit
from memopt.runtimes.batching import UnusableItems
from memopt.runtimes.text import TextFrontEnd
from memopt.weights.convert import to_safetensors

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@pytest.fixture
def bundle(tiny: Bundle, tmp_path: Path) -> Bundle:
    """The tiny BERT with a tokenizer that knows upper from lower case."""
    folder = Path(shutil.copytree(tiny.path, tmp_path / "bundle"))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = None
    path.write_text(json.dumps(tokenizer))
    to_safetensors(open_bundle(folder))
    return open_bundle(folder)


def change(bundle: Bundle, name: str, **values: Any) -> None:
    path = bundle.path / name
    stated = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**stated, **values}))


def tokens(bundle: Bundle, text: str) -> list[int]:
    (batch,) = TextFrontEnd(bundle, INPUTS).prepare([text])
    return [int(i) for i in batch.feed["input_ids"][0]]


def theirs(bundle: Bundle, text: str) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    return np.asarray(SentenceTransformer(str(bundle.path), device="cpu").encode([text]))


def ours(bundle: Bundle, text: str) -> np.ndarray:
    from memopt import ArrowEngine

    with ArrowEngine(bundle, device="torch") as engine:
        return engine.encode([text])


def test_do_lower_case_is_honoured(bundle: Bundle) -> None:
    """Where sentence_bert_config.json says so, capitals are lowered before the tokenizer."""
    assert tokens(bundle, "The CAT") != tokens(bundle, "the cat")
    change(bundle, "sentence_bert_config.json", do_lower_case=True)
    assert tokens(bundle, "The CAT") == tokens(bundle, "the cat")
    np.testing.assert_allclose(ours(bundle, "The CAT"), theirs(bundle, "The CAT"), atol=1e-5)


def test_the_default_prompt_is_put_before_every_text(bundle: Bundle) -> None:
    """config_sentence_transformers.json decides; a prompt that is not there is refused."""
    plain = tokens(bundle, "a dog")
    name = "config_sentence_transformers.json"
    change(bundle, name, prompts={"query": "the cat "}, default_prompt_name=None)
    assert tokens(bundle, "a dog") == plain
    change(bundle, name, default_prompt_name="query")
    assert tokens(bundle, "a dog") == tokens(bundle, "")[:-1] + plain[1:]
    np.testing.assert_allclose(ours(bundle, "a dog"), theirs(bundle, "a dog"), atol=1e-5)
    change(bundle, name, default_prompt_name="passage")
    with pytest.raises(BundleError, match="'passage' is not among the prompts"):
        tokens(bundle, "a dog")


def test_chunks_grow_and_hold_every_text_once(bundle: Bundle) -> None:
    """A small first chunk, larger later ones, none over the limit of characters; longest first."""
    front = TextFrontEnd(bundle, INPUTS)
    texts = ["word " * (1 + i % 900) for i in range(6_000)]
    chunks = front.chunks(texts)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(len(texts)))
    sizes = [len(chunk) for chunk in chunks]
    # The longest come first, and of those few fit.
    assert sizes[0] == 64 == min(sizes[:-1])
    assert 512 < max(sizes) <= 2048
    for chunk in chunks[1:]:
        assert len(chunk) == 64 or sum(len(texts[i]) for i in chunk) <= 1 << 18
    assert [len(chunk) for chunk in front.chunks(["word"] * 6_000)] == [64, 512, 2048, 2048, 1328]
    lengths = [len(texts[i]) for i in np.concatenate(chunks)]
    assert lengths == sorted(lengths, reverse=True)
    assert [len(chunk) for chunk in front.chunks(texts[:128])] == [128]
    assert front.chunks([]) == []


def test_a_token_beyond_the_table_is_an_input_error(tiny: Bundle, tmp_path: Path) -> None:
    """By name and position, before any runtime makes up a vector; others are answered."""
    folder = tmp_path / "small"
    shutil.copytree(tiny.path, folder)
    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"] = config["vocab_size"] - 1  # "dog" is the last word
    (folder / "config.json").write_text(json.dumps(config))
    front = TextFrontEnd(Bundle(folder, tiny.manifest), ("input_ids", "attention_mask"))
    assert front.prepare(["a cat"])
    for texts in (["a cat", "the dog"], ["the dog"]):
        with pytest.raises(UnusableItems) as error:
            front.prepare(texts)
        ((index, why),) = error.value.reasons.items()
        assert index == len(texts) - 1
        assert f"'dog' with id {rows}" in why


@pytest.mark.parametrize(
    ("model_type", "padding", "fits"),
    [
        *(("bert", 0, 130), ("gpt2", None, 130), ("roberta", 1, 128), ("mpnet", 1, 128)),
        *(("data2vec-text", 1, 128), ("roberta-prelayernorm", 1, 128), ("luke", 1, 128)),
        *(("xmod", 1, 128), ("roberta", None, 129), ("lilt", 0, 129)),
    ],
)
def test_how_many_tokens_a_position_table_takes(
    model_type: str, padding: int | None, fits: int
) -> None:
    """RoBERTa's kin count from behind the padding id; the rest use every row."""
    config = {"model_type": model_type, "max_position_embeddings": 130, "pad_token_id": padding}
    assert position_limit(config) == fits
    if padding == 1:
        del config["pad_token_id"]  # save_pretrained leaves out what is the default
        assert position_limit(config) == fits
