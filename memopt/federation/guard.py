"""Looks at the gRPC stream before gRPC does, so that no claim of a peer is allocated for.

Flight's server takes messages of any size and inflates compressed ones, and pyarrow has no
setting for it. This reads the HTTP/2 frames on their way in (RFC 9113) and stops a connection
that sends a message over the limit, a compressed message (gRPC flag 1: a zip bomb) or an Arrow
record batch body (FlightData field 1000), which this service never takes. It changes nothing.
"""

from __future__ import annotations

from memopt.federation.failures import SyncFailure

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM = 0x0, 0x1, 0x3
_END_STREAM, _PADDED = 0x1, 0x8
# FlightData.data_body in Flight.proto
_DATA_BODY = 1000
# Messages half received at one time; gRPC clients have a handful.
_MAX_PARTIAL = 1024


class StreamGuard:
    """Checks the client's half of one HTTP/2 connection; :meth:`feed` raises on a violation."""

    def __init__(self, message_bytes: int) -> None:
        self._limit = message_bytes
        self._preface = _PREFACE
        self._head = bytearray()
        self._left = 0  # bytes of the current frame still to come
        self._data_left = 0  # of those, bytes that are not padding
        self._pad_unknown = False
        self._type = self._flags = self._stream = 0
        self._messages: dict[int, _Message] = {}

    def feed(self, data: bytes) -> None:
        """Check the next bytes of the connection.

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
            if len(self._messages) > _MAX_PARTIAL:
                raise SyncFailure("too-large", "too many messages are half sent")
        message.feed(part)
        if message.idle:
            del self._messages[self._stream]

    def _end(self) -> None:
        closing = self._type in (_DATA, _HEADERS) and self._flags & _END_STREAM
        if closing or self._type == _RST_STREAM:
            self._messages.pop(self._stream, None)


class _Message:
    """The message being received on one stream: length prefix, then protobuf fields."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._prefix = bytearray()
        self._left = 0  # bytes of the message still to come
        self._skip = 0  # bytes of the current field still to come
        self._varint = self._shift = 0
        self._tag = -1  # tag whose length or value is being read; -1 while reading a tag

    @property
    def idle(self) -> bool:
        """Whether no message is under way."""
        return self._left == 0 and not self._prefix

    def feed(self, view: memoryview) -> None:
        at, end = 0, len(view)
        while at < end:
            if self._left == 0:
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
        self._left = int.from_bytes(self._prefix[1:], "big")
        self._prefix = bytearray()
        self._varint = self._shift = self._skip = 0
        self._tag = -1
        if self._left > self._limit:
            raise SyncFailure(
                "too-large", f"message of {self._left} bytes, the limit is {self._limit}"
            )

    def _byte(self, value: int) -> None:
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
