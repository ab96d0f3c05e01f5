"""A fleet on one machine: a server, two nodes that train, a third that only pulls.

    .venv/bin/python examples/federation_tour.py [--rounds 10] [--steps 15]

Needs extras federation and export, and peft: all of `make test`'s environment, no other data.

Mutual TLS 1.3 and Ed25519 signatures as in earnest. The two nodes train LoRA adapters with peft,
each on its half of this package's source; every round both push what changed, the server
averages the products B A, both pull the average and go on. The third node pulls the last version
and must hold the server's weights bit for bit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import lora_text
from rich.console import Console
from rich.table import Table

from memopt.federation import (
    DeltaSettings,
    DeltaSyncManager,
    SigningKey,
    SyncClient,
    SyncServer,
    TlsFiles,
    Trust,
    add_trusted,
    fp32_bytes,
    init_ca,
    issue,
    weights_hash,
)

NODES = ("north", "south")


def tour(folder: Path, *, rounds: int, steps: int, base_steps: int = 200) -> bool:
    """Run the tour; return whether the third node ended with the server's very bits."""
    console = Console(width=None if Console().is_terminal else 120)
    keys = {}
    init_ca(folder)
    for node in ("server", *NODES, "reader"):
        issue(folder, node, ca=folder, hosts=["localhost"] if node == "server" else ())
        keys[node] = SigningKey.generate()
        roles = ("pull",) if node == "reader" else ("push", "pull", "admin")
        add_trusted(folder / "trust.json", node, key=keys[node].public(), roles=roles)
    trust = Trust(path=folder / "trust.json")

    def tls(node: str) -> TlsFiles:
        return TlsFiles(
            ca=folder / "ca.pem", certificate=folder / f"{node}.pem", key=folder / f"{node}.key"
        )

    with console.status("training the base model"):
        base = lora_text.base_model(base_steps)
        model = lora_text.with_adapter(base)
    start = lora_text.adapter(model)
    text = lora_text.python_source()
    halves = dict(zip(NODES, (text[: len(text) // 2], text[len(text) // 2 :]), strict=True))
    console.print(
        f"adapter: {len(start)} tensors, {fp32_bytes(start):,} bytes in fp32; "
        f"loss before: {lora_text.loss(model, text):.4f}"
    )
    table = Table("round", "north sent", "south sent", "pulled", "saving", "SVD error", "loss")
    settings = DeltaSettings(codec="int8")
    with SyncServer(
        folder / "store", trust=trust, tls=tls("server"), key=keys["server"], node="server"
    ) as server:
        clients = {
            node: SyncClient("localhost", server.port, tls=tls(node)) for node in (*NODES, "reader")
        }
        own = {n: DeltaSyncManager(folder / n, f"lora-{n}", settings) for n in NODES}
        shared = {n: DeltaSyncManager(folder / n, "lora") for n in NODES}
        current = dict.fromkeys(NODES, start)
        for number in range(rounds):
            sent, pulled = {}, {}
            for node in NODES:
                lora_text.load_adapter(model, current[node])
                lora_text.train(model, halves[node], steps, seed=number + 1)
                sent[node] = clients[node].push(
                    own[node], lora_text.adapter(model), key=keys[node], node=node
                )
            averaged = clients["north"].aggregate(
                "lora", [f"lora-{n}" for n in NODES], key=keys["north"], node="north"
            )
            for node in NODES:
                pulled[node] = clients[node].pull(shared[node], trust=trust)
                current[node] = pulled[node].weights
            lora_text.load_adapter(model, current["north"])
            table.add_row(
                str(number + 1),
                *(f"{sent[n].payload_bytes:,} ({sent[n].kind})" for n in NODES),
                f"{pulled['north'].payload_bytes:,}",
                f"{sum(r.saving for r in sent.values()) / 2:.1%}",
                f"{averaged['error']:.2%}",
                f"{lora_text.loss(model, text):.4f}",
            )
        reader = DeltaSyncManager(folder / "reader", "lora")
        last = clients["reader"].pull(reader, trust=trust)
        same = last.weights_hash == weights_hash(server.store.weights("lora", last.sequence))
        same &= all(weights_hash(current[n]) == weights_hash(last.weights) for n in NODES)
    console.print(table)
    console.print(
        f"third node: version {last.sequence}, {last.payload_bytes:,} bytes, weights "
        f"{last.weights_hash[:16]}: {'bit-identical everywhere' if same else 'DIFFERENT'}"
    )
    return same


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not tour(Path(folder), rounds=arguments.rounds, steps=arguments.steps):
            raise SystemExit(1)


if __name__ == "__main__":
    main()
