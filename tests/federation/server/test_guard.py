"""The gRPC guard on raw HTTP/2 bytes, and what importing federation brings in."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.federation.failures import SyncFailure
from memopt.federation.server.guard import StreamGuard

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, payload: bytes, *, flags: int = 0, stream: int = 1) -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + payload
    )


def message(data: bytes, *, flag: int = 0) -> bytes:
    return bytes([flag]) + struct.pack(">I", len(data)) + data


# FlightData: app_metadata (3) of 300 bytes, then data_body (1000) of none.
# A message of 900 bytes of which the first 10 are there.
HALF = message(b"\x1a\x81\x07" + bytes(897))[:15]
HONEST = message(b"\x1a\xac\x02" + bytes(300) + b"\xc2\x3e\x00")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 400), max_size=30), st.booleans())
def test_honest_messages_pass_however_they_are_cut(cuts: list[int], padded: bool) -> None:
    """Any split into HTTP/2 frames and socket reads passes, padding included."""
    data, frames = HONEST * 3, PREFACE + frame(4, b"") + frame(1, b"headers")
    for cut in [*cuts, len(data)]:
        part, data = data[:cut], data[cut:]
        frames += frame(0, b"\2" + part + b"\0\0", flags=8) if padded else frame(0, part)
    guard, at = StreamGuard(1000, 32), 0
    for cut in [*cuts, len(frames)]:
        guard.feed(frames[at : at + cut])
        at += cut


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "HTTP/2"),
        (PREFACE + frame(0, message(b"", flag=1)), "compressed"),
        (PREFACE + frame(0, b"\0" + struct.pack(">I", 1001)), "limit is 1000"),
        (PREFACE + frame(0, message(b"\xc2\x3e\x04body")), "record batches"),
        (PREFACE + frame(0, message(b"\x1a\xff\xff\xff\x7f")), "longer than its message"),
        (PREFACE + frame(0, message(b"\xff" * 20)), "too long"),
        (PREFACE + frame(0, message(b"\x0b")), "not a protobuf"),
        (PREFACE + b"".join(frame(0, b"\0", stream=2 * n + 1) for n in range(40)), "half sent"),
        (PREFACE + b"".join(frame(0, HALF, stream=2 * n + 1) for n in range(3)), "half sent"),
        (PREFACE + b"".join(frame(1, b"", stream=2 * n + 1) for n in range(33)), "calls are open"),
        (PREFACE + frame(0, message(b"\x08\x01" * 200)), "too many fields"),
    ],
)
def test_what_must_not_reach_grpc_is_stopped(data: bytes, words: str) -> None:
    """Bombs, giants, batches and nonsense are stopped, byte by byte or at once."""
    with pytest.raises(SyncFailure, match=words):
        StreamGuard(1000, 32).feed(data)
    guard = StreamGuard(1000, 32)
    with pytest.raises(SyncFailure, match=words):  # noqa: PT012
        for byte in data:
            guard.feed(bytes([byte]))


@pytest.mark.parametrize("who", ["server", "client"])
def test_calls_that_ended_make_room(who: str) -> None:
    """Any number of calls one after another, each ended by a trailer or by a reset, passes."""
    guard = StreamGuard(1000, 2)
    guard.feed(PREFACE)
    for number in range(100):
        stream = 2 * number + 1
        guard.feed(frame(1, b"headers", stream=stream) + frame(0, HONEST, stream=stream))
        if who == "client":
            guard.feed(frame(3, bytes(4), stream=stream))
            continue
        ending = frame(0, b"answer", stream=stream) + frame(1, b"trailer", flags=1, stream=stream)
        for byte in ending:
            guard.sent(bytes([byte]))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000))
def test_the_guard_never_fails_otherwise(data: bytes) -> None:
    """Random frames give a SyncFailure or nothing."""
    guard = StreamGuard(1000, 32)
    guard.feed(PREFACE)
    try:
        guard.feed(data)
    except SyncFailure:
        return


def test_federation_runs_without_torch() -> None:
    """No federation module brings torch, transformers or peft in."""
    code = (
        "import sys, pkgutil, importlib, memopt.federation as f\n"
        "for m in pkgutil.walk_packages(f.__path__, f'{f.__name__}.'):\n"
        "    importlib.import_module(m.name)\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
