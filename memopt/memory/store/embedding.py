"""How content becomes vectors of one store: by its embedder, and by no other model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.errors import InputError
from memopt.memory.model import rows
from memopt.memory.model.schema import Content, Embedder
from memopt.memory.store.database import Database
from memopt.memory.store.locking import ReadOnlyError


class Embedding:
    """Makes the vectors of a store, and refuses those of another model.

    Attributes:
        embedder: None where every vector has to be given.
    """

    def __init__(self, database: Database, embedder: Embedder | None) -> None:
        self._database = database
        self.embedder = embedder

    def use(self, embedder: Embedder) -> None:
        """Embed with another model from now on."""
        self.embedder = embedder

    def embed(self, contents: Sequence[Content]) -> NDArray[np.float32]:
        """Return unit vectors, float32 (n, dim), by the store's embedder.

        Raises:
            InputError: there is no embedder, or it is not the one that made the store's vectors.
        """
        if self.embedder is None:
            raise InputError(
                "no embedding was given and the store has no embedder",
                fix="give embedding=, or open the store with embedder=",
            )
        self.check_model(self.embedder.model_id)
        return rows.unit(np.asarray(self.embedder.embed(contents)), self._database.dim)

    def query(self, vector: NDArray[Any] | Sequence[float]) -> NDArray[np.float32]:
        """Return a query of length 1, float32 (dim,).

        Raises:
            InputError: another shape, NaN, infinity or all zeros.
        """
        dim = self._database.dim
        try:
            array = np.asarray(vector)
        except ValueError as error:
            raise InputError(f"the query vector is no vector: {error}") from error
        if array.ndim != 1:
            raise InputError(f"the query vector has shape {array.shape}, not ({dim},)")
        query: NDArray[np.float32] = rows.unit(array[None, :], dim, "query vector")[0]
        return query

    def check_model(self, model_id: str | None) -> None:
        """Refuse vectors of another model than the store's; an empty store takes the first.

        Raises:
            InputError: the store holds vectors of another model, or of one nobody named.
        """
        database = self._database
        if not model_id or model_id == database.meta.model_id:
            return
        # What a commit deleted counts too until it is swept: its vectors are still there.
        if not database.memories.count_rows():
            try:
                with database.exclusive():
                    if not database.memories.count_rows():
                        database.write_meta(model_id=model_id)
            except ReadOnlyError:
                # Whatever model: there is nothing to be found, and nothing can be added.
                return
        # Another process may have been first; it names its model before it adds.
        if model_id == database.meta.model_id:
            return
        raise InputError(
            f"{database.place} holds vectors of {database.meta.model_id or 'an unnamed model'!r}, "
            f"not of {model_id!r}",
            fix="use that model, or move the store: memopt memory reembed",
        )
