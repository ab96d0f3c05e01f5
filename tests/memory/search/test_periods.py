"""Times that a question names."""

from __future__ import annotations

from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memopt.memory.search.periods import Period, periods


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("What happened in December 2023?", [Period(2023, 12, None)]),
        ("on 3 June, 2023", [Period(2023, 6, 3)]),
        ("the 3rd of May 2023", [Period(2023, 5, 3)]),
        ("before April 10, 2023", [Period(2023, 4, 10)]),
        ("on 16 june", [Period(None, 6, 16)]),
        ("mid-June", [Period(None, 6, None)]),
        ("since 2021", [Period(2021, None, None)]),
        ("2023-05-03 and 2023-05", [Period(2023, 5, 3), Period(2023, 5, None)]),
        ("am 7. März 2024", [Period(2024, 3, 7)]),
        ("le 1er août 2024", [Period(2024, 8, 1)]),
        ("15 de mayo de 2024", [Period(2024, 5, 15)]),
        ("em março de 2023", [Period(2023, 3, None)]),
        ("2023年5月3日", [Period(2023, 5, 3)]),
        ("in May or in May", [Period(None, 5, None)]),
    ],
)
def test_times_are_read_as_people_write_them(text: str, named: list[Period]) -> None:
    """With and without day and year, in several languages."""
    assert periods(text) == named


@pytest.mark.parametrize(
    "text", ["May I come in?", "they march on", "Mars is red", "room 20231", "99 of 100", ""]
)
def test_what_is_no_time_is_none(text: str) -> None:
    """Words that are months too count only where they are used as such."""
    assert periods(text) == []


@given(st.datetimes(datetime(1902, 1, 1), datetime(2098, 12, 31)))
def test_a_moment_lies_in_its_own_day_month_and_year(moment: datetime) -> None:
    """And in no other year, month or week."""
    moments = np.array([moment], "M8[us]")
    year, month, day = moment.year, moment.month, moment.day
    for own in (Period(year, None, None), Period(year, month, None), Period(None, month, day)):
        assert own.holds(moments).all()
    far = np.array([moment + timedelta(days=2), moment - timedelta(days=2)], "M8[us]")
    assert not Period(year, month, day).holds(far).any()
    assert Period(year, month, day).holds(far - np.timedelta64(1, "D"))[0]
    assert not Period(year + 1, None, None).holds(moments).any()
    assert not Period(year, 1 + month % 12, None).holds(moments).any()


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    """Whatever it is, without an error, and what is read can be compared."""
    for period in periods(f"in {text} 2023 may 31"):
        period.holds(np.array(["2023-05-31"], "M8[us]"))
