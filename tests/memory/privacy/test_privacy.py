"""Redaction, encryption with key rotation, and the log of who did what."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from memopt.errors import ConfigurationError, ConsolidationError, MissingExtra
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content, NewMemory
from memopt.memory.privacy.access_log import AccessLog, read_log
from memopt.memory.privacy.erase import erase
from memopt.memory.privacy.keys import AesGcm, read_cipher, rotate
from memopt.memory.privacy.redaction import redact, redactor
from memopt.memory.session import open_memory
from tests.memory.kit import Hashing, files_with, note, png

OLD, NEW = bytes(32), bytes(range(32))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("write to ann.lee+x@mail.example.co.uk now", "EMAIL"),
        ("an ünï.lee@exämple.de fragen", "EMAIL"),
        ("card 4111 1111 1111 1111 ok", "CARD"),
        ("5500-0055-5555-5559", "CARD"),
        ("pay DE89 3704 0044 0532 0130 00 please", "IBAN"),
        ("GB82WEST12345698765432", "IBAN"),
        ("to DE89 3704 0044 0532 0130 00 by the end of may", "IBAN"),
        ("an de89370400440532013000 senden", "IBAN"),
        ("call +49 30 1234567", "PHONE"),
        ("call 00 49 30 1234567", "PHONE"),
        ("my mobile is 01511234567", "PHONE"),
        ("call (030) 123456", "PHONE"),
        ("call 555-123-4567", "PHONE"),
        ("from 192.168.1.20 came", "IP"),
        ("host 2001:db8::8a2e:370:7334 is up", "IP"),
        ("AKIAIOSFODNN7EXAMPLE", "KEY"),
        ("ghp_" + "a1B2" * 9, "KEY"),
        ("sk-ant-api03-" + "x9Yz" * 8, "KEY"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N", "KEY"),
        ("-----BEGIN PRIVATE KEY-----\nMIIEvQ\nabc\n-----END PRIVATE KEY-----", "KEY"),
        ("password: hT7!kq9#Lw2z", "KEY"),
        ("api_key=9f8aK2lm0PqR7s", "KEY"),
        ("aws_secret_access_key=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "KEY"),
        ("Passwort: Geheim123!x", "KEY"),
    ],
)
def test_secrets_are_taken_out(text: str, kind: str) -> None:
    """And nothing of them stays."""
    found = redact(text)
    assert found.counts == {kind: 1}
    assert f"[{kind}]" in found.text
    assert not any(len(word) > 12 and word in found.text for word in text.split())


@pytest.mark.parametrize(
    "text",
    [
        "meet at 10:30 or 11:45 on 2026-11-23",
        "version 1.2.3.4000 and 3.14159265358979",
        "order 4111 1111 1111 1112",
        "0000 0000 0000 0000",
        "GB82WEST12345698765431",
        "a::b and std::vector<int> x",
        "300.300.300.300",
        "the token economy is a secret garden",
        "her password is forgotten",
        "read pages 100-200, paragraph 12",
        "@home and a@b",
        "the phone rang 3 times",
        "telephone exchange of 1987",
        "on12 people came here from the town at10",
        "population 8 000 000",
    ],
)
def test_harmless_text_stays(text: str) -> None:
    """Checksums and formats keep the false alarms down."""
    assert redact(text).text == text


def test_presidio_is_asked_for_by_name() -> None:
    """Where it is not installed the error says how to install it."""
    with pytest.raises(MissingExtra, match="presidio"):
        redactor("presidio")
    with pytest.raises(ConfigurationError, match="unknown redaction 'all'"):
        redactor("all")


def test_a_store_redacts_before_anything_is_written(tmp_path: Path) -> None:
    """No file ever holds the address."""
    with MemoryStore(tmp_path / "s", embedder=Hashing(), redact=redactor("patterns")) as store:
        key = store.add(NewMemory(content=Content(text="mail ann@example.org"))).ids[0]
        assert store.get(key).text == "mail [EMAIL]"
    assert files_with(tmp_path / "s", b"ann@example.org") == []


def test_an_encrypted_store_holds_no_plain_bytes_and_rotates(tmp_path: Path) -> None:
    """Content opens with its key alone; afterwards with the new one alone."""
    path, text = tmp_path / "s", "zq7vxk2jwp9 under the mat"
    with MemoryStore(path, embedder=Hashing(), cipher=AesGcm((OLD,))) as store:
        content = Content(text=text, vision=png(3))
        store.add([NewMemory(content=content, memory_id="m"), note("other")])
        archived = store.cells.pack(store.rows(["other"]))
        store.commit(updates=archived)
    assert files_with(path, text.encode()) == files_with(path, png(3)) == []
    for cipher, named in ((None, "no key"), (AesGcm((NEW,)), "does not open")):
        with pytest.raises(ConsolidationError, match=named):
            MemoryStore(path, cipher=cipher)
    with MemoryStore(path, cipher=AesGcm((OLD,))) as store:
        assert rotate(store, AesGcm((NEW, OLD))) == 2
        assert rotate(store, AesGcm((NEW, OLD))) == 0
        erase(store)
    with MemoryStore(path, cipher=AesGcm((NEW,))) as store:
        assert store.get("m").text == text
        assert store.get("m").vision_data == png(3)
        assert store.get("other").text == "other"
    with pytest.raises(ConsolidationError):
        MemoryStore(path, cipher=AesGcm((OLD,)))


def test_a_rotation_cut_short_goes_on(tmp_path: Path) -> None:
    """Half the rows under each key: both keys open it, and the next run ends it."""
    path = tmp_path / "s"
    with MemoryStore(path, embedder=Hashing(), cipher=AesGcm((OLD,))) as store:
        store.add([note(f"text {at}") for at in range(600)])

        def stop(done: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            rotate(store, AesGcm((NEW, OLD)), on_step=stop)
    with MemoryStore(path, cipher=AesGcm((NEW, OLD))) as store:
        assert {m.text for m in store.get_many(["text-0", "text-599"])} == {"text 0", "text 599"}
        assert rotate(store, AesGcm((NEW, OLD))) == 600 - 512
    with MemoryStore(path, cipher=AesGcm((NEW,))) as store:
        assert store.get("text-599").text == "text 599"


def test_keys_come_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hex or base64; others may not read the file; the value is never in a message."""
    assert read_cipher() is None
    monkeypatch.setenv("MEMOPT_MEMORY_KEY", "00" * 32)
    cipher = read_cipher()
    assert cipher is not None
    assert cipher.keys == (OLD,)
    path = tmp_path / "key"
    path.write_text("secretvalue")
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="256-bit") as caught:
        read_cipher(path)
    assert "secretvalue" not in str(caught.value)
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="can be read by others"):
        read_cipher(path)


def test_every_access_is_in_the_log(tmp_path: Path) -> None:
    """By actor, action and memory; over several sessions, in order."""
    for actor in ("ann", "bob"):
        with MemoryStore(tmp_path / "s", embedder=Hashing(), actor=actor) as store:
            log = AccessLog(store)
            store.add(note(f"by {actor}"))
            store.find(Content(text="by ann"), top_k=1)
            store.get("by-ann")
            log.close()
    with MemoryStore(tmp_path / "s", actor="carl") as store:
        log = AccessLog(store)
        store.delete(["by-ann"])
        lines = read_log(store, memory_id="by-ann")
        log.close()
        found = [(line.actor, line.action) for line in lines]
        reads = [("ann", "read")] * 2 + [("bob", "read")] * 2
        assert found == [("ann", "write"), *reads, ("carl", "delete")]
        assert {line.actor for line in read_log(store, action="delete")} == {"carl"}
        assert read_log(store, actor="bob", action="write")[0].memory_ids == ("by-bob",)


def test_writes_are_in_the_log_before_they_return_and_reads_soon_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a process that is killed has left its traces."""
    monkeypatch.setattr("memopt.memory.privacy.access_log.LONGEST_PENDING", 0.05)
    with MemoryStore(tmp_path / "s", embedder=Hashing(), actor="ann") as store:
        AccessLog(store)
        store.add(note("a"))
        other = MemoryStore(tmp_path / "s", actor="bob")
        assert [line.action for line in read_log(other)] == ["write"]
        store.get("a")
        while len(read_log(other)) < 2:
            time.sleep(0.02)
        assert [line.action for line in read_log(other)] == ["write", "read"]


def test_a_memory_is_opened_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The front door redacts, logs, links and encrypts without being asked for each."""
    monkeypatch.setenv("MEMOPT_MEMORY_KEY", "11" * 32)
    with open_memory(tmp_path / "s", embedder=Hashing()) as memory:
        ids = memory.store.add([note("mail ann@example.org now"), note("an hour later")]).ids
        assert memory.store.get(ids[0]).text == "mail [EMAIL] now"
        found = memory.retriever.retrieve("an hour later", top_k=1)
        assert [result.memory.memory_id for result in found] == [ids[1]]
        assert memory.store.links([ids[0]])[ids[0]][0].linked_id == ids[1]
        assert {line.action for line in read_log(memory.store)} == {"write", "read"}
    assert files_with(tmp_path / "s", b"an hour later") == []
    monkeypatch.setenv("MEMOPT_MEMORY_KEY", "22" * 32)
    with pytest.raises(ConsolidationError, match="does not open"), open_memory(tmp_path / "s"):
        pass
