"""Files that earlier code wrote (tests/data: v0.1, house) open and answer as they did then."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memopt.bundle import open_bundle
from memopt.config import load_config
from memopt.errors import ConfigurationError
from memopt.federation.client.client import SyncClient
from memopt.federation.client.manager import DeltaSyncManager
from memopt.federation.delta.arrays import weights_hash
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.server.server import SyncServer
from memopt.federation.trust.nodes import Trust
from memopt.federation.trust.signing import SigningKey
from memopt.joint.layer import JointEmbeddingLayer
from memopt.memory.graph.retriever import MultimodalRetriever
from memopt.memory.lifecycle.verify import verify
from memopt.memory.lifecycle.worker import ConsolidationRecipe, ConsolidationWorker
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.privacy.keys import AesGcm
from memopt.runtimes.engine import ArrowEngine
from memopt.weights.locked import decrypt_bundle

DATA = Path(__file__).parent / "data"
KEY = bytes(range(32))


@pytest.fixture(params=["v0.1", "house"])
def written(request: pytest.FixtureRequest) -> Path:
    """The folder of what one earlier state of the code wrote."""
    return DATA / request.param


@pytest.fixture
def unpack(tmp_path: Path, written: Path) -> Callable[[str], Path]:
    """Unpack what was written then into a folder of the test."""

    def unpacked(name: str) -> Path:
        with tarfile.open(written / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path / name

    return unpacked


def opened(folder: Path, sealed: bool) -> MemoryStore:
    return MemoryStore(folder, cipher=AesGcm((KEY,)) if sealed else None, background=False)


@pytest.mark.parametrize("name", ["store", "sealed"])
def test_a_store_opens_whole(unpack, name: str) -> None:
    """Texts, picture, links, expiry, archive and summary are there, and it takes more."""
    folder = unpack(name)
    with opened(folder, name == "sealed") as store:
        assert verify(store).problems == {}
        tiers = {row.memory_id: row.tier for row in store.get_many([f"m{n}" for n in range(5)])}
        assert set(tiers.values()) <= {"archived", "long_term", "short_term"}
        assert store.get("m2").text == "the blue bicycle belongs to Omar"
        assert store.get("m4").expires_at is not None
        assert store.get("picture").vision_data
        assert {link.linked_id for link in store.links(["m2"])["m2"]} >= {"m3"}
        summaries = [
            memory
            for batch in store.scan(columns=["memory_id"])
            for memory in store.get_many(batch["memory_id"].to_pylist())
            if memory.source_memory_ids
        ]
        assert [set(memory.source_memory_ids) for memory in summaries] == [{"m0", "m1"}]
        assert "Basel" in (summaries[0].summary or "")

        query = store.vectors(["m3"])[1][0]
        found = MultimodalRetriever(store).retrieve(vector=query, top_k=1)
        assert found[0].memory.text == "milk, bread and two lemons"
        fresh = NewMemory(content=Content(text="new here"), memory_id="new", embedding=query)
        store.add(fresh)
        store.update("m2", text="the blue bicycle belongs to Ida", joint_embedding=query)
    with opened(folder, name == "sealed") as store:
        assert store.get("new").text == "new here"
        assert store.get("m2").text == "the blue bicycle belongs to Ida"
        assert verify(store).problems == {}


def test_a_store_is_consolidated_again(unpack) -> None:
    """A run over a store of then changes nothing it should not."""
    import asyncio

    with opened(unpack("store"), sealed=False) as store:
        asyncio.run(ConsolidationWorker(store, ConsolidationRecipe()).consolidate())
        assert verify(store).problems == {}
        assert store.get("m4").text == "a key under the third flower pot"


@pytest.mark.parametrize(
    "variant", ["onnx-fp32", "openvino-fp32", "onnx-int8-dynamic", "openvino-int8-static"]
)
def test_a_bundle_answers_as_it_did(unpack, variant: str) -> None:
    """Float graphs give the vectors of then, quantized ones nearly."""
    folder = unpack("model")
    engine = ArrowEngine(
        folder / "tiny", variant=variant, device=variant.partition("-")[0].replace("onnx", "cpu")
    )
    vectors = engine.encode(json.loads((folder / "words.json").read_text()))
    cosines = (vectors * np.load(folder / "vectors.npy")).sum(1)
    assert cosines.min() > (0.99999 if "fp32" in variant else 0.999)


def test_a_bundle_keeps_its_records(unpack) -> None:
    """The manifest lists the variants and weights of then, and its hashes hold."""
    bundle = open_bundle(unpack("model") / "tiny")
    variants = {"onnx-fp32", "openvino-fp32", "onnx-int8-dynamic", "openvino-int8-static"}
    assert variants <= set(bundle.manifest.variants)


def test_a_fleet_goes_on(unpack) -> None:
    """Server, sender and receiver of then go on with version 4, in the same bits."""
    folder = unpack("sync")
    recorded = json.loads((folder / "hash.json").read_text())
    trust = Trust(path=folder / "trust.json")
    keys = {name: SigningKey.load(folder / f"{name}.key") for name in ("alice", "server")}
    with SyncServer(folder / "store", trust=trust, key=keys["server"], node="server") as server:
        assert weights_hash(server.store.weights("lora", 3)) == recorded["weights"]
        client = SyncClient("127.0.0.1", server.port)
        sender = DeltaSyncManager(folder / "sender", "lora", DeltaSettings(codec="int8"))
        weights = {name: value + 0.1 for name, value in sender.weights().items()}
        pushed = client.push(sender, weights, key=keys["alice"], node="alice")
        assert (pushed.kind, pushed.sequence) == ("delta", recorded["sequence"] + 1)
        receiver = DeltaSyncManager(folder / "receiver", "lora")
        pulled = client.pull(receiver, trust=trust)
    assert (pulled.kind, pulled.sequence) == ("delta", 4)
    assert weights_hash(pulled.weights) == weights_hash(sender.weights())


def test_settings_of_then_are_read(written: Path) -> None:
    """The file that ``config init`` wrote, with every line uncommented, is valid."""
    assert load_config(written / "config.yaml")


@pytest.mark.parametrize("written", ["house"], indirect=True)
def test_a_bundle_under_a_key_opens(unpack, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the key of then it answers as the plain one, without it is refused."""
    folder = unpack("more") / "locked"
    with pytest.raises(ConfigurationError, match="no key"):
        ArrowEngine(folder)
    monkeypatch.setenv("MEMOPT_WEIGHTS_KEY", KEY.hex())
    plain = unpack("model")
    engine = ArrowEngine(folder, variant="onnx-fp32", device="cpu")
    vectors = engine.encode(json.loads((plain / "words.json").read_text()))
    np.testing.assert_allclose(vectors, np.load(plain / "vectors.npy"), atol=1e-5)
    bundle = open_bundle(folder)
    assert not decrypt_bundle(bundle, KEY).encrypted


@pytest.mark.parametrize("written", ["house"], indirect=True)
def test_a_joint_layer_answers_as_it_did(unpack) -> None:
    """Vectors of three modalities give the joint vector of then."""
    folder = unpack("more")
    layer = JointEmbeddingLayer(folder / "joint")
    vectors = {
        name: np.ones((1, size), np.float32)
        for name, size in (("vision", 5), ("audio", 4), ("text", 6))
    }
    np.testing.assert_allclose(layer.embed(**vectors), np.load(folder / "joint.npy"), atol=1e-5)
