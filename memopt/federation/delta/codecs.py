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


# ------------------------------------------------------------------------------------- bit exact


def _encode_raw(base: Array, new: Array, param: int, levels: int) -> Bytes:
    return shuffle(raw(new), new.dtype.itemsize)


def _decode_raw(base: Array, body: Bytes, dtype: str, param: int) -> Array:
    return unshuffle(body, DTYPES[dtype].itemsize).view(DTYPES[dtype])


def _encode_xor(base: Array, new: Array, param: int, levels: int) -> Bytes:
    return shuffle(raw(new) ^ raw(base), new.dtype.itemsize)


def _decode_xor(base: Array, body: Bytes, dtype: str, param: int) -> Array:
    return (unshuffle(body, DTYPES[dtype].itemsize) ^ raw(base)).view(DTYPES[dtype])


def _exact_length(count: int, dtype: str, param: int) -> int:
    return count * DTYPES[dtype].itemsize


# ----------------------------------------------------------------------------------------- lossy


def difference(base: Array, new: Array) -> NDArray[Any]:
    """Return ``new - base`` flat, in the dtype the codecs compute in."""
    work = work_dtype(dtype_name(new))
    with np.errstate(over="ignore", invalid="ignore"):
        return (new.reshape(-1).astype(work) - base.reshape(-1).astype(work)).astype(work)


def _add(base: Array, delta: NDArray[Any], dtype: str) -> Array:
    work = work_dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        total: Array = (base.reshape(-1).astype(work) + delta).astype(DTYPES[dtype])
    return total


def _encode_fp16(base: Array, new: Array, param: int, levels: int) -> Bytes:
    with np.errstate(over="ignore", under="ignore"):
        scaled = np.ldexp(difference(base, new), -param).astype("<f2")
    return shuffle(raw(scaled), 2)


def _decode_fp16(base: Array, body: Bytes, dtype: str, param: int) -> Array:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        delta = np.ldexp(unshuffle(body, 2).view("<f2").astype(work_dtype(dtype)), param)
    return _add(base, delta, dtype)


def fp16_exponent(delta: NDArray[Any]) -> int:
    """Return the power of two that brings the largest change just under fp16's largest number."""
    peak = float(np.max(np.abs(delta), initial=0.0))
    return int(np.frexp(peak)[1]) - 15 if peak > 0 and np.isfinite(peak) else 0


def _scale_bytes(count: int, dtype: str, block: int) -> int:
    return -(-count // block) * work_dtype(dtype).itemsize


def _quantize(delta: NDArray[Any], block: int, top: int) -> tuple[Bytes, NDArray[np.int8]]:
    """Return each block's scale, as they are sent, and each value's step on it."""
    padded = np.zeros(-(-delta.size // block) * block, delta.dtype)
    padded[: delta.size] = delta
    grid = padded.reshape(-1, block)
    peak = np.abs(grid).max(axis=1)
    # A peak so small that peak/top underflows would never be sent: the smallest number is its step.
    tiny = np.finfo(delta.dtype).smallest_subnormal
    scales = np.where(peak > 0, np.maximum(peak / top, tiny), 0).astype(delta.dtype)
    steps = np.where(scales > 0, scales, 1)[:, None]
    quantized = np.clip(np.rint(grid / steps), -top, top).astype(np.int8).reshape(-1)
    return shuffle(raw(scales), scales.dtype.itemsize), quantized[: delta.size]


def _add_steps(
    base: Array, scales: Bytes, quantized: NDArray[np.int8], dtype: str, block: int
) -> Array:
    work = work_dtype(dtype)
    steps = np.repeat(unshuffle(scales, work.itemsize).view(work), block)[: quantized.size]
    with np.errstate(over="ignore", invalid="ignore"):
        return _add(base, steps * quantized.astype(work), dtype)


def _encode_int8(base: Array, new: Array, param: int, levels: int) -> Bytes:
    scales, quantized = _quantize(difference(base, new), param, levels)
    return np.concatenate([scales, raw(quantized)])


def _decode_int8(base: Array, body: Bytes, dtype: str, param: int) -> Array:
    head = _scale_bytes(base.size, dtype, param)
    return _add_steps(base, body[:head], body[head:].view(np.int8), dtype, param)


def _encode_int4(base: Array, new: Array, param: int, levels: int) -> Bytes:
    scales, quantized = _quantize(difference(base, new), param, 7)
    nibbles = np.zeros(quantized.size + quantized.size % 2, np.uint8)
    nibbles[: quantized.size] = quantized.view(np.uint8) & 0x0F
    return np.concatenate([scales, nibbles[0::2] | (nibbles[1::2] << 4)])


def _decode_int4(base: Array, body: Bytes, dtype: str, param: int) -> Array:
    head = _scale_bytes(base.size, dtype, param)
    nibbles = np.stack([body[head:] & 0x0F, body[head:] >> 4], axis=1).reshape(-1)[: base.size]
    # Two's complement in four bits: shift up, then arithmetically down again.
    return _add_steps(base, body[:head], (nibbles << 4).view(np.int8) >> 4, dtype, param)


def _encode_topk(base: Array, new: Array, param: int, levels: int) -> Bytes:
    indices = _largest(np.abs(difference(base, new)), param)
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


def _decode_topk(base: Array, body: Bytes, dtype: str, param: int) -> Array:
    width = DTYPES[dtype].itemsize
    gaps = unshuffle(body[: 4 * param], 4).view("<u4").astype(np.int64)
    indices = np.cumsum(gaps)
    if param and (bool(np.any(gaps[1:] == 0)) or int(indices[-1]) >= base.size):
        raise SyncFailure("malformed", "top-k indices are not increasing and within the tensor")
    flat = raw(base).reshape(-1, width).copy()
    flat[indices] ^= unshuffle(body[4 * param :], width).reshape(-1, width)
    return flat.reshape(-1).view(DTYPES[dtype])


# ---------------------------------------------------------------------------------------- table


@dataclass(frozen=True, slots=True)
class Codec:
    """How one kind of body is made, read and measured.

    ``param`` is all that the receiver needs besides dtype and shape; ``levels``, int8's steps on
    each side of zero, only the sender: fewer values in use are shorter after zstd's entropy coding.
    What is decoded is flat. A codec that needs no base looks at none.
    """

    name: str
    exact: bool
    needs_base: bool
    encode: Callable[[Array, Array, int, int], Bytes]  # base, new, param, levels
    decode: Callable[[Array, Bytes, str, int], Array]  # base, body, dtype, param
    length: Callable[[int, str, int], int]  # plain body bytes from (count, dtype, param)
    noise: bool = False  # the body is quantized numbers: entropy coding is all that helps


def _int8_length(count: int, dtype: str, param: int) -> int:
    return _scale_bytes(count, dtype, param) + count


def _int4_length(count: int, dtype: str, param: int) -> int:
    return _scale_bytes(count, dtype, param) + (count + 1) // 2


def _topk_length(count: int, dtype: str, param: int) -> int:
    return param * (4 + DTYPES[dtype].itemsize)


# On the wire a codec is its row number here: rows are appended, never moved.
CODECS: tuple[Codec, ...] = (
    Codec("raw", True, False, _encode_raw, _decode_raw, _exact_length),
    Codec("lossless", True, True, _encode_xor, _decode_xor, _exact_length),
    Codec("fp16", False, True, _encode_fp16, _decode_fp16, lambda count, *_: 2 * count, True),
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
