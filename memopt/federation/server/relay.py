"""Bytes from a client to the Flight server and back, each looked at by the guard on its way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import cast

from memopt.federation.failures import SyncFailure
from memopt.federation.server.guard import StreamGuard

# One read takes what the kernel has, up to this: a chunk on the wire is eight of them.
_READ = 256 * 1024
# What the server has sent last (a status, GOAWAY) still goes out after one end is closed.
_LAST_WORDS_SECONDS = 1.0
_LOOK_SECONDS = 1.0


class Relay:
    """One client's connection and the inner one that belongs to it.

    Attributes:
        client, server: the two ends, to be given to the event loop as protocols.
        refused: the guard has seen what may not pass; nothing passes any more.
    """

    def __init__(self, guard: StreamGuard) -> None:
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = loop.create_future()
        self._heard = time.monotonic()
        self.refused = False
        self.client = _End(self, guard.feed)
        self.server = _End(self, guard.sent)
        self.client.other, self.server.other = self.server, self.client

    async def run(self, judge: Callable[[float, float], None]) -> None:
        """Pass bytes on until either end is closed.

        Args:
            judge: called about once a second with the seconds since the client last sent and
                since the relay began; raises to end it.

        Raises:
            SyncFailure: the guard or the judge found that the connection must end.
            OSError: an end broke.
        """
        begun = self._heard = time.monotonic()
        self.server.resume()
        self.client.resume()
        while not self._ended.done():
            now = time.monotonic()
            judge(now - self._heard, now - begun)
            await asyncio.wait({self._ended}, timeout=_LOOK_SECONDS)
        self._ended.result()
        await asyncio.wait({self.server.closed}, timeout=_LAST_WORDS_SECONDS)

    def heard(self) -> None:
        """Note that the client sent something."""
        self._heard = time.monotonic()

    def end(self, error: BaseException | None = None) -> None:
        """End the relay; what is still to be written to the client may go out."""
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    def abort(self) -> None:
        """Drop both ends at once: a peer that does not read must not keep a socket."""
        self.end()
        # Read, so that an error nobody waited for is not reported as forgotten.
        self._ended.exception()
        for end in (self.server, self.client):
            if end.transport is not None:
                end.transport.abort()


class _End(asyncio.BufferedProtocol):
    """One end of a relay: what it receives is checked and written to the other one."""

    other: _End

    def __init__(self, relay: Relay, check: Callable[[memoryview], None]) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._relay = relay
        self._check = check
        self._buffer = memoryview(bytearray(_READ))

    def resume(self) -> None:
        """Begin, or go on, reading."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        # Nothing is read before the other end is there and the caller is known.
        self.transport.pause_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = self._buffer[:nbytes]
        other = self.other.transport
        if self is self._relay.client:
            self._relay.heard()
        if self._relay.refused:
            return
        try:
            self._check(data)
        except SyncFailure as error:
            self._relay.refused = True
            self._relay.end(error)
            return
        if other is not None:
            # A copy: TLS may keep what it was given, and the buffer is used again.
            other.write(bytes(data))

    def eof_received(self) -> bool:
        other = self.other.transport
        if other is not None and other.can_write_eof():
            other.write_eof()
        self._relay.end()
        # Half closed, where the transport can be: the other direction may have last words.
        return self.transport is not None and self.transport.can_write_eof()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)
        self._relay.end(error if isinstance(error, OSError) else None)

    def pause_writing(self) -> None:
        # This end takes no more for now: the other one is not read meanwhile (backpressure).
        if self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        self.other.resume()
