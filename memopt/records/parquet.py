"""Rows of a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from memopt.errors import InputError, first_line
from memopt.extras import require
from memopt.parquetfile import batches, open_parquet
from memopt.records.record import Record, Records

_BATCH = 256  # rows read at a time; pictures and sounds may be in them


def parquet_records(path: Path) -> Records:
    """Open a Parquet file; see :func:`memopt.records.open_records`."""
    pa = require("pyarrow", extra="arrow", why=f"read {path}")
    with open_parquet(path) as file:
        schema = file.schema_arrow
    names = tuple(dict.fromkeys(schema.names))
    if len(names) < len(schema.names):
        twice = next(name for name in names if schema.names.count(name) > 1)
        raise InputError(f"{path} has the column {twice!r} twice", fix="rename one")
    texts = tuple(f.name for f in schema if _maybe_text(pa, f.type))

    def read(columns: Sequence[str] | None) -> Iterator[Record]:
        row = 0
        with open_parquet(path) as opened:
            for batch in batches(opened, path, _BATCH, columns):
                for values in _row_values(pa, batch):
                    row += 1
                    where = f"{path} row {row}"
                    if isinstance(values, str):
                        yield Record(where, problem=values)
                    else:
                        yield Record(where, values)

    return Records(str(path), names, read, texts=texts)


def _maybe_text(pa: Any, kind: Any) -> bool:
    types = pa.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(text or types.is_floating(kind) or types.is_integer(kind))


def _row_values(pa: Any, batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a batch; nanoseconds, which Python's times lack, are cut off."""
    columns = [_without_nanoseconds(pa, column) for column in batch.columns]
    names = batch.schema.names
    for row in range(batch.num_rows):
        try:
            yield {n: column[row].as_py() for n, column in zip(names, columns, strict=True)}
        except (ValueError, OverflowError, ArithmeticError) as error:
            # A date before the year 1, or text that is no UTF-8.
            yield f"cannot be read: {first_line(error)}"


def _without_nanoseconds(pa: Any, column: Any) -> Any:
    kind = column.type
    if getattr(kind, "unit", None) != "ns":
        return column
    if pa.types.is_timestamp(kind):
        return column.cast(pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_time64(kind):
        return column.cast(pa.time64("us"), safe=False)
    if pa.types.is_duration(kind):
        return column.cast(pa.duration("us"), safe=False)
    return column
