"""``memopt sync status|history|rollback``: what the server has, and which of it is newest."""

from __future__ import annotations

from typing import Annotated

import typer

from memopt.commands.console import echo
from memopt.commands.sync.options import AsJson, SyncAccess, grouped
from memopt.commands.sync.output import kind, print_json, print_rows, when


@grouped
def status(
    access: SyncAccess,
    adapter: Annotated[str | None, typer.Option(help="One adapter only.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the newest version of each adapter on the server."""
    rows = access.connect().client.status(adapter)
    if as_json:
        print_json(rows)
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


@grouped
def history(
    adapter: Annotated[str, typer.Argument(help="The adapter's id.")],
    access: SyncAccess,
    as_json: AsJson = False,
) -> None:
    """Print an adapter's versions and check each signature against trust.json."""
    rows = access.connect().history(adapter)
    if as_json:
        print_json(rows)
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


@grouped
def rollback(
    adapter: Annotated[str, typer.Argument(help="The adapter's id.")],
    to: Annotated[int, typer.Option(help="The version whose weights come back.")],
    access: SyncAccess,
    as_json: AsJson = False,
) -> None:
    """Make an old version the newest again, under a new number (role admin)."""
    session = access.connect()
    files = session.files
    sequence = session.client.rollback(
        adapter, to, key=files.signing_key(), node=files.node, trust=files.trust()
    )
    if as_json:
        print_json({"adapter": adapter, "sequence": sequence, "target": to})
    else:
        echo(f"{adapter}: version {sequence} has the weights of version {to}")
