"""Who may ask, what happens under load and at the end, and models that come and go."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from memopt.bundle import Bundle, open_bundle
from memopt.errors import ConfigurationError
from memopt.runtimes.limits import resident_mb
from memopt.serve.guard import Admission, read_keys
from memopt.serve.hosting import Capacity
from tests.serve.conftest import events, running

KEY, OTHER = "k" * 24, "o" * 24
KEYS = {hashlib.sha256(key.encode()).digest(): key[0] for key in (KEY, OTHER)}
BODY = {"inputs": "a cat"}


def asked(client: httpx.Client, key: str = "", **headers: str) -> httpx.Response:
    """One request, with a key or without."""
    headers |= {"authorization": f"Bearer {key}"} if key else {}
    return client.post("/embed", json=BODY, headers=headers)


def test_keys_and_rates(small: dict[str, Bundle], caplog: pytest.LogCaptureFixture) -> None:
    """No key, a wrong one, a right one, too often; what is logged names no key and no text."""
    models = {"labels": small["labels"].path}
    body = {"inputs": "a secret text"}
    caplog.set_level(logging.INFO, "memopt.serve")
    with running(models, access=Admission(keys=KEYS, rate=3)) as (client, _):
        assert client.get("/health").status_code == 200
        assert client.post("/predict", json=body).status_code == 401
        wrong = {"authorization": "Bearer wrong"}
        refused = client.post("/predict", json=body, headers=wrong)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        right = {"authorization": f"Bearer {KEY}"}
        codes = [client.post("/predict", json=body, headers=right).status_code for _ in range(6)]
        assert codes[:3] == [200] * 3
        assert 429 in codes[3:]
        other = {"x-api-key": OTHER}
        assert client.post("/predict", json=body, headers=other).status_code == 200
        assert client.get("/v1/memories/mine").status_code == 401
        assert client.get("/nowhere").status_code == 401
        counts = client.get("/metrics", headers=other).text
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.getMessage()[:1] == "{"]
    assert {line["key"] for line in lines} == {"", "k", "o"}
    assert "secret" not in caplog.text
    assert KEY not in caplog.text
    refused_too = 2 + len(codes) + 1  # refusals of the guard are counted under their route
    assert f'te_request_count{{method="/predict"}} {refused_too}.0' in counts
    assert 'te_request_count{method="/v1/memories/{memory_id}"} 1.0' in counts
    assert 'te_request_count{method="other"} 1.0' in counts
    routes = [line["route"] for line in lines if line["status"] in (401, 429)]
    assert set(routes) == {"/predict", "/v1/memories/{memory_id}", "other"}


def test_key_files(tmp_path: Path) -> None:
    """Names, comments; a file that others can read, and a short key, are refused."""
    file = tmp_path / "keys"
    file.write_text(f"# ours\nalice:{KEY}\n{OTHER}\n")
    file.chmod(0o600)
    assert sorted(read_keys(file).values()) == ["alice", "key 3"]
    file.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        read_keys(file)
    file.chmod(0o600)
    file.write_text("short\n")
    with pytest.raises(ConfigurationError, match=r"line 1 .* 5 characters"):
        read_keys(file)


def test_pages_elsewhere_cannot_ask(served: httpx.Client) -> None:
    """Neither by a name that was pointed here, nor with a body that needs no leave, nor CORS."""
    assert served.get("/info", headers={"host": "evil.example"}).status_code == 403
    text = {"content-type": "text/plain"}
    assert served.post("/embed", content=json.dumps(BODY), headers=text).status_code == 415
    answer = served.get("/info", headers={"origin": "http://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_sizes_are_limited(small: dict[str, Bundle]) -> None:
    """By the header, and by what really comes."""
    limits = Capacity(body_bytes=1000)
    with running({"labels": small["labels"].path}, limits) as (client, _):
        assert client.post("/predict", json={"inputs": "a" * 2000}).status_code == 413

        def parts() -> Any:
            for _ in range(40):
                yield b" " * 100

        kind = {"content-type": "application/json"}
        assert client.post("/predict", content=parts(), headers=kind).status_code == 413


def test_every_answer_is_the_askers_own(minilm: Bundle) -> None:
    """Many clients at once, each with its own texts; vectors as the engine gives them alone."""
    texts = [f"number {i} " + "word " * (i % 23) for i in range(64)]
    with running({"minilm": minilm.path}) as (client, _):
        alone = np.array([client.post("/embed", json={"inputs": t}).json()[0] for t in texts])

        def ask(seed: int) -> float:
            rng = np.random.default_rng(seed)
            worst = 1.0
            for _ in range(12):
                rows = rng.integers(len(texts), size=rng.integers(1, 9))
                answer = client.post("/embed", json={"inputs": [texts[i] for i in rows]})
                assert answer.status_code == 200
                worst = min(worst, float((np.array(answer.json()) * alone[rows]).sum(1).min()))
            return worst

        with ThreadPoolExecutor(16) as pool:
            assert min(pool.map(ask, range(16))) > 0.999
        metrics = client.get("/metrics").text
        assert 'te_request_success{method="/embed"}' in metrics
        assert 'te_queue_size{model="minilm"} 0.0' in metrics


def test_a_bundle_is_reloaded_without_losing_a_request(
    small: dict[str, Bundle], tmp_path: Path
) -> None:
    """Requests go on while it is swapped, five times."""
    folder = tmp_path / "labels"
    shutil.copytree(small["labels"].path, folder)
    with running({"labels": folder}) as (client, host):
        stop, codes = threading.Event(), []

        def ask() -> None:
            while not stop.is_set():
                codes.append(client.post("/predict", json={"inputs": "a cat"}).status_code)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        first = host.models["labels"].opened
        for _ in range(5):
            assert client.post("/models/labels/reload").status_code == 200
        stop.set()
        for thread in threads:
            thread.join()
        assert set(codes) == {200}
        assert host.models["labels"].opened is not first
        shutil.rmtree(folder / "onnx")
        shutil.rmtree(folder / "openvino", ignore_errors=True)
        assert client.post("/models/labels/reload").status_code in (400, 503)
        assert client.post("/predict", json={"inputs": "a cat"}).status_code == 200


def test_models_give_way_where_memory_is_short(small: dict[str, Bundle]) -> None:
    """The one that was not used for longest is closed, and opened again when asked for."""
    paths = {name: small[name].path for name in ("labels", "reranker", "tags")}
    limits = Capacity()
    with running(paths, limits, lazy=True) as (client, host):
        assert not any(model.opened for model in host.models.values())
        client.post("/predict", json={"inputs": "a"})
        client.post("/tag", json={"inputs": "a"})
        limits.memory_limit_mb = resident_mb() + 1  # the next one has no room
        assert client.post("/rerank", json={"query": "a", "texts": ["b"]}).status_code in (200, 503)
        assert host.models["labels"].opened is None
        limits.memory_limit_mb = None
        assert client.post("/predict", json={"inputs": "a"}).status_code == 200


def test_a_client_that_goes_ends_the_writing(writer: Bundle) -> None:
    """The next one does not wait for a thousand tokens that nobody reads."""
    with running({"llama": writer.path}) as (client, host):
        ask = {"prompt": "the cat", "max_tokens": 4000, "stream": True, "temperature": 1.5}
        with client.stream("POST", "/v1/completions", json=ask) as answer:
            next(answer.iter_lines())
        done = events(client.post("/v1/completions", json={**ask, "max_tokens": 2}).text)
        assert done[-1] == "[DONE]"
        for _ in range(200):
            if not host.models["llama"].opened.users:
                break
            time.sleep(0.05)
        assert not host.models["llama"].opened.users


def test_a_request_has_its_time(small: dict[str, Bundle]) -> None:
    """One that takes longer is told so, and the server goes on."""
    limits = Capacity(seconds=0.3)
    with running({"labels": small["labels"].path}, limits) as (client, host):
        engine = host.models["labels"].opened.engine
        scores = engine.scores

        def slow(inputs: Any) -> Any:
            time.sleep(1.0)
            return scores(inputs)

        engine.scores = slow
        assert client.post("/predict", json={"inputs": "a"}).status_code == 503
        engine.scores = scores
        time.sleep(1.0)
        assert client.post("/predict", json={"inputs": "a"}).status_code == 200


def started(arguments: list[str]) -> tuple[subprocess.Popen[str], int]:
    """The command, and the port it listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "memopt", "serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    return process, port


def test_the_command_stops_behind_its_last_answer(small: dict[str, Bundle]) -> None:
    """SIGTERM while requests are in work: each is answered, then it is terminated."""
    process, port = started([f"m={small['labels'].path}", "--quiet"])
    url = f"http://127.0.0.1:{port}"
    waited = 0.0
    while True:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.1)
        waited += 0.1
        assert waited < 60
        assert process.poll() is None, process.stderr

    async def load() -> list[int]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            body = {"inputs": ["word " * 60] * 400}
            asks = [asyncio.create_task(client.post("/predict", json=body)) for _ in range(8)]
            await asyncio.sleep(0.3)
            os.kill(process.pid, signal.SIGTERM)
            return [answer.status_code for answer in await asyncio.gather(*asks)]

    assert asyncio.run(load()) == [200] * 8
    assert process.wait(30) == 143


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--cert", "/nowhere"], "TLS needs --cert and --key"),
        (["--api-key-file", "/nowhere"], "no keys in /nowhere"),
    ],
)
def test_what_is_not_safe_is_not_started(
    small: dict[str, Bundle], arguments: list[str], words: str
) -> None:
    """One line, exit code 2."""
    from typer.testing import CliRunner

    from memopt.cli import app

    done = CliRunner().invoke(app, ["serve", str(small["labels"].path), *arguments])
    assert isinstance(done.exception, ConfigurationError)
    assert words in str(done.exception)


def test_tls(small: dict[str, Bundle], tmp_path: Path) -> None:
    """A certificate of one's own, checked by the client."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl to make a certificate with")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    make += f" -keyout {key} -out {cert} -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(make.split(), check=True, capture_output=True)
    labels = f"m={small['labels'].path}"
    process, port = started([labels, "--quiet", "--cert", str(cert), "--key", str(key)])
    try:
        context = ssl.create_default_context(cafile=str(cert))
        for _ in range(300):
            try:
                answer = httpx.get(f"https://127.0.0.1:{port}/ready", verify=context)
                break
            except httpx.ConnectError:
                assert process.poll() is None
                time.sleep(0.1)
        assert answer.status_code == 200
    finally:
        process.terminate()
        process.wait(30)


def test_two_servers_on_one_port(small: dict[str, Bundle]) -> None:
    """The second says so in one line."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "memopt", "serve", str(small["labels"].path)]
        done = subprocess.run([*command, "--port", port], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot listen on 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_open_bundle_is_the_one_of_now(small: dict[str, Bundle]) -> None:
    """Names given on the command line are the models'."""
    with running({"a": small["labels"].path, "b": small["reranker"].path}) as (client, _):
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["a", "b"]
        assert open_bundle(small["labels"].path).manifest.task == "text-classification"
