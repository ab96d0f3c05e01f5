"""Load generators of ``benchmarks/serve.py``: wrk where it is installed, else asyncio.

Both keep their connections, send the next request when they have the answer to the last, and say
how many cores they took themselves: on a small machine those are the server's loss.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_SECONDS = 1.0  # of requests that do not count
# Every request is made before the load begins; wrk's own counts of what failed are in `summary`.
_SCRIPT = """
local requests, turn = {{}}, 0
function init(args)
  for line in io.lines({bodies}) do
    local headers = {{["Content-Type"] = "application/json"}}
    requests[#requests + 1] = wrk.format("POST", {path}, headers, line)
  end
end
function request()
  turn = turn % #requests + 1
  return requests[turn]
end
function done(summary, latency, all)
  local e = summary.errors
  print(string.format(
    '{{"requests": %d, "seconds": %f, "p50": %f, "p95": %f, "p99": %f, "failures": %d}}',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(95) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one load gave; times in ms. ``cores`` is what the generator itself took."""

    generator: str
    requests: int
    seconds: float
    p50: float
    p95: float
    p99: float
    failures: int
    cores: float


class Client:
    """One keep-alive connection that knows no more of HTTP than this needs."""

    def __init__(self, port: int, path: str = "/embed") -> None:
        self._port, self._path = port, path.encode()
        self._streams: Any = None

    async def ask(self, body: bytes) -> tuple[int, bytes]:
        """Send a body; return the status and what came."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        reader, writer = self._streams
        writer.write(
            b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (self._path, len(body), body)
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


def generator() -> str:
    """Return the generator that there is: ``wrk`` or ``asyncio``."""
    return "wrk" if shutil.which("wrk") else "asyncio"


def load(
    kind: str, port: int, path: str, bodies: list[bytes], clients: int, seconds: float
) -> Load:
    """Ask for ``seconds`` with so many connections, after a second that does not count."""
    if kind == "asyncio":
        return asyncio.run(_asyncio(port, path, bodies, clients, seconds))
    _wrk(port, path, bodies, clients, WARM_SECONDS)
    return _wrk(port, path, bodies, clients, seconds)


def _wrk(port: int, path: str, bodies: list[bytes], clients: int, seconds: float) -> Load:
    with tempfile.TemporaryDirectory() as folder:
        texts, script = Path(folder, "bodies"), Path(folder, "load.lua")
        texts.write_bytes(b"\n".join(bodies) + b"\n")
        script.write_text(_SCRIPT.format(bodies=json.dumps(str(texts)), path=json.dumps(path)))
        command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s"]
        # A request that waits for 256 others may take longer than wrk's own two seconds.
        command += ["--timeout", "60s", "-s", str(script), f"http://127.0.0.1:{port}"]
        before = os.times()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        after = os.times()
    given = json.loads(done.stdout.strip().splitlines()[-1])
    took = after.children_user + after.children_system
    took -= before.children_user + before.children_system
    return Load(generator="wrk", cores=took / given["seconds"], **given)


async def _asyncio(port: int, path: str, bodies: list[bytes], clients: int, seconds: float) -> Load:
    times: list[float] = []
    failures = 0
    start = time.perf_counter() + WARM_SECONDS
    end = start + seconds

    async def one(number: int) -> None:
        nonlocal failures
        client, turn = Client(port, path), number
        while (begin := time.perf_counter()) < end:
            try:
                status, _ = await client.ask(bodies[turn % len(bodies)])
            except (OSError, asyncio.IncompleteReadError):
                status, client = 0, Client(port, path)
            turn += clients
            if begin >= start:
                times.append(time.perf_counter() - begin)
                failures += status != 200
        client.close()

    before = time.process_time()
    await asyncio.gather(*(one(number) for number in range(clients)))
    took = time.perf_counter() - start
    order = sorted(times) or [0.0]

    def at(share: float) -> float:
        return 1e3 * order[min(len(order) - 1, int(share * len(order)))]

    return Load(
        generator="asyncio",
        requests=len(times),
        seconds=took,
        p50=at(0.5),
        p95=at(0.95),
        p99=at(0.99),
        failures=failures,
        cores=(time.process_time() - before) / (took + WARM_SECONDS),
    )
