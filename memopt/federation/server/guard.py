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
        self._frames, self._replies = _Frames(), _Frames()
        self._data_left = 0  # bytes of the current frame still to come that are not padding
        self._pad_unknown = False
        self._messages: dict[int, _Message] = {}

    def sent(self, data: bytes | memoryview) -> None:
        """Look at the server's next bytes, for the calls that they end."""
        frames = self._replies
        for part in frames.feed(memoryview(data)):
            if part is None and frames.closes:
                self._open.discard(frames.stream)

    def feed(self, data: bytes | memoryview) -> None:
        """Check the client's next bytes.

        Raises:
            SyncFailure: they may not be passed on; the connection must be closed.
        """
        view, at, frames = memoryview(data), 0, self._frames
        if self._preface:
            at = min(len(self._preface), len(view))
            if bytes(view[:at]) != self._preface[:at]:
                raise SyncFailure("malformed", "the connection does not speak HTTP/2")
            self._preface = self._preface[at:]
        for part in frames.feed(view[at:]):
            if part is None:
                self._begin()
            elif frames.kind == _DATA:
                self._payload(part)
            if frames.left == 0 and frames.closes:
                self._messages.pop(frames.stream, None)
                if frames.kind == _RST_STREAM:
                    self._open.discard(frames.stream)

    def _begin(self) -> None:
        frames = self._frames
        self._data_left = frames.left
        self._pad_unknown = frames.kind == _DATA and bool(frames.flags & _PADDED)
        if frames.kind == _HEADERS and frames.stream > self._newest:
            self._newest = frames.stream
            self._open.add(frames.stream)
            if len(self._open) > self._streams:
                raise SyncFailure("too-large", f"more than {self._streams} calls are open")

    def _payload(self, part: memoryview) -> None:
        if self._pad_unknown and len(part):
            self._data_left -= 1 + part[0]
            self._pad_unknown = False
            part = part[1:]
        part = part[: max(self._data_left, 0)]
        self._data_left -= len(part)
        message = self._messages.get(self._frames.stream)
        if message is None:
            message = self._messages[self._frames.stream] = _Message(self._limit)
        before = message.claimed
        message.feed(part)
        claimed = sum(m.claimed for m in self._messages.values()) if message.claimed > before else 0
        if claimed > _PARTIAL_SHARE * self._limit or len(self._messages) > self._streams:
            raise SyncFailure("too-large", "too much is in messages that are half sent")
        if message.idle:
            del self._messages[self._frames.stream]


class _Frames:
    """Cuts one direction of an HTTP/2 connection into its frames (RFC 9113, section 4.1).

    Attributes:
        kind, flags, stream: of the current frame.
        left: bytes of it still to come.
    """

    def __init__(self) -> None:
        self._head = bytearray()
        self.kind = self.flags = self.stream = self.left = 0

    @property
    def closes(self) -> bool:
        """Whether the frame is the last one of its stream in this direction, or of both."""
        ends = self.kind in (_DATA, _HEADERS) and bool(self.flags & _END_STREAM)
        return ends or self.kind == _RST_STREAM

    def feed(self, view: memoryview) -> Iterator[memoryview | None]:
        """Yield None when a frame's head is there, then each part of what is in the frame."""
        at, end = 0, len(view)
        while at < end:
            part: memoryview | None = None
            if self.left:
                part = view[at : at + self.left]
                at += len(part)
                self.left -= len(part)
            else:
                missing = view[at : at + 9 - len(self._head)]
                self._head += missing
                at += len(missing)
                if len(self._head) < 9:
                    return
                head, self._head = self._head, bytearray()
                self.left = int.from_bytes(head[:3], "big")
                self.kind, self.flags = head[3], head[4]
                self.stream = int.from_bytes(head[5:9], "big") & 0x7FFFFFFF
            yield part


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
