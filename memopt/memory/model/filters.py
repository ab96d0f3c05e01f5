"""A Filter as a LanceDB expression: values are bound as literals, never pasted into text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import reduce
from operator import and_
from typing import Any

from memopt.errors import InputError
from memopt.memory.model.schema import MODALITIES, TIERS, Filter

EVERYTHING = Filter()
# The tier of a row that a commit deleted and that is not swept away yet; no reader sees it.
DELETED = "deleted"


def utc(moment: datetime) -> datetime:
    """Return ``moment`` in UTC; one without a zone is taken to be UTC already.

    >>> utc(datetime(2026, 1, 1)).tzinfo
    datetime.timezone.utc
    """
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


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


def expression(where: Filter) -> Any | None:
    """Return the ``lancedb.expr.Expr`` of a filter, None when it lets everything pass.

    Raises:
        InputError: see :func:`check_filter`.

    >>> print(expression(Filter(categories=("it's",))))
    Expr((`category` = 'it''s'))
    """
    from lancedb.expr import col, lit

    check_filter(where)
    parts: list[Any] = []
    if where.since is not None:
        parts.append(col("timestamp") >= lit(utc(where.since)))
    if where.until is not None:
        parts.append(col("timestamp") < lit(utc(where.until)))
    for column, values in (
        ("category", where.categories),
        ("tier", where.tiers),
        ("memory_id", where.ids),
    ):
        if values:
            parts.append(one_of(column, values))
    if where.modality is not None:
        parts.append(col(f"has_{where.modality}") == lit(True))
    return all_of(parts)


def one_of(column: str, values: Sequence[str]) -> Any:
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
