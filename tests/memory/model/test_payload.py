"""Packed and encrypted content: comes back whole, is not readable without the key."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.errors import ConsolidationError
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.payload import decode_fields, encode_fields, seal, unseal
from memopt.memory.model.rows import new_rows
from memopt.memory.model.schema import Content, NewMemory
from tests.memory.kit import Key

SECRET = "the treasure lies under the old oak"


def secret(text: str = SECRET, **fields: object) -> NewMemory:
    return NewMemory(content=Content(text=text), embedding=np.ones(4), **fields)  # type: ignore[arg-type]


@given(st.lists(st.none() | st.binary(max_size=40), max_size=5))
def test_fields_round_trip(values: list[bytes | None]) -> None:
    """Any optional byte strings come back, empty ones and nulls apart."""
    assert decode_fields(encode_fields(values)) == values


@given(st.binary(max_size=60))
def test_damaged_fields_are_refused_or_read(data: bytes) -> None:
    """No bytes make the reader fail in another way than its own error, or grow."""
    with suppress(ConsolidationError):
        assert sum(len(value or b"") for value in decode_fields(data)) <= len(data)


@pytest.mark.parametrize("key", [None, Key("k1", 1)])
@pytest.mark.parametrize("compress", [True, False])
def test_rows_round_trip(key: Key | None, compress: bool) -> None:
    """Every mixture of content is the same after packing and unpacking."""
    columns = {
        "memory_id": ["a", "b", "c"],
        "timestamp": np.datetime64("2026-01-01T00:00:00").item(),
        "text": ["plain", None, ""],
        "vision_data": [None, b"\x00picture", b""],
        "audio_data": [b"sound" * 50, None, None],
        "summary": [None, "in short", "é"],
    }
    plain = new_rows(np.eye(3, 4, dtype=np.float32), columns)
    packed = seal(plain, compress=compress, cipher=key)
    if compress or key:
        # Archived words stay where they are found, unless a key hides them.
        assert packed["text"].null_count == (3 if key else 1)
        assert packed["audio_data"].null_count == 3
        assert packed["packed"].null_count == 0
        assert (packed["summary"].null_count == 3) is (key is not None)
    assert unseal(packed, key).equals(plain)


def test_damage_is_named_by_memory() -> None:
    """A flipped byte of an archive or a codec of tomorrow is one error with the id."""
    plain = new_rows(
        np.eye(1, 4, dtype=np.float32),
        {"memory_id": ["a"], "timestamp": 0, "vision_data": [b"x" * 99]},
    )
    packed = seal(plain, compress=True, cipher=None)
    at = packed.column_names.index
    for name, value in (
        ("packed", b"\x63" + b"\0" * 7 + b"junk"),
        ("packed", None),
        ("codec", "lz9"),
    ):
        field = packed.schema.field(name)
        bad = packed.set_column(at(name), field, pa.array([value], field.type))
        with pytest.raises(ConsolidationError, match="memory a"):
            unseal(bad, None)


def test_nothing_readable_reaches_the_disk(tmp_path: Path) -> None:
    """Text, summary and archived copies of an encrypted store are in no file, yet come back."""
    with MemoryStore(tmp_path, dim=4, cipher=Key("k1", 1)) as store:
        (memory_id,) = store.add(secret()).ids
        row = store.cells.unpack(store.rows([memory_id])).to_pylist()[0]
        del row["joint_embedding"]
        row.update(summary=SECRET, tier="archived")
        columns = {name: [value] for name, value in row.items()}
        store.commit(updates=store.cells.pack(new_rows(store.vectors([memory_id])[1], columns)))
        store.update(memory_id, category="c")
        assert store.rows([memory_id])["codec"].to_pylist() == ["zstd+aesgcm2:k1"]
        back = store.get(memory_id)
        assert (back.text, back.summary, back.category) == (SECRET, SECRET, "c")
        assert store.search(np.ones(4), text="treasure")[0].memory.text == SECRET
        with pytest.raises(ConsolidationError, match="no word index"):
            store.search(text="treasure")
    words = SECRET.encode()
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and words in path.read_bytes()
    ]


def test_the_same_check_finds_plain_text(tmp_path: Path) -> None:
    """The byte search of the test above does find what is not encrypted."""
    MemoryStore(tmp_path, dim=4).add(secret())
    words = SECRET.encode()
    assert [path for path in tmp_path.rglob("*") if path.is_file() and words in path.read_bytes()]


def test_the_id_does_not_betray_a_guess(tmp_path: Path) -> None:
    """Two encrypted stores give one text two ids, and each finds its own again."""
    ids = []
    for name in ("a", "b"):
        with MemoryStore(tmp_path / name, dim=4, cipher=Key("k1", 1)) as store:
            ids += store.add(secret()).ids
        assert MemoryStore(tmp_path / name, cipher=Key("k1", 1)).add(secret()).already == 1
    ids += MemoryStore(tmp_path / "plain", dim=4).add(secret()).ids
    assert len(set(ids)) == 3


def test_wrong_and_missing_keys_are_one_clear_error(tmp_path: Path) -> None:
    """Opening says which key the store wants; a key for a plain store is refused too."""
    MemoryStore(tmp_path / "s", dim=4, cipher=Key("k1", 1)).add(secret())
    with pytest.raises(ConsolidationError, match="'k2' does not open what key 'k1' encrypted"):
        MemoryStore(tmp_path / "s", cipher=Key("k2", 2))
    with pytest.raises(ConsolidationError, match="encrypted with key 'k1' and no key was given"):
        MemoryStore(tmp_path / "s")
    MemoryStore(tmp_path / "plain", dim=4)
    with pytest.raises(ConsolidationError, match="is not encrypted, and a key was given"):
        MemoryStore(tmp_path / "plain", cipher=Key("k1", 1))
