"""``memopt sync keygen|init-ca|issue``: signing keys and certificates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo
from memopt.commands.sync.options import DEFAULT_KEYS, AsJson, Keys


def keygen(
    node: Annotated[str, typer.Argument(help="The node that will sign.")],
    keys: Keys = DEFAULT_KEYS,
    trust: Annotated[
        Path | None, typer.Option(help="Trust file to add it to [default: KEYS/trust.json].")
    ] = None,
    role: Annotated[list[str] | None, typer.Option(help="push, pull, admin; repeatable.")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--adapter", help="Adapters it may touch (patterns).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a node's signing key and add the public one to the trust file."""
    from memopt.federation.client.session import NodeFiles
    from memopt.federation.trust.nodes import add_trusted
    from memopt.federation.trust.signing import SigningKey

    path = NodeFiles(folder=keys, node=node).folder / f"{node}.sign.key"
    key = SigningKey.generate()
    # The key first: of two commands for one node only one goes on to the trust file.
    key.save(path, new=True)
    try:
        add_trusted(
            trust or keys / "trust.json",
            node,
            key=key.public(),
            roles=tuple(role or ()),
            adapters=tuple(only or ()),
        )
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    done = {"node": node, "public": key.public(), "key": str(path)}
    echo(json.dumps(done) if as_json else f"{node} {key.public()}")


def init_ca(keys: Keys = DEFAULT_KEYS, as_json: AsJson = False) -> None:
    """Make a certificate authority for tests and closed fleets."""
    from memopt.federation.trust.authority import init_ca as make

    certificate = str(make(keys))
    echo(json.dumps({"certificate": certificate}) if as_json else f"wrote {certificate}")


def issue(
    node: Annotated[str, typer.Argument(help="The node's name.")],
    keys: Keys = DEFAULT_KEYS,
    out: Annotated[Path | None, typer.Option(help="Folder for the files [default: KEYS].")] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="Name or address it may serve on; repeatable.")
    ] = None,
    days: Annotated[float, typer.Option(help="Validity.")] = 90,
    as_json: AsJson = False,
) -> None:
    """Issue a node's certificate; with --host it may serve."""
    from memopt.federation.trust.authority import issue as make

    certificate, key = make(out or keys, node, ca=keys, hosts=host or (), days=days)
    done = {"node": node, "certificate": str(certificate), "key": str(key)}
    echo(json.dumps(done) if as_json else f"wrote {certificate} and {key}")
