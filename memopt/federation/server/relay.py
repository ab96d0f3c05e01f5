"""Bytes from a client to the Flight server and back, each looked at by the guard on its way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeAlias

from memopt.federation.server.guard import StreamGuard

End: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
# One read takes what has come, up to this: a chunk on the wire is eight of them. An end with twice
# as much unread is not read from (backpressure).
READ_BYTES = 256 * 1024
# What the server has sent last (a status, GOAWAY) still goes out after one end is closed.
_LAST_WORDS_SECONDS = 1.0
_LOOK_SECONDS = 1.0


async def relay(
    client: End, server: End, guard: StreamGuard, judge: Callable[[float, float], None]
) -> None:
    """Pass bytes on until either end is closed.

    Args:
        judge: called about once a second with the seconds since the client last sent and since the
            relay began; raises to end it.

    Raises:
        SyncFailure: the guard or the judge found that the connection must end.
        OSError: an end broke.
    """
    begun = heard = time.monotonic()

    def hear(data: bytes) -> None:
        nonlocal heard
        heard = time.monotonic()
        guard.feed(data)

    up = asyncio.create_task(_pass(client[0], server[1], hear))
    down = asyncio.create_task(_pass(server[0], client[1], guard.sent))
    try:
        done: set[asyncio.Task[None]] = set()
        while not done:
            now = time.monotonic()
            judge(now - heard, now - begun)
            done, _ = await asyncio.wait(
                {up, down}, timeout=_LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
        for each in done:
            each.result()
        await asyncio.wait({down}, timeout=_LAST_WORDS_SECONDS)
    finally:
        up.cancel()
        down.cancel()
        # Waited for, so that an error of the other one is not reported as forgotten.
        await asyncio.gather(up, down, return_exceptions=True)


async def _pass(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, check: Callable[[bytes], None]
) -> None:
    """Check what ``source`` gives and write it to ``sink``, which may take its time."""
    while data := await source.read(READ_BYTES):
        check(data)
        sink.write(data)
        await sink.drain()
    if sink.can_write_eof():
        sink.write_eof()
