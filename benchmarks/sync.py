"""What a sync costs: bytes, error, loss and time of each codec, on real LoRA rounds and 25M values.

    python benchmarks/sync.py [--rounds 10] [--steps 20] [--parameters 25000000]

Part 1: two nodes train one adapter in turns (peft on the tiny model of examples/lora_text.py);
each round one pulls, trains and pushes, so whatever a codec loses goes into the training. The
loss is measured after each round on what a receiver holds. Part 2: a synthetic adapter, six tenths
of whose tensors moved by 3 %, the rest by 0.1 %. Times at 1 and 10 Mbit/s are the measured time on
loopback plus the bytes at that rate. Part 3: the chunks of a push to a server process, with the
store on disk and in memory, plain and with TLS, beside raw Flight to a process that only counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from command_line import positive_int, run_main

from memopt.registry import check_names

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import lora_text
import numpy as np
import pyarrow as pa
import pyarrow.flight as flight
from rich.console import Console
from rich.table import Table

from memopt.federation.client.client import SyncClient
from memopt.federation.client.manager import DeltaSyncManager
from memopt.federation.delta.arrays import fp32_bytes, weights_hash
from memopt.federation.delta.compute import compute_delta, full_payload
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.server.server import SyncServer
from memopt.federation.trust.authority import init_ca, issue
from memopt.federation.trust.nodes import Node, Trust, add_trusted
from memopt.federation.trust.signing import SigningKey
from memopt.federation.wire.protocol import CHUNK_BYTES, WINDOW_BYTES
from memopt.federation.wire.tls import TlsFiles

CODECS = {
    **{name: DeltaSettings(codec=name) for name in ("lossless", "fp16", "int8", "int4", "topk")},
    "int8, 31 levels": DeltaSettings(codec="int8", levels=31),
    "int8, 127 levels": DeltaSettings(codec="int8", levels=127),
}
# In a short fast training every tensor moves by more than 1 % a round; these thresholds let a half
# and a quarter of them wait and show what skipping costs.
SKIPPING = {
    "int8 + skip": DeltaSettings(codec="int8", delta_threshold=0.08),
    "int8, 127 levels + skip": DeltaSettings(codec="int8", levels=127, delta_threshold=0.2),
}
NODES = ("north", "south")


@dataclass
class Line:
    """One row of part 1."""

    codec: str
    sent: int = 0
    packed: int = 0  # what sending everything with zstd would have cost
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    skipped: int = 0
    tensors: int = 0
    seconds: float = 0.0


def training_rounds(
    name: str,
    settings: DeltaSettings,
    model: object,
    start: dict[str, np.ndarray],
    rounds: int,
    steps: int,
) -> Line:
    """Train in turns over a real server with one way to make deltas."""
    text, line = lora_text.python_source(), Line(name)
    key = SigningKey.generate()
    trust = Trust({n: Node(roles=("push", "pull"), keys=(key.public(),)) for n in NODES})
    with tempfile.TemporaryDirectory() as home, SyncServer(Path(home) / "s", trust=trust) as server:
        client = SyncClient("127.0.0.1", server.port)
        managers = {n: DeltaSyncManager(Path(home) / n, "lora", settings) for n in NODES}
        client.push(managers["north"], start, key=key, node="north")
        for number in range(rounds):
            node = NODES[number % 2]
            weights = client.pull(managers[node], trust=trust).weights
            lora_text.load_adapter(model, weights)
            lora_text.train(model, text, steps, seed=number + 1)
            report = client.push(managers[node], lora_text.adapter(model), key=key, node=node)
            line.sent += report.payload_bytes
            line.skipped += report.skipped
            line.tensors += len(report.tensors)
            line.seconds += report.seconds
            line.errors.append(report.error)
            held = server.store.weights("lora", report.sequence)
            assert weights_hash(held) == weights_hash(managers[node].weights())
            line.packed += len(full_payload(held).payload)
            lora_text.load_adapter(model, held)
            line.losses.append(lora_text.loss(model, text))
    return line


def plain_training(model: object, start: dict, rounds: int, steps: int) -> list[float]:
    """The same training with no sync in between."""
    text, weights, losses = lora_text.python_source(), start, []
    for number in range(rounds):
        lora_text.load_adapter(model, weights)
        lora_text.train(model, text, steps, seed=number + 1)
        weights = lora_text.adapter(model)
        losses.append(lora_text.loss(model, text))
    return losses


def part_one(console: Console, rounds: int, steps: int) -> bool:
    """Real rounds; returns whether the targets hold."""
    model = lora_text.with_adapter(lora_text.base_model())
    start = lora_text.adapter(model)
    size = fp32_bytes(start) * rounds
    before = lora_text.loss(model, lora_text.python_source())
    plain = plain_training(model, start, rounds, steps)
    lines = [
        training_rounds(name, settings, model, start, rounds, steps)
        for name, settings in (CODECS | SKIPPING).items()
    ]
    console.print(
        f"\n[bold]Real LoRA training[/bold]: {rounds} rounds of {steps} steps, "
        f"{len(start)} tensors, "
        f"{size:,} bytes in fp32 over all rounds; loss before {before:.4f}, "
        f"uncompressed after {plain[-1]:.4f}"
    )
    table = Table(
        *("codec", "bytes", "saving / fp32", "saving / full+zstd", "skipped", "update error"),
        *("final loss", "against plain", "loopback", "1 Mbit/s", "10 Mbit/s"),
    )
    for line in lines:
        table.add_row(
            line.codec,
            f"{line.sent:,}",
            f"{1 - line.sent / size:.1%}",
            f"{1 - line.sent / line.packed:.1%}",
            f"{line.skipped}/{line.tensors}",
            f"{np.median(line.errors):.1e}",
            f"{line.losses[-1]:.4f}",
            f"{line.losses[-1] / plain[-1] - 1:+.2%}",
            f"{line.seconds:.1f} s",
            *(f"{line.seconds + line.sent * 8 / rate:.1f} s" for rate in (1e6, 1e7)),
        )
    console.print(table)
    curve = Table("loss after round", *(str(n + 1) for n in range(rounds)))
    curve.add_row("uncompressed", *(f"{v:.3f}" for v in plain))
    for line in lines:
        curve.add_row(line.codec, *(f"{v:.3f}" for v in line.losses))
    console.print(curve)
    reached = {
        line.codec: (1 - line.sent / size, abs(line.losses[-1] / plain[-1] - 1)) for line in lines
    }
    best = [c for c, (saving, gap) in reached.items() if saving >= 0.8 and gap <= 0.01]
    int8 = {name: reached[name] for name in SKIPPING}
    console.print(
        f"at least 80 % saving within 1 % of the loss: {'; '.join(best) or 'NONE'}\n"
        f"with skipped layers (target 85 %): "
        f"{'; '.join(f'{name} {s:.1%}, loss {g:.2%} off' for name, (s, g) in int8.items())}\n"
        f"lossless differs from uncompressed by {abs(lines[0].losses[-1] - plain[-1]):.1e}"
    )
    return (
        bool(best) and all(s >= 0.85 for s, _ in int8.values()) and set(best) & set(int8) != set()
    )


def synthetic(parameters: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A big adapter before and after a round."""
    rng = np.random.default_rng(0)
    rank, width = 16, 4096
    layers = max(1, parameters // (2 * rank * width))
    base, new = {}, {}
    for number in range(layers):
        for letter in "AB":
            shape = (rank, width) if letter == "A" else (width, rank)
            name = f"layers.{number}.q_proj.lora_{letter}.weight"
            base[name] = rng.normal(size=shape, scale=0.02).astype("float32")
            moved = 0.03 if rng.random() < 0.6 else 0.001
            change = rng.normal(size=shape, scale=0.02 * moved)
            new[name] = (base[name] + change).astype("float32")
    return base, new


def part_two(console: Console, parameters: int) -> None:
    """Each codec on the synthetic adapter, over a real server."""
    base, new = synthetic(parameters)
    size, packed = fp32_bytes(new), len(full_payload(new).payload)
    key = SigningKey.generate()
    trust = Trust({"north": Node(roles=("push", "pull"), keys=(key.public(),))})
    table = Table(
        *("codec", "sent as", "bytes", "saving / fp32", "saving / full+zstd", "update error"),
        *("encode", "push", "pull", "1 Mbit/s", "10 Mbit/s", "bit-identical"),
    )
    with tempfile.TemporaryDirectory() as name, SyncServer(Path(name) / "s", trust=trust) as server:
        client = SyncClient("127.0.0.1", server.port, timeout=120)
        for codec, settings in CODECS.items():
            adapter = codec.replace(",", "").replace(" ", "-")
            sender = DeltaSyncManager(Path(name) / "a", adapter, settings)
            receiver = DeltaSyncManager(Path(name) / "b", adapter)
            client.push(sender, base, key=key, node="north")
            client.pull(receiver, trust=trust)
            started = time.perf_counter()
            compute_delta(base, new, settings)
            encode = time.perf_counter() - started
            pushed = client.push(sender, new, key=key, node="north")
            pulled = client.pull(receiver, trust=trust)
            table.add_row(
                codec,
                pushed.kind,
                f"{pushed.payload_bytes:,}",
                f"{1 - pushed.payload_bytes / size:.1%}",
                f"{1 - pushed.payload_bytes / packed:.1%}",
                f"{pushed.error:.1e}",
                f"{encode:.2f} s",
                f"{pushed.seconds:.2f} s",
                f"{pulled.seconds:.2f} s",
                *(f"{pushed.seconds + pushed.payload_bytes * 8 / r:.0f} s" for r in (1e6, 1e7)),
                "yes" if pulled.weights_hash == weights_hash(sender.weights()) else "NO",
            )
            sender.close()
            receiver.close()
    console.print(
        f"\n[bold]Synthetic adapter[/bold]: {size // 4:,} values in {len(new)} tensors, {size:,} "
        f"bytes in fp32, {packed:,} as full + zstd"
    )
    console.print(table)


class _Raw(flight.FlightServerBase):
    def do_exchange(self, context, descriptor, reader, writer):  # type: ignore[no-untyped-def]
        taken = 0
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                return
            taken += len(chunk.app_metadata)
            writer.write_metadata(pa.py_buffer(str(taken).encode()))


def serve_raw() -> None:
    """Be the raw server: print the port, count until killed."""
    server = _Raw(("127.0.0.1", 0))
    print(f"raw:{server.port} (", flush=True)
    server.serve()


@contextmanager
def process(*command: str) -> Iterator[int]:
    """Run a server in a process of its own; yield the port that it prints."""
    started = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        yield int(started.stdout.readline().split(" (")[0].rpartition(":")[2])
    finally:
        started.terminate()
        started.wait()


def raw_flight(data: bytes) -> float:
    """MB/s of a bare DoExchange with the same chunks and window: nothing checked or stored."""
    with process(__file__, "--serve-raw") as port:
        client = flight.FlightClient(("127.0.0.1", port))
        writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(b"raw"))
        view, sent, acknowledged = memoryview(data), 0, 0
        started = time.perf_counter()
        while acknowledged < len(data):
            while sent < len(data) and sent - acknowledged < WINDOW_BYTES:
                writer.write_metadata(pa.py_buffer(view[sent : sent + CHUNK_BYTES]))
                sent = min(sent + CHUNK_BYTES, len(data))
            acknowledged = int(reader.read_chunk().app_metadata.to_pybytes())
        seconds = time.perf_counter() - started
        writer.close()
        client.close()
    return len(data) / seconds / 1e6


def our_chunks(weights: dict[str, np.ndarray], home: Path, *, secure: bool) -> float:
    """MB/s from the first to the last acknowledged chunk of a push to ``memopt sync serve``."""
    key, keys = SigningKey.generate(), home / "keys"
    add_trusted(keys / "trust.json", "north", key=key.public(), roles=("push",))
    init_ca(keys)
    for node, hosts in (("server", ["localhost"]), ("north", [])):
        issue(keys, node, ca=keys, hosts=hosts)
    files = TlsFiles(ca=keys / "ca.pem", certificate=keys / "north.pem", key=keys / "north.key")
    ticks: list[tuple[float, int]] = []
    command = ["-m", "memopt", "sync", "serve", str(home / "store"), "--port", "0"]
    with (
        process(*command, "--keys", str(keys), *(() if secure else ("--plain",))) as port,
        DeltaSyncManager(home / "state", "x", DeltaSettings(codec="lossless", level=-5)) as manager,
    ):
        SyncClient("localhost", port, tls=files if secure else None, timeout=120).push(
            manager,
            weights,
            key=key,
            node="north",
            progress=lambda done, total: ticks.append((time.perf_counter(), done)),
        )
    return (ticks[-1][1] - ticks[0][1]) / (ticks[-1][0] - ticks[0][0]) / 1e6


def part_three(console: Console, repeats: int = 5) -> None:
    """MB/s of the chunks of a 128 MiB push, beside raw Flight, in turns."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.integers(0, 2**32, size=32 << 20, dtype="uint32")}
    payload = full_payload(weights, DeltaSettings(level=-5)).payload
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    kinds = {"raw Flight, nothing checked or kept": None}
    for where, parent in (("memory", memory), ("disk", None)):
        kinds |= {f"plain, store in {where}": (parent, False), f"TLS 1.3, {where}": (parent, True)}
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind, how in kinds.items():
            if how is None:
                found[kind].append(raw_flight(payload))
                continue
            with tempfile.TemporaryDirectory(dir=how[0]) as name:
                found[kind].append(our_chunks(weights, Path(name), secure=how[1]))
    raw = np.median(next(iter(found.values())))
    table = Table("loopback, 128 MiB, server in its own process", "MB/s", "range", "against raw")
    for kind, values in found.items():
        middle = np.median(values)
        table.add_row(
            kind, f"{middle:.0f}", f"{min(values):.0f} to {max(values):.0f}", f"{middle / raw:.2f}"
        )
    console.print(table)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive_int, default=10)
    parser.add_argument("--steps", type=positive_int, default=20)
    parser.add_argument("--parameters", type=positive_int, default=25_000_000)
    parser.add_argument("--parts", default="123", help="which parts to run")
    parser.add_argument("--serve-raw", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_raw:
        serve_raw()
        return
    check_names("part", arguments.parts, "123")
    console = Console(width=None if Console().is_terminal else 190, highlight=False)
    good = "1" not in arguments.parts or part_one(console, arguments.rounds, arguments.steps)
    if "2" in arguments.parts:
        part_two(console, arguments.parameters)
    if "3" in arguments.parts:
        part_three(console)
    if not good:
        raise SystemExit("a target was missed")


if __name__ == "__main__":
    run_main(main)
