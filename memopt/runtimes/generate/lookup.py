"""Speculation by prompt lookup: what followed the last tokens before is proposed to follow again.

Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding. A run over several proposed
tokens costs little more than one over a single token, as the weights are read once; as many of them
are kept as the model would have written itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

# Three tokens that were there before say more about the next than two; one says nothing.
SIZES = (3, 2)
# Where proposals are wrong again and again, so many tokens are written without one at most.
_LONGEST_PAUSE = 15


class Lookup:
    """Proposes the next tokens of one growing text.

    Args:
        most: proposed at once. Fewer are, after a proposal that was wrong, and none for a while
            after several.

    >>> Lookup(4).propose([1, 2, 3, 7, 8, 9, 1, 2, 3], 10)
    [7, 8, 9, 1]
    """

    def __init__(self, most: int) -> None:
        self._most = self._size = most
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._proposed: list[int] = []
        self._wrong = self._pause = 0

    def propose(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return what followed the last tokens where they were last, at most ``room``; or nothing.

        Args:
            tokens: the text, which begins as at the last call.
            room: tokens that may be proposed.
        """
        self._adapt(tokens)
        # The end of the text itself is not indexed yet: it would find itself.
        for end in range(max(self._indexed, 1), len(tokens)):
            for size in SIZES:
                if end >= size:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)
        self._proposed = []
        if self._pause:
            self._pause -= 1
            return []
        for size in SIZES if room > 0 else ():
            place = self._ends.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if place is not None:
                self._proposed = list(tokens[place : place + min(self._size, room)])
                break
        return self._proposed

    def _adapt(self, tokens: Sequence[int]) -> None:
        """Propose more next time where all was right, little where it was not."""
        if not self._proposed:
            return
        written = tokens[self._indexed :]
        right = agreeing(self._proposed, written)
        if right == len(self._proposed):
            self._size = min(self._most, 2 * self._size)
        else:
            self._size = min(self._most, right + 1)
        self._wrong = 0 if right else self._wrong + 1
        self._pause = min(2**self._wrong - 1, _LONGEST_PAUSE) if self._wrong else 0


def agreeing(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two texts have in common at their beginning.

    >>> agreeing([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
