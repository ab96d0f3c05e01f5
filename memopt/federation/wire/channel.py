"""One side of an exchange: messages out, messages in, and long files in windows of chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import pyarrow as pa

from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits, check_count
from memopt.federation.wire import protocol


class Channel:
    """Messages over the two ends of a Flight exchange, as the server holds them.

    Args:
        reader, writer: Flight's.
        limits: what is believed of the peer.
    """

    # What a message calls the other side, and what a record batch of its makes of the exchange.
    peer, batch_code = "peer", "malformed"

    def __init__(self, reader: Any, writer: Any, limits: Limits) -> None:
        self._reader = reader
        self._writer = writer
        self._limits = limits

    def send(self, kind: int, fields: Mapping[str, Any] | None = None, body: Any = b"") -> None:
        """Write one message; blocks while the peer does not read (backpressure)."""
        self._writer.write_metadata(pa.py_buffer(protocol.encode(kind, dict(fields or {}), body)))

    def receive(self, *kinds: int) -> protocol.Message:
        """Read one message of these kinds; an ERROR message is raised.

        Raises:
            SyncFailure: the peer's refusal, a message out of place, or the end of the exchange.
        """
        try:
            chunk = self._reader.read_chunk()
        except StopIteration:
            raise SyncFailure("unavailable", f"the {self.peer} ended the exchange") from None
        if chunk.data is not None or chunk.app_metadata is None:
            raise SyncFailure(self.batch_code, f"the {self.peer} sent a record batch")
        frame = protocol.decode(memoryview(chunk.app_metadata), self._limits)
        if frame.kind == protocol.ERROR:
            raise protocol.decode_error(frame.fields)
        if frame.kind not in kinds:
            raise SyncFailure("out-of-order", f"message kind {frame.kind} is not expected here")
        return frame

    def drain(self, most: int) -> None:
        """Read and drop up to ``most`` bytes of what the peer still sends."""
        try:
            while most > 0:
                most -= len(self._reader.read_chunk().app_metadata or b"") + 1
        except StopIteration:
            return


class Sink(Protocol):
    """A file that grows by pieces."""

    @property
    def size(self) -> int:
        """Bytes so far."""

    def append(self, data: memoryview) -> None:
        """Write the next piece."""


def send_chunks(
    channel: Channel,
    parts: Iterator[bytes | memoryview],
    offset: int,
    total: int,
    reached: Callable[[int], None] = lambda there: None,
) -> None:
    """Send ``parts``, which are the bytes from ``offset`` to ``total``, and wait for the last ACK.

    A window of chunks is on the way: writing all before reading blocks past 16 MiB.

    Args:
        reached: called with the bytes that the peer has, after each of its acknowledgements.

    Raises:
        SyncFailure: the parts are not of that length, or an acknowledgement does not move on.
    """
    sent = acknowledged = offset
    while acknowledged < total:
        while sent < total and sent - acknowledged < protocol.WINDOW_BYTES:
            part = next(parts, b"")
            if not part or sent + len(part) > total:
                raise SyncFailure("storage", "a payload changed its length while it was sent")
            channel.send(protocol.CHUNK, {"offset": sent}, part)
            sent += len(part)
        before = acknowledged
        frame = channel.receive(protocol.ACK)
        acknowledged = check_count("offset", frame.fields.get("offset"), sent)
        if acknowledged <= before:
            raise SyncFailure("out-of-order", "an acknowledgement does not move on")
        reached(acknowledged)


def receive_chunks(
    channel: Channel, sink: Sink, total: int, reached: Callable[[int], None] = lambda there: None
) -> None:
    """Append chunks to ``sink`` until it has ``total`` bytes, each acknowledged when it is there.

    Raises:
        SyncFailure: a chunk is not the next one, or too long.
    """
    while (size := sink.size) < total:
        frame = channel.receive(protocol.CHUNK)
        offset = check_count("offset", frame.fields.get("offset"), total)
        if offset != size:
            raise SyncFailure("out-of-order", f"chunk at {offset}, expected {size}")
        if not 0 < len(frame.body) <= min(2 * protocol.CHUNK_BYTES, total - size):
            raise SyncFailure("too-large", f"chunk of {len(frame.body)} bytes does not fit")
        sink.append(frame.body)
        reached(sink.size)
        channel.send(protocol.ACK, {"offset": sink.size})
