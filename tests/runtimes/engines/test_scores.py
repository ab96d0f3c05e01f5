"""Classifier and Reranker beside transformers' pipelines and sentence-transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from memopt import ArrowEngine, Bundle, open_bundle
from memopt.cli import app
from memopt.errors import BundleError, ConfigurationError, DeviceError, InputError, WeightsError
from memopt.exporters.base import export
from memopt.runtimes.engines.classifier import Classifier
from memopt.runtimes.engines.reranker import Reranker
from memopt.runtimes.task_engine import open_task
from memopt.weights.convert import convert
from memopt.weights.cross_encoder import activation

TEXTS = [
    "a cat sat on the mat",
    "",
    "Why?",
    "the stock market fell by 3 % today " * 40,
    "été 猫 🙂",
]
PAIRS = [(a, b) for a in TEXTS[:4] for b in TEXTS]
Made = Callable[..., tuple[Path, Bundle]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, minilm: Bundle) -> Made:
    """Return what makes a small BERT classifier, random, exported: its folder and bundle."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(minilm.path)
    known: dict[str, tuple[Path, Bundle]] = {}

    def make(**config: Any) -> tuple[Path, Bundle]:
        key = json.dumps(config, sort_keys=True)
        if key not in known:
            torch.manual_seed(7)
            size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
            whole = {"vocab_size": len(tokenizer), "intermediate_size": 64, **size, **config}
            model = BertForSequenceClassification(BertConfig(**whole, initializer_range=0.4))
            folder = tmp_path_factory.mktemp("classifier")
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            bundle = convert(folder, tmp_path_factory.mktemp("bundles") / "b")
            export(bundle)
            known[key] = folder, open_bundle(bundle.path)
        return known[key]

    return make


LABELS = ("contradiction", "neutral", "entailment")
NLI = {
    "id2label": dict(enumerate(LABELS)),
    "label2id": {name: number for number, name in enumerate(LABELS)},
}


def pipeline(kind: str, folder: Path) -> Any:
    """Return transformers' own pipeline of a folder."""
    from transformers import pipeline as make

    return make(kind, model=str(folder), device="cpu")


def test_labels_and_scores_are_those_of_the_pipeline(made: Made) -> None:
    """Softmax over the labels, best first, for texts short, empty, long and of other scripts."""
    folder, bundle = made(id2label={0: "bad", 1: "good", 2: "so-so"})
    assert bundle.manifest.task == "text-classification"
    reference = pipeline("text-classification", folder)
    with Classifier(bundle) as engine:
        for text, found in zip(TEXTS, engine.classify(TEXTS), strict=True):
            right = reference(text, top_k=None, truncation=True)
            assert list(found.labels) == [entry["label"] for entry in right]
            np.testing.assert_allclose(found.scores, [e["score"] for e in right], atol=1e-5)
        assert engine.classify(TEXTS[0], top=1)[0].labels == engine.classify(TEXTS)[0].labels[:1]
        assert engine.classify([]) == []


def test_labels_that_do_not_exclude_each_other_get_a_sigmoid(made: Made) -> None:
    """problem_type multi_label_classification, as the pipeline."""
    folder, bundle = made(num_labels=4, problem_type="multi_label_classification")
    right = pipeline("text-classification", folder)(TEXTS[0], top_k=None)
    with Classifier(bundle) as engine:
        (found,) = engine.classify(TEXTS[0])
    np.testing.assert_allclose(found.scores, [entry["score"] for entry in right], atol=1e-5)


def test_labels_of_ones_own_are_those_of_the_zero_shot_pipeline(made: Made) -> None:
    """Each label as a hypothesis, exclusive and not; a model without inference is refused."""
    folder, bundle = made(**NLI)
    reference = pipeline("zero-shot-classification", folder)
    labels = ["animals", "money", "travel"]
    with Classifier(bundle) as engine:
        for multi in (False, True):
            right = reference(TEXTS[0], labels, multi_label=multi)
            (found,) = engine.classify([TEXTS[0]], labels=labels, multi_label=multi)
            assert list(found.labels) == right["labels"]
            np.testing.assert_allclose(found.scores, right["scores"], atol=1e-5)
        with pytest.raises(InputError, match="no place for a label"):
            engine.classify(TEXTS, labels=labels, hypothesis="This is it.")
        with pytest.raises(InputError, match="no labels"):
            engine.classify(TEXTS, labels=[])
    with (
        Classifier(made(id2label={0: "bad", 1: "good", 2: "so-so"})[1]) as engine,
        pytest.raises(BundleError, match="natural language inference"),
    ):
        engine.classify(TEXTS, labels=labels)


@pytest.mark.parametrize("names", [("entailment", "not_entailment"), ("other", "entailment")])
def test_two_labels_of_inference_are_enough(made: Made, names: tuple[str, str]) -> None:
    """Entailment or not takes labels of one's own, as the pipeline; braces are no code."""
    folder, bundle = made(
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}
    )
    reference = pipeline("zero-shot-classification", folder)
    labels = ["animals", "money"]
    with Classifier(bundle) as engine:
        for multi in (False, True):
            right = reference(TEXTS[0], labels, multi_label=multi)
            (found,) = engine.classify([TEXTS[0]], labels=labels, multi_label=multi)
            assert list(found.labels) == right["labels"]
            np.testing.assert_allclose(found.scores, right["scores"], atol=1e-5)
        with pytest.raises(InputError, match="no place for a label"):
            engine.classify(TEXTS, labels=labels, hypothesis="It is {thing}.")
    done = CliRunner().invoke(app, ["classify", str(bundle.path), "a cat", "--labels", ""])
    assert done.exit_code != 0
    assert "no labels" in str(done.exception)


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [("torch.nn.modules.linear.Identity", "Identity"), ("their.code.Identity", "Sigmoid")],
)
def test_an_activation_of_its_own_code_is_passed_over(
    tmp_path: Path, stated: str, wanted: str
) -> None:
    """As in sentence-transformers, which then takes the default."""
    config = {"sbert_ce_default_activation_function": stated}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert activation(tmp_path) == wanted


def test_scores_of_pairs_are_those_of_a_cross_encoder(made: Made) -> None:
    """Long pairs are cut where sentence-transformers cuts them; batches change nothing."""
    from sentence_transformers import CrossEncoder

    folder, bundle = made(num_labels=1)
    assert bundle.manifest.task == "reranking"
    right = CrossEncoder(str(folder), device="cpu").predict(PAIRS, show_progress_bar=False)
    with Reranker(bundle) as engine:
        np.testing.assert_allclose(engine.score(PAIRS), right, atol=1e-5)
        alone = [engine.score([pair])[0] for pair in PAIRS]
        np.testing.assert_allclose(engine.score(PAIRS, batch_size=3), alone, atol=1e-5)
        ranked = engine.rank(TEXTS[0], TEXTS, top=2)
    best = CrossEncoder(str(folder), device="cpu").rank(TEXTS[0], TEXTS, top_k=2)
    assert ranked.order.tolist() == [entry["corpus_id"] for entry in best]
    np.testing.assert_allclose(ranked.scores, [e["score"] for e in best], atol=1e-5)


def test_a_cross_encoder_that_sentence_transformers_saved(made: Made, tmp_path: Path) -> None:
    """Its modules.json, its length and its activation are honoured."""
    from sentence_transformers import CrossEncoder

    right = CrossEncoder(
        str(made(num_labels=1)[0]),
        device="cpu",
        max_length=24,
        activation_fn=torch.nn.Identity(),
    )
    right.save(str(tmp_path / "saved"))
    bundle = convert(tmp_path / "saved", tmp_path / "bundle")
    assert (bundle.manifest.task, bundle.manifest.max_length) == ("reranking", 24)
    wanted = right.predict(PAIRS, show_progress_bar=False)
    with Reranker(bundle, device="torch") as engine:
        np.testing.assert_allclose(engine.score(PAIRS), wanted, atol=1e-5)


def test_the_activation_of_older_cross_encoders_is_honoured(made: Made, tmp_path: Path) -> None:
    """config.json's key of before version 4, and the key of after it."""
    from sentence_transformers import CrossEncoder

    folder = shutil.copytree(made(num_labels=1)[0], tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    identity = "torch.nn.modules.linear.Identity"
    for older in (
        {"sbert_ce_default_activation_function": identity},
        {"sentence_transformers": {"activation_fn": identity, "version": "4.1.0"}},
    ):
        (folder / "config.json").write_text(json.dumps({**config, **older}))
        right = CrossEncoder(str(folder), device="cpu").predict(PAIRS[:3], show_progress_bar=False)
        bundle = convert(folder, tmp_path / "bundle")
        with Reranker(bundle, device="torch") as engine:
            np.testing.assert_allclose(engine.score(PAIRS[:3]), right, atol=1e-5)
        assert np.abs(right).max() > 1
        shutil.rmtree(tmp_path / "bundle")


def test_bad_input_is_named(made: Made) -> None:
    """No documents give none; what is no pair, no list, or not text is one clear line."""
    _, bundle = made(num_labels=1)
    with Reranker(bundle) as engine:
        assert len(engine.rank("a query", [])) == 0
        assert engine.score([]).shape == (0,)
        for documents, told in ((["a", None], "input 1"), ("a text", "one document")):
            with pytest.raises(InputError, match=told):
                engine.rank("query", documents)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="not a pair of str"):
            engine.score(["no pair"])
        with pytest.raises(InputError, match="lone surrogate"):
            engine.score([("a", "\ud800")])
        with pytest.raises(ConfigurationError, match="top is 0"):
            engine.rank("query", ["a"], top=0)


def test_an_engine_of_another_task_says_which(made: Made, minilm: Bundle) -> None:
    """A reranker has no vectors, a classifier no order; open_task finds the right engine."""
    _, bundle = made(num_labels=1)
    with pytest.raises(BundleError, match=r"reranking.*memopt rerank"):
        ArrowEngine(bundle)
    with pytest.raises(BundleError, match=r"text-classification.*Classifier"):
        Reranker(made(**NLI)[1])
    with open_task(bundle) as engine:
        assert isinstance(engine, Reranker)
    with open_task(minilm) as engine:
        assert isinstance(engine, ArrowEngine)


def test_labels_without_names_are_numbered_and_told(made: Made, tmp_path: Path) -> None:
    """A gap in id2label is filled, with a warning at convert."""
    folder = shutil.copytree(made(id2label={0: "bad", 1: "good", 2: "so-so"})[0], tmp_path / "gap")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "bad", "1": "good", "7": "so-so"}
    (folder / "config.json").write_text(json.dumps(config))
    told: list[str] = []
    bundle = convert(folder, tmp_path / "bundle", on_warning=told.append)
    assert any("no label 2" in line for line in told)
    with Classifier(bundle, device="torch") as engine:
        assert set(engine.classify("a")[0].labels) == {"bad", "good", "LABEL_2"}


@pytest.mark.parametrize("named", [{"0": "bad", "2": "so-so"}, {"0": "bad"}])
def test_fewer_names_than_the_head_has_rows(
    made: Made, tmp_path: Path, named: dict[str, str]
) -> None:
    """The head keeps the size it was trained with; transformers counts names and would cut it."""
    whole, bundle = made(id2label={0: "bad", 1: "good", 2: "so-so"})
    folder = shutil.copytree(whole, tmp_path / "few")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": named}))
    few = convert(folder, tmp_path / "bundle", task="text-classification", on_warning=str)
    names = [named.get(str(number), f"LABEL_{number}") for number in range(3)]
    with Classifier(few, device="torch") as engine, Classifier(bundle, device="torch") as other:
        got, exact = engine.classify("a cat")[0], other.classify("a cat")[0]
    assert sorted(got.labels) == sorted(names)
    np.testing.assert_allclose(got.scores, exact.scores, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id2label": ["bad", "good", "so-so"]}, "id2label is a list"),
        ({"problem_type": "multi_label"}, "did you mean 'multi_label_classification'"),
    ],
)
def test_a_config_that_says_its_labels_wrongly_is_refused(
    made: Made, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    """At convert, where the file can still be mended."""
    folder = shutil.copytree(made(id2label={0: "bad", 1: "good", 2: "so-so"})[0], tmp_path / "few")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError, match=said):
        convert(folder, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_head_that_embedding_leaves_out_is_named(made: Made, tmp_path: Path) -> None:
    """--task embedding of a classifier converts its trunk and says what is unused."""
    told: list[str] = []
    folder, _ = made(num_labels=1)
    convert(folder, tmp_path / "trunk", task="embedding", on_warning=told.append)
    assert any("head classifier.* unused" in line for line in told)


def test_a_trunk_exported_beside_a_head_never_answers_for_it(made: Made, tmp_path: Path) -> None:
    """Not even where its own graphs are gone, as a fallback would."""
    folder = shutil.copytree(made(num_labels=1)[1].path, tmp_path / "two")
    (tower, *_) = export(open_bundle(folder), task="embedding")
    assert tower.task == "embedding"
    bundle = open_bundle(folder)
    with pytest.raises(BundleError, match="another tower"):
        Reranker(bundle, variant=tower.name)
    for name in [n for n, v in bundle.manifest.variants.items() if not v.task]:
        bundle.file(bundle.variant(name)).unlink()
    with pytest.raises(DeviceError, match="no provider can run"):
        Reranker(bundle)
