"""Calibration and validation inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memopt.bundle import Bundle
from memopt.errors import ConfigurationError, InputError, MemoptError, QuantizationError
from memopt.quantization.accuracy.calibration import (
    FEWEST,
    CalibrationSet,
    check_disjoint,
    load,
    split,
    stratified,
)
from memopt.quantization.quantize import Samples, read_samples

PAIRS = [(f"the {n} first text", f"another {n} text, longer than it", n % 6) for n in range(40)]


def written(folder: Path, kind: str) -> Path:
    """Write PAIRS as a file of this kind."""
    path = folder / f"data.{kind}"
    names = ["sentence1", "sentence2", "score"]
    rows = [dict(zip(names, row, strict=True)) for row in PAIRS]
    if kind == "csv":
        body = "\n".join(f'"{a}","{b}",{s}' for a, b, s in PAIRS)
        path.write_text("sentence1,sentence2,score\n" + body + "\n")
    elif kind == "tsv":
        path.write_text("\n".join(f"{a}\t{b}\t{s}" for a, b, s in PAIRS))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_formats_give_the_same_split(tmp_path: Path, kind: str) -> None:
    """Every format gives texts, pairs and scores, split alike, with or without a header."""
    calibration, held = split(written(tmp_path, kind), samples=20, validation=20, seed=3)
    assert len(calibration) == 20
    assert len(held) == 20
    assert len(held.pairs) == 10
    left, right, score = held.pairs[0]
    assert (held.items[left], held.items[right], int(score)) in PAIRS
    check_disjoint(calibration, held)


def test_same_seed_same_split(texts: Path) -> None:
    """The same seed gives the same inputs, another seed others."""
    assert split(texts, samples=30, seed=1) == split(texts, samples=30, seed=1)
    assert split(texts, samples=30, seed=1)[0] != split(texts, samples=30, seed=2)[0]


def test_rows_that_share_a_text_stay_on_one_side(tmp_path: Path) -> None:
    """A text of a validation row is never calibrated with, whatever other rows it is in."""
    path = tmp_path / "d.jsonl"
    rows = [{"a": f"text {n // 2}", "b": f"other {n}"} for n in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    calibration, held = split(path, samples=100, validation=20)
    assert not set(calibration.items) & set(held.items)
    check_disjoint(calibration, held)


def test_overlap_is_refused() -> None:
    """A validation set that repeats a calibration text, spaces aside, is refused by number."""
    first = CalibrationSet(items=("a cat", "a dog"), modality="text")
    second = CalibrationSet(items=("a  cat", "a cow"), modality="text")
    with pytest.raises(QuantizationError, match="1 of 2 validation inputs are calibration inputs"):
        check_disjoint(first, second)


def test_short_and_long_inputs_count() -> None:
    """One long input among a thousand short ones is always drawn."""
    lengths = [20] * 1000 + [900]
    assert all(1000 in stratified(lengths, 10, seed) for seed in range(5))


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("e.txt", "", "is empty"),
        ("b.txt", "\n\n", "is empty"),
        ("one.txt", "only one\n", "holds 1 distinct texts"),
        ("same.txt", "same\n" * 50, "holds 1 distinct texts"),
        ("bad.jsonl", '{"text": "a"}\n{"text"\n', "line 2 is not JSON"),
        ("bad.parquet", "nothing", "is not a readable Parquet file"),
        ("bin.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("x.doc", "text", "a .doc file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, body: str | bytes, says: str) -> None:
    """A file that cannot be used is one error that says why."""
    path = tmp_path / name
    path.write_bytes(body if isinstance(body, bytes) else body.encode())
    with pytest.raises(InputError) as caught:
        split(path)
    assert says in str(caught.value)


def test_wrong_column_names_the_columns(tmp_path: Path) -> None:
    """An unknown or numeric column is an error that names the columns there are."""
    path = written(tmp_path, "csv")
    with pytest.raises(InputError, match="no column 'sentence'; it has 'sentence1', 'sentence2'"):
        split(path, column="sentence")
    with pytest.raises(InputError, match="not text; columns with text: sentence1, sentence2"):
        split(path, column="score")
    assert all("first" in item for item in split(path, column="sentence1", samples=8)[0].items)


@pytest.mark.parametrize("counts", [(0, 5), (5, 0), (-1, 5)])
def test_no_samples(texts: Path, counts: tuple[int, int]) -> None:
    """Zero samples prove nothing and are refused."""
    with pytest.raises(InputError, match="cannot prove anything"):
        split(texts, samples=counts[0], validation=counts[1])


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"seed": -1}, "seed -1 is negative"),
        ({"max_length": 0}, "no room for text"),
        ({"max_length": -5}, "no room for text"),
    ],
)
def test_impossible_samples(texts: Path, values: dict[str, int], says: str) -> None:
    """A negative seed and lengths without room for text are refused."""
    with pytest.raises(ConfigurationError, match=says):
        Samples(calibration=texts, **values)  # type: ignore[arg-type]


def test_a_length_beyond_the_model_is_refused(tiny: Bundle, texts: Path) -> None:
    """More tokens than the model has places for would fail in the middle of a run."""
    with pytest.raises(ConfigurationError, match="beyond the model's 64 tokens"):
        read_samples(tiny, Samples(calibration=texts, max_length=65))


def test_modality(texts: Path, tmp_path: Path) -> None:
    """Texts for an image model, a folder for a text model and an empty folder are refused."""
    for path, modality in ((texts, "image"), (tmp_path, "text"), (tmp_path, "audio")):
        with pytest.raises(MemoptError):
            split(path, modality=modality)


def test_image_folder(tmp_path: Path) -> None:
    """Images are found in sub-folders, by suffix, in a fixed order."""
    for n in range(12):
        file = tmp_path / f"{n % 3}" / f"{n:02}.PNG"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"")
    (tmp_path / "notes.md").write_text("no image")
    calibration, held = split(tmp_path, modality="image", samples=4, validation=4)
    assert (len(calibration), len(held)) == (4, 4)
    assert len(load(tmp_path, modality="image", samples=100)) == 12


def test_pictures_are_told_by_their_bytes(tmp_path: Path) -> None:
    """Another picture of the same name is other data; the same ones elsewhere are the same."""
    folder, moved = tmp_path / "pictures", tmp_path / "moved"
    folder.mkdir()
    for number in range(FEWEST):
        (folder / f"{number}.png").write_bytes(bytes([number]))
    before = [part.digest for part in split(folder, modality="image")]
    folder.rename(moved)
    assert [part.digest for part in split(moved, modality="image")] == before
    for number in range(FEWEST):
        (moved / f"{number}.png").write_bytes(bytes([number + 100]))
    after = [part.digest for part in split(moved, modality="image")]
    assert all(new != old for new, old in zip(after, before, strict=True))
