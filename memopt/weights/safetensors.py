"""safetensors files: every byte of the layout checked, one tensor in memory at a time.

The safetensors package maps or loads whole files and needs torch for bfloat16; the format is an
8-byte length, a JSON header and the bytes, so it is read here directly.
Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import WeightsError
from memopt.files import atomic_path
from memopt.jsontext import parse_json, unique_keys
from memopt.weights.reader import WeightLoader
from memopt.weights.schema import numpy_dtype

# The format's names of dtypes, and ours.
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
# A header has this entry beside those of its tensors.
METADATA = "__metadata__"
CODES = {name: code for code, name in DTYPES.items()}
# The reference implementation refuses longer headers.
_HEADER_LIMIT = 100_000_000
# numpy's limit since 2.0; a product of more could be made to take for ever.
_DIMENSIONS = 64
_DAMAGED = "the file is truncated or damaged; download it again"


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor is in its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A checked safetensors header: tensors in file order, and the file's own metadata."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    order: tuple[str, ...]  # names as the header lists them
    content: bytes | None = None  # where it is in memory

    def read(self, name: str) -> np.ndarray:
        """Read one tensor into memory of its own, or show it in the content.

        Raises:
            WeightsError: the file became shorter since it was opened.
        """
        tensor = self.tensors[name]
        dtype = numpy_dtype(tensor.dtype)
        if self.content is not None:
            bytes_ = np.frombuffer(self.content, np.uint8, tensor.nbytes, tensor.start)
            return bytes_.view(dtype).reshape(tensor.shape)
        out = np.empty(tensor.nbytes, np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(tensor.start)
            view = out.data
            while view:
                got = file.readinto(view)
                if not got:
                    raise WeightsError(f"{self.path} ends inside tensor {name!r}", fix=_DAMAGED)
                view = view[got:]
        return out.view(dtype).reshape(tensor.shape)


def open_safetensors(path: Path, content: bytes | None = None) -> SafetensorsFile:
    """Read and check the header: offsets, overlaps, sizes, total length.

    Args:
        path: the file.
        content: what it holds, where that was sealed and is in memory.

    Raises:
        WeightsError: anything that does not fit, with the values.
    """
    size = path.stat().st_size if content is None else len(content)
    with path.open("rb") if content is None else io.BytesIO(content) as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise WeightsError(
                f"{path} has {size:,} bytes and announces a header of {length:,}", fix=_DAMAGED
            )
        header = parse_json(
            file.read(length),
            f"the header of {path}",
            error=WeightsError,
            fix=_DAMAGED,
            pairs=unique_keys,
        )
    if not isinstance(header, dict):
        raise WeightsError(f"{path} has a header that is not an object", fix=_DAMAGED)
    metadata = header.pop(METADATA, None) or {}
    if not isinstance(metadata, dict):
        raise WeightsError(f"{path} has metadata that is not an object", fix=_DAMAGED)
    base = 8 + length
    tensors = [_tensor(path, name, entry, base) for name, entry in header.items()]
    at = base
    by_place = sorted(tensors, key=lambda t: (t.start, t.end))
    for tensor in by_place:
        if tensor.start != at:
            what = "overlaps the one before it" if tensor.start < at else "leaves a gap before it"
            raise WeightsError(
                f"{path}: tensor {tensor.name!r} at byte {tensor.start} {what} (byte {at})",
                fix=_DAMAGED,
            )
        at = tensor.end
    if at != size:
        raise WeightsError(f"{path} has {size:,} bytes, its header describes {at:,}", fix=_DAMAGED)
    return SafetensorsFile(path, {t.name: t for t in by_place}, metadata, tuple(header), content)


def _tensor(path: Path, name: str, entry: Any, base: int) -> Tensor:
    try:
        code, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if len(shape) > _DIMENSIONS or not all(
            type(n) is int and n >= 0 for n in (*shape, start, end)
        ):
            raise ValueError(f"shape {list(shape)}, offsets {[start, end]}")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path}: tensor {name!r} has a damaged entry ({error})", fix=_DAMAGED
        ) from error
    if not isinstance(code, str) or code not in DTYPES:
        raise WeightsError(
            f"{path}: tensor {name!r} has dtype {code!r}, which memopt does not store",
            fix=f"supported: {', '.join(DTYPES)}",
        )
    kind = DTYPES[code]
    needed = math.prod(shape) * numpy_dtype(kind).itemsize
    if end - start != needed:
        raise WeightsError(
            f"{path}: tensor {name!r} has {end - start} bytes, {code} {list(shape)} needs {needed}",
            fix=_DAMAGED,
        )
    return Tensor(name, kind, shape, base + start, base + end)


def header_json(path: Path) -> bytes:
    """Return the header's JSON bytes as they are, padding included."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def write_safetensors(
    weights: Path,
    output: Path,
    *,
    header: bytes | None = None,
    only: str = "",
    without: tuple[str, ...] = (),
) -> None:
    """Write a V1 weight file as safetensors, streaming.

    Args:
        weights: the Parquet file (schema V1).
        output: the file to write, whole or not at all.
        header: the header of the file the weights came from; when it describes exactly these
            weights the output equals that file bit for bit.
        only: what the names of the weights to write begin with, which is taken off.
        without: what the names of those that are left out begin with.

    Raises:
        WeightsError: a quantized weight file, or a damaged one.
    """
    with WeightLoader(weights) as loader:
        if loader.version != 1:
            raise WeightsError(
                f"{weights} is quantized (schema V2), which safetensors cannot hold",
                fix="give the float weights (weights.parquet)",
            )
        chosen = [n for n in loader.names() if n.startswith(only) and not n.startswith(without)]
        infos = {name.removeprefix(only): loader.info(name) for name in chosen}
        plan = _placed(header, infos)
        if plan is None:
            plan = list(infos)
            header = new_header(
                (n, i.dtype, i.shape, i.size * numpy_dtype(i.dtype).itemsize)
                for n, i in infos.items()
            )
        assert header is not None
        with atomic_path(output) as part, part.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for name, array in _in_order(loader, [only + name for name in plan]):
                file.write(array.reshape(-1).view(np.uint8).data)
                del array, name


def _in_order(loader: WeightLoader, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    if names == loader.names():
        yield from loader.items()
        return
    for name in names:
        yield name, loader.load(name)


def _placed(header: bytes | None, infos: Mapping[str, Any]) -> list[str] | None:
    """Return the names in the header's data order if it describes exactly these weights."""
    if header is None:
        return None
    entries = json.loads(header)
    entries.pop(METADATA, None)
    described = {n: (DTYPES.get(e["dtype"]), tuple(e["shape"])) for n, e in entries.items()}
    if described != {n: (i.dtype, i.shape) for n, i in infos.items()}:
        return None
    return sorted(entries, key=lambda n: tuple(entries[n]["data_offsets"]))


def new_header(tensors: Iterable[tuple[str, str, Iterable[int], int]]) -> bytes:
    """Return the header of a file of these tensors: name, dtype, shape and bytes of each."""
    header: dict[str, Any] = {METADATA: {"format": "pt"}}
    at = 0
    for name, dtype, shape, size in tensors:
        header[name] = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # data starts at a multiple of 8
