"""LateEncoder beside sentence-transformers' MultiVectorEncoder, for three kinds of folder."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from memopt import Bundle, open_bundle
from memopt.cli import app
from memopt.errors import InputError
from memopt.exporters.base import export
from memopt.runtimes.engines.late import LateEncoder
from memopt.tasks.late import maxsim, stacked
from memopt.weights.convert import convert
from tests.parameters import mostly_slow

QUERIES = ["where is the cat?", "", "what is the price of a very long question " * 6, "été 猫"]
DOCUMENTS = ["a cat sat, on the mat.", "!?", "the stock market fell " * 80, "Why? Because.", ""]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory, minilm: Bundle) -> Path:
    """Return a small BERT with random weights and MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(3)
    tokenizer = AutoTokenizer.from_pretrained(minilm.path)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(tokenizer), intermediate_size=64, **size, initializer_range=0.2
    )
    made = tmp_path_factory.mktemp("trunk")
    BertModel(config, add_pooling_layer=False).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def native(trunk: Path, target: Path, **transformer: Any) -> Path:
    """Save a MultiVectorEncoder of today: projection, skipped punctuation, prompts."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    torch.manual_seed(5)
    modules = [
        Transformer(str(trunk), **transformer),
        Dense(32, 16, False, torch.nn.Identity(), module_input_name="token_embeddings"),
        MultiVectorMask(skiplist_words=list(string.punctuation)),
        Normalize(module_input_name="token_embeddings"),
    ]
    prompts = {"query": "ask: ", "document": "text: "}
    MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu").save(str(target))
    return target


def plain(trunk: Path, target: Path) -> Path:
    return native(trunk, target)


def filled(trunk: Path, target: Path) -> Path:
    expansion = {"strategy": "fixed", "length": 24, "attend": False}
    return native(trunk, target, query_expansion=expansion, document_length=40)


def filled_at_least(trunk: Path, target: Path) -> Path:
    expansion = {"strategy": "min", "length": 24, "attend": True}
    return native(trunk, target, query_expansion=expansion, query_length=48)


def pylate(trunk: Path, target: Path) -> Path:
    """Save what PyLate 1 wrote: two modules, everything else in the settings file."""
    native(trunk, target)
    modules = json.loads((target / "modules.json").read_text())[:2]
    modules[1]["type"] = "pylate.models.Dense.Dense"
    (target / "modules.json").write_text(json.dumps(modules))
    dense = target / modules[1]["path"] / "config.json"
    config = json.loads(dense.read_text())
    kept = ("in_features", "out_features", "bias", "activation_function")
    dense.write_text(json.dumps({key: config[key] for key in kept}))
    settings = {
        "model_type": "ColBERT",
        "query_prefix": "[unused0] ",
        "document_prefix": "[unused1] ",
        "query_length": 24,
        "document_length": 40,
        "attend_to_expansion_tokens": False,
        "skiplist_words": list("!?.,"),
        "prompts": {},
    }
    (target / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return target


def stanford(trunk: Path, target: Path) -> Path:
    """Save what Stanford's ColBERT wrote: a projection beside the encoder, and its metadata."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, BertModel

    model = BertModel.from_pretrained(trunk, add_pooling_layer=False)
    torch.manual_seed(6)
    weights = {f"bert.{name}": value for name, value in model.state_dict().items()}
    target.mkdir()
    save_file({**weights, "linear.weight": torch.randn(16, 32)}, target / "model.safetensors")
    config = json.loads((trunk / "config.json").read_text())
    config["architectures"] = ["HF_ColBERT"]
    (target / "config.json").write_text(json.dumps(config))
    metadata = {"query_maxlen": 24, "doc_maxlen": 40, "attend_to_mask_tokens": False}
    (target / "artifact.metadata").write_text(json.dumps(metadata))
    AutoTokenizer.from_pretrained(trunk).save_pretrained(target)
    return target


KINDS = [plain, filled, filled_at_least, pylate, stanford]


@pytest.mark.parametrize("save", mostly_slow(KINDS, plain), ids=lambda save: save.__name__)
def test_vectors_and_scores_are_those_of_sentence_transformers(
    save: Callable[[Path, Path], Path], trunk: Path, tmp_path: Path
) -> None:
    """Queries and documents, short, long, empty and of punctuation alone, in one batch or many."""
    from sentence_transformers import MultiVectorEncoder

    folder = save(trunk, tmp_path / "model")
    right = MultiVectorEncoder(str(folder), device="cpu")
    bundle = convert(folder, tmp_path / "bundle")
    assert bundle.manifest.task == "late-interaction"
    export(bundle)
    wanted = [
        right.encode_query(QUERIES, convert_to_numpy=True),
        right.encode_document(DOCUMENTS, convert_to_numpy=True),
    ]
    with LateEncoder(open_bundle(bundle.path)) as engine:
        assert engine.dimension == 16
        found = engine.encode(QUERIES, query=True), engine.encode(DOCUMENTS)
        alone = [engine.encode([text])[0] for text in DOCUMENTS]
    for ours, theirs in zip(found, wanted, strict=True):
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-5)
    for one, other in zip(alone, found[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    scored = [row for row in range(len(DOCUMENTS)) if len(found[1][row])]
    similar = right.similarity(wanted[0], [wanted[1][row] for row in scored]).numpy()
    np.testing.assert_allclose(engine.maxsim(*found)[:, scored], similar, rtol=1e-4, atol=1e-4)


def test_maxsim_of_a_text_without_tokens() -> None:
    """A document without a token is below all others; a query without one is 0 with each."""
    random = np.random.default_rng(0)
    texts = [random.normal(size=(n, 4)).astype(np.float32) for n in (3, 0, 5, 1)]
    some = stacked(texts, 4)
    scores = maxsim(some, some)
    assert np.isneginf(scores[[0, 2, 3], 1]).all()
    assert (scores[1, [0, 2, 3]] == 0).all()
    right = (texts[2] @ texts[0].T).max(axis=1).sum()
    np.testing.assert_allclose(scores[2, 0], right, rtol=1e-6)


def test_the_command_and_bad_input(trunk: Path, tmp_path: Path) -> None:
    """embed --late writes a list of vectors a text; what is no text is named."""
    bundle = convert(filled(trunk, tmp_path / "model"), tmp_path / "bundle")
    export(bundle)
    texts = tmp_path / "texts.txt"
    texts.write_text("a cat\nthe dog\n", encoding="utf-8")
    output = tmp_path / "v.parquet"
    arguments = ["embed", str(bundle.path), "-i", str(texts), "-o", str(output), "--late"]
    assert CliRunner().invoke(app, [*arguments, "--query"]).exit_code == 0
    with LateEncoder(open_bundle(bundle.path)) as engine:
        found = engine.encode(["a cat", "the dog"], query=True).to_lists()
        assert pq.read_table(output)["vector"].to_pylist() == found
        assert len(engine.encode([])) == 0
        with pytest.raises(InputError, match="input 1 is NoneType"):
            engine.encode(["a", None])
