"""Open GGUF files: every count, offset and length checked, one tensor in memory at a time."""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import WeightsError
from memopt.weights.gguf.header import DAMAGED, Cursor
from memopt.weights.gguf.kinds import FLOATS, BlockKind, block_kind
from memopt.weights.schema import numpy_dtype

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 counted in 32 bits; nobody writes it since September 2023
_DIMENSIONS = 4  # ggml's limit
_ALIGNMENT = 32  # where the file does not say
# The least bytes of an entry: a key's length, its type and a value; a tensor's name, dimensions,
# type and offset.
_LEAST_KEY, _LEAST_TENSOR = 13, 24
_SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is, in which file.

    ``shape`` is in numpy's order, the reverse of GGUF's.
    """

    name: str
    kind: BlockKind
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) // self.kind.values * self.kind.size

    def read(self, part: int | None = None) -> np.ndarray:
        """Read it, or one part along its first axis: floats in their shape, or blocks of bytes.

        Blocks are uint8 (number of blocks, bytes of a block), in the order of the values.

        Raises:
            WeightsError: the file became shorter since it was opened.
        """
        size = self.nbytes if part is None else self.nbytes // self.shape[0]
        raw = np.empty(size, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start + (part or 0) * size)
            view = raw.data
            while view:
                got = file.readinto(view)
                if not got:
                    raise WeightsError(f"{self.path} ends inside tensor {self.name!r}", fix=DAMAGED)
                view = view[got:]
        if self.kind.quantized:
            return raw.reshape(-1, self.kind.size)
        dtype = numpy_dtype(FLOATS[self.kind.name])
        return raw.view(dtype).reshape(self.shape if part is None else self.shape[1:])


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checked file, or the joined parts of one that was split: metadata and tensors."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """The value of ``general.architecture``."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise WeightsError(
                f"{self.path} does not say its general.architecture (it says {name!r})",
                fix=DAMAGED,
            )
        return name


def open_gguf(path: Path) -> GgufFile:
    """Read and check a file's header, and those of its siblings where it is the first of several.

    Args:
        path: a file of GGUF version 2 or 3, little-endian.

    Raises:
        WeightsError: anything that does not fit, with the values: truncated, lying counts, tensors
            that overlap or end past the file, names given twice, unknown number types, a missing
            part of a split file.

    >>> path = Path(getfixture("tmp_path")) / "model.gguf"
    >>> _ = path.write_bytes(b"GGUF")
    >>> open_gguf(path)
    Traceback (most recent call last):
    ...
    memopt.errors.WeightsError: ...model.gguf has only 4 bytes; the file is truncated or damaged; \
download it again
    """
    first = _open_one(path)
    count = first.metadata.get("split.count", 0)
    if type(count) is not int or count < 2:
        return first
    parts = [first, *(_open_one(part) for part in _siblings(path, first, count))]
    tensors: dict[str, GgufTensor] = {}
    for number, part in enumerate(parts):
        if part.metadata.get("split.no") != number or part.metadata.get("split.count") != count:
            raise WeightsError(
                f"{part.path} is not part {number + 1} of {count}: it says split.no "
                f"{part.metadata.get('split.no')!r} of {part.metadata.get('split.count')!r}",
                fix="download the parts again",
            )
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise WeightsError(f"{part.path}: tensor {twice[0]!r} is in another part too")
        tensors |= part.tensors
    announced = first.metadata.get("split.tensors.count", len(tensors))
    if announced != len(tensors):
        raise WeightsError(
            f"{path} announces {announced} tensors in {count} files, which have {len(tensors)}",
            fix="download the parts again",
        )
    return GgufFile(path, first.metadata, tensors)


def _siblings(path: Path, first: GgufFile, count: int) -> list[Path]:
    match = _SPLIT_NAME.search(path.name)
    if first.metadata.get("split.no") != 0 or match is None or int(match[2]) != count:
        raise WeightsError(
            f"{path} is one of {count} parts of a model (split.no "
            f"{first.metadata.get('split.no')!r}), not the first",
            fix=f"give the one called ...-00001-of-{count:05}.gguf, with the others beside it",
        )
    stem = path.name[: match.start()]
    paths = [path.with_name(f"{stem}-{n:05}-of-{count:05}.gguf") for n in range(2, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise WeightsError(f"{path} lacks its part {missing[0]}", fix="put it beside the first")
    return paths


def _open_one(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            head = file.read(24)
            if head[:4] != _MAGIC:
                raise WeightsError(
                    f"{path} is no GGUF file: it begins with {head[:4]!r}",
                    fix="give a file that llama.cpp opens",
                )
            if len(head) < 24:
                raise WeightsError(f"{path} has only {len(head)} bytes", fix=DAMAGED)
            # Unmapped when the last view of it is gone.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return _read(Cursor(path, memoryview(mapped)))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error


def _read(cursor: Cursor) -> GgufFile:
    path = cursor.path
    cursor.at = 4
    version = cursor.type("the version")
    if version not in _VERSIONS:
        big = int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS)
        raise WeightsError(
            f"{path} is big-endian" if big else f"{path} is GGUF version {version}",
            fix=f"memopt reads little-endian files of version {' and '.join(map(str, _VERSIONS))}: "
            "convert the model again with llama.cpp",
        )
    count, keys = cursor.number("the number of tensors"), cursor.number("the number of keys")
    if keys * _LEAST_KEY + count * _LEAST_TENSOR > cursor.left:
        raise cursor.damaged(
            f"{keys:,} keys and {count:,} tensors do not fit in {cursor.left:,} bytes"
        )
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.string("a key")
        if key in metadata:
            raise cursor.damaged(f"key {key!r:.200} is there twice")
        metadata[key] = cursor.value(cursor.type(f"the type of {key!r:.200}"), f"{key:.200}")
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment {alignment!r} is not a power of two")
    tensors: dict[str, tuple[BlockKind, tuple[int, ...], int]] = {}
    for _ in range(count):
        name, entry = _entry(cursor, alignment)
        if name in tensors:
            raise cursor.damaged(f"tensor {name!r:.200} is there twice")
        tensors[name] = entry
    base = cursor.at + -cursor.at % alignment
    placed = {
        name: GgufTensor(name, kind, shape, path, base + offset)
        for name, (kind, shape, offset) in tensors.items()
    }
    _check_places(placed, cursor, base)
    return GgufFile(path, metadata, placed)


def _entry(cursor: Cursor, alignment: int) -> tuple[str, tuple[BlockKind, tuple[int, ...], int]]:
    """Read where a tensor is said to be."""
    name = cursor.string("a tensor's name")
    shown = f"tensor {name!r:.200}"
    dimensions = cursor.type(f"the dimensions of {shown}")
    if dimensions > _DIMENSIONS:
        raise cursor.damaged(f"{shown} has {dimensions} dimensions, ggml has {_DIMENSIONS}")
    sizes = [cursor.number(f"the shape of {shown}") for _ in range(dimensions)]
    kind = block_kind(cursor.type(f"the type of {shown}"), name)
    offset = cursor.number(f"the offset of {shown}")
    if any(size >= 1 << 31 for size in sizes):
        raise cursor.damaged(f"{shown} has shape {sizes[::-1]}")
    if (sizes[0] if sizes else 1) % kind.values:
        raise cursor.damaged(
            f"{shown} has rows of {sizes[0] if sizes else 1}, {kind.name} needs whole blocks of "
            f"{kind.values}"
        )
    if offset % alignment:
        raise cursor.damaged(f"{shown} is at offset {offset:,}, not a multiple of {alignment}")
    return name, (kind, tuple(reversed(sizes)), offset)


def _check_places(tensors: Mapping[str, GgufTensor], cursor: Cursor, base: int) -> None:
    """Refuse tensors that overlap, or that the file ends before."""
    end, before, size = base, "", len(cursor.data)
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.nbytes)):
        if tensor.start < end:
            raise WeightsError(
                f"{cursor.path}: tensor {tensor.name!r:.200} overlaps {before!r:.200}", fix=DAMAGED
            )
        end, before = tensor.start + tensor.nbytes, tensor.name
        if end > size:
            raise WeightsError(
                f"{cursor.path} has {size:,} bytes, tensor {tensor.name!r:.200} ends at {end:,}",
                fix=DAMAGED,
            )
