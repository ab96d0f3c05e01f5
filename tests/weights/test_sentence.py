"""A sentence-transformers folder gives the vectors that sentence-transformers itself gives."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt import ArrowEngine
from memopt.bundle import open_bundle
from memopt.errors import MemoptError, WeightsError
from memopt.weights.convert import convert, to_safetensors
from memopt.weights.sentence import read_sentence

TEXTS = ["a cat", "The dog, the cat and a Dog " * 3, "", "x"]
Change = Callable[[Path], None]


def put(folder: Path, name: str, value: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def stated(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.fixture
def source(tiny_source: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny BERT's folder: mean pooling, normalised, 64 tokens."""
    return Path(shutil.copytree(tiny_source, tmp_path / "source"))


def settings(**values: Any) -> Change:
    return lambda folder: put(folder, "sentence_bert_config.json", values)


def pipeline(**values: Any) -> Change:
    return lambda folder: put(folder, "config_sentence_transformers.json", values)


def pooling(**values: Any) -> Change:
    return lambda folder: put(
        folder, "1_Pooling/config.json", {"word_embedding_dimension": 32, **values}
    )


def module(index: int, **values: Any) -> Change:
    def change(folder: Path) -> None:
        modules = stated(folder, "modules.json")
        modules[index] |= values
        put(folder, "modules.json", modules)

    return change


def together(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def elsewhere(folder: Path) -> None:
    (folder / "1_Pooling").rename(folder / "pooler")
    pooling(pooling_mode="cls")(folder)
    (folder / "1_Pooling" / "config.json").rename(folder / "pooler" / "config.json")
    module(1, path="pooler")(folder)


def subfolder(folder: Path) -> None:
    inside = folder / "0_Transformer"
    inside.mkdir()
    for path in [p for p in folder.iterdir() if p.is_file() and p.name != "modules.json"]:
        path.rename(inside / path.name)
    module(0, path="0_Transformer")(folder)


def cased(folder: Path) -> None:
    """A tokenizer that does not know capitals: only lowering first makes words of them."""
    tokenizer = stated(folder, "tokenizer.json")
    put(folder, "tokenizer.json", {**tokenizer, "normalizer": None})
    config = stated(folder, "tokenizer_config.json")
    put(folder, "tokenizer_config.json", {**config, "do_lower_case": False})


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


PROMPT = {"prompts": {"query": "the dog "}, "default_prompt_name": "query"}
HONOURED: dict[str, Change] = {
    "pooling elsewhere": elsewhere,
    "transformer in a sub-folder": subfolder,
    "no pooling flag is mean": pooling(pooling_mode_cls_token=False),
    "max": pooling(pooling_mode="max"),
    "prompt": pipeline(**PROMPT),
    "prompt left out": together(
        pipeline(**PROMPT), pooling(pooling_mode="mean", include_prompt=False)
    ),
    "normalize first": lambda f: put(
        f, "modules.json", [stated(f, "modules.json")[i] for i in (0, 2, 1)]
    ),
    "normalized tokens": together(
        lambda f: put(f, "2_Normalize/config.json", {"module_input_name": "token_embeddings"}),
        lambda f: put(f, "modules.json", [stated(f, "modules.json")[i] for i in (0, 2, 1)]),
    ),
    "weighted mean": pooling(pooling_mode="weightedmean"),
    "prompt left out of a weighted mean": together(
        pipeline(**PROMPT), pooling(pooling_mode="weightedmean", include_prompt=False)
    ),
    "mean by the root of the length": pooling(pooling_mode="mean_sqrt_len_tokens"),
    "two poolings": pooling(pooling_mode=["mean", "cls"]),
    "two flags": pooling(pooling_mode_mean_tokens=True, pooling_mode_cls_token=True),
    "all poolings": pooling(
        pooling_mode=["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
    ),
    "prompt left out of cls": together(
        pipeline(**PROMPT), pooling(pooling_mode="cls", include_prompt=False)
    ),
    "truncate_dim": pipeline(truncate_dim=8),
    "truncate_dim past the width": pipeline(truncate_dim=99),
    "max_seq_length past the tokenizer's": together(
        lambda f: put(
            f,
            "tokenizer_config.json",
            {**stated(f, "tokenizer_config.json"), "model_max_length": 4},
        ),
        settings(max_seq_length=12),
    ),
    "max_seq_length": settings(max_seq_length=6),
    "older file name": together(
        without("sentence_bert_config.json"),
        lambda f: put(f, "sentence_distilbert_config.json", {"max_seq_length": 5}),
    ),
    "tokenizer_args": settings(tokenizer_args={"model_max_length": 7, "truncation_side": "left"}),
    "processor_kwargs": together(cased, settings(processor_kwargs={"do_lower_case": True})),
    "config_args": settings(config_args={"hidden_act": "relu"}),
    "model_args": settings(model_args={"add_pooling_layer": False, "attn_implementation": "eager"}),
    "do_lower_case": together(cased, settings(do_lower_case=True)),
    "modality_config": settings(
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    ),
    "call limit": settings(processing_kwargs={"text": {"max_length": 5, "truncation": True}}),
    "no modules.json": together(
        without("modules.json"),
        settings(max_seq_length=3, do_lower_case=True),
        pipeline(**PROMPT, truncate_dim=4),
    ),
}


@pytest.mark.parametrize("name", HONOURED)
def test_vectors_are_those_of_sentence_transformers(
    source: Path, tmp_path: Path, name: str
) -> None:
    """Whatever a folder says, the bundle answers as the installed sentence-transformers does."""
    HONOURED[name](source)
    wanted = theirs(source)
    bundle = convert(source, tmp_path / "bundle", on_warning=pytest.fail)
    with ArrowEngine(bundle, device="torch") as engine:
        got = engine.encode(TEXTS, normalize=False)
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert bundle.manifest.dimension == wanted.shape[1]
    if name in ("pooling elsewhere", "transformer in a sub-folder", "do_lower_case"):
        to_safetensors(bundle)
        np.testing.assert_allclose(theirs(bundle.path), wanted, atol=1e-5)


def theirs(folder: Path) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return np.asarray(model.encode(TEXTS))


@pytest.mark.slow
def test_a_prompt_that_is_not_pooled_is_left_out_by_every_graph(
    source: Path, tmp_path: Path
) -> None:
    """The exported graph leaves the prompt's tokens and the cut values out, as torch does."""
    from memopt.exporters.base import export

    pipeline(**PROMPT, truncate_dim=8)(source)
    pooling(pooling_mode="mean", include_prompt=False)(source)
    wanted = theirs(source)
    bundle = convert(source, tmp_path / "bundle")
    export(bundle)
    for device in ("cpu", "openvino"):
        if device == "openvino":
            export(open_bundle(bundle.path), format="openvino")
        with ArrowEngine(bundle.path, device=device) as engine:
            assert engine.dimension == 8
            np.testing.assert_allclose(engine.encode(TEXTS, normalize=False), wanted, atol=1e-4)


REFUSED: dict[str, tuple[Change, str]] = {
    "cross-encoder": (pipeline(model_type="CrossEncoder"), "a CrossEncoder of the modules"),
    "sparse": (pipeline(model_type="SparseEncoder"), "SparseEncoder"),
    "unknown kind": (pipeline(model_type="Oracle"), "'Oracle'"),
    "truncate_dim": (pipeline(truncate_dim=0), "truncate_dim 0"),
    "prompt": (pipeline(default_prompt_name="passage"), "'passage' is not among the prompts"),
    "pooling key": (pooling(pooling_mode="mean", weights=[1]), "'weights'"),
    "pooling mode": (pooling(pooling_mode=["cls", "median"]), r"pooling cls \+ median"),
    "pooling gone": (without("1_Pooling/config.json"), "which is missing"),
    "no pooling": (
        lambda f: put(f, "modules.json", stated(f, "modules.json")[:1]),
        "no Pooling module",
    ),
    "transformer last": (
        lambda f: put(f, "modules.json", [stated(f, "modules.json")[i] for i in (0, 1, 0)]),
        "order",
    ),
    "code": (module(0, type="custom_st.Transformer"), "Python code of its own"),
    "outside": (module(1, path="../1_Pooling"), "not below"),
    "a name too long": (module(1, path="1_" + "n" * 300), "not below"),
    "half a character": (module(1, path="1_\ud83d"), "not below"),
    "layers": (module(2, type="sentence_transformers.models.CNN"), "a CNN module"),
    "dense without a size": (
        module(2, type="sentence_transformers.models.Dense"),
        "in_features None",
    ),
    "unknown key": (settings(max_seq_len=3), "'max_seq_len'"),
    "model_kwargs": (settings(model_kwargs={"rotary_scaling_factor": 2}), "rotary_scaling_factor"),
    "task": (settings(transformer_task="fill-mask"), "'fill-mask'"),
    "other tokenizer": (settings(tokenizer_name_or_path="bert"), "tokenizer_name_or_path"),
    "query_length": (settings(query_length=3), "query_length"),
    "calls": (settings(processing_kwargs={"text": {"add_special_tokens": False}}), "add_special"),
    "modality": (
        settings(
            modality_config={"text": {"method": "forward", "method_output_name": "logits"}},
            module_output_name="scores",
        ),
        "'logits'",
    ),
}


ODD: list[Change] = [
    settings(processing_kwargs=5),
    settings(processing_kwargs={"text": 5}),
    settings(model_kwargs="x"),
    settings(tokenizer_args=[1]),
    settings(modality_config=[1]),
    settings(modality_config={"text": 1}),
    pooling(pooling_mode=7),
    pooling(pooling_mode=[{}]),
    pipeline(prompts=5, default_prompt_name="query"),
    pipeline(prompts={"query": 5}, default_prompt_name="query"),
    pipeline(default_prompt_name=[1]),
    pipeline(truncate_dim="8"),
    pipeline(model_type=[1]),
    module(1, path=[1]),
    lambda f: put(f, "modules.json", {"a": 1}),
    lambda f: put(f, "modules.json", [[1]]),
    lambda f: put(f, "modules.json", []),
]


@pytest.mark.parametrize("index", range(len(ODD)))
def test_odd_values_never_end_in_a_traceback(source: Path, index: int) -> None:
    """A value of another type is read as nothing, or is one line."""
    ODD[index](source)
    with contextlib.suppress(MemoptError):
        read_sentence(source)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(source: Path, tmp_path: Path, name: str) -> None:
    """One line names the file and the key, and nothing is written."""
    change, message = REFUSED[name]
    change(source)
    with pytest.raises(MemoptError, match=message) as caught:
        convert(source, tmp_path / "made" / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists() or not any((tmp_path / "made").iterdir())


def test_a_head_is_kept_or_announced(source: Path, tmp_path: Path) -> None:
    """A classifier stays one, unless its trunk is asked for; other heads are named."""
    (source / "modules.json").unlink()
    config = stated(source, "config.json")
    put(source, "config.json", {**config, "architectures": ["BertForSequenceClassification"]})
    assert convert(source, tmp_path / "whole").manifest.task == "text-classification"
    lines: list[str] = []
    trunk = convert(source, tmp_path / "trunk", task="embedding", on_warning=lines.append)
    assert trunk.manifest.pooling == "mean"
    assert "has a head that is left out" in lines.pop()
    put(source, "config.json", {**config, "architectures": ["BertForMaskedLM"]})
    convert(source, tmp_path / "masked", task="embedding", on_warning=lines.append)
    assert lines[0].startswith("BertForMaskedLM has a head that is left out")
    assert lines[0].endswith("the bundle gives the embeddings of Bert (pooling mean)")


def test_weights_that_are_no_floats_are_named(source: Path, tmp_path: Path) -> None:
    """Quantized weights and adapters are called what they are."""
    config = stated(source, "config.json")
    quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    put(source, "config.json", {**config, "quantization_config": quantized})
    with pytest.raises(WeightsError, match=r"quantized \(fp8\).*with scales"):
        convert(source, tmp_path / "fp8")
    put(source, "config.json", config)
    put(source, "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(WeightsError, match=r"adapter .*merge_and_unload"):
        convert(source, tmp_path / "lora")


def test_a_model_made_for_dot_products_is_told(source: Path, tmp_path: Path) -> None:
    """encode() makes unit vectors, which changes the order of dot products."""
    pipeline(similarity_fn_name="dot")(source)
    put(source, "modules.json", stated(source, "modules.json")[:2])
    lines: list[str] = []
    convert(source, tmp_path / "bundle", on_warning=lines.append)
    assert len(lines) == 1
    assert "normalize=False" in lines[0]


def test_a_plain_folder_has_no_pipeline(source: Path) -> None:
    """Without modules.json the other files mean nothing, as in sentence-transformers."""
    assert read_sentence(source) is not None
    (source / "modules.json").unlink()
    pipeline(truncate_dim=8)(source)
    assert read_sentence(source) is None
