"""Reranker: a cross-encoder scores how well each document answers a query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import BundleError, ConfigurationError, InputError
from memopt.runtimes.task_engine import Engine
from memopt.tasks.classes import sigmoid
from memopt.tasks.ranking import Ranking, ranking
from memopt.weights.cross_encoder import activation

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ACTIVATIONS = ("Sigmoid", "Identity")


class Reranker(Engine):
    """Orders documents by how well they answer a query.

    Of a pair that is too long the longer text is cut, token by token, as sentence-transformers
    does. Arguments and errors are those of :class:`memopt.runtimes.task_engine.Engine`.

    >>> Reranker("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks = ("reranking",)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top: int | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Ranking:
        """Return the documents' positions and scores, the best first; of no documents none.

        Args:
            query: what they shall answer.
            documents: texts.
            top: how many at most; None for all.
            batch_size, show_progress: as of :meth:`answers`.

        Raises:
            InputError: a text that cannot be used, named by its position.
            DeviceError: the engine is closed, or no provider is left.
        """
        if not isinstance(query, str) or isinstance(documents, str):
            what = type(query).__name__ if not isinstance(query, str) else "one document"
            raise InputError(f"rank() got {what}", fix="give a query and a list of documents")
        if top is not None and (type(top) is not int or top < 1):
            raise ConfigurationError(f"top is {top!r}", fix="give 1 or more, or None")
        pairs = [(query, document) for document in documents]
        scores = self.score(pairs, batch_size=batch_size, show_progress=show_progress)
        return ranking(scores, top)

    def score(
        self,
        pairs: Sequence[Any],
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> NDArray[np.float32]:
        """Return the score of each (query, document), float32 (pairs,).

        Through the activation that the model was saved with, a sigmoid where it says none.

        Raises:
            InputError: a pair that cannot be used, named by its position.
            BundleError: the model gives several scores a pair, or its activation is not known.
            DeviceError: the engine is closed, or no provider is left.
        """
        rows = self.answers(pairs, batch_size=batch_size, show_progress=show_progress)
        logits = np.stack(rows) if rows else np.empty((0, 1), np.float32)
        if logits.shape[1] != 1:
            raise BundleError(
                f"{self._bundle.path} gives {logits.shape[1]} scores a pair, an order needs one",
                fix="convert it with --task text-classification",
            )
        name = activation(self._bundle.path)
        if name not in _ACTIVATIONS:
            raise BundleError(
                f"{self._bundle.path} asks for the activation {name!r}, which memopt does not know",
                fix=f"known: {', '.join(_ACTIVATIONS)}",
            )
        return sigmoid(logits[:, 0]) if name == "Sigmoid" else logits[:, 0]
