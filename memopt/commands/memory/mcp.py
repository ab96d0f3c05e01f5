"""``memopt memory mcp``: a store as an MCP server, for agents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import say
from memopt.commands.memory.options import Key, Redaction, Store
from memopt.commands.memory.shared import bundles
from memopt.errors import ConfigurationError


def mcp(
    store: Store,
    model: Annotated[
        str | None,
        typer.Option("--model", "--bundle", help="Bundle that encodes texts; makes a new store."),
    ] = None,
    http: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of 127.0.0.1; 0 takes a free one. Else stdio."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys, one a line; --http clients send one as a bearer.")
    ] = None,
    llm: Annotated[
        str, typer.Option(help="Who writes the summaries of consolidate, as of that command.")
    ] = "extractive",
    key: Key = None,
    redaction: Redaction = "auto",
) -> None:
    """Serve a store to agents: remember, recall, show, forget, consolidate, stats.

    On standard input and output, as an agent's settings start it, or over HTTP at /mcp. Other
    processes may use the store meanwhile.
    """
    from memopt.extras import require
    from memopt.memory.session import open_memory

    # Before the store is opened and made: what is missing is said at once.
    require("mcp", extra="mcp", why="serve a memory to agents")
    require("msgspec", extra="mcp", why="read requests")
    from memopt.serve.guard import Admission, read_keys
    from memopt.serve.mcp import serve_http, serve_stdio
    from memopt.serve.memories import Memories
    from memopt.serve.server import bound

    if (http is None) != (api_key_file is None):
        raise ConfigurationError(
            "--http and --api-key-file go together: every process of this machine reaches a port",
            fix="openssl rand -hex 24 > keys; chmod 600 keys; give both",
        )
    keys = read_keys(api_key_file) if api_key_file else {}
    sock = None if http is None else bound("127.0.0.1", http)
    models = bundles(text=model)
    with open_memory(
        store, create=model is not None, models=models, key=key, redaction=redaction
    ) as session:
        memories = Memories(session, llm=llm)
        if sock is None:
            serve_stdio(memories)
            return
        say(f"memopt serves {store} on http://127.0.0.1:{sock.getsockname()[1]}/mcp")
        serve_http(memories, sock, Admission(keys=keys))
