"""SparseEncoder beside sentence-transformers' own, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from memopt import Bundle, open_bundle
from memopt.cli import app
from memopt.errors import BundleError, ConfigurationError, InputError
from memopt.exporters.base import export
from memopt.runtimes.engines.sparse import SparseEncoder
from memopt.tasks.sparse import dots, sparse_rows
from memopt.weights.convert import convert
from tests.parameters import mostly_slow

TEXTS = ["a cat sat on the mat", "", "Why?", "the stock market fell " * 80, "été 猫 🙂"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm: Bundle) -> Path:
    """Return a small masked language model with random weights."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(minilm.path)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    made = tmp_path_factory.mktemp("mlm")
    BertForMaskedLM(config).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Return its bundle, exported as a sparse encoder to both formats."""
    made = convert(folder, tmp_path_factory.mktemp("b") / "b", task="sparse-embedding")
    export(made)
    export(open_bundle(made.path), format="openvino")
    return open_bundle(made.path)


@pytest.mark.parametrize("variant", ["onnx-fp32-fused", "openvino-fp32"])
def test_weights_are_those_of_sentence_transformers(
    folder: Path, bundle: Bundle, variant: str
) -> None:
    """Short, empty, long and foreign texts; the largest weights alone with ``top``."""
    from sentence_transformers import SparseEncoder as Reference

    right = Reference(str(folder), device="cpu")
    wanted = right.encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    with SparseEncoder(bundle, variant=variant) as engine:
        found = engine.encode(TEXTS)
        assert engine.dimension == wanted.shape[1]
        np.testing.assert_allclose(found.dense(), wanted, atol=1e-5)
        few = engine.encode(TEXTS, top=8)
        assert np.diff(few.indptr).max() == 8
        scores = engine.similarity(found, found)
    np.testing.assert_allclose(scores, wanted @ wanted.T, rtol=1e-4)
    kept = right.encode(TEXTS, convert_to_sparse_tensor=False, max_active_dims=8).numpy()
    np.testing.assert_allclose(few.dense(), kept, atol=1e-5)


@pytest.mark.parametrize("pooling", mostly_slow(["max", "sum"], "max"))
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_a_sparse_encoder_that_sentence_transformers_saved(
    folder: Path, tmp_path: Path, pooling: str, activation: str
) -> None:
    """Its pooling, its activation and its number of weights are honoured, in graph and torch."""
    from sentence_transformers import SparseEncoder as Reference
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    trunk = Transformer(str(folder), transformer_task="fill-mask")
    modules = [trunk, SpladePooling(pooling_strategy=pooling, activation_function=activation)]
    right = Reference(modules=modules, device="cpu", max_active_dims=40)
    right.save(str(tmp_path / "saved"))
    bundle = convert(tmp_path / "saved", tmp_path / "bundle")
    assert bundle.manifest.task == "sparse-embedding"
    if pooling == "sum":
        export(bundle)
    wanted = right.encode(TEXTS, convert_to_sparse_tensor=False).numpy()
    device = "cpu" if pooling == "sum" else "torch"
    with SparseEncoder(open_bundle(bundle.path), device=device) as engine:
        np.testing.assert_allclose(engine.encode(TEXTS).dense(), wanted, rtol=1e-4, atol=1e-5)


def test_what_a_vector_is_made_of(bundle: Bundle) -> None:
    """Columns rise, none is zero, words come by weight; no texts give no rows."""
    with SparseEncoder(bundle) as engine:
        found = engine.encode(TEXTS)
        for columns, values in found:
            assert (np.diff(columns) > 0).all()
            assert (values > 0).all()
        words = engine.words(TEXTS[0], top=3)[0]
        assert [weight for _, weight in words] == sorted((w for _, w in words), reverse=True)
        assert len(engine.encode([])) == 0
        with pytest.raises(InputError, match="input 1 is int"):
            engine.encode(["a", 1])
        with pytest.raises(ConfigurationError, match="top is 0"):
            engine.encode(["a"], top=0)
    np.testing.assert_array_equal(found.to_scipy().toarray(), found.dense())


def test_dots_see_documents_without_words() -> None:
    """An empty row between others, and at the end, has the product 0."""
    rows = [np.array(r, np.float32) for r in ([0, 1, 2], [0, 0, 0], [3, 0, 0], [0, 0, 0])]
    sparse, dense = sparse_rows(rows, 3), np.stack(rows)
    np.testing.assert_array_equal(dots(sparse, sparse), dense @ dense.T)


def test_the_command_writes_parquet_and_lines(
    bundle: Bundle, minilm: Bundle, tmp_path: Path
) -> None:
    """embed --sparse gives every text's vector, whole or not at all; a dense bundle is refused."""
    texts = tmp_path / "texts.txt"
    texts.write_text("a cat\nthe dog\n", encoding="utf-8")

    def run(model: Path, output: str, *more: str) -> Any:
        arguments = ["embed", str(model), "-i", str(texts), "-o", str(tmp_path / output), *more]
        return CliRunner().invoke(app, arguments)

    for output in ("v.parquet", "v.jsonl"):
        assert run(bundle.path, output, "--sparse").exit_code == 0
    table = pq.read_table(tmp_path / "v.parquet").to_pylist()
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    with SparseEncoder(bundle) as engine:
        right = engine.encode(["a cat", "the dog"]).to_lists()
    for number, (row, line) in enumerate(zip(table, lines, strict=True)):
        assert [[e["index"], e["value"]] for e in row["vector"]] == right[number]
        assert line["vector"] == right[number]
    failed = run(minilm.path, "no.jsonl", "--sparse")
    assert isinstance(failed.exception, BundleError)
    assert not (tmp_path / "no.jsonl").exists()
    assert isinstance(run(bundle.path, "v.npy", "--sparse").exception, ConfigurationError)
