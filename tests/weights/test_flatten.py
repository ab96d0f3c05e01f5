"""Static embeddings and the routes of a Router become bundles of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import (
    Dense,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
)
from tokenizers import Tokenizer
from typer.testing import CliRunner

from memopt import ArrowEngine
from memopt.bundle import Bundle, open_bundle
from memopt.cli import app
from memopt.errors import MemoptError, WeightsError
from memopt.exporters.base import export
from memopt.weights.convert import convert, to_safetensors
from memopt.weights.sentence import read_sentence

TEXTS = ["a cat", "The dog, the cat and a Dog ? " * 9, "", "x", "日本"]
RANDOM = np.random.default_rng(5)


def theirs(folder: Path, **call: Any) -> np.ndarray:
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return np.asarray(model.encode(TEXTS, **call))


def ours(bundle: Bundle, device: str = "torch", **call: Any) -> np.ndarray:
    with ArrowEngine(bundle.path, device=device) as engine:
        return engine.encode(TEXTS, normalize=False, **call)


@pytest.fixture
def words(tiny_source: Path) -> Tokenizer:
    """The tiny BERT's tokenizer, which puts special tokens round a text."""
    return Tokenizer.from_file(str(tiny_source / "tokenizer.json"))


def rows(words: Tokenizer) -> int:
    return max(words.get_vocab().values()) + 1


def static(words: Tokenizer, width: int = 16) -> StaticEmbedding:
    table = RANDOM.normal(size=(rows(words), width)).astype(np.float32)
    return StaticEmbedding(words, embedding_weights=table)


@pytest.mark.parametrize("device", ["cpu", "openvino"])
def test_static_embeddings_are_sentence_transformers_own(
    words: Tokenizer, tmp_path: Path, device: str
) -> None:
    """A mean over the text's own tokens, zero for none, in torch and in both formats."""
    source = tmp_path / "source"
    SentenceTransformer(modules=[static(words), Dense(16, 8), Normalize()]).save(str(source))
    wanted = theirs(source)
    bundle = convert(source, tmp_path / "bundle", on_warning=pytest.fail)
    np.testing.assert_allclose(ours(bundle), wanted, atol=1e-5)
    np.testing.assert_allclose(
        ours(bundle, prompt="a dog "), theirs(source, prompt="a dog "), atol=1e-5
    )
    export(bundle, format="onnx" if device == "cpu" else device)
    np.testing.assert_allclose(ours(bundle, device), wanted, atol=1e-5)
    to_safetensors(bundle)
    assert (bundle.path / "model.safetensors").read_bytes() == (
        source / "model.safetensors"
    ).read_bytes()
    np.testing.assert_allclose(theirs(bundle.path), wanted, atol=1e-6)


def test_texts_are_cut_where_the_tokenizer_says(words: Tokenizer, tmp_path: Path) -> None:
    """A truncation that was saved with the tokenizer counts, without special tokens."""
    words.enable_truncation(7)
    source = tmp_path / "source"
    SentenceTransformer(modules=[static(words)]).save(str(source))
    bundle = convert(source, tmp_path / "bundle")
    assert bundle.manifest.max_length == 7
    np.testing.assert_allclose(ours(bundle), theirs(source), atol=1e-5)


@pytest.mark.parametrize("modules", [True, False])
@pytest.mark.parametrize("parts", [(), ("mapping",), ("mapping", "weights"), ("weights",)])
def test_model2vec_folders_are_read(
    words: Tokenizer, tmp_path: Path, modules: bool, parts: tuple[str, ...]
) -> None:
    """With a mapping and weights for each token, and without modules.json too."""
    source = tmp_path / "source"
    source.mkdir()
    count = rows(words)
    tensors = {"embeddings": RANDOM.normal(size=(count, 8)).astype(np.float32)}
    if "mapping" in parts:
        tensors = {"embeddings": tensors["embeddings"][:9], "mapping": np.arange(count) % 9}
    if "weights" in parts:
        tensors["weights"] = RANDOM.uniform(size=count)
    save_file(tensors, source / "model.safetensors")
    words.save(str(source / "tokenizer.json"))
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": True}
    (source / "config.json").write_text(json.dumps(config))
    entries = [
        {
            "idx": 0,
            "name": "0",
            "path": ".",
            "type": "sentence_transformers.models.StaticEmbedding",
        },
        {"idx": 1, "name": "1", "path": "1_N", "type": "sentence_transformers.models.Normalize"},
    ]
    (source / "modules.json").write_text(json.dumps(entries))
    wanted = theirs(source)
    if not modules:
        (source / "modules.json").unlink()
    lines: list[str] = []
    bundle = convert(source, tmp_path / "bundle", on_warning=lines.append)
    assert len(lines) == 1
    assert "model2vec itself leaves out unknown words" in lines[0]
    assert (bundle.manifest.dimension, bundle.manifest.normalize) == (8, True)
    np.testing.assert_allclose(ours(bundle), wanted, atol=1e-5)
    to_safetensors(bundle)
    np.testing.assert_allclose(theirs(bundle.path), wanted, atol=1e-6)


def wordllama(words: Tokenizer, folder: Path) -> Path:
    (folder / "weights").mkdir(parents=True)
    (folder / "tokenizers").mkdir()
    table = RANDOM.normal(size=(rows(words), 8)).astype(np.float16)
    save_file({"embedding.weight": table}, folder / "weights" / "l2_tiny_8.safetensors")
    words.save(str(folder / "tokenizers" / "l2_tiny_tokenizer_config.json"))
    return folder


def test_wordllama_s_files_are_read(words: Tokenizer, tmp_path: Path) -> None:
    """The package's own layout: a float16 table, averaged in float32."""
    source = wordllama(words, tmp_path / "source")
    bundle = convert(source, tmp_path / "bundle", on_warning=pytest.fail)
    got = ours(bundle)
    table = load_file(source / "weights" / "l2_tiny_8.safetensors")["embedding.weight"]
    for row, text in zip(got, TEXTS, strict=True):
        ids = words.encode(text, add_special_tokens=False).ids
        wanted = table[ids].astype(np.float32).mean(0) if ids else np.zeros(8)
        np.testing.assert_allclose(row, wanted, atol=1e-5)
    shutil.copy(
        source / "weights" / "l2_tiny_8.safetensors", source / "weights" / "l2_tiny_9.safetensors"
    )
    with pytest.raises(WeightsError, match=r"several tables: l2_tiny_8.*l2_tiny_9"):
        convert(source, tmp_path / "no")


def test_the_real_wordllama_answers_as_its_package(tmp_path: Path) -> None:
    """package:wordllama converts, and gives WordLlama's own vectors."""
    inference = pytest.importorskip("wordllama.inference")
    folder = Path(inference.__file__).parent
    bundle = convert("package:wordllama", tmp_path / "bundle", on_warning=pytest.fail)
    table = load_file(next((folder / "weights").glob("*.safetensors")))["embedding.weight"]
    tokenizer = Tokenizer.from_file(str(next((folder / "tokenizers").iterdir())))
    wanted = inference.WordLlamaInference(table, tokenizer).embed(TEXTS)
    np.testing.assert_allclose(ours(bundle), wanted, atol=1e-5)


BROKEN = {
    "tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "table": (
        lambda f: save_file({"rows": np.eye(3)}, f / "model.safetensors"),
        r"no table of static embeddings",
    ),
    "mapping": (
        lambda f: save_file(
            {"embeddings": np.eye(3), "mapping": np.array([3])}, f / "model.safetensors"
        ),
        r"mapping goes past the 3 rows",
    ),
    "weights": (
        lambda f: save_file(
            {"embeddings": np.eye(3), "weights": np.ones(2)}, f / "model.safetensors"
        ),
        r"\(2,\) weights for 3 tokens",
    ),
    "shape": (
        lambda f: save_file({"embedding.weight": np.ones(3)}, f / "model.safetensors"),
        r"shape \(3,\), not \(tokens, width\)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_static_embeddings_are_one_line(
    words: Tokenizer, tmp_path: Path, name: str
) -> None:
    """What does not fit is named, and nothing is written."""
    source = tmp_path / "source"
    SentenceTransformer(modules=[static(words)]).save(str(source))
    change, message = BROKEN[name]
    change(source)
    with pytest.raises(MemoptError, match=message):
        convert(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.fixture
def router(words: Tokenizer, tiny_source: Path, tmp_path: Path) -> Path:
    """A table for queries, the tiny BERT for documents, one layer behind both."""
    route = Router.for_query_document(
        query_modules=[static(words, 32)],
        document_modules=[Transformer(str(tiny_source)), Pooling(32, "cls")],
    )
    prompts = {"query": "the dog ", "document": ""}
    model = SentenceTransformer(modules=[route, Dense(32, 8), Normalize()], prompts=prompts)
    model.save(str(tmp_path / "router"))
    return tmp_path / "router"


@pytest.mark.parametrize("route", ["query", "document"])
def test_a_route_answers_as_its_task(router: Path, tmp_path: Path, route: str) -> None:
    """Each route is a bundle, equal to encode(task=...), that sentence-transformers opens."""
    wanted = theirs(router, task=route, prompt_name=route)
    done = CliRunner().invoke(
        app, ["convert", str(router), "-o", str(tmp_path / "bundle"), "--route", route]
    )
    assert done.exit_code == 0, done.output
    bundle = open_bundle(tmp_path / "bundle")
    np.testing.assert_allclose(ours(bundle, prompt_name=route), wanted, atol=1e-5)
    to_safetensors(bundle)
    np.testing.assert_allclose(theirs(bundle.path, prompt_name=route), wanted, atol=1e-6)


def test_a_router_says_its_routes(router: Path, tiny_source: Path, tmp_path: Path) -> None:
    """Without a route, with one that is not there, and with one for another model."""
    with pytest.raises(WeightsError, match=r"is a Router.*query, document.*--route query"):
        convert(router, tmp_path / "no")
    with pytest.raises(WeightsError, match=r"no route 'querry'.*did you mean 'query'"):
        convert(router, tmp_path / "no", route="querry")
    with pytest.raises(WeightsError, match=r"no Router, so there is no route 'query'"):
        convert(tiny_source, tmp_path / "no", route="query")
    with pytest.raises(WeightsError, match=r"begins with a Router.*--route"):
        read_sentence(router)
    (router / "router_config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"does not say what the Router's routes"):
        convert(router, tmp_path / "no", route="query")
