"""A sealed cell opens in its own row of its own store alone, whoever moved it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from memopt.errors import ConsolidationError
from memopt.memory.lifecycle.tiering import HotColdTiering
from memopt.memory.lifecycle.verify import verify
from memopt.memory.lifecycle.worker import ConsolidationRecipe, ConsolidationWorker
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.payload import Cipher, encode_fields, is_tied, tie, untie
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.privacy.erase import erase
from memopt.memory.privacy.keys import AesGcm, rotate
from tests.memory.kit import Hashing, Key, note, png

OLD, NEW = bytes(range(32)), bytes(32)
WRITTEN = Path(__file__).parents[2] / "data" / "v0.1" / "sealed.tar.xz"
CHANGED = "was changed from outside"
CIPHERS: list[Cipher] = [AesGcm((OLD,)), Key("k1", 1)]

Change = Callable[[list[dict[str, Any]]], None]


def filled(path: Path, cipher: Cipher) -> MemoryStore:
    """Two memories, ``b`` archived."""
    store = MemoryStore(path, embedder=Hashing(), cipher=cipher, background=False)
    content = Content(text="the key lies under the mat", vision=png(1))
    store.add([NewMemory(content=content, memory_id="a"), note("b")])
    HotColdTiering(store).archive(["b"])
    return store


def tampered(path: Path, change: Change) -> None:
    """Change rows in the files, as somebody without a key can."""
    import lancedb

    table = lancedb.connect(path).open_table("memories")
    schema, rows = table.schema, table.to_arrow().to_pylist()
    rows.sort(key=lambda row: row["memory_id"])
    change(rows)
    table.add(pa.Table.from_pylist(rows, schema=schema), mode="overwrite")


def cells(store: MemoryStore) -> dict[str, str]:
    """Id -> codec."""
    found = store.database.memories.search().select(["memory_id", "codec"]).limit(None).to_list()
    return {row["memory_id"]: row["codec"] for row in found}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """An encrypted store of version 0.1, of 7 memories under the key OLD."""
    with tarfile.open(WRITTEN) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "sealed"


def test_a_tie_is_of_one_place() -> None:
    """Another store, memory, column or codec, or a boundary moved between two names, is another."""
    place = ("ab", "packed", "zstd+aesgcm2:k", b"store")
    cell = tie(b"text", *place)
    assert untie(cell, *place) == b"text"
    assert len(cell) == 24 + len(b"text")
    for other in (
        ("a", "bpacked", "zstd+aesgcm2:k", b"store"),
        ("ab", "summary", "zstd+aesgcm2:k", b"store"),
        ("ab", "packed", "aesgcm2:k", b"store"),
        ("ab", "packed", "zstd+aesgcm2:k2", b"store"),
        ("ab", "packed", "zstd+aesgcm2:k", b"other"),
    ):
        assert untie(cell, *other) is None
    assert is_tied(cell)
    # Nothing that was sealed before begins so: fields, or the length of what is compressed.
    assert not is_tied(encode_fields([b"memopt"]))
    assert int.from_bytes(cell[:8], "little") > 1 << 60


def _swap(rows: list[dict[str, Any]]) -> None:
    for name in ("packed", "codec"):
        rows[0][name], rows[1][name] = rows[1][name], rows[0][name]


def _rename(rows: list[dict[str, Any]]) -> None:
    rows[0]["memory_id"], rows[1]["memory_id"] = rows[1]["memory_id"], rows[0]["memory_id"]


def _old_mark(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["codec"] = row["codec"].replace("aesgcm2", "aesgcm")


def _plain(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row.update(codec="", packed=None, text="you may trust this")


def _no_zstd(rows: list[dict[str, Any]]) -> None:
    rows[1]["codec"] = rows[1]["codec"].removeprefix("zstd+")


@pytest.mark.parametrize("cipher", CIPHERS, ids=["ours", "a caller's"])
@pytest.mark.parametrize("change", [_swap, _rename, _old_mark, _plain, _no_zstd])
def test_a_moved_cell_is_refused_by_name(tmp_path: Path, cipher: Cipher, change: Change) -> None:
    """One line that names the memory, by every way to it; never another's text."""
    filled(tmp_path / "s", cipher).close()
    tampered(tmp_path / "s", change)
    with MemoryStore(tmp_path / "s", embedder=Hashing(), cipher=cipher) as store:
        bad = ("b",) if change is _no_zstd else ("a", "b")
        assert verify(store).unreadable == bad
        for key in bad:
            with pytest.raises(ConsolidationError, match=f"memory {key} {CHANGED}") as caught:
                store.get(key)
            assert "\n" not in str(caught.value)
        for ask in (
            lambda: store.find(Content(text="b"), top_k=2),
            lambda: store.update("b", category="c"),
            lambda: (HotColdTiering(store).recall(["b"]), HotColdTiering(store).archive(["b"])),
            lambda: HotColdTiering(store).rank(),
            lambda: store.export_parquet(tmp_path / "out"),
            lambda: store.cells.pack(store.rows(["b"])) if change is not _plain else store.get("b"),
            lambda: store.reembed(Hashing("another")),
        ):
            with pytest.raises(ConsolidationError, match=CHANGED):
                ask()
        # It can be deleted, and the rest goes on.
        store.delete(list(bad))
        assert verify(store).problems == {}


@pytest.mark.parametrize("cipher", CIPHERS, ids=["ours", "a caller's"])
def test_a_cell_of_another_store_is_refused(tmp_path: Path, cipher: Cipher) -> None:
    """Under the same key and the same id too; so is the secret of another store."""
    for name in ("s", "other"):
        filled(tmp_path / name, cipher).close()
    with MemoryStore(tmp_path / "other", cipher=cipher) as other:
        packed = other.rows(["a"])["packed"][0].as_py()
    tampered(tmp_path / "s", lambda rows: rows[0].update(packed=packed))
    with (
        MemoryStore(tmp_path / "s", cipher=cipher) as store,
        pytest.raises(ConsolidationError, match=f"memory a {CHANGED}.* another memory or store"),
    ):
        store.get("a")
    (tmp_path / "s" / "memory.json").write_bytes((tmp_path / "other/memory.json").read_bytes())
    with (
        MemoryStore(tmp_path / "s", cipher=cipher) as store,
        pytest.raises(ConsolidationError, match=f"memory b {CHANGED}"),
    ):
        store.get("b")


@pytest.mark.parametrize("cipher", CIPHERS, ids=["ours", "a caller's"])
def test_a_cell_of_another_column_is_refused(tmp_path: Path, cipher: Cipher) -> None:
    """The secret in memory.json is no content, and content no secret."""
    import base64

    with filled(tmp_path / "s", cipher) as store:
        packed = store.rows(["a"])["packed"][0].as_py()
    file = tmp_path / "s" / "memory.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({**meta, "id_key": base64.b64encode(packed).decode()}))
    with pytest.raises(ConsolidationError, match=rf"{CHANGED}: its memory.json holds another"):
        MemoryStore(tmp_path / "s", cipher=cipher)
    file.write_text(json.dumps(meta))
    secret = base64.b64decode(meta["id_key"])
    tampered(tmp_path / "s", lambda rows: rows[0].update(packed=secret))
    with (
        MemoryStore(tmp_path / "s", cipher=cipher) as store,
        pytest.raises(ConsolidationError, match=f"memory a {CHANGED}"),
    ):
        store.get("a")


def test_a_loose_cell_gets_into_no_tied_store(tmp_path: Path) -> None:
    """One sealed before, under the same key, is not read, not packed and not rotated in."""
    cipher = AesGcm((OLD,))
    filled(tmp_path / "s", cipher).close()
    loose = cipher.encrypt(encode_fields([b"trust me", None, None, None]))
    codec = f"aesgcm:{cipher.key_id}"
    tampered(tmp_path / "s", lambda rows: rows[0].update(packed=loose, codec=codec))
    with MemoryStore(tmp_path / "s", cipher=cipher) as store:
        assert verify(store).unreadable == ("a",)
        for ask in (
            lambda: store.get("a"),
            lambda: store.cells.pack(store.rows(["a"])),
            lambda: rotate(store, AesGcm((NEW, OLD))),
        ):
            with pytest.raises(ConsolidationError, match=f"memory a {CHANGED}"):
                ask()


def test_what_moves_rows_leaves_them_open(tmp_path: Path) -> None:
    """Update, tiers, consolidation, erasure, merging, another model, export and import."""
    import asyncio

    cipher = AesGcm((OLD,))
    with filled(tmp_path / "s", cipher) as store:
        store.update("a", text="it lies in the shed", category="c")
        HotColdTiering(store).archive(["a"])
        HotColdTiering(store).recall(["b"])
        store.add([note(f"the train to Basel leaves at {at}") for at in range(12)])
        asyncio.run(ConsolidationWorker(store, ConsolidationRecipe()).consolidate())
        erase(store)
        store.reembed(Hashing("another", dim=32))
        store.optimize()
        assert verify(store).problems == {}
        assert all("aesgcm2:" in codec for codec in cells(store).values())
        store.export_parquet(tmp_path / "out")
        count = store.count()
    with MemoryStore(tmp_path / "copy", cipher=AesGcm((NEW,)), dim=32) as copy:
        assert copy.import_parquet(tmp_path / "out").memories == count
        assert verify(copy).problems == {}
        back = copy.get("a")
        assert (back.text, back.vision_data) == ("it lies in the shed", png(1))
        assert all("aesgcm2:" in codec for codec in cells(copy).values())


def test_a_store_of_before_is_tied_row_by_row(written: Path) -> None:
    """What is written again is tied; moved tied cells are refused there too, loose ones open."""
    with MemoryStore(written, cipher=AesGcm((OLD,)), background=False) as store:
        assert not any("aesgcm2:" in codec for codec in cells(store).values())
        known = {f"m{at}": store.get(f"m{at}").text for at in range(5)}
        store.update("m2", category="c")
        store.update("m3", category="c")
        tied = {key for key, codec in cells(store).items() if "aesgcm2:" in codec}
        assert tied == {"m2", "m3"}
        assert {key: store.get(key).text for key in known} == known
        assert json.loads((written / "memory.json").read_text())["format"] == 1

    def old_mark(rows: list[dict[str, Any]]) -> None:
        at = {row["memory_id"]: row for row in rows}
        at["m2"]["packed"], at["m3"]["packed"] = at["m3"]["packed"], at["m2"]["packed"]
        at["m2"]["codec"] = at["m2"]["codec"].replace("aesgcm2", "aesgcm")

    tampered(written, old_mark)
    with MemoryStore(written, cipher=AesGcm((OLD,)), background=False) as store:
        for key in ("m2", "m3"):
            with pytest.raises(ConsolidationError, match=f"memory {key} {CHANGED}"):
                store.get(key)


_ROTATE = """
import os, signal, sys
from memopt.memory.privacy import keys
from memopt.memory.memory_store import MemoryStore

keys._CHUNK = 3
old, new = bytes(range(32)), bytes(32)
store = MemoryStore(sys.argv[1], cipher=keys.AesGcm((old,)), background=False)
keys.rotate(store, keys.AesGcm((new, old)), on_step=lambda _: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_rotation_of_a_store_of_before_survives_a_kill(written: Path) -> None:
    """Half loose under one key, half tied under the other: it opens, and the next run ends it."""
    with MemoryStore(written, cipher=AesGcm((OLD,)), background=False) as store:
        known = {key: store.get(key).text for key in cells(store)}
        loose = store.rows(["m2"], ["codec", "packed"]).to_pylist()[0]
        ids = store.add(NewMemory(content=Content(text="again"), embedding=png_vector(store))).ids
    killed = subprocess.run(
        [sys.executable, "-c", _ROTATE, str(written)], env=os.environ, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    both = AesGcm((NEW, OLD))
    with MemoryStore(written, cipher=both, background=False) as store:
        marks = sorted(codec.split("+")[-1].split(":")[0] for codec in cells(store).values())
        assert set(marks) == {"aesgcm", "aesgcm2"}
        assert {key: store.get(key).text for key in known} == known
        left = sum(f"aesgcm2:{both.key_id}" not in codec for codec in cells(store).values())
        assert rotate(store, both) == left
    with MemoryStore(written, cipher=AesGcm((NEW,)), background=False) as store:
        assert all(f"aesgcm2:{both.key_id}" in codec for codec in cells(store).values())
        assert {key: store.get(key).text for key in known} == known
        assert verify(store).problems == {}
        # Its ids are those of before: what is added again is there.
        again = NewMemory(content=Content(text="again"), embedding=png_vector(store))
        assert store.add(again).already == 1
        assert store.content_id(Content(text="again")) == ids[0]
    assert json.loads((written / "memory.json").read_text())["format"] == 2

    def put_back(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if row["memory_id"] == "m2").update(loose)

    tampered(written, put_back)
    with (
        MemoryStore(written, cipher=both, background=False) as store,
        pytest.raises(ConsolidationError, match=f"memory m2 {CHANGED}"),
    ):
        store.get("m2")


def png_vector(store: MemoryStore) -> Any:
    """Any vector of the store."""
    return store.vectors(["m3"])[1][0]


def test_nothing_is_written_under_a_key_that_was_replaced(tmp_path: Path) -> None:
    """A store that another process rotates says so, instead of sealing what nobody will open."""
    first = filled(tmp_path / "s", AesGcm((OLD,)))
    with MemoryStore(tmp_path / "s", cipher=AesGcm((OLD,))) as second:
        assert rotate(second, AesGcm((NEW, OLD))) == 2
    for ask in (
        lambda: first.add(note("c")),
        lambda: first.update("a", category="c"),
        lambda: first.get("a"),
    ):
        with pytest.raises(ConsolidationError, match="does not open"):
            ask()
    with MemoryStore(tmp_path / "s", cipher=AesGcm((NEW,))) as store:
        assert store.count() == 2
        assert verify(store).problems == {}
