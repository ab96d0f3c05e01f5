"""``memopt serve``: bundles behind HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from memopt.serve.memories import Memories


def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(help="Bundle folders or names under models/; NAME=PATH gives a name."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    device: Annotated[str, typer.Option(help="Device that models are opened on.")] = "auto",
    memory_limit_mb: Annotated[
        float | None, typer.Option(help="Resident memory; models nobody uses are closed first.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed at once.")] = 8192,
    queue_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that may wait; more is told 429.")
    ] = 1_000_000,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request may take.")] = 60.0,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Size of a request.")] = 32,
    api_key_file: Annotated[
        Path | None, typer.Option(help="Keys, one a line; clients send one as a bearer token.")
    ] = None,
    rate: Annotated[
        float, typer.Option(min=0, help="Requests a second for each key or address; 0: any.")
    ] = 0.0,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin of a page that may ask; repeatable.")
    ] = None,
    cert: Annotated[Path | None, typer.Option(help="TLS certificate, PEM.")] = None,
    key: Annotated[Path | None, typer.Option(help="TLS key, PEM.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="A memory store behind /v1/memories; needs --api-key-file.")
    ] = None,
    memory_key: Annotated[
        Path | None, typer.Option(help="File of its key [default: variable MEMOPT_MEMORY_KEY].")
    ] = None,
    lazy: Annotated[bool, typer.Option("--lazy", help="Open models when first asked.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line a request.")] = False,
) -> None:
    """Serve bundles by OpenAI's, Cohere's and TEI's routes, with a page at /.

    SIGTERM answers what is in work, then stops; SIGHUP opens the bundles anew.
    """
    import logging
    import sys

    from memopt.commands.console import stderr
    from memopt.errors import ConfigurationError
    from memopt.serve.guard import Admission, read_keys
    from memopt.serve.hosting import Capacity, Host
    from memopt.serve.server import loopback
    from memopt.serve.server import serve as run
    from memopt.weights.convert import resolve

    models: dict[str, Path] = {}
    for text in bundles:
        name, equals, where = text.partition("=")
        path = resolve(where if equals else text).path
        name = name if equals else path.name
        if name in models:
            raise ConfigurationError(f"two bundles are called {name!r}", fix="use NAME=PATH")
        models[name] = path
    keys = read_keys(api_key_file) if api_key_file else {}
    if not loopback(host) and not keys:
        raise ConfigurationError(
            f"{host} can be reached from other machines, and there are no keys",
            fix="give --api-key-file, or --host 127.0.0.1 behind a proxy that asks for one",
        )
    if memory is not None and not keys:
        raise ConfigurationError(
            "every process of this machine reaches the port, and so could read the memory",
            fix="give --api-key-file",
        )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    own = logging.getLogger("memopt.serve")
    own.addHandler(handler)
    own.propagate = False
    own.setLevel(logging.WARNING if quiet else logging.INFO)
    limits = Capacity(
        batch_tokens=batch_tokens,
        queue_tokens=queue_tokens,
        memory_limit_mb=memory_limit_mb,
        seconds=timeout,
        body_bytes=max_body_mb << 20,
    )
    scheme = "https" if cert else "http"
    stderr().print(f"memopt serves {', '.join(models)} on {scheme}://{host}:{port}/")
    try:
        with _memories(memory, memory_key) as memories:
            run(
                Host(models, limits, {"device": device}),
                address=host,
                port=port,
                access=Admission(keys=keys, rate=rate, loopback=loopback(host)),
                origins=tuple(cors_origin or ()),
                certificate=cert,
                private_key=key,
                lazy=lazy,
                memories=memories,
            )
    finally:
        own.removeHandler(handler)


@contextmanager
def _memories(store: str | None, key: Path | None) -> Iterator[Memories | None]:
    """Open a memory store with the privacy rules of ``memopt memory``; nothing where it is None."""
    if store is None:
        yield None
        return
    from memopt.memory.session import open_memory
    from memopt.serve.memories import Memories

    with open_memory(store, create=False, key=key) as session:
        yield Memories(session)
