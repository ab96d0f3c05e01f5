"""Randomised sync rounds over a network that breaks: how many succeed, and is any weight wrong?

    python benchmarks/sync_faults.py [--rounds 1000] [--seed 0]

Each round pushes a changed adapter and pulls it elsewhere through a proxy that drops, truncates,
flips, doubles, stalls or delays connections at random bytes; now and then the server process is
killed with signal 9 in the middle of it. A round succeeds when push and pull return after their
own retries; after each the receiver's weights are compared with the sender's, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from chaos import ChaosProxy, Fault
from command_line import positive_int, run_main

from memopt.federation.client.client import SyncClient
from memopt.federation.client.manager import DeltaSyncManager
from memopt.federation.delta.arrays import weights_hash
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.failures import SyncFailure
from memopt.federation.trust.nodes import Trust, add_trusted
from memopt.federation.trust.signing import SigningKey

CODECS = ("int8", "int4", "fp16", "lossless", "topk")
KINDS = ("drop", "truncate", "flip", "duplicate", "stall", "delay")
# A stall costs a whole timeout: one in ten of the faults, as packets are mostly lost, not held.
WEIGHTS = (3, 2, 3, 2, 1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of the rounds."""

    rounds: int
    succeeded: int
    wrong: int
    faults: int
    kills: int
    attempts: int
    seconds: float
    failures: tuple[str, ...]


class Server:
    """The server in a process of its own, on one port for good."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.port = 0
        self.start()

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "memopt", "sync", "serve", str(self._folder / "store")),
            *("--plain", "--idle", "5", "--keep", "30", "--keys", str(self._folder)),
            *("--port", str(self.port)),
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.port = int(line.split(" (")[0].rpartition(":")[2])

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run(*, rounds: int, seed: int, folder: Path, show: bool = False) -> Result:
    """Run the rounds and return the count."""
    chance = random.Random(seed)
    key = SigningKey.generate()
    add_trusted(folder / "trust.json", "alice", key=key.public(), roles=("push", "pull"))
    trust = Trust(path=folder / "trust.json")
    server = Server(folder)
    rng = np.random.default_rng(seed)
    weights = {
        f"l{i}.lora_{x}.weight": rng.normal(size=(8, 512) if x == "A" else (512, 8)).astype("f4")
        for i in range(6)
        for x in "AB"
    }

    def choose(number: int) -> Fault:
        if chance.random() < 0.4:
            return Fault()
        size = int(10 ** chance.uniform(1.5, 5))
        (kind,) = chance.choices(KINDS, WEIGHTS)
        way = chance.choice(("up", "down"))
        return Fault(kind=kind, at=size, direction=way, bit=chance.randrange(8), seconds=0.005)

    succeeded = wrong = kills = attempts = 0
    failures: list[str] = []
    started = time.monotonic()
    with ChaosProxy(("127.0.0.1", server.port), choose) as proxy:
        client = SyncClient("127.0.0.1", proxy.port, timeout=1.0, max_retries=8, seed=seed)
        receiver = DeltaSyncManager(folder / "receiver", "lora")
        for number in range(rounds):
            weights = {
                n: (a + rng.normal(size=a.shape).astype("f4") * 0.03 * (rng.random() < 0.7))
                for n, a in weights.items()
            }
            settings = DeltaSettings(codec=chance.choice(CODECS))
            timer = None
            if chance.random() < 0.03:
                kills += 1
                timer = threading.Timer(chance.uniform(0, 0.15), _restart, (server,))
                timer.start()
            try:
                with DeltaSyncManager(folder / "sender", "lora", settings) as sender:
                    pushed = client.push(
                        sender, weights, key=key, node="alice", full=chance.random() < 0.1
                    )
                    pulled = client.pull(receiver, trust=trust)
                    attempts += pushed.attempts + pulled.attempts
                    succeeded += 1
                    if weights_hash(pulled.weights) != weights_hash(sender.weights()):
                        wrong += 1
            except SyncFailure as error:
                failures.append(f"round {number}: {error.code}: {error}")
            finally:
                if timer:
                    timer.join()
            if show and number % 50 == 49:
                print(f"{number + 1} rounds, {succeeded} succeeded, {wrong} wrong", flush=True)
        receiver.close()
        faults = proxy.faults
    server.kill()
    return Result(
        rounds=rounds,
        succeeded=succeeded,
        wrong=wrong,
        faults=faults,
        kills=kills,
        attempts=attempts,
        seconds=time.monotonic() - started,
        failures=tuple(failures),
    )


def _restart(server: Server) -> None:
    server.kill()
    server.start()


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=positive_int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(rounds=arguments.rounds, seed=arguments.seed, folder=Path(folder), show=True)
    print(
        f"{result.rounds} rounds: {result.succeeded / result.rounds:.2%} succeeded, "
        f"{result.wrong} wrong weights, {result.faults} faults struck, {result.kills} servers "
        f"killed, {result.attempts} attempts, {result.seconds:.0f} s"
    )
    for line in result.failures:
        print(line)


if __name__ == "__main__":
    run_main(main)
