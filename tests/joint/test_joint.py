"""The joint layer: masked for real, trained, written, exported, refused when wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.bundle import Bundle, open_bundle
from memopt.cli import main
from memopt.errors import (
    BundleError,
    ConfigurationError,
    DeviceError,
    ExportError,
    InputError,
)
from memopt.exporters import base
from memopt.exporters.base import export
from memopt.joint import graph as joint_exporter
from memopt.joint.bundle import make_joint_bundle, write_joint_bundle
from memopt.joint.layer import JointConfig, JointEmbeddingLayer, joint_inputs
from memopt.joint.model import JOINT_MODALITIES, network
from memopt.joint.pairs import Pairs, make_pairs, read_pairs
from memopt.joint.train import JointRecipe, train_joint
from memopt.memory.model.encoders import (
    AudioEncoder,
    JointEmbedder,
    TextEncoder,
    VisionEncoder,
    model_id,
)
from memopt.memory.model.schema import Content
from memopt.runtimes.engine import ArrowEngine
from memopt.runtimes.testing import fake_engine
from memopt.weights.reader import WeightLoader

CONFIG = JointConfig(vision=20, audio=16, text=12, joint=32, hidden=48, heads=4)
RECIPE = JointRecipe(epochs=25, batch_size=64, learning_rate=3e-3)
MASKS = [mask for mask in product((False, True), repeat=3) if any(mask)]


def moments(count: int = 320, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Vectors of three modalities that share nothing but which of 8 things they are of."""
    centres = np.random.default_rng(1)
    generator = np.random.default_rng(seed)
    things = generator.integers(0, 8, count)
    vectors = {}
    for name, width in CONFIG.dims.items():
        middle = centres.normal(size=(8, width))
        vectors[name] = middle[things] + 0.5 * generator.normal(size=(count, width))
    return vectors, things


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Nets of 32 numbers are slower on two threads, and far slower where the cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    vectors, things = moments()
    pairs = make_pairs(vectors, group=things)
    folder = tmp_path_factory.mktemp("joint") / "layer"
    return make_joint_bundle(pairs, folder, config=CONFIG, recipe=RECIPE)


@pytest.fixture(scope="module")
def layer(bundle: Bundle) -> Iterator[JointEmbeddingLayer]:
    with JointEmbeddingLayer(bundle) as opened:
        yield opened


def test_default_dimensions_are_those_of_clip_whisper_and_minilm() -> None:
    """512, 384 and 384 go to 768 through 1024, with attention."""
    assert JointConfig().to_dict() == {
        "vision": 512, "audio": 384, "text": 384, "joint": 768, "hidden": 1024,
        "attention": True, "heads": 8,
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [{"joint": 0}, {"joint": 30}, {"vision": 2.5}, {"attention": 1}, {"heads": True}]
)
def test_a_config_out_of_range_is_refused(wrong: dict[str, int]) -> None:
    """Widths are whole numbers above 0 and heads divide the joint width."""
    with pytest.raises(ConfigurationError):
        JointConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no setting 'depth'"):
        JointConfig.from_dict({"depth": 2})


garbage = st.sampled_from([0.0, 1.0, -1e30, 1e30, float("nan"), float("inf")])


@settings(max_examples=40, deadline=None)
@given(mask=st.sampled_from(MASKS), fill=garbage, seed=st.integers(0, 99), attention=st.booleans())
def test_what_an_absent_slot_holds_cannot_change_torch(
    mask: tuple[bool, ...], fill: float, seed: int, attention: bool
) -> None:
    """The network gives the same bits whatever an absent modality's slot holds, NaN included."""
    torch.manual_seed(0)
    net = network(replace(CONFIG, attention=attention)).eval()
    generator = np.random.default_rng(seed)
    clean, dirty = [], []
    for here, width in zip(mask, CONFIG.dims.values(), strict=True):
        values = generator.normal(size=(2, width)).astype(np.float32)
        clean.append(torch.from_numpy(values if here else np.zeros_like(values)))
        dirty.append(torch.from_numpy(values if here else np.full_like(values, fill)))
    present = torch.tensor([mask, mask], dtype=torch.float32)
    with torch.no_grad():
        wanted, found = net(*clean, present), net(*dirty, present)
    assert torch.equal(wanted, found)
    assert torch.allclose(wanted.norm(dim=1), torch.ones(2), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(mask=st.sampled_from(MASKS), fill=garbage, seed=st.integers(0, 99))
def test_what_an_absent_slot_holds_cannot_change_the_exported_graph(
    bundle: Bundle, mask: tuple[bool, ...], fill: float, seed: int
) -> None:
    """The graph on onnxruntime, given the slots as they are, does not look at absent ones."""
    from memopt.exporters.onnx import runner

    run = runner(bundle.path / "onnx/model.onnx", ("joint_embedding",))
    generator = np.random.default_rng(seed)
    clean: dict[str, np.ndarray] = {"present": np.array([mask], np.float32)}
    dirty = dict(clean)
    for here, (name, width) in zip(mask, CONFIG.dims.items(), strict=True):
        values = generator.normal(size=(1, width)).astype(np.float32)
        clean[name] = values if here else np.zeros_like(values)
        dirty[name] = values if here else np.full_like(values, fill)
    np.testing.assert_array_equal(run(clean)["joint_embedding"], run(dirty)["joint_embedding"])


def test_every_modality_present_does_change_the_result(layer: JointEmbeddingLayer) -> None:
    """Masking is not ignoring: each modality that is there moves the joint vector."""
    vectors, _ = moments(6, seed=3)
    whole = layer.embed(**vectors)
    for name in JOINT_MODALITIES:
        rest = {other: values for other, values in vectors.items() if other != name}
        assert np.abs(layer.embed(**rest) - whole).max() > 1e-3
        turned = {**vectors, name: np.roll(vectors[name], 1, axis=1)}
        assert np.abs(layer.embed(**turned) - whole).max() > 1e-3


def test_rows_with_other_masks_in_one_batch_are_as_alone(layer: JointEmbeddingLayer) -> None:
    """A batch of all seven masks gives each row what it gets by itself."""
    vectors, _ = moments(len(MASKS), seed=4)
    together = layer.embed(**vectors, present=np.array(MASKS))
    for row, mask in enumerate(MASKS):
        alone = {
            name: vectors[name][row : row + 1]
            for name, here in zip(JOINT_MODALITIES, mask, strict=True)
            if here
        }
        np.testing.assert_allclose(layer.embed(**alone)[0], together[row], atol=1e-5)


def test_training_brings_modalities_together(bundle: Bundle, layer: JointEmbeddingLayer) -> None:
    """Unseen vectors of one thing find that thing in every other modality, far above chance."""
    vectors, things = moments(160, seed=9)
    joint = {name: layer.embed(**{name: values}) for name, values in vectors.items()}
    for one in JOINT_MODALITIES:
        for other in JOINT_MODALITIES:
            nearest = (joint[one] @ joint[other].T).argmax(axis=1)
            assert (things[nearest] == things).mean() > 0.9, (one, other)
    report = bundle.manifest.history[0]
    assert report["held_out_loss"] < report["held_out_loss_before"]


def test_training_again_gives_the_same_bits() -> None:
    """Same pairs and seed, same weights; another seed, others; the caller's generator is left."""
    vectors, things = moments(64)
    pairs = make_pairs(vectors, group=things)
    short = replace(RECIPE, epochs=2)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = train_joint(pairs, CONFIG, short).weights
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(6)
    again = train_joint(pairs, CONFIG, short).weights
    other = train_joint(pairs, CONFIG, replace(short, seed=1)).weights
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_training_stops_early_and_keeps_the_best() -> None:
    """Where nothing can be learnt, it stops after `patience` epochs and reports the best one."""
    generator = np.random.default_rng(0)
    noise = {"audio": generator.normal(size=(64, 16)), "text": generator.normal(size=(64, 12))}
    losses: list[float] = []
    trained = train_joint(
        make_pairs(noise),
        CONFIG,
        JointRecipe(epochs=200, patience=3, batch_size=32, learning_rate=3e-3),
        lambda epoch, of, loss: losses.append(loss),
    )
    report = trained.report
    assert report["epochs"] < 200
    assert report["epochs"] == report["best_epoch"] + 3
    assert report["held_out_loss"] <= min(losses)


def test_pairs_of_two_modalities_train_without_the_third(tmp_path: Path) -> None:
    """A modality that never occurs leaves the others to be trained, and rows of one are skipped."""
    vectors, things = moments(96)
    present = np.ones((96, 3), bool)
    present[:, 0] = False
    present[:10, 1] = False
    pairs = make_pairs({n: vectors[n] for n in ("audio", "text")}, present, things)
    trained = train_joint(pairs, CONFIG, replace(RECIPE, epochs=2))
    assert (len(pairs), pairs.skipped) == (86, 10)
    assert set(trained.report["recall_at_1"]) == {"audio -> text", "text -> audio"}


def test_the_bundle_is_one_like_any_other(bundle: Bundle) -> None:
    """V1 weights, a manifest with history and hashes, and an fp32 variant that passed its check."""
    assert bundle.verify() == []
    manifest = open_bundle(bundle.path).manifest
    assert (manifest.task, manifest.dimension) == ("joint-embedding", 32)
    assert [event["event"] for event in manifest.history] == ["train-joint", "export"]
    with WeightLoader(bundle.weights) as loader:
        assert loader.version == 1
        assert loader.info("project.vision.weight").shape == (32, 20)
    check = manifest.variants["onnx-fp32"].check
    assert check is not None
    assert len(check["shapes"]) >= 7
    assert check["min_cosine"] > 0.99999


def test_the_exporter_gives_openvino_too(bundle: Bundle, tmp_path: Path) -> None:
    """memopt export takes a joint bundle like any other, in its other format as well."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    (variant,) = export(open_bundle(copy), format="openvino")
    vectors, _ = moments(5, seed=2)
    with (
        JointEmbeddingLayer(copy, device="openvino") as other,
        JointEmbeddingLayer(bundle, variant="onnx-fp32") as layer,
    ):
        assert other.device_info()["variant"] == variant.name
        np.testing.assert_allclose(other.embed(**vectors), layer.embed(**vectors), atol=1e-4)


@pytest.mark.parametrize("fault", ["leak", "swapped", "unmasked mean"])
def test_a_wrong_graph_is_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that looks at absent slots or mixes its inputs up is not written."""
    vectors, things = moments(64)
    same = replace(CONFIG, text=CONFIG.audio)
    vectors["text"] = np.resize(vectors["text"], (64, CONFIG.audio))
    trained = train_joint(make_pairs(vectors, group=things), same, replace(RECIPE, epochs=1))
    made = write_joint_bundle(trained, tmp_path / "layer")
    right = joint_exporter.wrap

    def wrong(loaded: object, manifest: object, task: str) -> object:
        module = right(loaded, manifest, task)  # type: ignore[arg-type]

        class Wrong(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = module.model

            def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor]:
                vision, audio, text, present = values
                if fault == "swapped":
                    return (self.model(vision, text, audio, present),)
                if fault == "leak":
                    out = self.model(vision, audio, text, present)
                    return (out + 1e-4 * text.mean(dim=1, keepdim=True),)
                return (self.model(vision, audio, text, torch.ones_like(present)),)

        return Wrong().eval()

    monkeypatch.setattr(joint_exporter, "wrap", wrong)
    with pytest.raises(ExportError, match="does not give the answers of torch"):
        base.export(made)
    assert not (made.path / "onnx").exists()
    assert open_bundle(made.path).manifest.variants == {}


def test_running_needs_no_torch(bundle: Bundle) -> None:
    """A process that opens and runs the layer has imported neither torch nor transformers."""
    code = (
        "import sys, numpy as np\n"
        "from memopt.joint.layer import JointEmbeddingLayer\n"
        "from memopt.joint import bundle, pairs, train\n"
        "from memopt.memory.model import encoders\n"
        f"layer = JointEmbeddingLayer({str(bundle.path)!r})\n"
        "assert layer.embed(text=np.ones((2, 12))).shape == (2, 32)\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("given_", "present", "message"),
    [
        ({}, None, "no vectors given"),
        ({"text": np.ones((2, 5))}, None, r"text has shape \(2, 5\), not \(2, 12\)"),
        ({"text": np.ones((2, 12)), "audio": np.ones((3, 16))}, None, r"audio has shape"),
        ({"text": np.full((2, 12), np.nan)}, None, "text vector 0 is all zero or not finite"),
        ({"text": np.eye(2, 12) * [[1], [0]]}, None, "text vector 1 is all zero"),
        ({"text": np.ones((2, 12))}, [[0, 0, 1], [0, 0, 0]], "row 1 has no modality"),
        ({"text": np.ones((1, 12))}, [[0, 1, 1]], "present says audio"),
        ({"text": np.ones((1, 12))}, [[1]], "present has shape"),
    ],
)
def test_bad_vectors_are_named(
    given_: dict[str, np.ndarray], present: list[list[int]] | None, message: str
) -> None:
    """A wrong shape, NaN, a zero vector or an empty row is refused with its place."""
    mask = None if present is None else np.array(present)
    with pytest.raises(InputError, match=message):
        joint_inputs(CONFIG, given_, mask)


def test_a_nan_in_an_absent_slot_is_fine(layer: JointEmbeddingLayer) -> None:
    """Only present vectors are checked."""
    text = np.ones((1, 12))
    present = np.array([[False, False, True]])
    found = layer.embed(text=text, audio=np.full((1, 16), np.nan), present=present)
    np.testing.assert_array_equal(found, layer.embed(text=text))


def test_a_provider_that_cannot_open_is_told_and_replaced(bundle: Bundle) -> None:
    """Asking for a device that is not here runs elsewhere, with an event; strict refuses."""
    vectors, _ = moments(3, seed=2)
    with JointEmbeddingLayer(bundle, device="rocm") as opened:
        assert [event.from_ for event in opened.events] == ["rocm"]
        assert opened.device_info()["device"] != "rocm"
        assert opened.embed(**vectors).shape == (3, 32)
    with pytest.raises(DeviceError):
        JointEmbeddingLayer(bundle, device="rocm", strict=True)


def test_an_engine_says_that_a_joint_layer_takes_vectors(bundle: Bundle) -> None:
    """ArrowEngine refuses a joint bundle, and the joint layer refuses an encoder's."""
    with pytest.raises(BundleError, match="JointEmbeddingLayer"):
        ArrowEngine(bundle)
    with pytest.raises(BundleError, match="is no joint layer"):
        JointEmbeddingLayer(fake_engine(8).bundle)


def test_the_embedder_joins_encoders_and_layer(layer: JointEmbeddingLayer) -> None:
    """Mixed content gives what the layer gives for the encoders' vectors, row by row."""
    text = TextEncoder(fake_engine(12), dim=12)
    audio = AudioEncoder(fake_engine(16, "audio"), dim=16)
    vision = VisionEncoder(fake_engine(20, "image"), dim=20)
    embedder = JointEmbedder(layer, vision=vision, audio=audio, text=text)
    items = [Content(text="a"), Content(audio=b"b"), Content(text="a", vision=b"c")]
    found = embedder.embed(items)
    assert embedder.dim == 32
    assert embedder.model_id.startswith(layer.model_id)
    np.testing.assert_allclose(found[0], layer.embed(text=text.encode(["a"]))[0], atol=1e-6)
    both = layer.embed(text=text.encode(["a"]), vision=vision.encode([b"c"]))
    np.testing.assert_allclose(found[2], both[0], atol=1e-6)
    assert embedder.embed([]).shape == (0, 32)
    with pytest.raises(InputError, match="item 0 is empty"):
        embedder.embed([Content()])
    with pytest.raises(InputError, match="item 1 has audio, and there is no audio encoder"):
        JointEmbedder(layer, text=text).embed([Content(text="a"), Content(audio=b"b")])
    with pytest.raises(ConfigurationError, match="gives 13 dimensions, the joint layer takes 12"):
        JointEmbedder(layer, text=TextEncoder(fake_engine(13), dim=13))


def test_another_encoder_than_the_trained_one_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    """Vectors of another model of the same length would be garbage: the model id is compared."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    config = json.loads((copy / "config.json").read_text())
    assert config["encoders"] == {}
    config["encoders"] = {"text": "minilm@1234"}
    (copy / "config.json").write_text(json.dumps(config))
    text = TextEncoder(fake_engine(12), dim=12)
    assert text.model_id == model_id(text.engine.bundle) == "fake"
    with (
        JointEmbeddingLayer(copy) as opened,
        pytest.raises(ConfigurationError, match="trained on text vectors of minilm@1234"),
    ):
        JointEmbedder(opened, text=text)


def parquet(folder: Path, **columns: object) -> Path:
    path = folder / "pairs.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def lists(values: np.ndarray) -> pa.Array:
    return pa.array(values.tolist(), pa.list_(pa.float32()))


def test_pairs_are_read_with_nulls_as_absent(tmp_path: Path) -> None:
    """Ready vectors and content side by side; a null is a modality that is not there."""
    vectors, _ = moments(12)
    audio = [*vectors["audio"].tolist()[:10], None, None]
    texts = [f"text {row}" for row in range(11)] + [None]
    path = parquet(
        tmp_path,
        vision_embedding=lists(vectors["vision"]),
        audio_embedding=pa.array(audio, pa.list_(pa.float16())),
        text=texts,
    )
    encoder = TextEncoder(fake_engine(12), dim=12)
    pairs = read_pairs(path, {"text": encoder})
    assert (len(pairs), pairs.skipped, pairs.dims) == (11, 1, CONFIG.dims)
    assert pairs.present.sum(axis=0).tolist() == [11, 10, 11]
    np.testing.assert_array_equal(pairs.vectors["text"][3], encoder.encode(["text 3"])[0])
    assert not pairs.vectors["audio"][10].any()


def test_equal_content_means_the_same() -> None:
    """Rows with an equal vector in any modality are positives, and a null group equals nothing."""
    vectors, _ = moments(10)
    vectors["text"][1] = vectors["text"][0]
    pairs: Pairs = make_pairs(vectors, group=np.array([None, None, "a", "a", *range(6)], object))
    same = pairs.same
    agree = (same[:, None] == same[None]) & (same[:, None] >= 0)
    assert agree.any(axis=2).sum() == 10 + 4
    assert agree[0, 1].any()
    assert agree[2, 3].any()


FLOATS = pa.array([[1.0, 2.0]] * 9, pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": [1]}, "the columns are 'a'; needed are two of"),
        ({"text_embedding": FLOATS}, "needed are two of"),
        ({"text": [1] * 9, "audio_embedding": FLOATS}, "column 'text' is int64, not string"),
        (
            {"text_embedding": FLOATS, "audio_data": [b"x"] * 9},
            "column 'audio_data' holds content and there is no audio encoder",
        ),
        (
            {"text_embedding": FLOATS, "audio_embedding": pa.array([[1]] * 9)},
            "'audio_embedding' is list<.*int64>, not a list of floats",
        ),
        (
            {"text_embedding": FLOATS, "audio_embedding": pa.array([[1.0]] * 8 + [[1.0, 2.0]])},
            "has vectors of lengths 1, 2",
        ),
        (
            {"text_embedding": FLOATS, "audio_embedding": pa.array([[1.0]] * 8 + [[None]])},
            "null inside",
        ),
        (
            {"text_embedding": FLOATS, "audio_embedding": pa.array([[1.0]] * 8 + [[np.nan]])},
            "row 8: the audio vector is all zero or not finite",
        ),
        (
            {"text_embedding": FLOATS, "audio_embedding": pa.array([[1.0]] * 7 + [None] * 2)},
            "7 of 9 rows hold two modalities",
        ),
    ],
)
def test_bad_columns_are_named(columns: dict[str, object], message: str, tmp_path: Path) -> None:
    """Every problem of a pairs file is one clear line."""
    with pytest.raises(InputError, match=message):
        read_pairs(parquet(tmp_path, **columns))


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Run memopt memory train-joint; return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["memopt", "memory", "train-joint", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    done = capsys.readouterr()
    return code, done.out, done.err


def test_the_command_trains_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """train-joint writes a bundle with its report; a bad file or a full target writes nothing."""
    vectors, things = moments(96)
    path = parquet(
        tmp_path, **{f"{n}_embedding": lists(v) for n, v in vectors.items()}, group=things
    )
    out, none = tmp_path / "out", tmp_path / "none"
    small = ("--dim", 30, "--hidden", 16, "--epochs", 2, "--json")
    code, printed, _ = run(monkeypatch, capsys, path, out, *small)
    assert code == 0
    assert json.loads(printed)["rows"] == 96
    with JointEmbeddingLayer(out) as opened:
        assert opened.embed(text=vectors["text"][:1]).shape == (1, 30)
        assert opened.config.heads == 6
    code, _, said = run(monkeypatch, capsys, path, out)
    assert (code, "holds a bundle already" in said) == (1, True)
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(path.read_bytes()[:-20])
    code, _, said = run(monkeypatch, capsys, bad, none)
    assert (code, "not a readable Parquet file" in said) == (1, True)
    code, _, said = run(monkeypatch, capsys, path, none, "--epochs", 0)
    assert (code, "epochs is 0" in said) == (2, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.parquet", "out", "pairs.parquet"]


def test_weights_of_another_shape_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    """config.json and weights.parquet of two trainings do not make a graph."""
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    config = json.loads((copy / "config.json").read_text())
    config["joint"]["hidden"] = 47
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match="do not fit the joint layer: fuse_in"):
        export(open_bundle(copy))
