"""Requests per second and latency of `memopt serve` under load, beside the engine and a peer.

    python benchmarks/serve.py [--bundle models/minilm] [--peer] [--seconds 8]
    python benchmarks/serve.py --soak 60          # 1,000 clients: no wrong, no lost answer

Clients are keep-alive connections of one asyncio process on loopback; each sends its next request
when it has the answer to the last. Texts are the STS sentences of ../shared/data where they are
there, else seeded ones. The engine alone encodes the same texts in this process, before and after.
Server, clients and model share the cores, so at one text a request the clients are the load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from memopt.benchmark.workload import default_inputs, read_inputs
from memopt.bundle import open_bundle
from memopt.runtimes.engine import ArrowEngine
from memopt.weights.convert import resolve

DATA = Path(__file__).parents[2] / "shared" / "data" / "stsb-en-dev.csv"
CLIENTS, INPUTS = (1, 8, 64, 256), (1, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one load gave; times in ms."""

    server: str
    clients: int
    inputs: int
    requests: int
    texts_per_second: float
    p50: float
    p95: float
    p99: float
    failures: int


class Client:
    """One keep-alive connection that knows no more of HTTP than this needs."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: Any = None

    async def ask(self, body: bytes) -> tuple[int, bytes]:
        """Send a body to /embed; return the status and what came."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        reader, writer = self._streams
        writer.write(
            b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return int(head[9:12]), await reader.readexactly(length)

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()


async def load(
    port: int, server: str, bodies: list[bytes], clients: int, inputs: int, seconds: float
) -> Load:
    """Ask for ``seconds``, after a second that does not count."""
    times: list[float] = []
    failures = 0
    start = time.perf_counter() + 1.0
    end = start + seconds

    async def one(number: int) -> None:
        nonlocal failures
        client, turn = Client(port), number
        while (begin := time.perf_counter()) < end:
            status, _ = await client.ask(bodies[turn % len(bodies)])
            turn += clients
            if begin >= start:
                times.append(time.perf_counter() - begin)
                failures += status != 200
        client.close()

    await asyncio.gather(*(one(number) for number in range(clients)))
    took = time.perf_counter() - start
    order = sorted(times) or [0.0]

    def at(share: float) -> float:
        return 1e3 * order[min(len(order) - 1, int(share * len(order)))]

    return Load(
        server=server,
        clients=clients,
        inputs=inputs,
        requests=len(times),
        texts_per_second=len(times) * inputs / took,
        p50=at(0.5),
        p95=at(0.95),
        p99=at(0.99),
        failures=failures,
    )


def bodies_of(texts: list[str], inputs: int) -> list[bytes]:
    """Return request bodies of so many texts each."""
    parts = [texts[i : i + inputs] for i in range(0, len(texts) - inputs + 1, inputs)]
    return [orjson.dumps({"inputs": part}) for part in parts]


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def started(command: list[str], port: int) -> subprocess.Popen[bytes]:
    """Start a server and wait until it is ready."""
    import urllib.request

    process = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL)
    for _ in range(1200):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready") as answer:
                if answer.status == 200:
                    return process
        except OSError:
            pass
        if process.poll() is not None:
            raise SystemExit(f"{command} ended with {process.returncode}")
        time.sleep(0.1)
    raise SystemExit(f"{command} is not ready after two minutes")


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
            await asyncio.sleep(2)
            memory.append(rss_mb(pid))

    await asyncio.gather(watch(), *(one(number) for number in range(1000)))
    print(
        f"1,000 clients, {seconds:.0f} s: {done} answers, {wrong} wrong, {lost} lost, "
        f"{refused} told to come again; resident memory {memory[0]:.0f} MB at the start, "
        f"{statistics.median(memory[1 : len(memory) // 2]):.0f} in the first half, "
        f"{statistics.median(memory[len(memory) // 2 :]):.0f} in the second"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="minilm")
    parser.add_argument("--peer", action="store_true", help="sentence-transformers too")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--soak", type=float, default=0.0)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    bundle = resolve(given.bundle)
    texts = (read_inputs(DATA, "text") if DATA.exists() else default_inputs(bundle.manifest, 3000))[
        :3000
    ]
    port = free_port()
    command = [sys.executable, "-m", "memopt", "serve", str(bundle.path), "--quiet"]
    if given.soak:
        with ArrowEngine(open_bundle(bundle.path)) as engine:
            expected = engine.encode(texts)
        process = started(command, port)
        asyncio.run(soak(port, process.pid, texts, expected, given.soak))
        process.terminate()
        process.wait()
        return
    with ArrowEngine(open_bundle(bundle.path)) as engine:
        speeds = [bare(engine, texts, given.seconds / 2)]
        variant = engine.device_info()["variant"]
    servers = {f"memopt serve ({variant})": command}
    if given.peer:
        peer = [sys.executable, str(Path(__file__).with_name("serve_peer.py")), str(bundle.path)]
        servers |= {
            "sentence-transformers": peer,
            "sentence-transformers, batched": [*peer, "--batched"],
        }
    found: list[Load] = []
    for name, start in servers.items():
        process = started(start, port := free_port())
        for inputs in INPUTS:
            for clients in CLIENTS:
                bodies = bodies_of(texts, inputs)
                found.append(asyncio.run(load(port, name, bodies, clients, inputs, given.seconds)))
        process.terminate()
        process.wait()
    with ArrowEngine(open_bundle(bundle.path)) as engine:
        speeds.append(bare(engine, texts, given.seconds / 2))
    alone = statistics.mean(speeds)
    table = Table(
        title=f"the engine alone: {alone:,.0f} texts/s ({speeds[0]:,.0f}, {speeds[1]:,.0f})"
    )
    for column in (
        "server",
        "clients",
        "texts a request",
        "texts/s",
        "of the engine",
        "requests/s",
    ):
        table.add_column(column, justify="left" if column == "server" else "right")
    for column in ("p50 ms", "p95 ms", "p99 ms", "failures"):
        table.add_column(column, justify="right")
    for row in found:
        rate = row.texts_per_second
        table.add_row(
            row.server, str(row.clients), str(row.inputs), f"{rate:,.0f}", f"{rate / alone:.0%}",
            f"{rate / row.inputs:,.0f}", f"{row.p50:.1f}", f"{row.p95:.1f}", f"{row.p99:.1f}",
            str(row.failures),
        )  # fmt: skip
    Console(width=150).print(table)
    if given.save:
        record = {"engine": speeds, "loads": [asdict(row) for row in found]}
        given.save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
