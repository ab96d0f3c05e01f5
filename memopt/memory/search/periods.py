"""Times that a question names: a day, a month, a year, as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memopt.memory.model.words import plain

# English, German, French, Spanish, Italian, Portuguese, Dutch.
_NAMES = (
    "january januar janvier enero gennaio janeiro januari jan",
    "february februar fevrier febrero febbraio fevereiro februari feb",
    "march marz mars marzo marco maart mar",
    "april avril abril aprile apr",
    "may mai mayo maggio maio mei",
    "june juni juin junio giugno junho jun",
    "july juli juillet julio luglio julho jul",
    "august aout agosto augustus aug",
    "september septembre septiembre settembre setembro sept sep",
    "october oktober octobre octubre ottobre outubro oct",
    "november novembre noviembre novembro nov",
    "december dezember decembre diciembre dicembre dezembro dec",
)
_MONTHS = {name: at for at, names in enumerate(_NAMES, 1) for name in names.split()}
# A month by itself follows one of these, since "may" and "mars" are words too.
_BEFORE = re.compile(
    r"\b(?:in|of|since|until|by|during|this|last|next|early|late|mid|im|seit|bis|en|au|de|em|nel)"
    r"[\s-]$"
)
_YEAR, _DAY, _OF = r"(?:19|20)\d\d", r"\d{1,2}", r"(?:\s+(?:of|de))?\s+"
_DATE = re.compile(
    rf"(?<!\d)(?:(?P<day>{_DAY})(?:st|nd|rd|th|er|\.)?{_OF})?"
    rf"\b(?P<month>{'|'.join(sorted(_MONTHS, key=len, reverse=True))})\b\.?"
    rf"(?:\s+(?P<after>{_DAY})(?:st|nd|rd|th)?(?!\d))?"
    rf"(?:(?:,\s*|{_OF})(?P<year>{_YEAR})(?!\d))?"
    rf"|(?<!\d)(?P<iso>{_YEAR})(?:[-/年](?P<iso_month>{_DAY})(?:[-/月](?P<iso_day>{_DAY}))?)?(?!\d)"
)
_A_DAY = np.timedelta64(1, "D")


@dataclass(frozen=True, slots=True)
class Period:
    """A day, a month or a year; what is None may be any."""

    year: int | None
    month: int | None
    day: int | None

    def holds(self, moments: NDArray[np.datetime64]) -> NDArray[np.bool_]:
        """Say which moments lie in it, bool (n,).

        A day counts with those beside it: it may be another one in UTC, and what happened is told
        the day after.

        >>> moments = np.array(["2026-05-03", "2026-05-05", "2025-05-04"], "M8[us]")
        >>> Period(2026, 5, 4).holds(moments).tolist()
        [True, True, False]
        """
        found = self._on(moments)
        if self.day is not None:
            found |= self._on(moments - _A_DAY) | self._on(moments + _A_DAY)
        return found

    def _on(self, moments: NDArray[np.datetime64]) -> NDArray[np.bool_]:
        months = moments.astype("M8[M]")
        # Months are counted from January 1970.
        count = months.astype(np.int64)
        days = (moments.astype("M8[D]") - months.astype("M8[D]")).astype(np.int64) + 1
        found = np.ones(len(moments), np.bool_)
        for wanted, given in (
            (self.year, 1970 + count // 12),
            (self.month, 1 + count % 12),
            (self.day, days),
        ):
            if wanted is not None:
                found &= given == wanted
        return found


def periods(text: str) -> list[Period]:
    """Return the times a text names, each once.

    >>> periods("Was it on May 3rd, 2023 or in June?")
    [Period(year=2023, month=5, day=3), Period(year=None, month=6, day=None)]
    >>> periods("am 7. März 2024"), periods("2024-03-07"), periods("May I?")
    ([Period(year=2024, month=3, day=7)], [Period(year=2024, month=3, day=7)], [])
    """
    return list(dict.fromkeys(_named(plain(text))))


def _named(text: str) -> Iterator[Period]:
    for match in _DATE.finditer(text):
        part = match.groupdict()
        if part["iso"]:
            numbers = (part["iso"], part["iso_month"], part["iso_day"])
            year, month, day = (int(number) if number else None for number in numbers)
        else:
            year = int(part["year"]) if part["year"] else None
            month, day = _MONTHS[part["month"]], int(part["day"] or part["after"] or 0) or None
            if year is None and day is None and not _BEFORE.search(text[: match.start()]):
                continue
        yield Period(year, month, day)
