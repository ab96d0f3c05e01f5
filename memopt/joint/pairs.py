"""``pairs.parquet``: what a joint layer learns from, read and checked before anything slow starts.

One row is one moment: what was seen, heard and read at the same time. Each modality comes as a
ready vector (``vision_embedding``, ``audio_embedding``, ``text_embedding``: list<float>) or as
content that an encoder turns into one (``vision_data``, ``audio_data``: bytes of a file; ``text``).
A null is a modality that is absent in that row. An optional column ``group`` (any value) says which
rows mean the same, so that they are not pushed apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import InputError
from memopt.joint.model import JOINT_MODALITIES, Encoder
from memopt.parquetfile import one_line, open_parquet

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

RAW = {"vision": "vision_data", "audio": "audio_data", "text": "text"}
READY = {name: f"{name}_embedding" for name in JOINT_MODALITIES}
GROUP = "group"
# Below this a held-out part says nothing and a batch has no negatives.
FEWEST_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pairs:
    """Vectors of rows that hold at least two modalities.

    Attributes:
        vectors: modality -> float32 (n, dim); rows where it is absent are zero.
        present: bool (n, 3), columns as JOINT_MODALITIES.
        same: int64 (n, k); two rows that agree in any column mean the same. -1 agrees with nothing.
        skipped: rows left out because they hold fewer than two modalities.
    """

    vectors: Mapping[str, NDArray[np.float32]]
    present: NDArray[np.bool_]
    same: NDArray[np.int64]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.present)

    @property
    def dims(self) -> dict[str, int]:
        """Vector length of each modality that occurs."""
        return {name: values.shape[1] for name, values in self.vectors.items()}


def make_pairs(
    vectors: Mapping[str, NDArray[Any]],
    present: NDArray[Any] | None = None,
    group: NDArray[Any] | None = None,
) -> Pairs:
    """Return checked pairs from arrays.

    Args:
        vectors: modality -> float (n, dim), two or three of vision, audio, text.
        present: bool (n, 3); by default every modality given is present in every row.
        group: (n,) labels of what rows mean; by default only equal vectors mean the same.

    Raises:
        InputError: another shape, a present vector that is zero or not finite, fewer than two
            modalities, fewer than eight rows that have two.

    >>> rng = np.random.default_rng(0)
    >>> made = make_pairs({"text": rng.normal(size=(9, 4)), "audio": rng.normal(size=(9, 3))})
    >>> len(made), made.dims
    (9, {'audio': 3, 'text': 4})
    """
    given = {n: np.asarray(vectors[n], np.float32) for n in JOINT_MODALITIES if n in vectors}
    if len(given) < 2:
        raise InputError(
            f"pairs hold {', '.join(given) or 'no modality'}", fix="give two of vision, audio, text"
        )
    count = len(next(iter(given.values())))
    for name, values in given.items():
        if values.ndim != 2 or len(values) != count:
            raise InputError(f"{name} vectors have shape {values.shape}, not ({count}, dim)")
    if present is None:
        present = np.repeat([[name in given for name in JOINT_MODALITIES]], count, axis=0)
    mask = np.asarray(present).astype(bool)
    for column, name in enumerate(JOINT_MODALITIES):
        if name not in given:
            mask[:, column] = False
            continue
        here = mask[:, column]
        bad = np.flatnonzero(
            here & (~np.isfinite(given[name]).all(axis=1) | ~given[name].any(axis=1))
        )
        if len(bad):
            raise InputError(f"row {bad[0]}: the {name} vector is all zero or not finite")
        given[name] = np.where(here[:, None], given[name], np.float32(0))
    keep = mask.sum(axis=1) >= 2
    if keep.sum() < FEWEST_ROWS:
        raise InputError(
            f"{int(keep.sum())} of {count} rows hold two modalities, at least {FEWEST_ROWS} needed",
            fix="give more rows with two of vision, audio and text",
        )
    labels = [_equal_rows(given[name], mask[:, JOINT_MODALITIES.index(name)]) for name in given]
    if group is not None:
        labels.append(_codes(list(group)))
    return Pairs(
        vectors={name: values[keep] for name, values in given.items()},
        present=mask[keep],
        same=np.stack(labels, axis=1)[keep],
        skipped=int((~keep).sum()),
    )


def read_pairs(path: str | Path, encoders: Mapping[str, Encoder] | None = None) -> Pairs:
    """Read a Parquet file of pairs; content is encoded, ready vectors are taken as they are.

    Args:
        path: the file; see the module for its columns.
        encoders: modality -> encoder, needed for the columns that hold content.

    Raises:
        InputError: not a Parquet file, unknown or doubled columns, a column of another type, a
            missing encoder, vectors of different lengths, or what :func:`make_pairs` refuses.
    """
    with open_parquet(path) as file, one_line(Path(path), InputError):
        table = file.read()
        table.validate(full=True)
    sources = _sources(table, path, dict(encoders or {}))
    vectors, masks = {}, np.zeros((table.num_rows, len(JOINT_MODALITIES)), bool)
    for name, column in sources.items():
        values = table[column].combine_chunks()
        here = np.asarray(values.is_valid())
        masks[:, JOINT_MODALITIES.index(name)] = here
        if not here.any():
            continue
        if column == READY[name]:
            vectors[name] = _ready(values, here, column)
        else:
            encoded = (encoders or {})[name].encode(values.drop_null().to_pylist())
            vectors[name] = np.zeros((table.num_rows, encoded.shape[1]), np.float32)
            vectors[name][here] = encoded
    group = np.array(table[GROUP].to_pylist(), object) if GROUP in table.column_names else None
    return make_pairs(vectors, masks, group)


def _sources(table: pa.Table, path: str | Path, encoders: Mapping[str, Encoder]) -> dict[str, str]:
    """Choose the column of each modality, or say everything that is wrong with them."""
    import pyarrow as pa

    found: dict[str, str] = {}
    problems: list[str] = []
    for name in JOINT_MODALITIES:
        columns = [c for c in (READY[name], RAW[name]) if c in table.column_names]
        if not columns:
            continue
        # A ready vector wins: somebody made it on purpose.
        column = found[name] = columns[0]
        if table.column_names.count(column) > 1:
            problems.append(f"column {column!r} is there twice")
            continue
        kind = table.schema.field(column).type
        if column == READY[name]:
            lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
            lists = lists or pa.types.is_fixed_size_list(kind)
            if not (lists and pa.types.is_floating(kind.value_type)):
                problems.append(f"column {column!r} is {kind}, not a list of floats")
        elif name == "text":
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                problems.append(f"column 'text' is {kind}, not string")
        elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            problems.append(f"column {column!r} is {kind}, not binary")
        if column == RAW[name] and name not in encoders:
            problems.append(f"column {column!r} holds content and there is no {name} encoder")
    if len(found) < 2:
        have = ", ".join(map(repr, table.column_names)) or "no column"
        wanted = "; ".join(f"{READY[n]} or {RAW[n]}" for n in JOINT_MODALITIES)
        problems.append(f"the columns are {have}; needed are two of: {wanted}")
    if problems:
        raise InputError(f"{path}: " + "; ".join(problems))
    return found


def _ready(values: pa.Array, here: NDArray[np.bool_], column: str) -> NDArray[np.float32]:
    import pyarrow as pa
    import pyarrow.compute as pc

    kept = values.drop_null()
    lengths = np.unique(np.asarray(pc.list_value_length(kept)))
    if len(lengths) != 1 or lengths[0] == 0:
        raise InputError(
            f"column {column!r} has vectors of lengths {', '.join(map(str, lengths[:5]))}",
            fix="every vector of a column has one length above 0",
        )
    flat = kept.flatten()
    if flat.null_count:
        raise InputError(f"column {column!r} has null inside a vector")
    out = np.zeros((len(here), int(lengths[0])), np.float32)
    out[here] = np.asarray(flat.cast(pa.float32())).reshape(-1, int(lengths[0]))
    return out


def _equal_rows(values: NDArray[np.float32], here: NDArray[np.bool_]) -> NDArray[np.int64]:
    digests = [
        hashlib.blake2b(row.tobytes(), digest_size=16).digest() if there else None
        for row, there in zip(values, here, strict=True)
    ]
    return _codes(digests)


def _codes(labels: list[Any]) -> NDArray[np.int64]:
    known: dict[Any, int] = {}
    codes = [-1 if label is None else known.setdefault(label, len(known)) for label in labels]
    return np.array(codes, np.int64)
