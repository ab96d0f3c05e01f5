"""A row of a file, and a file of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from memopt.errors import InputError
from memopt.registry import nearest


@dataclass(frozen=True, slots=True)
class Record:
    """One row.

    Attributes:
        where: file and line or row, both counted from 1.
        values: column -> value; empty where there is a problem.
        problem: why it cannot be used, to be said after ``where``.
    """

    where: str
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Records:
    """An opened file of rows.

    Attributes:
        path: the file.
        names: its columns in order; None where each row has its own (JSON lines).
        header: False when the names are positions, "0", "1" and so on.
        texts: the columns that may hold text; None where that is seen row by row.
    """

    path: str
    names: tuple[str, ...] | None
    read: Callable[[Sequence[str] | None], Iterator[Record]]
    header: bool = True
    texts: tuple[str, ...] | None = None

    def __iter__(self) -> Iterator[Record]:
        return self.read(None)

    def check(self, column: str) -> None:
        """Raise InputError unless there is such a column, where that is known beforehand."""
        if self.names is not None and column not in self.names:
            raise InputError(
                f"{self.path} has no column {column!r}; it has "
                + (", ".join(map(repr, self.names)) or "none"),
                fix=nearest(column, self.names) if self.header and self.names else None,
            )
