"""A Filter as a LanceDB expression, and over rows already read; values are bound as literals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import reduce
from operator import and_
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from memopt.errors import InputError
from memopt.memory.model.schema import MODALITIES, TIERS, TIMESTAMP, Filter

EVERYTHING = Filter()
# The tier of a row that a commit deleted and that is not swept away yet; no reader sees it.
DELETED = "deleted"


def utc(moment: datetime) -> datetime:
    """Return ``moment`` in UTC; one without a zone is taken to be UTC already.

    Raises:
        InputError: no datetime, or one that in UTC lies outside the years 1 to 9999.

    >>> utc(datetime(2026, 1, 1)).tzinfo
    datetime.timezone.utc
    """
    if not isinstance(moment, datetime):
        raise InputError(f"{moment!r} is {type(moment).__name__}, not a datetime")
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError as error:
        raise InputError(f"{moment} in UTC lies outside the years 1 to 9999") from error


def check_filter(where: Filter) -> None:
    """Refuse a filter that can match nothing by mistake.

    Raises:
        InputError: a value of a wrong type, an unknown tier or modality, since not before until.
    """
    for name in ("categories", "tiers", "ids"):
        id_list(getattr(where, name), name)
    for name in ("since", "until"):
        moment = getattr(where, name)
        if moment is not None and not isinstance(moment, datetime):
            raise InputError(f"{name} is {type(moment).__name__}, not a datetime")
    for tier in where.tiers:
        if tier not in TIERS:
            raise InputError(f"unknown tier {tier!r}", fix=f"one of {', '.join(TIERS)}")
    if where.modality is not None and where.modality not in MODALITIES:
        raise InputError(
            f"unknown modality {where.modality!r}", fix=f"one of {', '.join(MODALITIES)}"
        )
    if where.since and where.until and utc(where.since) >= utc(where.until):
        raise InputError(
            f"since {where.since.isoformat()} is not before until {where.until.isoformat()}",
            fix="since is inclusive, until is exclusive",
        )


def id_list(ids: Sequence[str], name: str = "ids") -> list[str]:
    """Return a list of strings that can be looked up.

    Raises:
        InputError: one string instead of several, something that is no string, or no Unicode.

    >>> id_list(("a", "b"))
    ['a', 'b']
    """
    if isinstance(ids, str | bytes):
        raise InputError(f"{name} is one {type(ids).__name__}, not several", fix="give a list")
    found = list(ids)
    try:
        "".join(found).encode()
    except TypeError as error:
        raise InputError(f"{name} holds something that is no string: {error}") from error
    except UnicodeEncodeError as error:
        raise InputError(f"{name} holds text that is not valid Unicode: {error.reason}") from error
    return found


def _conditions(where: Filter) -> Iterator[tuple[str, str, Any]]:
    """Yield (column, how, value) of all that a filter asks for: 'from', 'before' or 'one of'."""
    if where.since is not None:
        yield "timestamp", "from", utc(where.since)
    if where.until is not None:
        yield "timestamp", "before", utc(where.until)
    for column, values in (
        ("category", where.categories),
        ("tier", where.tiers),
        ("memory_id", where.ids),
    ):
        if values:
            yield column, "one of", values
    if where.modality is not None:
        yield f"has_{where.modality}", "one of", (True,)


def columns_of(where: Filter) -> list[str]:
    """Return the columns a filter looks at, beside the id.

    >>> columns_of(Filter(ids=("a",), modality="text"))
    ['has_text']
    """
    names = dict.fromkeys(column for column, _, _ in _conditions(where))
    return [name for name in names if name != "memory_id"]


def expression(where: Filter) -> Any | None:
    """Return the ``lancedb.expr.Expr`` of a filter, None when it lets everything pass.

    Raises:
        InputError: see :func:`check_filter`.

    >>> print(expression(Filter(categories=("it's",))))
    Expr((`category` = 'it''s'))
    """
    from lancedb.expr import col, lit

    check_filter(where)
    build = {
        "from": lambda column, value: col(column) >= lit(value),
        "before": lambda column, value: col(column) < lit(value),
        "one of": one_of,
    }
    return all_of(build[how](column, value) for column, how, value in _conditions(where))


def passing(table: pa.Table, where: Filter, now: datetime) -> pa.ChunkedArray:
    """Say which rows already read pass the filter and have not expired, bool (n,).

    Args:
        table: with ``memory_id``, ``expires_at`` and :func:`columns_of`.
    """
    build: dict[str, Callable[[Any, Any], Any]] = {
        "from": lambda column, value: pc.greater_equal(column, pa.scalar(value, TIMESTAMP)),
        "before": lambda column, value: pc.less(column, pa.scalar(value, TIMESTAMP)),
        "one of": lambda column, values: pc.is_in(column, pa.array(values, column.type)),
    }
    mask = unexpired(table["expires_at"], now)
    for column, how, value in _conditions(where):
        mask = pc.and_(mask, build[how](table[column], value))
    return mask


def unexpired(ends: pa.ChunkedArray, now: datetime) -> pa.ChunkedArray:
    """Say which ends have not come, bool (n,); null is never."""
    return pc.fill_null(pc.greater(ends, pa.scalar(now, TIMESTAMP)), True)


def one_of(column: str, values: Sequence[Any]) -> Any:
    """Return the expression "``column`` is one of ``values``" (at least one)."""
    from lancedb.expr import col, lit

    if len(values) == 1:
        return col(column) == lit(values[0])
    return col(column).isin(list(values))


def present(condition: Any | None = None) -> Any:
    """Return ``condition`` without the rows that a commit deleted."""
    from lancedb.expr import col, lit

    return all_of([condition, col("tier") != lit(DELETED)])


def all_of(parts: Iterable[Any | None]) -> Any | None:
    """Join expressions with AND; None where there is none."""
    present = [part for part in parts if part is not None]
    return reduce(and_, present) if present else None
