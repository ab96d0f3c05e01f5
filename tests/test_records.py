"""One reader of rows: no row is lost without a word, and nothing ends in a traceback."""

from __future__ import annotations

import datetime
import gzip
import json
import random
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memopt.commands.memory.add import read as read_memories
from memopt.errors import InputError
from memopt.quantization.accuracy.calibration import read as read_calibration
from memopt.records import open_records
from memopt.runtimes.inputs import read_items

ROWS = [f"bird number {n}, on the roof" for n in range(12)]


def written(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def everywhere(path: Path) -> list[list[str]]:
    """The texts that embed, calibration and memory take of one file."""
    return [
        [item.value for item in read_items(str(path), "text")],
        [item for record in read_calibration(path) for item in record.items],
        [memory.content.text or "" for memory in read_memories([str(path)], category="")],
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_tables_of_any_spreadsheet(tmp_path: Path, delimiter: str, ending: str) -> None:
    """Commas, semicolons, tabs and all three line ends give the same texts to every command."""
    lines = [f"text{delimiter}category"] + [f'"{text}"{delimiter}birds' for text in ROWS]
    path = written(tmp_path, "a.csv", ending.join(lines) + ending)
    embedded, _, remembered = everywhere(path)
    assert embedded == remembered == ROWS
    assert [r.items[0] for r in read_calibration(path, column="text")] == ROWS


def test_the_formats_agree(tmp_path: Path) -> None:
    """The same rows in every format are the same texts for every command."""
    files = {
        "a.txt": "\n".join(ROWS),
        "b.csv": "text\n" + "".join(f'"{text}"\n' for text in ROWS),
        "c.tsv": "text\n" + "".join(f"{text}\n" for text in ROWS),
        "d.jsonl": "\n\n".join(json.dumps(text) for text in ROWS),
        "e.csv": "sep=;\ntext;category\n" + "".join(f"{text};\n" for text in ROWS),
        "f.csv": "\ufefftext\n" + "".join(f'"{text}"\n' for text in ROWS),
    }
    for name, data in files.items():
        assert everywhere(written(tmp_path, name, data)) == [ROWS] * 3, name
    for name, data in files.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data.encode()))
        assert everywhere(tmp_path / f"{name}.gz") == [ROWS] * 3, name
    pq.write_table(pa.table({"text": ROWS}), tmp_path / "g.parquet")
    assert everywhere(tmp_path / "g.parquet") == [ROWS] * 3


@pytest.mark.parametrize("name", ["a.txt.gz", "a.csv.gz", "a.jsonl.gz"])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, name: str) -> None:
    """Cut off, changed, of other bytes or of none: one line with the file, early or late."""
    whole = gzip.compress("\n".join(['"text"', *(f'"bird {n}"' for n in range(9_000))]).encode())
    for data in (whole[:-9], whole[:200] + b"abc" + whole[203:], b"text", b""):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"{name} is no whole gzip file"):
            list(read_items(str(tmp_path / name), "text", "text"))


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", '{"text": "cut \\ud83d"}', "half of a surrogate pair at position 4"),
        ("a.jsonl", '{"cut \\ud83d": "a"}', "half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000, "nested too deep"),
        ("a.jsonl", '{"text": ' + "7" * 5000 + "}", "not usable JSON"),
        ("a.jsonl", "[1, 2]", "is list, not text"),
        ("a.csv", "text,score\nfirst\rrow,1\n", "a carriage return stands in a cell"),
        ("a.csv", "text,score\na,b,1\n", "has 3 cells, the first line has 2"),
        ("a.csv", 'text,score\n"a" b,1\n', "is not CSV"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    tmp_path: Path, name: str, data: str, says: str
) -> None:
    """Every command says which line and why; embed can leave out that row and no other."""
    good = '"a good row"' if name.endswith("l") else "a good row,3"
    path = written(tmp_path, name, f"{data.rstrip()}\n{good}\n")
    line = 2 if name.endswith(".csv") else 1
    for read in (
        lambda: list(read_calibration(path)),
        lambda: list(read_memories([str(path)], category="")),
    ):
        with pytest.raises(InputError, match=rf"line {line} .*{says}"):
            read()
    items = list(read_items(str(path), "text", "text"))
    assert [item.value for item in items] == [None, "a good row"]
    assert f"line {line}) " in str(items[0].problem)
    assert says in str(items[0].problem)


@pytest.mark.parametrize(
    "closing", ["", 'a "quoted" word,7\n', 'ends in a quote",7\n', 'x,"closed"\n']
)
def test_a_quote_that_is_never_closed_swallows_nothing(tmp_path: Path, closing: str) -> None:
    """Rows behind an open quote are not one cell of it, wherever the next quote is."""
    lines = [f"bird {n},{n}\n" for n in range(20)]
    lines[4] = '"' + lines[4]
    path = written(tmp_path, "a.csv", "text,score\n" + "".join(lines) + closing)
    with pytest.raises(InputError, match=r"line 6.*quote"):
        list(read_calibration(path))
    try:
        said = " ".join(str(item.problem) for item in read_items(str(path), "text"))
    except InputError as error:
        said = str(error)
    assert "line 6" in said


def test_a_long_quoted_text_is_one_cell(tmp_path: Path) -> None:
    """Line ends inside quotes are part of a text, also in many lines with commas."""
    text = "Dear all,\n\nit is late, and dark.\n" + "So, good night, all.\n" * 9 + "Yours"
    path = written(tmp_path, "a.csv", f'text,score\n"{text}",1\nnext,2\n')
    assert [item.value for item in read_items(str(path), "text")] == [text, "next"]


def test_a_cell_may_be_longer_than_131072_characters(tmp_path: Path) -> None:
    """The csv module's own limit holds for no command."""
    long = "word " * 60_000
    path = written(tmp_path, "a.csv", f"text,score\n{long},1\nnext,2\n")
    texts = [item.value for item in read_items(str(path), "text")]
    assert texts == [long, "next"]
    assert len(list(read_calibration(path))) == 2


def test_a_number_of_many_digits_is_no_score(tmp_path: Path) -> None:
    """4,000 digits are JSON that Python reads and no float holds."""
    path = written(tmp_path, "a.jsonl", '{"text": "a", "score": ' + "7" * 4000 + "}\n")
    assert [record.score for record in read_calibration(path)] == [None]


def test_nanoseconds_are_read(tmp_path: Path) -> None:
    """pandas writes times in nanoseconds, which Python's do not have."""
    stamp = pa.array([1714560000123456789], pa.timestamp("ns", "UTC"))
    pq.write_table(pa.table({"text": ["a note"], "timestamp": stamp}), tmp_path / "a.parquet")
    (memory,) = read_memories([str(tmp_path / "a.parquet")], category="")
    assert memory.timestamp == datetime.datetime.fromtimestamp(1714560000, datetime.UTC).replace(
        microsecond=123456
    )


def test_a_header_is_never_guessed_for_embed(tmp_path: Path) -> None:
    """One column under an unusual name could be a header or a text: the choice is asked for."""
    path = written(tmp_path, "a.csv", "review\nvery good\nnot so good\n")
    with pytest.raises(InputError, match=r"may have a header or none.*--column"):
        list(read_items(str(path), "text"))
    assert len(list(read_items(str(path), "text", "review"))) == 2
    assert len(list(read_items(str(path), "text", "0"))) == 3


def test_no_column_hides_another(tmp_path: Path) -> None:
    """Two columns of one name are two columns; in Parquet they are refused."""
    path = written(tmp_path, "a.csv", "text,text\na,b\n")
    assert [dict(r.values) for r in open_records(path)] == [{"text": "a", "text.1": "b"}]
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="column 'text' twice"):
        open_records(tmp_path / "a.parquet")


def test_damaged_parquet_is_one_line(tmp_path: Path) -> None:
    """Any changed byte of any part of the file gives rows or one clear line."""
    pq.write_table(pa.table({"text": ROWS, "n": range(12)}), tmp_path / "a.parquet")
    good = (tmp_path / "a.parquet").read_bytes()
    rng = random.Random(0)
    for _ in range(400):
        at = rng.randrange(len(good))
        damaged = good[:at] + bytes([rng.randrange(256)]) + good[at + 1 :]
        path = written(tmp_path, "b.parquet", damaged)
        with suppress(InputError):
            list(open_records(path))
