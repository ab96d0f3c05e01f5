"""Properties of deltas, payloads and frames over arbitrary weights and arbitrary bytes."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.federation.delta.arrays import DTYPES, FLOATS, weights_hash
from memopt.federation.delta.compute import apply_delta, compute_delta
from memopt.federation.delta.payload import Compressor, Table, TensorRow, pack, read_table, unpack
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import Limits, canonical_json
from memopt.federation.wire.protocol import CHUNK, KINDS, decode, encode

INFINITE = float("inf")
SPECIAL = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-40, 3.4e38, -3.4e38, 1e-8])
FATES = ("keep", "change", "change", "reshape", "retype", "add", "drop")
shapes = st.sampled_from([(), (0,), (1,), (3,), (7, 5), (16, 33), (2, 3, 4), (600,)])


def tensor(
    seed: int, dtype: str, shape: tuple[int, ...], scale: float, special: bool
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kind = DTYPES[dtype]
    if dtype not in FLOATS:
        return rng.integers(0, 2, size=shape).astype(kind)
    with np.errstate(all="ignore"):
        values = rng.normal(size=shape) * scale
        if special:
            where = rng.random(shape) < 0.2
            values = np.where(where, rng.choice(SPECIAL, size=shape), values)
        return np.asarray(values).astype(kind)


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one.astype("f8"), other.astype("f8"), equal_nan=True)


@st.composite
def pairs(draw: st.DrawFn, *, special: bool = True, dtypes: tuple[str, ...] = tuple(DTYPES)):
    """Two sets of weights: some tensors kept, changed, reshaped, retyped, added, removed."""
    base, new = {}, {}
    for name in draw(st.lists(st.sampled_from("abcd"), unique=True, min_size=1)):
        seed, scale = draw(st.integers(0, 10**6)), draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
        dtype, shape = draw(st.sampled_from(dtypes)), draw(shapes)
        odd = special and draw(st.booleans())
        array = tensor(seed, dtype, shape, scale, odd)
        fate = draw(
            st.sampled_from(["keep", "change", "change", "reshape", "retype", "add", "drop"])
        )
        if fate != "add":
            base[name] = array
        if fate == "drop":
            continue
        if fate == "reshape":
            shape = (*shape, 2)
        if fate == "retype":
            dtype = draw(st.sampled_from(dtypes))
        change = fate != "keep"
        new[name] = tensor(seed + change, dtype, shape, scale, odd) if change else array
    if not new:
        new["z"] = np.ones(3, "float32")
    return base, new


@settings(max_examples=150, deadline=None)
@given(pairs(), st.integers(-5, 12))
def test_lossless_delta_then_apply_gives_the_new_bits(both, level: int) -> None:
    """A lossless delta brings any base to any new weights, bit for bit."""
    base, new = both
    delta = compute_delta(
        base, new, DeltaSettings(codec="lossless", delta_threshold=0, level=level)
    )
    assert weights_hash(apply_delta(base, delta.payload)) == weights_hash(new) == delta.new_hash


@settings(max_examples=150, deadline=None)
@given(
    pairs(),
    st.sampled_from(["fp16", "int8", "int4", "topk"]),
    st.sampled_from([0.0, 0.01, 0.5]),
    st.sampled_from([0, 8, 100]),
)
def test_both_ends_reconstruct_the_same_bits(both, codec, threshold, block) -> None:
    """Whatever a lossy codec loses, sender and receiver hold the same weights."""
    base, new = both
    chosen = DeltaSettings(
        codec=codec, delta_threshold=threshold, block=block, full_ratio=INFINITE, topk=0.1
    )
    delta = compute_delta(base, new, chosen)
    received = apply_delta(base, delta.payload)
    assert weights_hash(received) == delta.new_hash == weights_hash(delta.received)
    assert set(received) == set(new)


@settings(max_examples=60, deadline=None)
@given(
    pairs(special=False, dtypes=tuple(FLOATS)), st.sampled_from(["fp16", "int8", "int4", "topk"])
)
def test_the_residual_drains_to_exact_weights(both, codec) -> None:
    """Pushing the same weights again sends what was left out, until nothing is."""
    held, new = both
    chosen = DeltaSettings(codec=codec, delta_threshold=0, full_ratio=INFINITE, topk=0.2)
    for _ in range(60):
        delta = compute_delta(held, new, chosen)
        held = apply_delta(held, delta.payload)
        if all(same(held[name], new[name]) for name in new):
            return
    raise AssertionError("something is still missing after 60 rounds")


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([8, 64, 256]),
    st.sampled_from([("int8", 127), ("int4", 7)]),
)
def test_block_codecs_stay_within_half_a_step(seed, block, codec) -> None:
    """int8 and int4 miss each value by at most half of its block's step, plus rounding."""
    name, top = codec
    rng = np.random.default_rng(seed)
    base = {"w": rng.normal(size=1000).astype("float32")}
    new = {"w": base["w"] + (rng.normal(size=1000) * rng.exponential(size=1000)).astype("float32")}
    chosen = DeltaSettings(
        codec=name, delta_threshold=0, block=block, levels=127, full_ratio=INFINITE
    )
    got = apply_delta(base, compute_delta(base, new, chosen).payload)["w"]
    change = np.abs(new["w"].astype("f8") - base["w"])
    padded = np.zeros(-(-1000 // block) * block)
    padded[:1000] = change
    step = np.repeat(padded.reshape(-1, block).max(axis=1) / top, block)[:1000]
    rounding = 4 * np.spacing(np.abs(new["w"]) + change.astype("f4"))
    assert np.all(np.abs(new["w"].astype("f8") - got) <= step / 2 + rounding)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 7, 15, 31, 63, 127]))
def test_fewer_levels_are_shorter_and_stay_within_half_a_step(seed: int, levels: int) -> None:
    """int8 with fewer steps misses by at most half of the larger step, and takes no more bytes."""
    rng = np.random.default_rng(seed)
    base = {"w": rng.normal(size=4096).astype("float32")}
    new = {"w": (base["w"] + rng.normal(size=4096) * 0.1).astype("float32")}
    chosen = DeltaSettings(codec="int8", delta_threshold=0, full_ratio=INFINITE, levels=levels)
    delta = compute_delta(base, new, chosen)
    got = apply_delta(base, delta.payload)["w"].astype("f8")
    step = np.abs(new["w"].astype("f8") - base["w"]).reshape(-1, 256).max(axis=1) / levels
    assert np.all(np.abs(new["w"] - got) <= np.repeat(step, 256) / 2 + 1e-6)
    all_levels = DeltaSettings(codec="int8", delta_threshold=0, full_ratio=INFINITE, levels=127)
    most = compute_delta(base, new, all_levels)
    assert len(delta.payload) <= len(most.payload)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-20, 1e-3, 1.0, 1e20]))
def test_fp16_stays_within_its_bound(seed: int, scale: float) -> None:
    """fp16 misses a change by 2^-11 of it, or of 2^-29 of the largest change where that is more."""
    rng = np.random.default_rng(seed)
    base = {"w": np.zeros(1000, "float64")}
    new = {"w": rng.normal(size=1000) * rng.exponential(size=1000) ** 4 * scale}
    chosen = DeltaSettings(codec="fp16", delta_threshold=0, full_ratio=INFINITE)
    got = apply_delta(base, compute_delta(base, new, chosen).payload)["w"]
    change = np.abs(new["w"])
    assert np.all(np.abs(new["w"] - got) <= np.maximum(change * 2.0**-11, change.max() * 2.0**-29))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.001, 0.05, 0.3, 1.0]))
def test_topk_sends_the_largest_changes_exactly(seed: int, share: float) -> None:
    """What topk sends is there bit for bit; what it leaves is no larger than anything it sent."""
    rng = np.random.default_rng(seed)
    base = {"w": rng.normal(size=(20, 50)).astype("float32")}
    new = {"w": base["w"] + rng.normal(size=(20, 50)).astype("float32")}
    chosen = DeltaSettings(codec="topk", topk=share, delta_threshold=0, full_ratio=INFINITE)
    got = apply_delta(base, compute_delta(base, new, chosen).payload)["w"]
    change = np.abs(new["w"] - base["w"])
    sent = got == new["w"]
    assert sent.sum() >= np.ceil(1000 * share)
    assert np.array_equal(got[~sent], base["w"][~sent])
    assert change[~sent].max(initial=0) <= change[sent].min()


BASE = {"a": np.arange(300, dtype="float32"), "b": np.ones((4, 4), "float16")}
NEW = {"a": BASE["a"] * 1.5, "b": BASE["b"] * 2, "c": np.zeros(3)}
PAYLOAD = compute_delta(BASE, NEW, DeltaSettings(full_ratio=INFINITE)).payload
FRAME = encode(CHUNK, {"offset": 7}, PAYLOAD)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(PAYLOAD) - 1), st.integers(1, 255))
def test_any_changed_byte_of_a_payload_is_detected(place: int, change: int) -> None:
    """No byte of a payload can change without a SyncFailure."""
    damaged = bytearray(PAYLOAD)
    damaged[place] ^= change
    with pytest.raises(SyncFailure):
        unpack(bytes(damaged), BASE, Limits())


def test_every_single_byte_of_a_frame_is_covered() -> None:
    """Each byte of a message is under its checksum, the head included."""
    for place in range(len(FRAME)):
        damaged = bytearray(FRAME)
        damaged[place] ^= 0x40
        with pytest.raises(SyncFailure):
            decode(bytes(damaged), Limits())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_never_crash_or_allocate(data: bytes, dressed: bool) -> None:
    """Random bytes, and random bytes behind a right head and hash, are refused within the limit."""
    limits = Limits(total_bytes=1 << 20, header_bytes=1 << 16, payload_bytes=1 << 20)
    if dressed:
        body = PAYLOAD[:12] + b"\1\0" + data
        data = body + hashlib.sha256(body).digest()
    tracemalloc.start()
    try:
        with pytest.raises(SyncFailure):
            unpack(data, BASE, limits)
        with pytest.raises(SyncFailure):
            decode(data, limits)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.lists(st.integers(-3, 2**40), max_size=4),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 7), scalars)
def test_any_field_of_a_row_may_be_anything(place: int, value: object) -> None:
    """A table with one field replaced, well hashed, gives weights or a SyncFailure, never else."""
    row: list[object] = ["a", 1, "float32", [300], 3, 308, 0, 256]
    row[place] = value
    compressor = Compressor()

    table = Table(kind="delta", rows=(TensorRow(name="a", operation="drop"),))
    honest = pack(table, [b""], compressor)
    assert read_table(honest, Limits())[0] == table
    text = canonical_json({"kind": "delta", "dictionary": "", "tensors": [row]})
    stored = compressor.table(text)
    body = PAYLOAD[:12] + struct.pack("<HII", 1, len(stored), len(text)) + stored + bytes(308)
    try:
        unpack(body + hashlib.sha256(body).digest(), BASE, Limits(total_bytes=1 << 20))
    except SyncFailure:
        return


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(KINDS), st.dictionaries(st.text(max_size=8), scalars, max_size=3), st.binary()
)
def test_frames_come_back_as_they_were(kind, fields, body) -> None:
    """decode(encode(x)) is x."""
    frame = decode(encode(kind, fields, body), Limits())
    assert (frame.kind, frame.fields, bytes(frame.body)) == (kind, fields, body)
