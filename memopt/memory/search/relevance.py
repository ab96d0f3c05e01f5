"""How well memories answer a question: by meaning, by its words, and by what is said around them.

No model reads the memories here. Meaning (cosine) and words (BM25) are each measured against the
best, and added; more counts what is of a time the question names. A part of that goes to the
neighbours in the same conversation, since an answer follows its question and seldom repeats its
words. Constants were set on three conversations (``benchmarks/conversations.py``) and are flat
around what is chosen: chosen anew on two of them, they find 0.02 less in the third at most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memopt.memory.model import rows
from memopt.memory.model.words import query_words, words
from memopt.memory.search.periods import periods
from memopt.memory.search.surroundings import Surroundings, nowhere

_K1, _B = 1.2, 0.3
# Share of the meaning beside the words.
_MEANING = 0.5
# What a moment gets of those beside it, and of those one further.
CONTEXT = {-1: 0.3, 1: 0.3, -2: 0.2, 2: 0.2}
# It is of the time that is asked for; who is asked for has said it; what asks itself answers less.
_WHEN, _SPEAKER, _ASKS = 0.5, 0.25, 0.15
_SAID = re.compile(r"\s*([^\W\d_][^:：\n]{0,39})[:：]\s")
_ASKING = ("?", "？", "؟", "՞")


class Question:
    """A question to a store, against which rows are measured.

    Args:
        around: what the store knows of all its memories.
        text: the question.
        vector: float32 (dim,), of length 1.
        plain: the texts of the store can be read: the words of the question count.
        worded: the table has the words of each text.
    """

    def __init__(
        self,
        around: Surroundings,
        text: str,
        vector: NDArray[np.float32],
        *,
        plain: bool,
        worded: bool,
    ) -> None:
        self.vector, self.around = vector, around
        self.asked = query_words(text) if plain else []
        self._named = set(words(text))
        read = ["words"] if worded else []
        self._periods = periods(text)
        self.columns = [*(("text", "category") if plain else ()), *(read if plain else ())]
        self.columns += ["timestamp"] if self._periods else []
        self._rarity = {word: self.around.rarity(word) for word in self.asked}
        self._names: dict[str, bool] = {"": False}
        self._near = self._worded = self._scale = 0.0

    def scores(self, table: pa.Table) -> NDArray[np.float64]:
        """Return how well each row answers by itself, float64 (n,); the first call sets the scale.

        Args:
            table: with ``joint_embedding`` and ``columns``.
        """
        vectors = rows.vectors_array(table["joint_embedding"], len(self.vector))
        near = np.clip(vectors @ self.vector, 0, 1).astype(float)
        worded = self._by_words(table)
        if not self._scale:
            self._near = float(near.max(initial=0)) or 1.0
            self._worded = float(worded.max(initial=0))
            self._scale = 1.0
        share = _MEANING if self._worded else 1.0
        found = share * near / self._near + (1 - share) * worded / (self._worded or 1.0)
        return np.asarray(found * (1 + _WHEN * self._in_time(table)), np.float64)

    def relevance(self, table: pa.Table, own: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the relevance of rows with the context they give each other, 0..1.

        Args:
            table: with ``_rowid`` too.
            own: what :meth:`scores` says of each row, float64 (n,).
        """
        ids = table["_rowid"].to_numpy().astype(np.uint64)
        order = np.argsort(ids)
        found = own.copy()
        for offset, share in CONTEXT.items():
            beside = self.around.beside(ids, offset)
            at = np.minimum(np.searchsorted(ids[order], beside), len(ids) - 1)
            place = order[at]
            found += np.where((ids[place] == beside) & ~nowhere(beside), share * own[place], 0.0)
        found *= self._factors(table)
        # The best counts as much as the nearest is similar.
        self._scale = self._near / (float(found.max(initial=0)) or 1.0)
        return np.clip(found * self._scale, 0, 1)

    def alone(self, table: pa.Table) -> NDArray[np.float64]:
        """Return the relevance of rows that came in later, 0..1."""
        return np.clip(self.scores(table) * self._factors(table) * self._scale, 0, 1)

    def _by_words(self, table: pa.Table) -> NDArray[np.float64]:
        """Return BM25 (Robertson & Zaragoza 2009) of each row."""
        scores = np.zeros(table.num_rows)
        if not self.asked:
            return scores
        usual = max(1.0, self.around.length)
        for at, held in enumerate(self._words(table)):
            norm = _K1 * (1 - _B + _B * len(held) / usual)
            for word, rarity in self._rarity.items():
                count = held.count(word)
                if count:
                    scores[at] += rarity * count * (_K1 + 1) / (count + norm)
        return scores

    def _words(self, table: pa.Table) -> list[list[str]]:
        texts = table["text"].to_pylist()
        if "words" not in self.columns:
            return [words(text or "") for text in texts]
        made = table["words"].to_pylist()
        return [
            words(text or "") if held is None else held.split()
            for held, text in zip(made, texts, strict=True)
        ]

    def _in_time(self, table: pa.Table) -> NDArray[np.bool_]:
        """Say which rows are of a time that the question names, bool (n,)."""
        found = np.zeros(table.num_rows, np.bool_)
        if self._periods:
            moments = table["timestamp"].cast(pa.timestamp("us")).to_numpy()
            for period in self._periods:
                found |= period.holds(moments)
        return found

    def _factors(self, table: pa.Table) -> NDArray[np.float64]:
        factors = np.ones(table.num_rows)
        if "text" not in self.columns:
            return factors
        pairs = zip(table["text"].to_pylist(), table["category"].to_pylist(), strict=True)
        for at, (text, category) in enumerate(pairs):
            text = text or ""
            said = _SAID.match(text)
            if any(self._is_named(name) for name in (said[1] if said else "", category)):
                factors[at] += _SPEAKER
            if text.rstrip().endswith(_ASKING):
                factors[at] *= 1 - _ASKS
        return factors

    def _is_named(self, name: str) -> bool:
        # Few speak, and often: a name is taken apart once a question.
        if name not in self._names:
            self._names[name] = any(len(word) > 1 and word in self._named for word in words(name))
        return self._names[name]


def neighbours(question: Question, row_ids: Sequence[int]) -> list[int]:
    """Return the rows beside these in their conversations, without these themselves."""
    ids = np.array(row_ids, np.uint64)
    beside = np.concatenate([question.around.beside(ids, offset) for offset in CONTEXT])
    found: list[int] = np.setdiff1d(beside[~nowhere(beside)], ids).tolist()
    return found
