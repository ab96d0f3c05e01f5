"""memopt memory through the real command line, good and bad input."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memopt.bundle import Bundle
from memopt.cli import app as whole
from memopt.commands.memory import app
from memopt.commands.memory.add import read
from memopt.errors import MemoptError
from tests.memory.kit import files_with, png


def memopt(*arguments: object, input: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``memopt memory ...`` in this process, where a command does not import for 2 seconds."""
    command = ["memory", *map(str, arguments)]
    done = CliRunner().invoke(whole, command, input=input)
    if done.exception is None or isinstance(done.exception, SystemExit):
        code, problem = done.exit_code, done.stderr
    elif isinstance(done.exception, MemoptError):
        code, problem = done.exception.exit_code, f"{done.stderr}error: {done.exception}"
    else:
        raise done.exception
    return subprocess.CompletedProcess(command, code, done.stdout, problem)


def process(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run ``memopt memory ...``."""
    command = [sys.executable, "-m", "memopt", "memory", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def store(minilm: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of texts made by the command; do not change it."""
    folder = tmp_path_factory.mktemp("memory")
    lines = ["The key is under the mat.", "Rain is expected tonight.", "A cat sleeps all day."]
    (folder / "notes.txt").write_text("\n".join(lines) + "\n")
    (folder / "more.jsonl").write_text(
        '{"text": "Ann moved to Oslo.", "category": "people", "timestamp": "2025-05-01"}\n"plain"\n'
    )
    inputs = [folder / "notes.txt", folder / "more.jsonl", "-", "mail bob@example.org"]
    done = process(
        "add", folder / "s", *inputs, "--model", minilm.path, "--json", input="From a pipe.\n"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["added"] == 7
    return folder / "s"


def test_what_was_added_is_found(store: Path) -> None:
    """By meaning, with the bundle remembered, redacted, and once."""
    found = json.loads(memopt("search", store, "where is my key?", "--json").stdout)
    assert found[0]["text"] == "The key is under the mat."
    assert 0 < found[0]["similarity"] <= 1
    people = memopt("search", store, "who moved?", "--category", "people", "--json")
    assert [row["text"] for row in json.loads(people.stdout)] == ["Ann moved to Oslo."]
    early = memopt("search", store, "weather", "--until", "2025-06-01", "--json")
    assert len(json.loads(early.stdout)) == 1
    again = memopt("add", store, "A cat sleeps all day.", "--json")
    assert json.loads(again.stdout)["already"] == 1
    assert files_with(store, b"bob@example.org") == []


def test_show_stats_verify_export_import(store: Path, tmp_path: Path) -> None:
    """Tables for people, JSON for scripts, and a copy that verifies."""
    stats = json.loads(memopt("stats", store, "--json").stdout)
    assert stats["memories"] == 7
    assert stats["tiers"]["short_term"] == 7
    key = json.loads(memopt("search", store, "cat", "--json").stdout)[0]["memory_id"]
    shown = json.loads(memopt("show", store, key, "--log", "--json").stdout)
    assert shown["text"] == "A cat sleeps all day."
    assert {line["action"] for line in shown["log"]} >= {"read", "write"}
    assert memopt("export", store, tmp_path / "out").returncode == 0
    copied = memopt("import", tmp_path / "copy", tmp_path / "out")
    assert "7 added, 0 of them long-term, 0 there already; links of" in copied.stdout
    again = memopt("import", tmp_path / "copy", tmp_path / "out", "--json")
    assert json.loads(again.stdout).items() >= {"added": 0, "already": 7, "differing": 0}.items()
    expected = tmp_path / "ids"
    expected.write_text(f"{key}\nnobody\n")
    assert memopt("verify", tmp_path / "copy").returncode == 0
    missing = memopt("verify", tmp_path / "copy", "--expect", expected, "--json")
    assert missing.returncode == 1
    assert json.loads(missing.stdout)["missing"] == ["nobody"]


def test_import_redacts_and_counts_as_add_does(minilm: Bundle, tmp_path: Path) -> None:
    """The same option, and what was there already or says something else is told."""
    mail = ("write to ann@example.org", "--model", minilm.path, "--redaction", "none", "--json")
    key = json.loads(memopt("add", tmp_path / "mail", *mail).stdout)["ids"][0]
    assert memopt("export", tmp_path / "mail", tmp_path / "mails").returncode == 0
    for kind, text in ((), "[EMAIL]"), (("--redaction", "none"), "ann@example.org"):
        place = tmp_path / f"mail-{len(kind)}"
        assert memopt("import", place, tmp_path / "mails", *kind).returncode == 0
        assert text in json.loads(memopt("show", place, key, "--json").stdout)["text"]
    # What is there under the same id and says something else is told.
    warned = memopt("import", tmp_path / "mail-0", tmp_path / "mails", "--redaction", "none")
    assert "0 added" in warned.stdout
    assert "1 ids hold other content, which stays" in warned.stderr


def test_an_empty_cell_is_nothing_in_every_kind_of_table(tmp_path: Path) -> None:
    """Not an empty time or category, whatever the file is compressed with."""
    rows = [["text", "category", "expires_at"], ["a red door", "", ""], ["rain", "x", "2027-01-01"]]
    for ending, delimiter in ((".csv", ","), (".tsv", "\t"), (".CSV.gz", ","), (".tsv.gz", "\t")):
        table = "\n".join(delimiter.join(row) for row in rows).encode()
        path = tmp_path / f"rows{ending}"
        path.write_bytes(gzip.compress(table) if ending.endswith(".gz") else table)
        first, second = read([str(path)], category="usual")
        assert (first.category, first.expires_at) == ("usual", None), ending
        assert second.category == "x", ending
        assert second.expires_at is not None, ending


def test_forget_erases(minilm: Bundle, tmp_path: Path) -> None:
    """By id, after asking; the words are in no file then."""
    path, secret = tmp_path / "s", "zq7vxk2jwp9 hb4nmt6rlc8"
    added = memopt("add", path, secret, "something else", "--model", minilm.path, "--json")
    key = json.loads(added.stdout)["ids"][0]
    assert files_with(path, b"zq7vxk2jwp9")
    assert memopt("forget", path, key, input="n\n").returncode == 1
    assert memopt("forget", path, key, "--yes").returncode == 0
    assert files_with(path, b"zq7vxk2jwp9") == []
    assert json.loads(memopt("stats", path, "--json").stdout)["memories"] == 1


def test_bad_input_is_one_line(
    store: Path, minilm: Bundle, tmp_path: Path, unmeasured: None
) -> None:
    """Each kind of bad input: exit 1 or 2, one line that names it, nothing added."""
    (tmp_path / "broken.png").write_bytes(png(1)[:60])
    (tmp_path / "broken.wav").write_bytes(b"RIFF\x10\0\0\0WAVEjunk")
    (tmp_path / "huge.txt").write_text("x" * (50 << 20))
    (tmp_path / "latin.txt").write_bytes("Größe\n".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "number.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "memory.json").write_text('{"format": 9, "dim": 4}')
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("x")
    before = json.loads(memopt("stats", store, "--json").stdout)["memories"]
    cases: list[tuple[list[object], int, str]] = [
        (["add", store, tmp_path / "broken.png"], 1, "broken.png: vision is no image"),
        (["add", store, tmp_path / "broken.wav"], 1, "broken.wav: audio is no sound"),
        (["add", store, tmp_path / "huge.txt"], 1, "huge.txt line 1: text has 50.0 MiB"),
        (["add", store, tmp_path / "number.jsonl"], 1, "number.jsonl line 2: text is int"),
        (["add", store, tmp_path / "latin.txt"], 1, "UTF-8"),
        (["add", store, tmp_path / "bad.jsonl"], 1, "line 2"),
        (["add", store, tmp_path / "none.png"], 1, "none.png"),
        (["add", tmp_path / "n", "x", "--vision", minilm.path], 2, "joint"),
        (["search", store, ""], 1, "empty"),
        (["search", store], 1, "query"),
        (["search", store, "x", "--top-k", "-3"], 1, "top_k is -3"),
        (["search", store, "x", "--since", "soon"], 2, "'soon'"),
        (["search", store, "x", "--modality", "smell"], 1, "smell"),
        (["search", store, "--image", tmp_path / "broken.png"], 1, "image"),
        (["show", store, "unknown"], 1, "'unknown'"),
        (["forget", store, "unknown", "--yes"], 1, "'unknown'"),
        (["forget", store, "--yes"], 2, "nothing to forget"),
        (["stats", tmp_path / "plain"], 1, "no memory store"),
        (["stats", tmp_path / "newer"], 1, "9"),
        (["import", store, tmp_path], 1, "memories.parquet"),
    ]
    # In this process, where a case costs milliseconds; that main() makes one line of any such error
    # is tested for the whole command line, and here once.
    for arguments, code, named in cases:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert isinstance(done.exception, MemoptError), (arguments, done.exception)
        assert done.exception.exit_code == code
        assert named.lower() in str(done.exception).lower(), (arguments, done.exception)
    once = process(*cases[0][0])
    assert once.returncode == 1
    assert [line[:7] for line in once.stderr.splitlines()] == ["error: "]
    # A line before the bad one was added: jsonl and pipes are streams of commits.
    after = json.loads(memopt("stats", store, "--json").stdout)["memories"]
    assert after - before in (0, 1)


def test_an_encrypted_store_needs_its_key(minilm: Bundle, tmp_path: Path) -> None:
    """From a file; the words are in no file of the store."""
    path, key = tmp_path / "s", tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o600)
    added = memopt("add", path, "zq7vxk2jwp9 key", "--model", minilm.path, "--key", key)
    assert added.returncode == 0, added.stderr
    assert files_with(path, b"zq7vxk2jwp9") == []
    found = json.loads(memopt("search", path, "key", "--key", key, "--json").stdout)
    assert found[0]["text"] == "zq7vxk2jwp9 key"
    refused = memopt("search", path, "key")
    assert refused.returncode == 1
    assert "no key was given" in refused.stderr
    # A new key before the old one; afterwards the new one alone opens it.
    both, new = tmp_path / "both", tmp_path / "new"
    for file, text in ((both, "\n".join(["cd" * 32, "ab" * 32])), (new, "cd" * 32)):
        file.write_text(text)
        file.chmod(0o600)
    lacking = memopt("rekey", path, "--key", key)
    assert (lacking.returncode, "two keys" in lacking.stderr) == (2, True)
    moved = memopt("rekey", path, "--key", both)
    assert "1 memories sealed" in moved.stdout, moved.stderr
    shown = json.loads(memopt("search", path, "key", "--key", new, "--json").stdout)
    assert shown[0]["text"] == "zq7vxk2jwp9 key"
    assert "does not open" in memopt("search", path, "key", "--key", key).stderr


@pytest.mark.parametrize("source", ["notes.md", "gone.pdf", "./gone.dat", "../gone/x.q", "folder"])
def test_a_name_of_a_file_is_not_kept_as_a_text(
    source: str, minilm: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is stored then, also of what came before it, and no empty store is left."""
    monkeypatch.chdir(tmp_path)
    Path("notes.md").write_text("The roof was mended in May.\n")
    Path("folder").mkdir()
    done = memopt("add", "s", "A good text.", source, "--model", minilm.path)
    assert done.returncode != 0
    assert source in done.stderr
    assert not Path("s").exists()


def test_texts_that_only_look_like_paths_are_kept(minilm: Bundle, tmp_path: Path) -> None:
    """Addresses of the web, versions, and sentences that name a file."""
    texts = ["https://example.org/a.html", "and/or", "v1.2", "Read notes.md first", "3.14"]
    done = memopt("add", tmp_path / "s", *texts, "--model", minilm.path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["added"] == 5


def test_a_failed_add_or_import_leaves_no_empty_store(
    store: Path, minilm: Bundle, tmp_path: Path
) -> None:
    """A store that was there stays, and so does a folder of the user's."""
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"colour": "bad"}\n')
    new, empty = tmp_path / "new", tmp_path / "empty"
    empty.mkdir()
    for folder in (new, empty):
        done = memopt("add", folder, tmp_path / "bad.jsonl", "--model", minilm.path)
        assert done.returncode != 0
        assert "colour" in done.stderr
    assert not new.exists()
    assert list(empty.iterdir()) == []
    assert memopt("export", store, tmp_path / "out").returncode == 0
    for file in (tmp_path / "out").iterdir():
        file.write_bytes(b"PAR1 no")
    assert memopt("import", new, tmp_path / "out").returncode != 0
    assert not new.exists()
    assert memopt("add", new, "kept", "--model", minilm.path).returncode == 0
    assert memopt("add", new, tmp_path / "bad.jsonl").returncode != 0
    found = json.loads(memopt("search", new, "kept", "--json").stdout)
    assert [memory["text"] for memory in found] == ["kept"]
