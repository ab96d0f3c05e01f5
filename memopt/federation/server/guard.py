"""Looks at the gRPC stream before gRPC does, so that no claim of a peer is allocated for.

Flight's server takes messages of any size and inflates compressed ones, and pyarrow has no
setting for it, nor for how many calls run at once, each of which holds a thread. This reads the
HTTP/2 frames on their way through (RFC 9113) and stops a connection that sends a message over the
limit, holds too much in messages half sent, has too many calls open, sends a compressed message
(gRPC flag 1: a zip bomb) or an Arrow record batch body (FlightData field 1000), which this service
never takes. It changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from memopt.federation.failures import SyncFailure

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM = 0x0, 0x1, 0x3
_END_STREAM, _PADDED = 0x1, 0x8
# FlightData.data_body in Flight.proto
_DATA_BODY = 1000
# Messages half received may announce this many times the limit of one: a client has one or two.
_PARTIAL_SHARE = 2
# Bytes of a message outside its fields' contents. Flight's messages have at most five fields with a
# few bytes of tag and length each; these bytes are read one by one, so they must stay few.
_MAX_FRAMING = 256


class StreamGuard:
    """Checks one HTTP/2 connection; :meth:`feed` and :meth:`sent` raise on a violation.

    Args:
        message_bytes: the largest gRPC message.
        streams: calls that may be open at once.

    >>> guard = StreamGuard(1000, 4)
    >>> guard.feed(b"GET / HTTP/1.1")
    Traceback (most recent call last):
    ...
    memopt.federation.failures.SyncFailure: the connection does not speak HTTP/2
    """

    def __init__(self, message_bytes: int, streams: int) -> None:
        self._limit = message_bytes
        self._streams = streams
        self._open: set[int] = set()
        self._newest = 0
        self._preface = _PREFACE
        self._replies = _Heads()
        self._head = bytearray()
        self._left = 0  # bytes of the current frame still to come
        self._data_left = 0  # of those, bytes that are not padding
        self._pad_unknown = False
        self._type = self._flags = self._stream = 0
        self._messages: dict[int, _Message] = {}

    def sent(self, data: bytes | memoryview) -> None:
        """Look at the server's next bytes, for the calls that they end."""
        for kind, flags, stream in self._replies.feed(data):
            if kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
                self._open.discard(stream)

    def feed(self, data: bytes | memoryview) -> None:
        """Check the client's next bytes.

        Raises:
            SyncFailure: they may not be passed on; the connection must be closed.
        """
        view, at, end = memoryview(data), 0, len(data)
        if self._preface:
            at = min(len(self._preface), end)
            if bytes(view[:at]) != self._preface[:at]:
                raise SyncFailure("malformed", "the connection does not speak HTTP/2")
            self._preface = self._preface[at:]
        while at < end:
            if self._left == 0:
                take = min(9 - len(self._head), end - at)
                self._head += view[at : at + take]
                at += take
                if len(self._head) < 9:
                    return
                self._begin()
                continue
            take = min(self._left, end - at)
            if self._type == _DATA:
                self._payload(view[at : at + take])
            at += take
            self._left -= take
            if self._left == 0:
                self._end()

    def _begin(self) -> None:
        head = self._head
        self._left = self._data_left = int.from_bytes(head[:3], "big")
        self._type, self._flags = head[3], head[4]
        self._stream = int.from_bytes(head[5:9], "big") & 0x7FFFFFFF
        self._pad_unknown = self._type == _DATA and bool(self._flags & _PADDED)
        self._head = bytearray()
        if self._type == _HEADERS and self._stream > self._newest:
            self._newest = self._stream
            self._open.add(self._stream)
            if len(self._open) > self._streams:
                raise SyncFailure("too-large", f"more than {self._streams} calls are open")
        if self._left == 0:
            self._end()

    def _payload(self, part: memoryview) -> None:
        if self._pad_unknown and len(part):
            self._data_left -= 1 + part[0]
            self._pad_unknown = False
            part = part[1:]
        part = part[: max(self._data_left, 0)]
        self._data_left -= len(part)
        message = self._messages.get(self._stream)
        if message is None:
            message = self._messages[self._stream] = _Message(self._limit)
        before = message.claimed
        message.feed(part)
        claimed = sum(m.claimed for m in self._messages.values()) if message.claimed > before else 0
        if claimed > _PARTIAL_SHARE * self._limit or len(self._messages) > self._streams:
            raise SyncFailure("too-large", "too much is in messages that are half sent")
        if message.idle:
            del self._messages[self._stream]

    def _end(self) -> None:
        closing = self._type in (_DATA, _HEADERS) and self._flags & _END_STREAM
        if closing or self._type == _RST_STREAM:
            self._messages.pop(self._stream, None)
        if self._type == _RST_STREAM:
            self._open.discard(self._stream)


class _Heads:
    """Finds the frame heads in one direction of an HTTP/2 connection."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
        """Yield type, flags and stream of each frame that begins in the next bytes."""
        view, at, end = memoryview(data), 0, len(data)
        while at < end:
            if self._left:
                take = min(self._left, end - at)
                self._left -= take
            else:
                take = min(9 - len(self._head), end - at)
                self._head += view[at : at + take]
                if len(self._head) == 9:
                    head, self._head = self._head, bytearray()
                    self._left = int.from_bytes(head[:3], "big")
                    yield head[3], head[4], int.from_bytes(head[5:9], "big") & 0x7FFFFFFF
            at += take


class _Message:
    """The message being received on one stream: length prefix, then protobuf fields."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._prefix = bytearray()
        self._left = 0  # bytes of the message still to come
        self._skip = 0  # bytes of the current field still to come
        self._varint = self._shift = 0
        self._tag = -1  # tag whose length or value is being read; -1 while reading a tag
        self._framing = 0  # bytes of the message that were tags and lengths
        self.claimed = 0  # bytes of the message under way, as announced

    @property
    def idle(self) -> bool:
        """Whether no message is under way."""
        return self._left == 0 and not self._prefix

    def feed(self, view: memoryview) -> None:
        at, end = 0, len(view)
        while at < end:
            if self._left == 0:
                self.claimed = 0
                take = min(5 - len(self._prefix), end - at)
                self._prefix += view[at : at + take]
                at += take
                if len(self._prefix) == 5:
                    self._start()
            elif self._skip:
                take = min(self._skip, end - at)
                at += take
                self._skip -= take
                self._left -= take
            else:
                self._byte(view[at])
                at += 1
                self._left -= 1
            if self._skip > self._left:
                raise SyncFailure("malformed", "a field is longer than its message")

    def _start(self) -> None:
        if self._prefix[0]:
            raise SyncFailure("malformed", "compressed gRPC messages are not taken")
        self._left = self.claimed = int.from_bytes(self._prefix[1:], "big")
        self._prefix = bytearray()
        self._varint = self._shift = self._skip = self._framing = 0
        self._tag = -1
        if self._left > self._limit:
            raise SyncFailure(
                "too-large", f"message of {self._left} bytes, the limit is {self._limit}"
            )

    def _byte(self, value: int) -> None:
        self._framing += 1
        if self._framing > _MAX_FRAMING:
            raise SyncFailure("malformed", "a message has too many fields")
        self._varint |= (value & 0x7F) << self._shift
        self._shift += 7
        if value & 0x80:
            if self._shift > 63:
                raise SyncFailure("malformed", "a protobuf number is too long")
            return
        number, self._varint, self._shift = self._varint, 0, 0
        if self._tag >= 0:
            # The length of a bytes field, or a plain number that needs no skipping.
            self._skip = number if self._tag & 7 == 2 else 0
            if self._tag >> 3 == _DATA_BODY and self._skip:
                raise SyncFailure("malformed", "record batches are not taken")
            self._tag = -1
            return
        wire = number & 7
        if wire in (0, 2):
            self._tag = number
        elif wire in (1, 5):
            self._skip = 8 if wire == 1 else 4
        else:
            raise SyncFailure("malformed", "not a protobuf message")
