"""The process: uvicorn with the application, its signals, its log."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from pathlib import Path
from typing import Any

from memopt.errors import ConfigurationError, DeviceError
from memopt.extras import require
from memopt.serve.app import make_app
from memopt.serve.guard import Admission
from memopt.serve.hosting import Host

log = logging.getLogger("memopt.serve")
# Requests in work get so long to end when the server stops.
GRACE_SECONDS = 30


def loopback(address: str) -> bool:
    """Say whether an address is this machine's alone.

    >>> loopback("127.0.0.1"), loopback("localhost"), loopback("0.0.0.0")
    (True, True, False)
    """
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def serve(
    host: Host,
    *,
    address: str = "127.0.0.1",
    port: int = 8080,
    access: Admission,
    origins: tuple[str, ...] = (),
    certificate: Path | None = None,
    private_key: Path | None = None,
    lazy: bool = False,
    memories: Any = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; requests in work are answered first. SIGHUP reloads bundles.

    Raises:
        ConfigurationError: one of certificate and key is missing, or cannot be used.
        DeviceError: the address is taken.
        MissingExtra: uvicorn is not installed.
    """
    uvicorn = require("uvicorn", extra="serve", why="serve")
    if (certificate is None) != (private_key is None):
        raise ConfigurationError("TLS needs --cert and --key", fix="give both")
    for path in (certificate, private_key):
        if path is not None and not path.is_file():
            raise ConfigurationError(f"no file {str(path)!r}", fix="check the path")
    app = make_app(host, access=access, origins=origins, lazy=lazy, memories=memories)
    config = uvicorn.Config(
        app,
        host=address,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        ssl_certfile=certificate,
        ssl_keyfile=private_key,
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=30,
        backlog=4096,
    )
    try:
        config.load()
    except OSError as error:  # ssl's errors are such
        raise ConfigurationError(
            f"TLS cannot be set up: {error}", fix="check both files"
        ) from error
    sock = bound(address, port)
    server = uvicorn.Server(config)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.create_task(_reload(host)))
        await server.serve(sockets=[sock])

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())
    if not server.started:
        raise DeviceError("the server did not start", fix="the log above says why")


async def _reload(host: Host) -> None:
    for model in host.models.values():
        if model.opened is not None:
            try:
                await model.reload()
            except Exception as error:  # noqa: BLE001 - the old one goes on
                log.error("%s stays as it was: %s", model.name, error)


def bound(address: str, port: int) -> Any:
    """Return a socket that is bound to an address; port 0 takes a free one.

    Raises:
        DeviceError: the address is taken.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address, port))
    except OSError as error:
        sock.close()
        raise DeviceError(
            f"cannot listen on {address}:{port}: {error.strerror}", fix="choose another --port"
        ) from error
    return sock
