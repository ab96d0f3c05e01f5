"""``memopt sync serve``: keep the versions, until interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo
from memopt.commands.sync.options import (
    DEFAULT_KEYS,
    Dictionary,
    Insecure,
    KeyFile,
    Keys,
    Node,
    Plain,
)


def serve(
    store: Annotated[Path, typer.Argument(help="Folder of the versions; made when absent.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8815,
    node: Node = "server",
    keys: Keys = DEFAULT_KEYS,
    plain: Plain = False,
    insecure: Insecure = False,
    idle: Annotated[float, typer.Option(help="Close silent connections after seconds.")] = 60.0,
    keep: Annotated[int, typer.Option(help="Versions kept per adapter.")] = 200,
    dictionary: Dictionary = None,
    key_file: KeyFile = None,
) -> None:
    """Serve a store of versions until interrupted."""
    import hashlib
    import signal
    import threading

    from memopt.federation.client.session import NodeFiles, read_dictionary, vault
    from memopt.federation.server.server import SyncServer

    files = NodeFiles(folder=keys, node=node)
    data = read_dictionary(dictionary)
    signer = files.folder / f"{node}.sign.key"
    stop = threading.Event()
    with SyncServer(
        store,
        trust=files.trust(),
        host=host,
        port=port,
        tls=files.tls(plain=plain),
        insecure=insecure,
        idle_seconds=idle,
        keep=keep,
        dictionaries={hashlib.sha256(data).hexdigest(): data} if data else None,
        key=files.signing_key() if signer.is_file() else None,
        node=node,
        vault=vault(key_file),
    ) as server:
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        how = "plain" if plain else "TLS 1.3, client certificates"
        echo(f"serving {store} on {host}:{server.port} ({how})")
        while not stop.wait(3600):
            pass
