"""Codecs: one tensor's change as bytes, and the same bytes back to the same tensor everywhere.

Each codec turns ``(base, new)`` into a plain body of a length that shape, dtype and parameter fix
beforehand; :mod:`.payload` compresses it. The sender learns what receivers will
hold by decoding its own body with the same function: numpy's elementwise add, multiply and casts
are IEEE 754 operations rounded once each, so both ends get the same bits.

Sources: byte shuffle as in Blosc (Alted 2010); block-wise absolute-maximum quantization as in
bitsandbytes (Dettmers et al. 2021, arXiv:2110.02861); top-k sparsification with error feedback
(Stich et al. 2018, arXiv:1809.07599; Karimireddy et al. 2019, arXiv:1901.09847).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.federation.delta.arrays import DTYPES, FLOATS, Array, dtype_name, raw, work_dtype
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import check_count

Bytes = NDArray[np.uint8]
# 256 values share a scale: 1.6 % on top of int8, as bitsandbytes has it; 64 for four bits, where
# one outlier would take the resolution from all of its block.
INT8_BLOCK, INT4_BLOCK = 256, 64
INT8_LEVELS = 127
# What is used of them by default: what a coarser step leaves out is carried forward, and ten rounds
# of real training end at the same loss with 15 as with 127, for 85 % saved instead of 76 %.
DEFAULT_LEVELS = 15
# Indices are 32 bit; a tensor of more values takes another codec.
_MAX_TOPK = 1 << 32


def shuffle(data: Bytes, itemsize: int) -> Bytes:
    """Put all first bytes of the items first, then all second bytes: exponents compress together.

    >>> shuffle(np.array([1, 2, 3, 4], "uint8"), 2).tolist()
    [1, 3, 2, 4]
    """
    if itemsize == 1:
        return data
    return np.ascontiguousarray(data.reshape(-1, itemsize).T).reshape(-1)


def unshuffle(data: Bytes, itemsize: int) -> Bytes:
    """Undo :func:`shuffle`."""
    if itemsize == 1:
        return data
    return np.ascontiguousarray(data.reshape(itemsize, -1).T).reshape(-1)


def _as_array(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    return data.view(DTYPES[dtype]).reshape(shape)


# ------------------------------------------------------------------------------------- bit exact


def _encode_raw(base: Array | None, new: Array, param: int, levels: int) -> Bytes:
    return shuffle(raw(new), new.dtype.itemsize)


def _decode_raw(
    base: Array | None, body: Bytes, dtype: str, shape: tuple[int, ...], param: int
) -> Array:
    return _as_array(unshuffle(body, DTYPES[dtype].itemsize), dtype, shape)


def _encode_xor(base: Array | None, new: Array, param: int, levels: int) -> Bytes:
    assert base is not None
    return shuffle(raw(new) ^ raw(base), new.dtype.itemsize)


def _decode_xor(
    base: Array | None, body: Bytes, dtype: str, shape: tuple[int, ...], param: int
) -> Array:
    assert base is not None
    return _as_array(unshuffle(body, DTYPES[dtype].itemsize) ^ raw(base), dtype, shape)


def _exact_length(count: int, dtype: str, param: int) -> int:
    return count * DTYPES[dtype].itemsize


# ----------------------------------------------------------------------------------------- lossy


def difference(base: Array, new: Array) -> NDArray[Any]:
    """Return ``new - base`` flat, in the dtype the codecs compute in."""
    work = work_dtype(dtype_name(new))
    with np.errstate(over="ignore", invalid="ignore"):
        return (new.reshape(-1).astype(work) - base.reshape(-1).astype(work)).astype(work)


def _add(base: Array, delta: NDArray[Any], dtype: str, shape: tuple[int, ...]) -> Array:
    work = work_dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        total: Array = (base.reshape(-1).astype(work) + delta).astype(DTYPES[dtype])
    return total.reshape(shape)


def _encode_fp16(base: Array | None, new: Array, param: int, levels: int) -> Bytes:
    assert base is not None
    with np.errstate(over="ignore", under="ignore"):
        scaled = np.ldexp(difference(base, new), -param).astype("<f2")
    return shuffle(raw(scaled), 2)


def _decode_fp16(
    base: Array | None, body: Bytes, dtype: str, shape: tuple[int, ...], param: int
) -> Array:
    assert base is not None
    work = work_dtype(dtype)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        delta = np.ldexp(unshuffle(body, 2).view("<f2").astype(work), param)
    return _add(base, delta, dtype, shape)


def fp16_exponent(delta: NDArray[Any]) -> int:
    """Return the power of two that brings the largest change just under fp16's largest number."""
    peak = float(np.max(np.abs(delta), initial=0.0))
    return int(np.frexp(peak)[1]) - 15 if peak > 0 and np.isfinite(peak) else 0


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _quantize(delta: NDArray[Any], block: int, top: int) -> tuple[NDArray[Any], NDArray[np.int8]]:
    padded = np.zeros(_blocks(delta.size, block) * block, delta.dtype)
    padded[: delta.size] = delta
    grid = padded.reshape(-1, block)
    peak = np.abs(grid).max(axis=1)
    # A peak so small that peak/top underflows would never be sent: the smallest number is its step.
    tiny = np.finfo(delta.dtype).smallest_subnormal
    scales = np.where(peak > 0, np.maximum(peak / top, tiny), 0).astype(delta.dtype)
    steps = np.where(scales > 0, scales, 1)[:, None]
    quantized = np.clip(np.rint(grid / steps), -top, top).astype(np.int8).reshape(-1)
    return scales, quantized[: delta.size]


def _dequantize(scales: NDArray[Any], quantized: NDArray[np.int8], block: int) -> NDArray[Any]:
    steps = np.repeat(scales, block)[: quantized.size]
    with np.errstate(over="ignore", invalid="ignore"):
        product: NDArray[Any] = steps * quantized.astype(scales.dtype)
    return product


def _encode_int8(base: Array | None, new: Array, param: int, levels: int) -> Bytes:
    assert base is not None
    scales, quantized = _quantize(difference(base, new), param, levels)
    return np.concatenate([shuffle(raw(scales), scales.dtype.itemsize), raw(quantized)])


def _decode_int8(
    base: Array | None, body: Bytes, dtype: str, shape: tuple[int, ...], param: int
) -> Array:
    assert base is not None
    work = work_dtype(dtype)
    head = _blocks(base.size, param) * work.itemsize
    scales = unshuffle(body[:head], work.itemsize).view(work)
    return _add(base, _dequantize(scales, body[head:].view(np.int8), param), dtype, shape)


def _encode_int4(base: Array | None, new: Array, param: int, levels: int) -> Bytes:
    assert base is not None
    scales, quantized = _quantize(difference(base, new), param, 7)
    nibbles = np.zeros(quantized.size + quantized.size % 2, np.uint8)
    nibbles[: quantized.size] = quantized.view(np.uint8) & 0x0F
    packed = nibbles[0::2] | (nibbles[1::2] << 4)
    return np.concatenate([shuffle(raw(scales), scales.dtype.itemsize), packed])


def _decode_int4(
    base: Array | None, body: Bytes, dtype: str, shape: tuple[int, ...], param: int
) -> Array:
    assert base is not None
    work = work_dtype(dtype)
    head = _blocks(base.size, param) * work.itemsize
    scales = unshuffle(body[:head], work.itemsize).view(work)
    packed = body[head:]
    nibbles = np.empty(packed.size * 2, np.uint8)
    nibbles[0::2] = packed & 0x0F
    nibbles[1::2] = packed >> 4
    # Two's complement in four bits: shift up, then arithmetically down again.
    quantized = ((nibbles[: base.size] << 4).view(np.int8)) >> 4
    return _add(base, _dequantize(scales, quantized, param), dtype, shape)


def _encode_topk(base: Array | None, new: Array, param: int, levels: int) -> Bytes:
    assert base is not None
    size = np.abs(difference(base, new))
    indices = _largest(size, param)
    gaps = np.diff(indices, prepend=0).astype("<u4")
    width = new.dtype.itemsize
    flat = raw(new).reshape(-1, width)[indices] ^ raw(base).reshape(-1, width)[indices]
    return np.concatenate([shuffle(raw(gaps), 4), shuffle(flat.reshape(-1), width)])


def _largest(size: NDArray[Any], count: int) -> NDArray[np.int64]:
    # Equal magnitudes are taken from the front: the same input gives the same bytes.
    if count == 0:
        return np.zeros(0, np.int64)
    edge = np.partition(size, size.size - count)[size.size - count]
    above = np.flatnonzero(size > edge)
    ties = np.flatnonzero(size == edge)[: count - above.size]
    return np.sort(np.concatenate([above, ties]))


def _decode_topk(
    base: Array | None, body: Bytes, dtype: str, shape: tuple[int, ...], param: int
) -> Array:
    assert base is not None
    width = DTYPES[dtype].itemsize
    gaps = unshuffle(body[: 4 * param], 4).view("<u4").astype(np.int64)
    indices = np.cumsum(gaps)
    if param and (bool(np.any(gaps[1:] == 0)) or int(indices[-1]) >= base.size):
        raise SyncFailure("malformed", "top-k indices are not increasing and within the tensor")
    flat = raw(base).reshape(-1, width).copy()
    flat[indices] ^= unshuffle(body[4 * param :], width).reshape(-1, width)
    return _as_array(flat.reshape(-1), dtype, shape)


# ---------------------------------------------------------------------------------------- table


@dataclass(frozen=True, slots=True)
class Codec:
    """How one kind of body is made, read and measured.

    ``param`` is all that the receiver needs besides dtype and shape; ``levels``, int8's steps on
    each side of zero, only the sender: fewer values in use are shorter after zstd's entropy coding.
    """

    name: str
    exact: bool
    needs_base: bool
    encode: Callable[[Array | None, Array, int, int], Bytes]  # base, new, param, levels
    decode: Callable[[Array | None, Bytes, str, tuple[int, ...], int], Array]
    length: Callable[[int, str, int], int]  # plain body bytes from (count, dtype, param)
    noise: bool = False  # the body is quantized numbers: entropy coding is all that helps


def _fp16_length(count: int, dtype: str, param: int) -> int:
    return 2 * count


def _int8_length(count: int, dtype: str, param: int) -> int:
    return _blocks(count, param) * work_dtype(dtype).itemsize + count


def _int4_length(count: int, dtype: str, param: int) -> int:
    return _blocks(count, param) * work_dtype(dtype).itemsize + (count + 1) // 2


def _topk_length(count: int, dtype: str, param: int) -> int:
    return param * (4 + DTYPES[dtype].itemsize)


# On the wire a codec is its row number here: rows are appended, never moved.
CODECS: tuple[Codec, ...] = (
    Codec("raw", True, False, _encode_raw, _decode_raw, _exact_length),
    Codec("lossless", True, True, _encode_xor, _decode_xor, _exact_length),
    Codec("fp16", False, True, _encode_fp16, _decode_fp16, _fp16_length, True),
    Codec("int8", False, True, _encode_int8, _decode_int8, _int8_length, True),
    Codec("int4", False, True, _encode_int4, _decode_int4, _int4_length, True),
    Codec("topk", False, True, _encode_topk, _decode_topk, _topk_length),
)
BY_NAME = {codec.name: (number, codec) for number, codec in enumerate(CODECS)}


def check_param(codec: Codec, dtype: str, count: int, param: object) -> int:
    """Return ``param`` when the codec allows it for a tensor of ``count`` values."""
    if not codec.exact and dtype not in FLOATS:
        raise SyncFailure("malformed", f"codec {codec.name} cannot hold dtype {dtype}")
    if codec.exact:
        return check_count(f"{codec.name} parameter", param, 0)
    if codec.name == "fp16":
        if type(param) is not int or not -1200 <= param <= 1200:
            raise SyncFailure("malformed", "fp16 exponent is out of range")
        return param
    if codec.name == "topk":
        if count >= _MAX_TOPK:
            raise SyncFailure("too-large", f"topk holds at most 2^32 values, not {count}")
        return check_count("topk count", param, count)
    block = check_count(f"{codec.name} block", param, 1 << 20)
    if block < 8:
        raise SyncFailure("malformed", f"{codec.name} block {block} is under 8")
    return block
