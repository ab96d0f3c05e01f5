"""What one client, one connection or one moment must never do to all the others."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from memopt.errors import ConfigurationError, SyncError
from memopt.federation.client.client import SyncClient
from memopt.federation.client.manager import DeltaSyncManager
from memopt.federation.delta.adapters import CONFIG_TENSOR, read_weights, write_weights
from memopt.federation.delta.aggregate import AggregateSettings, aggregate
from memopt.federation.delta.arrays import Array
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.server.server import SyncServer
from memopt.federation.trust.audit import AuditLog
from memopt.federation.trust.nodes import Node, Trust, add_trusted
from memopt.federation.trust.signing import SigningKey
from memopt.federation.trust.vault import Appending, Vault

OF_Q = ("q.lora_magnitude_vector", "q.lora_B.weight")
EXACT = DeltaSettings(codec="lossless", delta_threshold=0)


def lora(seed: int, *, alpha: float = 4, rank: int = 2, dtype: str = "f4") -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    config = json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": alpha}).encode()
    return {
        "m.q.lora_A.weight": rng.normal(size=(rank, 8)).astype(dtype),
        "m.q.lora_B.weight": rng.normal(size=(6, rank)).astype(dtype),
        "m.q.lora_magnitude_vector": np.ones(6, dtype),
        "m.head.weight": np.ones((3, 3), dtype),
        CONFIG_TENSOR: np.frombuffer(config, np.uint8),
    }


# ------------------------------------------------------------------------------------ averages


@pytest.mark.parametrize("method", ["product", "freeze-a", "naive"])
@pytest.mark.parametrize(
    "name", ["m.head.weight", "m.q.lora_magnitude_vector", "m.q.lora_B.weight"]
)
def test_the_bound_holds_for_every_tensor(method: str, name: str) -> None:
    """Whatever tensor a client makes large, nothing of the average is over max_norm."""
    clients = [lora(0), lora(0), lora(0)]
    clients[2][name] = clients[2][name] * np.float32(1e6)
    result = aggregate(clients, None, AggregateSettings(max_norm=20.0, method=method))
    assert 2 in result.clipped
    for key, array in result.weights.items():
        if key != CONFIG_TENSOR and key != "m.q.lora_A.weight":
            assert np.linalg.norm(array.astype("f8")) <= 20.0 + 1e-3, key


def test_the_bound_holds_for_factors_averaged_apart() -> None:
    """A huge A beside a tiny B is a small product, and no small A."""
    clients = [lora(0), lora(1)]
    clients[1]["m.q.lora_A.weight"] = clients[1]["m.q.lora_A.weight"] * np.float32(1e6)
    clients[1]["m.q.lora_B.weight"] = clients[1]["m.q.lora_B.weight"] * np.float32(1e-6)
    result = aggregate(clients, None, AggregateSettings(max_norm=20.0, method="naive"))
    assert np.linalg.norm(result.weights["m.q.lora_A.weight"]) <= 20.0


@pytest.mark.parametrize("robust", ["mean", "median", "trimmed"])
def test_finite_weights_never_make_an_infinite_average(robust: str) -> None:
    """Numbers that fit float16 alone, and not multiplied, leave their client out by name."""
    clients = [lora(n, dtype="f2", rank=8) for n in range(4)]
    for name in ("m.q.lora_A.weight", "m.q.lora_B.weight"):
        clients[1][name] = np.full_like(clients[1][name], 60_000)
    result = aggregate(clients, None, AggregateSettings(robust=robust))
    assert all(np.isfinite(a.astype("f8")).all() for a in result.weights.values())
    assert robust != "mean" or result.left_out == (1,)
    assert np.isfinite(result.error)


@pytest.mark.parametrize(
    "config",
    [
        b"no JSON",
        b'{"lora_alpha": "x"}',
        b'{"lora_alpha": %b}' % (b"9" * 400),
        b'{"lora_alpha": NaN}',
    ],
)
def test_a_config_that_says_nothing_leaves_its_client_out(config: bytes) -> None:
    """The others are averaged without it."""
    odd = lora(0) | {CONFIG_TENSOR: np.frombuffer(config, np.uint8)}
    result = aggregate([odd, lora(1), lora(1)])
    assert result.left_out == (0,)
    assert result.error < 1e-6


def test_lora_alpha_0_first_does_not_silence_the_others() -> None:
    """The result has the scaling of a client whose products count, and its size."""
    result = aggregate([lora(0, alpha=0), lora(1), lora(1)])
    config = json.loads(result.weights[CONFIG_TENSOR].tobytes())
    made = config["lora_alpha"] / config["r"] * _product(result.weights)
    np.testing.assert_allclose(made, 2 / 3 * (4 / 2) * _product(lora(1)), rtol=1e-4, atol=1e-5)


def test_rank_0_and_scalars_are_averaged() -> None:
    """A pair of rank 0 adds nothing; a scalar under a factor's name is a plain tensor."""
    empty = lora(0, rank=0)
    assert aggregate([empty, lora(1)]).left_out == ()
    assert aggregate([empty, empty]).weights["m.q.lora_A.weight"].shape == (0, 8)
    scalar = {
        "x.lora_A.weight": np.float32(1).reshape(()),
        "x.lora_B.weight": np.ones((2, 1), "f4"),
    }
    assert aggregate([scalar, scalar]).weights["x.lora_A.weight"] == 1


def _product(weights: dict[str, Array]) -> Array:
    return weights["m.q.lora_B.weight"] @ weights["m.q.lora_A.weight"]


# -------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("key", [None, bytes(32)], ids=["plain", "sealed"])
def test_a_tensor_may_be_called_anything(tmp_path: Path, key: bytes | None) -> None:
    """Also as the entry of a safetensors header, on the server and on both nodes."""
    names = ("__metadata__", "__metadata___", "ein Gewicht", "重み", "a" * 500)
    weights = {name: np.full(8, n, "f4") for n, name in enumerate(names)}
    own = SigningKey.generate()
    trust = Trust({n: Node(roles=("push", "pull"), keys=(own.public(),)) for n in "ab"})
    with SyncServer(tmp_path / "s", trust=trust, vault=Vault(key)) as server:
        client = SyncClient("127.0.0.1", server.port)
        for number in range(3):
            weights = {name: array + 1 for name, array in weights.items()}
            with DeltaSyncManager(tmp_path / "a", "x", EXACT, vault=Vault(key)) as sender:
                client.push(sender, weights, key=own, node="a")
            with DeltaSyncManager(tmp_path / "b", "x", vault=Vault(key)) as receiver:
                report = client.pull(receiver, trust=trust)
            assert report.sequence == number + 1
            for name, array in weights.items():
                np.testing.assert_array_equal(report.weights[name], array)
        with (
            DeltaSyncManager(tmp_path / "c", "x") as sender,
            pytest.raises(SyncError, match="path"),
        ):
            client.push(sender, {"../x": np.ones(3, "f4")}, key=own, node="a")


def test_a_file_that_cannot_hold_a_name_is_refused(tmp_path: Path) -> None:
    """A safetensors file has no place for it; a Parquet file has."""
    weights = {"__metadata__": np.ones(3, "f4")}
    with pytest.raises(SyncError, match="cannot hold a tensor called '__metadata__'"):
        write_weights(tmp_path / "w.safetensors", weights)
    assert not list(tmp_path.iterdir())
    write_weights(tmp_path / "w.parquet", weights)
    assert list(read_weights(tmp_path / "w.parquet")) == ["__metadata__"]


# --------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("change", ["rotated", "role taken"])
def test_a_node_behind_a_rotated_key_takes_the_newest_version_whole(
    tmp_path: Path, change: str
) -> None:
    """What an old key signed on the way is not believed, and strands nobody."""
    old, new = SigningKey.generate(), SigningKey.generate()
    both = ("push", "pull")
    trust = Trust({"a": Node(roles=both, keys=(old.public(),)), "b": Node(roles=both, keys=())})
    weights = np.random.default_rng(0).normal(size=(64, 64)).astype("f4")
    with SyncServer(tmp_path / "s", trust=trust) as server:
        client = SyncClient("127.0.0.1", server.port, max_retries=0)
        sender = DeltaSyncManager(tmp_path / "a", "x", EXACT)
        behind = DeltaSyncManager(tmp_path / "b", "x")

        def push(key: SigningKey, node: str) -> None:
            weights[0] += 1
            state = sender if node == "a" else DeltaSyncManager(tmp_path / node, "x", EXACT)
            with state:
                client.push(state, {"w": weights.copy()}, key=key, node=node)

        with sender, behind:
            client.push(sender, {"w": weights.copy()}, key=old, node="a")
            client.pull(behind, trust=trust)
            weights[1] += 1
            client.push(sender, {"w": weights.copy()}, key=old, node="a")
            keys = (new.public(),) if change == "rotated" else ()
            trust._nodes["a"] = Node(roles=both, keys=keys)
            trust._nodes["c"] = Node(roles=both, keys=(new.public(),))
            if change == "rotated":
                weights[2] += 1
                client.push(sender, {"w": weights.copy()}, key=new, node="a")
            else:
                push(new, "c")
            report = client.pull(behind, trust=trust)
            assert (report.kind, report.sequence) == ("full", 3)
            np.testing.assert_array_equal(report.weights["w"], weights)


def test_key_generations_at_once_lose_nobody(tmp_path: Path) -> None:
    """Every node is in the trust file; of two keys for one node one stays."""
    begin = threading.Barrier(8)

    def generate(number: int) -> None:
        begin.wait()
        add_trusted(tmp_path / "trust.json", f"n{number}", key=f"{number:064x}", roles=("push",))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(generate, range(8)))
    assert len(Trust(path=tmp_path / "trust.json").nodes()) == 8
    SigningKey.generate().save(tmp_path / "k", new=True)
    first = (tmp_path / "k").read_bytes()
    with pytest.raises(ConfigurationError, match="exists already"):
        SigningKey.generate().save(tmp_path / "k", new=True)
    assert (tmp_path / "k").read_bytes() == first


# --------------------------------------------------------------------------------- connections


def test_silent_connections_keep_nobody_out(tmp_path: Path) -> None:
    """More silent connections than there are handshakes, from one address: a node is served."""
    own = SigningKey.generate()
    trust = Trust({"a": Node(roles=("push", "pull"), keys=(own.public(),))})
    silent: list[socket.socket] = []
    with SyncServer(tmp_path / "s", trust=trust) as server:
        for _ in range(400):
            silent.append(socket.create_connection(("127.0.0.1", server.port), timeout=10))
        assert SyncClient("127.0.0.1", server.port, timeout=30, max_retries=0).status() == []
        for each in silent:
            each.close()


# --------------------------------------------------------------------------------------- links


def test_nothing_is_appended_to_through_a_link(tmp_path: Path) -> None:
    """Neither an arriving payload nor the audit log writes where a link points."""
    victim = tmp_path / "victim"
    victim.write_text("precious\n")
    for name in ("upload", "audit"):
        (tmp_path / name).symlink_to(victim)
    with pytest.raises(ConfigurationError, match="is a link"):
        Appending(tmp_path / "upload", Vault())
    with pytest.raises(ConfigurationError, match="is a link"):
        AuditLog(tmp_path / "audit")
    assert victim.read_text() == "precious\n"
