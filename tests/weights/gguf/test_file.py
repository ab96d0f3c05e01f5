"""Damaged, lying and foreign GGUF files are one clear line; parts of a split file are joined."""

from __future__ import annotations

import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.bundle import open_bundle
from memopt.errors import BundleError, MemoptError, WeightsError
from memopt.weights.convert import convert
from memopt.weights.gguf.file import open_gguf
from memopt.weights.gguf.folder import open_model
from tests.weights.gguf.kit import CASES, add_tensor, add_tokenizer, make_model, write_case

Type = gguf.GGMLQuantizationType


def text(value: str | bytes) -> bytes:
    """A string as GGUF stores it."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    """A metadata entry."""
    return text(name) + struct.pack("<I", kind) + value


ARCH = key("general.architecture", 8, text("llama"))


def entry(name: str = "w", sizes: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry."""
    shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def file(
    path: Path,
    *,
    keys: tuple[bytes, ...] = (ARCH,),
    tensors: tuple[bytes, ...] = (entry(),),
    counts: tuple[int, int] | None = None,
    version: bytes = struct.pack("<I", 3),
    data: int = 128,
) -> Path:
    """Write a file of these parts, its counts true or as given."""
    stated = counts or (len(tensors), len(keys))
    head = b"GGUF" + version + struct.pack("<QQ", *stated) + b"".join((*keys, *tensors))
    path.write_bytes(head + bytes(-len(head) % 32) + bytes(data))
    return path


HUGE = (1 << 64) - 1
BAD = {
    "version 1": ({"version": struct.pack("<I", 1)}, "GGUF version 1"),
    "version 4": ({"version": struct.pack("<I", 4)}, "GGUF version 4"),
    "big-endian": ({"version": struct.pack(">I", 3)}, "big-endian"),
    "more tensors": ({"counts": (HUGE, 1)}, "do not fit"),
    "more keys": ({"counts": (1, HUGE)}, "do not fit"),
    "long key": ({"keys": (struct.pack("<Q", HUGE) + b"x" * 32,)}, "needs 18,446,744"),
    "long string": ({"keys": (key("k", 8, struct.pack("<Q", 1 << 60) + bytes(9)),)}, "needs"),
    "long array": (
        {"keys": (key("k", 9, struct.pack("<IQ", 6, 1 << 62)),)},
        "announces 4,611,686,018,427,387,904 values",
    ),
    "many strings": (
        {"keys": (key("k", 9, struct.pack("<IQ", 8, 1 << 61)),)},
        "announces 2,305,843,009,213,693,952 strings",
    ),
    "array of arrays": ({"keys": (key("k", 9, struct.pack("<IQ", 9, 1)),)}, "array of type 9"),
    "unknown value": ({"keys": (key("k", 77, bytes(8)),)}, "type 77"),
    "not UTF-8": ({"keys": (key("k", 8, text(b"\xff\xfe")),)}, "not UTF-8"),
    "key twice": ({"keys": (ARCH, ARCH)}, "'general.architecture' is there twice"),
    "tensor twice": ({"tensors": (entry(), entry(offset=64))}, "tensor 'w' is there twice"),
    "five dimensions": ({"tensors": (entry(sizes=(2,) * 5),)}, "5 dimensions"),
    "many dimensions": (
        {"tensors": (text("w") + struct.pack("<I", 1 << 31) + bytes(32),)},
        "2147483648 dimensions",
    ),
    "huge shape": ({"tensors": (entry(sizes=(HUGE, HUGE)),)}, "has shape"),
    "past the end": ({"tensors": (entry(sizes=(1 << 30, 1 << 30)),)}, "ends at"),
    "offset past the end": ({"tensors": (entry(offset=1 << 40),)}, "ends at"),
    "offset overflows": ({"tensors": (entry(offset=HUGE - 31),)}, "ends at"),
    "unaligned": ({"tensors": (entry(offset=8),)}, "not a multiple of 32"),
    "overlap": (
        {"tensors": (entry("a", (32,)), entry("b", (8,), offset=96)), "data": 256},
        "'b' overlaps 'a'",
    ),
    "half a block": ({"tensors": (entry(sizes=(48,), kind=8),)}, "whole blocks of 32"),
    "IQ type": ({"tensors": (entry("blk.0.w", (256,), 16),)}, "'blk.0.w' is IQ2_XXS"),
    "alignment 0": (
        {"keys": (ARCH, key("general.alignment", 4, struct.pack("<I", 0)))},
        "general.alignment 0",
    ),
    "alignment text": (
        {"keys": (ARCH, key("general.alignment", 8, text("32")))},
        "general.alignment '32'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_lying_files_are_refused_before_memory_is_taken(name: str, tmp_path: Path) -> None:
    """Whatever a header says, it is compared with the bytes that are there."""
    parts, said = BAD[name]
    path = file(tmp_path / "bad.gguf", **parts)
    tracemalloc.start()
    with pytest.raises(WeightsError, match=said):
        open_gguf(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Each cut of a whole model's file, in every section, is one line and no traceback."""
    whole = write_case(tmp_path / "whole.gguf", CASES[0], make_model(CASES[0])).read_bytes()
    cut = tmp_path / "cut.gguf"
    opened = open_gguf(tmp_path / "whole.gguf")
    first = min(tensor.start for tensor in opened.tensors.values())
    last = max(tensor.start + tensor.nbytes for tensor in opened.tensors.values())
    for size in (*range(0, 200, 7), *range(200, first, 997), first, (first + last) // 2, last - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(WeightsError):
            open_gguf(cut)
    cut.write_bytes(whole[:last])
    assert open_gguf(cut).tensors.keys() == opened.tensors.keys()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_changed_bytes_never_are_a_traceback(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A file with any bytes of its header changed opens, or is refused by name."""
    if not _WHOLE:
        path = tmp_path_factory.mktemp("whole") / "m.gguf"
        _WHOLE.append(write_case(path, CASES[0], make_model(CASES[0])).read_bytes())
    raw = bytearray(_WHOLE[0])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, 9000))
        raw[at] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("changed") / "m.gguf"
    path.write_bytes(raw)
    with suppress(MemoptError):
        open_model(path)


_WHOLE: list[bytes] = []


def split(folder: Path, count: int = 3, left_out: int | None = None) -> Path:
    """Write a model in several files as gguf-split does; return the first."""
    case = CASES[0]
    whole = write_case(folder / "whole.gguf", case, make_model(case))
    names = [t.name for t in gguf.GGUFReader(whole).tensors]
    opened = open_gguf(whole)
    for number in range(count):
        if number == left_out:
            continue
        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(path, case.arch)
        if number == 0:
            for name, value in opened.metadata.items():
                if name.startswith("llama."):
                    add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
                    add(name, value)
            add_tokenizer(writer)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(names))
        for name in names[number::count]:
            add_tensor(writer, name, opened.tensors[name].read(), Type.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    whole.rename(folder / "whole")
    return folder / f"m-00001-of-{count:05}.gguf"


def test_parts_of_a_split_file_are_joined(tmp_path: Path) -> None:
    """The first part, or the folder of all, is the whole model."""
    first = split(tmp_path)
    joined, whole = open_gguf(first), open_gguf(tmp_path / "whole")
    assert joined.tensors.keys() == whole.tensors.keys()
    for name, tensor in joined.tensors.items():
        np.testing.assert_array_equal(tensor.read(), whole.tensors[name].read())
    assert convert(tmp_path, tmp_path / "bundle").manifest.name == tmp_path.name


def test_another_alignment_is_honoured(tmp_path: Path) -> None:
    """Tensors lie where ``general.alignment`` puts them."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(256)
    values = {"a": np.arange(5, dtype=np.float32), "b": np.ones((2, 3), np.float32)}
    for name, array in values.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = open_gguf(tmp_path / "m.gguf").tensors
    assert {tensor.start % 256 for tensor in tensors.values()} == {0}
    for name, array in values.items():
        np.testing.assert_array_equal(tensors[name].read(), array)


def test_a_part_without_the_others_is_refused(tmp_path: Path) -> None:
    """A later part names the first; a first part names what is missing."""
    first = split(tmp_path, left_out=1)
    with pytest.raises(WeightsError, match=r"lacks its part m-00002-of-00003\.gguf"):
        open_gguf(first)
    with pytest.raises(WeightsError, match=r"one of 3 parts .* not the first"):
        open_gguf(tmp_path / "m-00003-of-00003.gguf")


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    """A file of another format, and an empty one, are told by their first bytes."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(WeightsError, match=r"no GGUF file: it begins with b'PK"):
        open_gguf(path)
    for source in (path, tmp_path):
        with pytest.raises(WeightsError, match="no GGUF file"):
            convert(source, tmp_path / "bundle")
    with pytest.raises(BundleError, match="a file, not a bundle folder; memopt convert takes it"):
        open_bundle(path)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="begins with b''"):
        open_gguf(path)
