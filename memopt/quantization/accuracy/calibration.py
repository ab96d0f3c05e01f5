"""Calibration and validation inputs: read as a stream, split by seed, never overlapping."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import InputError, QuantizationError
from memopt.files import sha256_file
from memopt.records import FILES as TEXT_FILES
from memopt.records import ending, open_records
from memopt.registry import nearest

IMAGE_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
AUDIO_FILES = (".wav", ".flac")
# Below this there is nothing to split: four to calibrate with, four to validate on.
FEWEST = 8
_SCORES = ("score", "similarity_score", "similarity", "label", "labels")


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a file: its texts (or one path) and the similarity score, when it has one."""

    items: tuple[Any, ...]
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Inputs to calibrate or validate with, every one distinct.

    ``pairs`` are positions in ``items`` with the similarity that people gave them.
    """

    items: tuple[Any, ...]
    modality: str
    pairs: tuple[tuple[int, int, float], ...] = ()
    origin: str = ""

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the items, of a picture or sound its bytes: which data a variant is of."""
        state = hashlib.sha256()
        for item in self.items:
            told = sha256_file(item) if isinstance(item, Path) else item
            state.update(f"{told}\0".encode())
        return state.hexdigest()


def described(held_out: CalibrationSet) -> dict[str, Any]:
    """Return what the manifest says of the set its variants are proven on."""
    return {"sha256": held_out.digest, "samples": len(held_out), "origin": held_out.origin}


def split(
    path: str | Path,
    *,
    modality: str = "text",
    samples: int = 300,
    validation: int = 512,
    seed: int = 0,
    column: str | None = None,
    pairs: bool = False,
) -> tuple[CalibrationSet, CalibrationSet]:
    """Choose calibration and validation inputs from one file or folder.

    Validation rows are drawn first, as they come; calibration inputs are drawn from what shares no
    text with them, as many of each length class (by powers of sqrt 2) as there are, so that the few
    short and long ones set ranges too. A file with too little keeps two thirds to calibrate.
    The file is read twice, as a stream: memory holds a hash and a length per text.
    With ``pairs`` an input is the two texts of a row.

    Raises:
        InputError: missing, empty, too few, of another modality, or without the wanted column.
    """
    if samples < 1 or validation < 1:
        raise InputError(
            f"{samples} calibration and {validation} validation samples cannot prove anything",
            fix="give at least 1 of each; 300 and 512 are the defaults",
        )
    path = Path(path)
    keys: list[tuple[int, ...]] = []
    lengths: dict[int, int] = {}
    for record in read(path, modality=modality, column=column, pairs=pairs):
        keys.append(tuple(_key(item) for item in record.items))
        lengths.update(zip(keys[-1], (_length(item) for item in record.items), strict=True))
    _enough(path, len(lengths), modality)
    generator = np.random.default_rng(seed)
    most = max(FEWEST // 2, len(lengths) // 3)
    held_rows, held = _draw_rows(keys, min(validation, most), generator)
    rest = np.array([key for key in lengths if key not in held], dtype=object)
    if len(rest) == 0:
        raise InputError(
            f"every row of {path} shares a text with others: nothing is left to calibrate on",
            fix="give a second file with --validation",
        )
    chosen = {
        rest[i] for i in stratified([lengths[key] for key in rest], min(samples, len(rest)), seed)
    }
    return _collect(path, modality, column, pairs, chosen, held_rows, held)


def load(
    path: str | Path,
    *,
    modality: str = "text",
    samples: int = 512,
    seed: int = 0,
    column: str | None = None,
    pairs: bool = False,
) -> CalibrationSet:
    """Read up to ``samples`` inputs of one file or folder, rows kept whole (for validation).

    Raises:
        InputError: as :func:`split`.
    """
    if samples < 1:
        raise InputError(f"{samples} samples cannot prove anything", fix="give at least 1")
    path = Path(path)
    keys = [
        tuple(_key(item) for item in r.items)
        for r in read(path, modality=modality, column=column, pairs=pairs)
    ]
    _enough(path, len({key for row in keys for key in row}), modality)
    rows, held = _draw_rows(keys, samples, np.random.default_rng(seed))
    return _collect(path, modality, column, pairs, set(), rows, held)[1]


def check_disjoint(calibration: CalibrationSet, validation: CalibrationSet) -> None:
    """Refuse a validation set that shares an input with the calibration set.

    Raises:
        QuantizationError: they overlap; the message counts and shows the first one.
    """
    seen = {_key(item) for item in calibration.items}
    shared = [item for item in validation.items if _key(item) in seen]
    if shared:
        raise QuantizationError(
            f"{len(shared)} of {len(validation)} validation inputs are calibration inputs too, "
            f"such as {str(shared[0])[:60]!r}",
            fix="validate on other data",
        )


def stratified(lengths: Sequence[int], count: int, seed: int) -> list[int]:
    """Return ``count`` distinct positions, taken in turn from each length class.

    >>> stratified([1, 1, 1, 1, 1, 1, 900], 2, seed=0)[1]
    6
    """
    generator = np.random.default_rng(seed)
    classes: dict[int, list[int]] = {}
    for position in generator.permutation(len(lengths)):
        name = int(2 * math.log2(max(lengths[position], 1)))
        classes.setdefault(name, []).append(int(position))
    chosen: list[int] = []
    turn = 0
    while len(chosen) < min(count, len(lengths)):
        for name in sorted(classes):
            if turn < len(classes[name]) and len(chosen) < count:
                chosen.append(classes[name][turn])
        turn += 1
    return chosen


def read(
    path: Path, *, modality: str = "text", column: str | None = None, pairs: bool = False
) -> Iterator[Example]:
    """Yield the records of a file (text) or folder (images, audio), one at a time.

    With ``pairs`` the two texts of a row are one input; ``column`` then names both, with a comma.

    Raises:
        InputError: as :func:`split`.
    """
    if not path.exists():
        raise InputError(f"no calibration data at {str(path)!r}", fix="check the path")
    if modality == "text":
        if path.is_dir() or ending(path) not in TEXT_FILES:
            kind = "a folder" if path.is_dir() else f"a {path.suffix or 'nameless'} file"
            raise InputError(
                f"{path} is {kind}, and this is a text model", fix="give " + ", ".join(TEXT_FILES)
            )
        yield from _read_pairs(path, column) if pairs else _read_text(path, column)
        return
    suffixes = IMAGE_FILES if modality == "image" else AUDIO_FILES
    if not path.is_dir():
        raise InputError(
            f"{path} is not a folder, and this is an {modality} model",
            fix=f"give a folder of {', '.join(suffixes)}",
        )
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes)
    if not files:
        raise InputError(f"no {modality} files in {path}", fix="it needs " + ", ".join(suffixes))
    for file in files:
        yield Example((file,))


def _read_text(path: Path, column: str | None) -> Iterator[Example]:
    records = open_records(path, column)
    if column is not None:
        if ending(path) == ".txt":
            raise InputError(f"{path} has no columns", fix="leave --column out")
        records.check(column)
    for row in records.read(records.texts):
        if row.problem:
            raise InputError(f"{row.where} {row.problem}", fix="correct it, or take it out")
        record = _record(dict(row.values), column, path)
        if record.items:
            yield record


def _read_pairs(path: Path, column: str | None) -> Iterator[Example]:
    names = [name.strip() for name in column.split(",")] if column else None
    if names is not None and len(names) != 2:
        raise InputError(f"--column {column!r} names no pair", fix="give two, as in query,document")
    if names is not None:
        halves = zip(*(_read_text(path, name) for name in names), strict=True)
        rows: Iterator[Example] = (Example(left.items + right.items) for left, right in halves)
    else:
        rows = _read_text(path, None)
    for number, row in enumerate(rows):
        if len(row.items) < 2:
            raise InputError(
                f"row {number} of {path} holds {len(row.items)} texts, and this model takes pairs",
                fix="give rows of two texts, or name the columns: --column query,document",
            )
        yield Example((row.items[:2],), row.score)


def _record(row: dict[str, Any], column: str | None, path: Path) -> Example:
    if column is not None:
        if column not in row:
            raise InputError(
                f"{path} has no column {column!r}; it has {', '.join(map(repr, row))}",
                fix=nearest(column, row) if row else None,
            )
        value = row[column]
        if not isinstance(value, str) or (_number(value) and ending(path) != ".txt"):
            raise InputError(
                f"column {column!r} of {path} holds {value!r}, not text",
                fix="columns with text: " + ", ".join(_texts(row)),
            )
        return Example((value.strip(),) if value.strip() else ())
    texts = tuple(str(row[name]).strip() for name in _texts(row))
    return Example(texts, _score(row))


def _texts(row: dict[str, Any]) -> list[str]:
    return [
        name
        for name, value in row.items()
        if isinstance(value, str) and value.strip() and not _number(value)
    ]


def _score(row: dict[str, Any]) -> float | None:
    numbers = {n.lower(): float(v) for n, v in row.items() if v is not None and _number(v)}
    named = next((numbers[name] for name in _SCORES if name in numbers), None)
    if named is not None:
        return named
    # Without names (STS-B has no header) a single numeric column can only be the score.
    return next(iter(numbers.values())) if len(numbers) == 1 else None


def _number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _key(item: Any) -> int:
    text = " ".join(str(item).split())
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def _length(item: Any) -> int:
    if isinstance(item, tuple):
        return sum(map(len, item))
    return len(item) if isinstance(item, str) else 1


def _enough(path: Path, count: int, modality: str) -> None:
    what = "texts" if modality == "text" else "files"
    if count == 0:
        raise InputError(f"{path} is empty: no {what} in it", fix="give data to calibrate with")
    if count < FEWEST:
        raise InputError(
            f"{path} holds {count} distinct {what}; calibrating and validating need {FEWEST}",
            fix="give more data, 800 or so",
        )


def _draw_rows(
    keys: Sequence[tuple[int, ...]], count: int, generator: np.random.Generator
) -> tuple[set[int], set[int]]:
    rows: set[int] = set()
    held: set[int] = set()
    for row in generator.permutation(len(keys)):
        if len(held) >= count:
            break
        rows.add(int(row))
        held.update(keys[row])
    return rows, held


def _collect(
    path: Path,
    modality: str,
    column: str | None,
    two: bool,
    chosen: set[int],
    held_rows: set[int],
    held: set[int],
) -> tuple[CalibrationSet, CalibrationSet]:
    calibration: dict[int, Any] = {}
    places: dict[int, int] = {}
    items: list[Any] = []
    pairs: list[tuple[int, int, float]] = []
    for number, record in enumerate(read(path, modality=modality, column=column, pairs=two)):
        keyed = [(_key(item), item) for item in record.items]
        if number in held_rows:
            for key, item in keyed:
                if key not in places:
                    places[key] = len(items)
                    items.append(item)
            if len(keyed) == 2 and record.score is not None:
                pairs.append((places[keyed[0][0]], places[keyed[1][0]], record.score))
        else:
            calibration.update((key, item) for key, item in keyed if key in chosen)
    origin = str(path)
    return (
        CalibrationSet(
            items=tuple(dict.fromkeys(calibration.values())), modality=modality, origin=origin
        ),
        CalibrationSet(items=tuple(items), modality=modality, pairs=tuple(pairs), origin=origin),
    )
