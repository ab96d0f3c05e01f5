"""/v1/memories over a real store: the command line's privacy, for those who have a key."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from memopt.bundle import Bundle
from memopt.memory.io.models import Models
from memopt.memory.privacy.access_log import read_log
from memopt.memory.session import Session, open_memory
from memopt.serve.memories import Memories
from tests.memory.kit import files_with
from tests.memory.test_commands import memopt
from tests.serve.conftest import running

KEY = "k" * 24


@pytest.fixture(scope="module")
def kept(
    minilm: Bundle, small: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[httpx.Client, Path, Session]]:
    """A server with a memory, and where that lies."""
    folder = tmp_path_factory.mktemp("memory") / "s"
    with (
        open_memory(folder, models=Models(text=str(minilm.path))) as session,
        running({"labels": small["labels"].path}, memories=Memories(session)) as (client, _),
    ):
        yield client, folder, session


def test_added_found_shown_and_erased(kept: tuple[httpx.Client, Path, Session]) -> None:
    """Redacted, once, found by meaning; afterwards no file holds it; every access is logged."""
    client, folder, session = kept
    body = {"text": "The key zq7vxk2jwp: ask bob@example.org", "category": "home"}
    added = client.post("/v1/memories", json=body)
    assert added.status_code == 200
    key = added.json()["memory_id"]
    assert client.post("/v1/memories", json=body).json() == {"memory_id": key, "added": False}
    ask = {"query": "where is the key", "category": "home", "top_k": 3}
    found = client.post("/v1/memories/search", json=ask).json()["memories"]
    assert found[0]["text"] == "The key zq7vxk2jwp: ask [EMAIL]"
    assert "joint_embedding" not in found[0]
    assert client.get(f"/v1/memories/{key}").json()["category"] == "home"
    assert files_with(folder, b"bob@example.org") == []
    assert client.delete(f"/v1/memories/{key}").json()["forgotten"] == 1
    assert files_with(folder, b"zq7vxk2jwp") == []
    for answer in (client.get(f"/v1/memories/{key}"), client.delete(f"/v1/memories/{key}")):
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "not_found_error"
    session.store.close()
    actions = {line.action for line in read_log(session.store, memory_id=key)}
    assert {"write", "read", "delete"} <= actions
    # Without keys the log names the address, not the user whom the server runs as.
    assert {line.actor for line in read_log(session.store, memory_id=key)} == {"127.0.0.1"}


def test_what_is_wrong_is_said(kept: tuple[httpx.Client, Path, Session]) -> None:
    """Which field, and its bound."""
    client, _, _ = kept
    for path, body, words in (
        ("/v1/memories", {"text": ""}, "$.text"),
        ("/v1/memories", {"text": "a", "vector": [1]}, "`vector`"),
        ("/v1/memories", {"text": "a", "timestamp": "now"}, "$.timestamp"),
        ("/v1/memories/search", {"query": "a", "top_k": 1000}, "$.top_k"),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 422, body
        assert words in answer.json()["error"]["message"]
    blank = client.post("/v1/memories", json={"text": "  "})
    assert blank.status_code == 400
    assert "text is empty" in blank.json()["error"]["message"]


def test_many_clients_at_once(kept: tuple[httpx.Client, Path, Session]) -> None:
    """Each memory is there afterwards, under the id its client was told."""
    client, _, _ = kept

    def one(number: int) -> bool:
        text = f"Client {number} likes the number {number * 7}."
        key = client.post("/v1/memories", json={"text": text}).json()["memory_id"]
        found = client.post("/v1/memories/search", json={"query": text, "top_k": 50}).json()
        same = client.get(f"/v1/memories/{key}").json()["text"] == text
        # Neighbours in time and wording may stand before it.
        return same and key in {row["memory_id"] for row in found["memories"]}

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(32)))


def test_routes_are_documented_and_off_without_a_store(served: httpx.Client) -> None:
    """A server without a memory says how to have one."""
    answer = served.get("/v1/memories/x")
    assert answer.status_code == 404
    assert "--memory STORE" in answer.json()["error"]["message"]
    paths = served.get("/openapi.json").json()["paths"]
    assert set(paths["/v1/memories/{memory_id}"]) == {"get", "delete"}
    assert paths["/v1/memories/{memory_id}"]["get"]["parameters"][0]["name"] == "memory_id"
    body = paths["/v1/memories/search"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"].endswith("/MemorySearchRequest")


def test_the_command_wants_keys_for_a_memory(
    minilm: Bundle, small: dict[str, Bundle], tmp_path: Path
) -> None:
    """Without a key file it is not served; with one, who has no key reads nothing."""
    labels = f"labels={small['labels'].path}"
    store = tmp_path / "s"
    assert memopt("add", store, "A cat sleeps.", "--model", minilm.path).returncode == 0
    command = [sys.executable, "-m", "memopt", "serve", labels, "--quiet", "--memory", str(store)]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "give --api-key-file" in refused.stderr
    (tmp_path / "keys").write_text(f"alice:{KEY}\n")
    (tmp_path / "keys").chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command += ["--api-key-file", str(tmp_path / "keys"), "--port", port]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        address = re.search(r"http://\S+/", process.stderr.readline())
        assert address
        with httpx.Client(base_url=address[0], timeout=60) as client:
            while True:
                try:
                    assert client.get("/ready").status_code in (200, 503)
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    time.sleep(0.1)
            ask = {"query": "cat"}
            assert client.post("/v1/memories/search", json=ask).status_code == 401
            right = {"authorization": f"Bearer {KEY}"}
            found = client.post("/v1/memories/search", json=ask, headers=right).json()
            assert [row["text"] for row in found["memories"]] == ["A cat sleeps."]
            added = client.post("/v1/memories", json={"text": "A dog barks."}, headers=right).json()
    finally:
        process.terminate()
        assert process.wait(30) == 143
    shown = json.loads(memopt("show", store, added["memory_id"], "--log", "--json").stdout)
    assert ("alice", "write") in {(line["actor"], line["action"]) for line in shown["log"]}
    assert KEY not in json.dumps(shown)
    assert "A dog barks." in json.dumps(json.loads(memopt("search", store, "dog", "--json").stdout))
