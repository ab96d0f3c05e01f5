"""LateEncoder: a vector for each token of queries and documents, compared by MaxSim (ColBERT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.bundle import Bundle
from memopt.errors import BundleError
from memopt.runtimes.batching import USUAL, Batch, Budget, by_budget
from memopt.runtimes.task_engine import Engine
from memopt.runtimes.text import TextFrontEnd
from memopt.runtimes.vectors import as_items, unit_rows
from memopt.tasks.late import TokenVectors, maxsim, stacked
from memopt.weights.late import Late, read_late

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows
    from memopt.runtimes.batching import FrontEnd


class LateEncoder(Engine):
    """Encodes queries and documents into a vector for each token.

    Khattab and Zaharia 2020, https://arxiv.org/abs/2004.12832. Prompts, lengths, the filling of
    queries and the words that are not scored are those the model was saved with. Arguments and
    errors are those of :class:`memopt.runtimes.task_engine.Engine`.

    >>> LateEncoder("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks = ("late-interaction",)

    def after_fork(self) -> None:
        """In a child of fork(): nor are the front ends."""
        super().after_fork()
        self._fronts: dict[tuple[bool, frozenset[str]], _LateFrontEnd] = {}

    @property
    def dimension(self) -> int:
        """Numbers of one token's vector."""
        return self._chain.backend.dimension or self._bundle.manifest.dimension or 0

    def encode(
        self,
        inputs: Any,
        *,
        query: bool = False,
        normalize: bool = True,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> TokenVectors:
        """Return the vectors of each text's tokens, in the order of the texts.

        Args:
            inputs: texts, or one.
            query: whether they are queries; documents otherwise.
            normalize: make every vector unit length, whatever the head does.
            batch_size, show_progress: as of :meth:`answers`.

        Raises:
            InputError: a text that cannot be used, named by its position.
            DeviceError: the engine is closed, or no provider is left.
        """
        front = self._front_of(query, self._chain.backend.inputs)
        texts = as_items(inputs, "text")
        found = [np.zeros((0, self.dimension), np.float32)] * len(texts)

        def given(_: FrontEnd, names: Sequence[str]) -> FrontEnd:
            return self._front_of(query, names)

        def store(places: NDArray[np.intp], feed: Feed, output: Rows) -> None:
            for place, row, scored in zip(places, output, front.scored(feed), strict=True):
                found[place] = row[scored]

        self._run(texts, store, {}, batch_size, show_progress, fail=True, front=given)
        # Before an export only the vectors themselves say how long they are.
        vectors = stacked(found, found[0].shape[1] if found else self.dimension)
        if normalize:
            return TokenVectors(unit_rows(vectors.values), vectors.starts)
        return vectors

    def maxsim(self, queries: TokenVectors, documents: TokenVectors) -> NDArray[np.float32]:
        """Return the MaxSim of every query with every document, float32 (queries, documents)."""
        return maxsim(queries, documents)

    def _front_of(self, query: bool, inputs: Sequence[str]) -> _LateFrontEnd:
        key = (query, frozenset(inputs))
        with self._lock:
            if key not in self._fronts:
                self._fronts[key] = _LateFrontEnd(self._bundle, inputs, query)
            return self._fronts[key]


class _LateFrontEnd(TextFrontEnd):
    """Tokens of queries or of documents, and which of them are scored."""

    def __init__(self, bundle: Bundle, inputs: Sequence[str], query: bool) -> None:
        super().__init__(bundle, inputs)
        late = read_late(bundle.path)
        self._prompt = late.query_prompt if query else late.document_prompt
        self._expansion = late.expansion if query else None
        self._register(late)
        self._cut(late.query_length if query else late.document_length)
        kind = "query" if query else "document"
        ids = [self._tokenizer.token_to_id(w) for w in late.skipped if kind in late.skipped_of]
        self._skipped = np.array([i for i in ids if i is not None], np.int64)
        token = late.expansion.token if late.expansion else None
        self._filler = self._token(bundle, token) if self._expansion else 0

    def scored(self, feed: Feed) -> NDArray[np.bool_]:
        """Return which tokens of a batch count, (batch, tokens)."""
        ids, mask = feed["input_ids"], feed["attention_mask"].astype(bool)
        if self._expansion is not None:
            # The filling counts whether or not the model was let see it.
            mask = mask | (np.arange(ids.shape[1]) < self._expansion.length)
        return np.asarray(mask & ~np.isin(ids, self._skipped))

    def batches(self, encodings: list[Any], budget: Budget = USUAL) -> list[Batch]:
        """Cut into batches; queries are filled up."""
        if self._expansion is None:
            return super().batches(encodings, budget)
        lengths = np.array([len(encoding) for encoding in encodings])
        wide = np.maximum(lengths, self._expansion.length)
        found = []
        for rows, width in by_budget(wide, budget, self.max_length):
            feed = self._feed([encodings[row] for row in rows], width)
            empty = (np.arange(width) >= lengths[rows, None]) & (
                np.arange(width) < self._expansion.length
            )
            feed["input_ids"][empty] = self._filler
            if self._expansion.attend:
                feed["attention_mask"][empty] = 1
            found.append(Batch(rows, feed))
        return found

    def _cut(self, length: int | None) -> None:
        if self._expansion is not None and self._expansion.fixed:
            length = self._expansion.length
        if length is not None:
            self.max_length = min(length, self.max_length or length)
            self._tokenizer.enable_truncation(self.max_length)

    def _register(self, late: Late) -> None:
        """Let the tokenizer take markers such as ``[unused0]`` for the one token that they are."""
        from tokenizers import AddedToken

        for prompt in (late.query_prompt, late.document_prompt) if late.markers else ():
            for marker in (prompt, prompt.split(None, 1)[0]) if prompt.split() else ():
                if self._tokenizer.token_to_id(marker) is None:
                    continue
                if self._tokenizer.encode(marker, add_special_tokens=False).tokens != [marker]:
                    added = AddedToken(marker, normalized=False, special=True)
                    self._tokenizer.add_special_tokens([added])
                break

    def _token(self, bundle: Bundle, name: str | None) -> int:
        mask = name or _mask_token(bundle)
        found = self._tokenizer.token_to_id(mask) if mask else None
        if found is None:
            raise BundleError(
                f"{bundle.path}: queries are filled up with {mask or 'a mask token'!r}, which its "
                "tokenizer does not have",
                fix="convert the model again, with its tokenizer files",
            )
        return int(found)


def _mask_token(bundle: Bundle) -> str | None:
    from memopt.bundle import read_json

    path = bundle.path / "tokenizer_config.json"
    token = read_json(path).get("mask_token") if path.is_file() else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else "[MASK]"
