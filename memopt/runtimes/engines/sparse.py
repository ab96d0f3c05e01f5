"""SparseEncoder: a weight for each word of the vocabulary (SPLADE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import ConfigurationError
from memopt.runtimes.task_engine import Engine
from memopt.runtimes.vectors import as_items, is_bare
from memopt.tasks.sparse import SparseVectors, dots, gathered, sparse_row
from memopt.weights.splade import read_splade

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows


class SparseEncoder(Engine):
    """Encodes texts into sparse vectors whose columns are words of the model's vocabulary.

    Formal et al. 2021, https://arxiv.org/abs/2109.10086. Arguments and errors are those of
    :class:`memopt.runtimes.task_engine.Engine`.

    >>> SparseEncoder("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks = ("sparse-embedding",)

    @property
    def dimension(self) -> int:
        """Words of the vocabulary."""
        return self._chain.backend.dimension or self._bundle.manifest.dimension or 0

    def encode(
        self,
        inputs: Any,
        *,
        top: int | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> SparseVectors:
        """Return one sparse vector per text, in the order of the texts.

        Args:
            inputs: texts, or one.
            top: weights kept of each text, the largest; None takes what the model was saved with
                (``max_active_dims``), which mostly is all that are not zero.
            batch_size, show_progress: as of :meth:`answers`.

        Raises:
            InputError: a text that cannot be used, named by its position.
            DeviceError: the engine is closed, or no provider is left.
        """
        if top is not None and (type(top) is not int or top < 1):
            raise ConfigurationError(f"top is {top!r}", fix="give 1 or more, or None")
        most = top or read_splade(self._bundle.path).top
        texts = as_items(inputs, "text")
        rows = [(np.zeros(0, np.int32), np.zeros(0, np.float32))] * len(texts)

        def store(places: NDArray[np.intp], feed: Feed, output: Rows) -> None:
            # Row by row: a thousand dense ones would be 120 MB.
            for place, row in zip(places, output, strict=True):
                rows[place] = sparse_row(row, most)

        self._run(texts, store, {}, batch_size, show_progress, fail=True)
        return gathered(rows, self.dimension)

    def similarity(self, queries: SparseVectors, documents: SparseVectors) -> NDArray[np.float32]:
        """Return the dot product of every query with every document, float32."""
        return dots(queries, documents)

    def words(self, inputs: Any, top: int | None = 10) -> list[list[tuple[str, float]]]:
        """Return the heaviest words of each text and their weights, the heaviest first.

        Args:
            inputs: texts, or one.
            top: words of each; None for all.
        """
        from memopt.runtimes.text import open_tokenizer

        tokenizer = open_tokenizer(self._bundle)
        found = []
        for columns, values in self.encode([inputs] if is_bare(inputs, "text") else inputs):
            order: Sequence[int] = np.argsort(-values, kind="stable")[:top].tolist()
            words = (str(tokenizer.id_to_token(int(columns[i]))) for i in order)
            found.append([(word, float(values[i])) for word, i in zip(words, order, strict=True)])
        return found
