"""Downloads, against a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.weights.conftest import ModelFolder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository, ``acme/tiny``, and how the server treats who asks for it."""

    files: dict[str, bytes]
    mode: str = "up"  # or silent
    status: int = 0  # answered to everything, unless 0
    cut: int = 0  # how many downloads of weights still break off in the middle
    asked: list[str] = field(default_factory=list)
    awake: threading.Event = field(default_factory=threading.Event)


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            if hub.mode == "silent":
                hub.awake.wait(60)
                return
            revision = self.path.rpartition("/")[2]
            if hub.status or re.match(r"s\d{3}-", revision):
                self.send_response(hub.status or int(revision[1:4]))
                self.send_header("X-Error-Code", "" if hub.status else revision[5:])
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if self.path.startswith("/api/models/acme/tiny"):
                siblings = [{"rfilename": name} for name in sorted(hub.files)]
                listed = {"id": "acme/tiny", "sha": COMMIT, "siblings": siblings}
                self.send(json.dumps(listed).encode() if revision != "portal" else b"<html>", body)
                return
            name = self.path.partition("/resolve/")[2].partition("/")[2]
            if name not in hub.files:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send(hub.files[name], body)

        def send(self, content: bytes, body: bool) -> None:
            start = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                span = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", span)
            self.end_headers()
            if not body:
                return
            if hub.cut and self.path.endswith(".safetensors"):
                hub.cut -= 1
                self.wfile.write(content[start : start + (len(content) - start) // 2])
                self.close_connection = True
                return
            self.wfile.write(content[start:])

    return Handler


@pytest.fixture
def hub(model_folder: ModelFolder) -> Iterator[tuple[Hub, str]]:
    """A running hub with a tiny BERT in it, and its address."""
    folder = model_folder()
    hub = Hub({p.name: p.read_bytes() for p in folder.iterdir()})
    hub.files["pytorch_model.bin"] = b"never asked for"
    hub.files["model-00001-of-00002.safetensors"] = b"left from before"
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub, f"http://127.0.0.1:{server.server_port}"
    hub.awake.set()
    server.shutdown()
    server.server_close()
    thread.join()


PROGRAM = """
import json, sys
from importlib.metadata import version
if int(version("huggingface_hub").partition(".")[0]) >= 2:
    sys.modules["httpx"] = None  # a clean install lacks it
from memopt.errors import MemoptError
from memopt.weights.sources import checkpoint, find_source
from memopt.weights.sentence import read_sentence
for revision in sys.argv[1:]:
    try:
        found = find_source("acme/tiny", revision=None if revision == "main" else revision)
        sentence = read_sentence(found.folder)
        checkpoint(found.folder / (sentence.transformer if sentence else ""))
        print(json.dumps({"origin": found.origin, "told": list(found.told)}))
    except MemoptError as error:
        print(json.dumps({"error": str(error)}))
"""


def ask(address: str, home: Path, *revisions: str, **environment: str) -> list[dict[str, Any]]:
    """Find ``acme/tiny`` in a process of its own: the hub's client reads its settings once."""
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HTTP"))},
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "*",
        **environment,
    }
    command = [sys.executable, "-c", PROGRAM, *(revisions or ["main"])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_model_is_downloaded_and_then_there_without_the_hub(
    hub: tuple[Hub, str], tmp_path: Path
) -> None:
    """Only what is needed is fetched; with the hub down, silent or failing the cache serves."""
    server, address = hub
    origin = f"acme/tiny@{COMMIT}"
    assert ask(address, tmp_path) == [{"origin": origin, "told": []}]
    fetched = {line.rpartition("/")[2] for line in server.asked if line.startswith("GET /acme")}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors"}
    server.mode = "silent"
    (silent,) = ask(address, tmp_path)
    server.mode, server.status = "up", 503
    (failing,) = ask(address, tmp_path)
    (down,) = ask("http://127.0.0.1:9", tmp_path)
    for answer, why in ((silent, "ReadTimeout"), (failing, "status 503"), (down, "ConnectError")):
        assert answer["origin"] == origin
        assert "acme/tiny is taken from the local cache" in answer["told"][0]
        assert why in answer["told"][0]
    assert ask(address, tmp_path, HF_HUB_OFFLINE="1") == [{"origin": origin, "told": []}]


REFUSALS = {
    "s404-RepoNotFound": "no model 'acme/tiny' that you may read",
    "s403-GatedRepo": "is gated",
    "s404-RevisionNotFound": "has no revision 's404-RevisionNotFound'",
    "s401-": "refuses acme/tiny (HTTP status 401)",
    "s403-": "refuses acme/tiny (HTTP status 403)",
    "s500-": "not in the local hub cache and cannot be downloaded: the hub does not answer (HTTP",
    "s429-": "HTTP status 429",
    "portal": "no hub answers there",
}


def test_what_the_hub_refuses_is_one_line(hub: tuple[Hub, str], tmp_path: Path) -> None:
    """An answer is believed and a failure called one; a page of a portal is no list of files."""
    _, address = hub
    for answer, message in zip(ask(address, tmp_path, *REFUSALS), REFUSALS.values(), strict=True):
        assert message in answer["error"]
        assert "\n" not in answer["error"]


def test_a_download_that_breaks_off_is_resumed_or_named(
    hub: tuple[Hub, str], tmp_path: Path
) -> None:
    """One cut is mended; a hub that cuts every time is one line, and half a model is not taken."""
    server, address = hub
    server.cut = 1
    assert "origin" in ask(address, tmp_path / "once")[0]
    server.cut = 1000
    (answer,) = ask(address, tmp_path / "ever")
    assert "acme/tiny cannot be downloaded" in answer["error"]
    assert "run it again: what arrived is kept" in answer["error"]
    (half,) = ask(address, tmp_path / "ever", HF_HUB_OFFLINE="1")
    assert ".safetensors" in half["error"]


def test_a_transformer_in_a_folder_is_downloaded_from_there(
    hub: tuple[Hub, str], tmp_path: Path
) -> None:
    """modules.json is read first: it says which folders of the repository are needed."""
    server, address = hub
    inside = {f"0_Transformer/{name}": content for name, content in server.files.items()}
    kinds = (("Transformer", "0_Transformer"), ("Pooling", "pool"))
    modules = [{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds]
    pooling = {"embedding_dimension": 8, "pooling_mode": "cls"}
    server.files = {
        **inside,
        "modules.json": json.dumps(modules).encode(),
        "pool/config.json": json.dumps(pooling).encode(),
        "onnx/config.json": b"{}",
    }
    assert "origin" in ask(address, tmp_path)[0]
    assert any("pool/config.json" in line for line in server.asked)
    assert not any("onnx" in line or ".bin" in line for line in server.asked)


def test_weights_of_modules_and_of_every_route_are_downloaded(
    hub: tuple[Hub, str], tmp_path: Path
) -> None:
    """A Dense layer has a file of its own, and of a Router each route's folder is fetched."""
    server, address = hub
    kind = "sentence_transformers.models."
    model = {f"q_0_Transformer/{name}": content for name, content in server.files.items()}
    dense = {"in_features": 4, "out_features": 2}
    modules = [{"type": f"{kind}Router", "path": ""}, {"type": f"{kind}Dense", "path": "1_Dense"}]
    types = {"q_0_Transformer": f"{kind}Transformer", "q_1_Pooling": f"{kind}Pooling"}
    stated = {
        "modules.json": modules,
        "router_config.json": {"types": types, "structure": {"query": list(types)}},
        "q_1_Pooling/config.json": {"embedding_dimension": 4},
        "1_Dense/config.json": dense,
    }
    server.files = {
        **model,
        **{name: json.dumps(value).encode() for name, value in stated.items()},
        "1_Dense/model.safetensors": b"weights",
    }
    (answer,) = ask(address, tmp_path)
    assert "begins with a Router" in answer["error"]
    fetched = {
        line.partition("/resolve/")[2].partition("/")[2]
        for line in server.asked
        if line.startswith("GET /acme")
    }
    wanted = {f"q_0_Transformer/{name}" for name in ("config.json", "model.safetensors")}
    assert {*stated, *wanted, "1_Dense/model.safetensors"} <= fetched
    assert not any(name.endswith(".bin") for name in fetched)
