"""The likeliest tokens of a mask, and how often two models agree on it."""

from __future__ import annotations

import numpy as np
import pytest

from memopt.tasks.filling import Filling, fill_agreement, filling


@pytest.mark.parametrize("top", [1, 4, 5, 99])
def test_tokens_come_by_falling_score(top: int) -> None:
    """Equal ones by their id; no more than there are."""
    found = filling(np.array([1, 3, 3, 0, 2], np.float32), (2, 8), str, top)
    assert found.ids == (1, 2, 4, 0, 3)[:top]
    assert found.tokens == tuple(map(str, found.ids))
    assert (found.start, found.end, found.token) == (2, 8, "1")
    assert sum(found.scores) <= 1.0001


def test_agreement_is_the_share_of_masks() -> None:
    """Over all texts; where there is no mask nothing disagrees."""
    a, b = (Filling(0, 1, (str(i),), (1.0,), (i,)) for i in (1, 2))
    assert fill_agreement([[a], [b, a]], [[a], [a, a]]) == pytest.approx(2 / 3)
    assert fill_agreement([], []) == 1.0
    with pytest.raises(ValueError, match="longer"):
        fill_agreement([[a]], [[a, b]])
