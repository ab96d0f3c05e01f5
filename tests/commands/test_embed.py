"""memopt embed: every kind of file in and out, bad input named, a kill loses nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from memopt.bundle import Bundle
from memopt.errors import ConfigurationError, InputError
from memopt.runtimes import embed as module
from memopt.runtimes.embed import embed
from memopt.runtimes.engine import ArrowEngine
from memopt.runtimes.inputs import read_items
from memopt.runtimes.testing import fake_engine

TEXTS = ["a cat", "", "zwei\u2028Hunde", 'said "so", twice', "a cat"]


@pytest.fixture
def engine() -> ArrowEngine:
    return fake_engine(dimension=8)


def source(folder: Path, suffix: str) -> Path:
    path = folder / f"in{suffix}"
    if suffix == ".txt":
        path.write_bytes("\r\n".join(TEXTS).encode())
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"id": 1, "text": text}) for text in TEXTS))
    elif suffix == ".csv":
        lines = ["id,text"] + [f'1,"{text.replace(chr(34), chr(34) * 2)}"' for text in TEXTS]
        path.write_text("\n".join(lines))
    else:
        pq.write_table(pa.table({"id": [1] * len(TEXTS), "text": TEXTS}), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("ending", [".npy", ".parquet", ".jsonl"])
def test_any_input_to_any_output(
    engine: ArrowEngine, suffix: str, ending: str, tmp_path: Path
) -> None:
    """One vector per input, in order, equal to encode()."""
    out = tmp_path / f"out{ending}"
    done = embed(engine, str(source(tmp_path, suffix)), out)
    assert (done.inputs, done.vectors, done.dimension) == (5, 5, 8)
    if ending == ".npy":
        vectors = np.load(out)
    elif ending == ".parquet":
        table = pq.read_table(out)
        assert table["index"].to_pylist() == list(range(5))
        assert table["input"].to_pylist() == TEXTS
        vectors = np.array(table["vector"].to_pylist(), np.float32)
    else:
        lines = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
        assert [line["input"] for line in lines] == TEXTS
        vectors = np.array([line["vector"] for line in lines], np.float32)
    np.testing.assert_array_equal(vectors, engine.encode(TEXTS))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([f"in{suffix}", out.name])


def test_an_unreadable_input_is_named_and_leaves_nothing(
    engine: ArrowEngine, tmp_path: Path
) -> None:
    """File, byte, line or column is in the message; no output and no parts are left."""
    bad = tmp_path / "in.txt"
    bad.write_bytes(b"good\ncaf\xe9\n")
    with pytest.raises(InputError, match=r"in\.txt is not UTF-8 text: byte 0xe9 at offset 8"):
        embed(engine, str(bad), tmp_path / "out.npy")
    bad.write_bytes(b"")
    with pytest.raises(InputError, match="holds nothing to embed"):
        embed(engine, str(bad), tmp_path / "out.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["in.txt"]
    cases = {
        "in.csv": (b"id,txt\n1,a\n", "columns 'id', 'txt'.*--column"),
        "in.parquet": (b"PAR1 no", "not a readable Parquet file"),
        "in.pdf": (b"", "ending '.pdf'"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message):
            list(read_items(str(tmp_path / name), "text"))
    with pytest.raises(InputError, match="no input"):
        read_items(str(tmp_path / "gone.txt"), "text")
    with pytest.raises(InputError, match=r"no column 'txet'.*'text'"):
        list(read_items(str(source(tmp_path, ".csv")), "text", "txet"))
    with pytest.raises(ConfigurationError, match=r"ending '\.csv'"):
        embed(engine, str(bad), tmp_path / "out.csv")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("in.jsonl", b'"a"\n{"text"\n"b"', r"\(.*in\.jsonl line 2\) is not JSON"),
        ("in.jsonl", b'{"text": "a"}\n{"txt": "b"}\n"b"', r"has no 'text', did you mean 'txt'"),
        ("in.jsonl", b'"a"\nnull\n"b"', "is null, not text"),
        ("in.csv", b"id,text\n1,a\n2\n3,b\n", r"in\.csv line 3\) has 1 cells"),
        ("in.parquet", b"", r"in\.parquet row 2\) is null"),
    ],
)
def test_a_row_that_holds_no_text_is_named_or_skipped(
    engine: ArrowEngine, tmp_path: Path, name: str, data: bytes, reason: str
) -> None:
    """fail stops with file and line; skip leaves out that one row and reports it."""
    path, out = tmp_path / name, tmp_path / "out.parquet"
    if data:
        path.write_bytes(data)
    else:
        pq.write_table(pa.table({"text": ["a", None, "b"]}), path)
    with pytest.raises(InputError, match=f"input 1 .*{reason}"):
        embed(engine, str(path), out)
    assert not out.exists()
    done = embed(engine, str(path), out, on_error="skip")
    assert [entry["index"] for entry in done.skipped] == [1]
    assert pq.read_table(out)["input"].to_pylist() == ["a", "b"]


def test_a_cell_of_a_csv_may_be_as_long_as_a_book(tmp_path: Path) -> None:
    """The csv module's own limit of 128 KiB does not apply."""
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "word " * 50_000 + "\n")
    assert [len(item.value) for item in read_items(str(path), "text")] == [250_000]


def test_the_output_is_never_the_input(engine: ArrowEngine, tmp_path: Path) -> None:
    """A file of texts is not replaced by its own vectors."""
    path = source(tmp_path, ".jsonl")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="is the input"):
        embed(engine, str(path), path)
    assert path.read_bytes() == before


def test_a_csv_without_header_is_read_by_position(tmp_path: Path) -> None:
    """A number counts columns from 0 and the first line is data; line breaks in cells survive."""
    path = tmp_path / "a.csv"
    path.write_text('x,"one\ntwo"\ny,three\n')
    assert [item.value for item in read_items(str(path), "text", "1")] == ["one\ntwo", "three"]


def test_a_corrupt_image_among_good_ones(tmp_path: Path) -> None:
    """fail names it and writes nothing; skip leaves it out of Parquet and reports it."""
    from memopt.runtimes.batching import USUAL, Batch, Budget, UnusableItems
    from memopt.runtimes.testing import FakeFrontEnd

    class Decoding(FakeFrontEnd):
        def prepare(self, items: object, budget: Budget = USUAL) -> list[Batch]:
            broken = {}
            for index, item in enumerate(items):  # type: ignore[var-annotated, arg-type]
                try:
                    Image.open(item).load()
                except OSError as error:
                    broken[index] = f"({item}) {error}"
            if broken:
                raise UnusableItems(broken)
            return super().prepare(items, budget)  # type: ignore[arg-type]

    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"not an image")
    (folder / "notes.txt").write_text("ignored")
    engine = fake_engine(8, "image")
    engine._front = Decoding("image")
    out = tmp_path / "out.parquet"
    with pytest.raises(InputError, match=r"input 1 .*b\.png"):
        embed(engine, str(folder), out)
    assert [p.name for p in tmp_path.iterdir()] == ["images"]
    done = embed(engine, str(folder), out, on_error="skip")
    assert [entry["index"] for entry in done.skipped] == [1]
    table = pq.read_table(out)
    assert table["index"].to_pylist() == [0, 2]
    assert np.isfinite(np.array(table["vector"].to_pylist())).all()
    embed(engine, str(folder), tmp_path / "out.npy", on_error="skip")
    assert np.isnan(np.load(tmp_path / "out.npy")).any(axis=1).tolist() == [False, True, False]


def test_resume_refuses_changed_inputs(
    engine: ArrowEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was left by a kill is only used with the same inputs and variant."""
    monkeypatch.setattr(module, "PART", {"text": 2})
    path, out = tmp_path / "in.txt", tmp_path / "out.npy"
    path.write_text("a\nb\nc\nd\n")
    embed_parts(engine, path, out, monkeypatch)
    path.write_text("a\nX\nc\nd\n")
    with pytest.raises(InputError, match="have changed"):
        embed(engine, str(path), out, resume=True)
    with pytest.raises(InputError, match="another normalize"):
        embed(engine, str(path), out, resume=True, normalize=False)


def embed_parts(
    engine: ArrowEngine, path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run until the parts are there, then stop as a kill would."""
    with monkeypatch.context() as patched:

        def stop(self: object, count: int) -> None:
            raise KeyboardInterrupt

        patched.setattr(module._Parts, "assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            embed(engine, str(path), out)
    assert not out.exists()


@pytest.mark.parametrize("damaged", [b"", b'{"inputs": 1', b"[1]", b"\xff"])
def test_damaged_notes_of_a_killed_run_are_one_line(
    engine: ArrowEngine, tmp_path: Path, damaged: bytes
) -> None:
    """The line names the file and says how to start anew."""
    source, out = tmp_path / "in.txt", tmp_path / "o.npy"
    source.write_text("a cat\n")
    parts = tmp_path / ".o.npy.parts"
    parts.mkdir()
    (parts / "state.json").write_bytes(damaged)
    with pytest.raises(InputError, match=r"state.json is not .*without --resume"):
        embed(engine, str(source), out, resume=True)


def test_a_killed_run_resumes_without_loss(minilm: Bundle, tmp_path: Path) -> None:
    """kill -9 in the middle, then --resume: the same bytes as an uninterrupted run."""
    path = tmp_path / "in.jsonl"
    count = module.PART["text"] + 200
    path.write_text("".join(f'"text {i} of many"\n' for i in range(count)))
    command = [sys.executable, "-m", "memopt", "embed", str(minilm.path), "-i", str(path)]
    command += ["--device", "cpu", "--variant", "onnx-fp32-fused", "--json", "-o"]
    killed, whole = tmp_path / "killed.npy", tmp_path / "whole.npy"
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL)
    parts = tmp_path / ".killed.npy.parts"
    while not (parts / "00000000.json").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not killed.exists()
    run = subprocess.run([*command, str(killed), "--resume"], capture_output=True, check=True)
    summary = json.loads(run.stdout)
    assert summary["inputs"] == summary["vectors"] == count
    assert summary["resumed"] >= module.PART["text"]
    subprocess.run([*command, str(whole)], check=True, capture_output=True)
    assert killed.read_bytes() == whole.read_bytes()
    assert not parts.exists()


def test_ctrl_c_says_how_to_go_on(minilm: Bundle, tmp_path: Path) -> None:
    """One line, exit 130, and the parts stay for --resume."""
    command = [sys.executable, "-m", "memopt", "embed", str(minilm.path), "-i", "-", "-o"]
    with subprocess.Popen(
        [*command, str(tmp_path / "o.npy"), "--device", "cpu"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        state = tmp_path / ".o.npy.parts" / "state.json"
        while not state.is_file():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors == "error: interrupted; what is done is kept; go on with --resume\n"
    assert process.returncode == 130
    assert state.is_file()


def test_stdin_and_the_summary(minilm: Bundle, tmp_path: Path) -> None:
    """`-` reads lines; the human summary names count, device and file."""
    command = [sys.executable, "-m", "memopt", "embed", str(minilm.path), "-i", "-", "-o"]
    result = subprocess.run(
        [*command, str(tmp_path / "o.npy"), "--device", "cpu"],
        input="one\ntwo\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "2 vectors of 384 from 2 inputs" in result.stdout
    assert np.load(tmp_path / "o.npy").shape == (2, 384)
