"""``memopt sync status|history|rollback``: what the server has, and which of it is newest."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from memopt.commands.console import echo
from memopt.commands.sync.options import DEFAULT_KEYS, AsJson, Insecure, Keys, Node, Plain, Server
from memopt.commands.sync.output import kind, print_rows, when


def status(
    node: Node,
    adapter: Annotated[str | None, typer.Option(help="One adapter only.")] = None,
    server: Server = "localhost:8815",
    keys: Keys = DEFAULT_KEYS,
    plain: Plain = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Print the newest version of each adapter on the server."""
    from memopt.federation.client.session import connect

    session = connect(server, node=node, keys=keys, plain=plain, insecure=insecure)
    rows = session.client.status(adapter)
    if as_json:
        echo(json.dumps(rows))
        return
    print_rows(
        ("adapter", "version", "kind", "by", "when", "bytes", "weights"),
        [
            (
                *(r["adapter"], r["sequence"], r.get("kind", "-"), r.get("node", "-")),
                *(when(r.get("time")), f"{r.get('payload_bytes', 0):,}"),
                r.get("weights_hash", "-")[:16],
            )
            for r in rows
        ],
    )


def history(
    adapter: Annotated[str, typer.Argument(help="The adapter's id.")],
    node: Node,
    server: Server = "localhost:8815",
    keys: Keys = DEFAULT_KEYS,
    plain: Plain = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Print an adapter's versions and check each signature against trust.json."""
    from memopt.errors import SyncError
    from memopt.federation.client.session import connect

    session = connect(server, node=node, keys=keys, plain=plain, insecure=insecure)
    trust = session.files.trust()
    rows = []
    for signed in session.client.history(adapter):
        try:
            trust.verify(signed, fresh=False)
            verdict = "yes"
        except SyncError as error:
            verdict = f"NO: {error.problem}"
        digest = signed.manifest.digest()
        rows.append({**signed.to_json(), "digest": digest, "trusted": verdict})
    if as_json:
        echo(json.dumps(rows))
        return
    print_rows(
        ("version", "kind", "by", "when", "bytes", "weights", "trusted"),
        [
            (
                *(r["manifest"]["sequence"], kind(r["manifest"]), r["manifest"]["node"]),
                *(when(r["manifest"]["time"]), f"{r['manifest']['payload_bytes']:,}"),
                *(r["manifest"]["new_hash"][:16], r["trusted"]),
            )
            for r in rows
        ],
    )


def rollback(
    adapter: Annotated[str, typer.Argument(help="The adapter's id.")],
    to: Annotated[int, typer.Option(help="The version whose weights come back.")],
    node: Node,
    server: Server = "localhost:8815",
    keys: Keys = DEFAULT_KEYS,
    plain: Plain = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Make an old version the newest again, under a new number (role admin)."""
    from memopt.federation.client.session import connect

    session = connect(server, node=node, keys=keys, plain=plain, insecure=insecure)
    files = session.files
    sequence = session.client.rollback(
        adapter, to, key=files.signing_key(), node=node, trust=files.trust()
    )
    if as_json:
        echo(json.dumps({"adapter": adapter, "sequence": sequence, "target": to}))
        return
    echo(f"{adapter}: version {sequence} has the weights of version {to}")
