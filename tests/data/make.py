"""How the files beside this were made: v0.1 with the code of bf71f04, house with that of ce7c2e7.

    PYTHONPATH=. python tests/data/make.py tests/data/house TINY

TINY is the folder that the fixture ``tiny_source`` in tests/conftest.py makes; the bundle under a
key and the joint layer came with the second. They are never made again: tests/test_formats.py
proves that what was written then opens today.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

KEY = bytes(range(32))
NOW = datetime(2026, 11, 1, 12, tzinfo=UTC)
DIM = 8
TEXTS = [
    "Anna's train to Basel leaves at 7:42 on platform 9",
    "Anna's train to Basel leaves at 7:42 from platform 9",
    "the blue bicycle belongs to Omar",
    "milk, bread and two lemons",
    "a key under the third flower pot",
]


def vector(text: str) -> np.ndarray:
    """A direction of its own for each text; the first two are near each other."""
    seed = TEXTS.index(text) if text in TEXTS else len(text)
    row = np.random.default_rng(max(seed, 1)).normal(size=DIM).astype(np.float32)
    return row / np.linalg.norm(row)


def store(folder: Path, *, key: bytes | None) -> None:
    """Five texts and a picture, linked, one expiring, two condensed and one archived."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "memory"))
    from kit import png

    from memopt.memory.consolidation import ConsolidationRecipe, ConsolidationWorker
    from memopt.memory.graph import AssociationGraph
    from memopt.memory.keys import AesGcm
    from memopt.memory.schema import Content, NewMemory
    from memopt.memory.store import MemoryStore

    now = [NOW - timedelta(days=60)]
    cipher = None if key is None else AesGcm((key,))
    with MemoryStore(folder, dim=DIM, cipher=cipher, clock=lambda: now[0]) as memories:
        graph = AssociationGraph(memories)
        rows = [
            NewMemory(
                content=Content(text=text),
                memory_id=f"m{number}",
                embedding=vector(text),
                category="travel" if number < 2 else "home",
                expires_at=NOW + timedelta(days=36500) if number == 4 else None,
            )
            for number, text in enumerate(TEXTS)
        ]
        rows.append(
            NewMemory(content=Content(vision=png(1)), memory_id="picture", embedding=np.ones(DIM))
        )
        memories.add(rows)
        graph.retrieved(["m2", "m3"])
        graph.flush()
        for _ in range(30):
            memories.touch(["m0", "m1"])
        memories.flush()
        now[0] = NOW
        recipe = ConsolidationRecipe(similarity=0.7)
        done = asyncio.run(ConsolidationWorker(memories, recipe).consolidate())
        print(
            f"{done.condensed} condensed, {done.archived} archived, {len(done.summaries)} summaries"
        )
        memories.optimize()


def bundle(folder: Path) -> None:
    """The tiny BERT of the tests with its graphs, int8 ones and V2 weights."""
    from memopt.bundle import open_bundle
    from memopt.exporters.base import export
    from memopt.weights.convert import convert

    convert(sys.argv[2], folder)
    export(open_bundle(folder), format="onnx")
    export(open_bundle(folder), format="openvino")
    texts = folder.parent / "texts.txt"
    words = ["the cat", "a dog", "the dog and a cat", "cat dog cat", "abc def", "xyz the cat"]
    texts.write_text(
        "\n".join(f"{words[i % 6]} {chr(97 + i % 26) * (i % 7)} {i}" for i in range(200))
    )
    for options in (["--method", "dynamic"], ["--method", "static"], ["--method", "arrow"]):
        subprocess.run(
            [
                sys.executable,
                "-m",
                "memopt",
                "quantize",
                str(folder),
                "-c",
                str(texts),
                "--min-cosine",
                "0.5",
                *options,
            ],
            check=True,
        )
    from memopt.runtimes.engine import ArrowEngine

    engine = ArrowEngine(folder, variant="onnx-fp32")
    np.save(folder.parent / "vectors.npy", engine.encode(words))
    (folder.parent / "words.json").write_text(json.dumps(words))
    for cache in folder.rglob(".ort-cache"):
        shutil.rmtree(cache)


def locked(folder: Path) -> None:
    """The bundle with its weights and one float graph under a key."""
    from memopt.bundle import open_bundle
    from memopt.exporters.base import export
    from memopt.weights.convert import convert
    from memopt.weights.locked import encrypt_bundle

    convert(sys.argv[2], folder)
    export(open_bundle(folder), format="onnx")
    encrypt_bundle(open_bundle(folder), KEY)


def joint(folder: Path) -> None:
    """A joint layer of three modalities after one epoch, and what it answers to one moment."""
    from memopt.commands.memory.train_joint import make_joint_bundle
    from memopt.memory.joint import JointEmbeddingLayer
    from memopt.memory.joint_pairs import make_pairs
    from memopt.memory.joint_train import JointConfig, JointRecipe

    random = np.random.default_rng(0)
    sizes = {"vision": 5, "audio": 4, "text": 6}
    pairs = make_pairs({name: random.normal(size=(64, size)) for name, size in sizes.items()})
    config = JointConfig(**sizes, joint=8, hidden=8, heads=2)
    make_joint_bundle(pairs, folder, config=config, recipe=JointRecipe(epochs=1))
    layer = JointEmbeddingLayer(folder)
    vectors = {name: np.ones((1, size), np.float32) for name, size in sizes.items()}
    np.save(folder.parent / "joint.npy", layer.embed(**vectors))
    for cache in folder.rglob(".ort-cache"):
        shutil.rmtree(cache)


def sync(folder: Path) -> None:
    """A server's store of three versions, a sender's and a receiver's state, keys and trust."""
    from memopt.federation.client.client import SyncClient
    from memopt.federation.client.manager import DeltaSyncManager
    from memopt.federation.delta.arrays import weights_hash
    from memopt.federation.delta.settings import DeltaSettings
    from memopt.federation.server.server import SyncServer
    from memopt.federation.trust.nodes import Trust, add_trusted
    from memopt.federation.trust.signing import SigningKey

    keys = {}
    for node, roles in (("alice", ("push", "pull", "admin")), ("server", ("push",))):
        keys[node] = SigningKey.generate()
        keys[node].save(folder / f"{node}.key")
        add_trusted(folder / "trust.json", node, key=keys[node].public(), roles=roles)
    trust = Trust(path=folder / "trust.json")
    weights = {
        f"layer.{n}.lora_{part}": np.random.default_rng(n).normal(size=(4, 8)).astype(np.float32)
        for n in range(3)
        for part in "AB"
    }
    with SyncServer(folder / "store", trust=trust, key=keys["server"], node="server") as server:
        client = SyncClient("127.0.0.1", server.port)
        sender = DeltaSyncManager(
            folder / "sender", "lora", DeltaSettings(codec="int8", delta_threshold=0)
        )
        receiver = DeltaSyncManager(folder / "receiver", "lora")
        for number in range(3):
            client.push(sender, weights, key=keys["alice"], node="alice")
            weights = {
                name: value
                + np.float32(0.01)
                * np.random.default_rng(number).normal(size=value.shape).astype(np.float32)
                for name, value in weights.items()
            }
        pulled = client.pull(receiver, trust=trust)
    (folder / "hash.json").write_text(
        json.dumps({"sequence": pulled.sequence, "weights": weights_hash(pulled.weights)})
    )


def pack(folder: Path, target: Path) -> None:
    """One small file."""
    with tarfile.open(target, "w:xz") as archive:
        archive.add(folder, arcname=folder.name)
    print(target, target.stat().st_size)


def main() -> None:
    """Make them all."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        base = Path(work)
        store(base / "store", key=None)
        pack(base / "store", out / "store.tar.xz")
        store(base / "sealed", key=KEY)
        pack(base / "sealed", out / "sealed.tar.xz")
        (base / "sync").mkdir()
        sync(base / "sync")
        pack(base / "sync", out / "sync.tar.xz")
        (base / "model").mkdir()
        bundle(base / "model" / "tiny")
        pack(base / "model", out / "model.tar.xz")
        (base / "more").mkdir()
        locked(base / "more" / "locked")
        joint(base / "more" / "joint")
        pack(base / "more", out / "more.tar.xz")
        config = out / "config.yaml"
        config.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "memopt", "config", "init", str(config)], check=True)


if __name__ == "__main__":
    main()
