"""How content becomes vectors, ids and cells of an open database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from memopt.errors import InputError
from memopt.memory.model import content as incoming
from memopt.memory.model import payload, rows
from memopt.memory.model.schema import Content, Embedder
from memopt.memory.store import founding as opening
from memopt.memory.store.database import Connection
from memopt.memory.store.locking import ReadOnlyError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Sealed(Connection):
    """A connection with an embedder and a cipher, on which MemoryStore stands."""

    def __init__(
        self,
        path: str | Path,
        dim: int | None,
        embedder: Embedder | None,
        cipher: payload.Cipher | None,
        clock: Callable[[], datetime],
        *,
        create: bool,
    ) -> None:
        super().__init__(path, dim, embedder, cipher, clock, create=create)
        self._id_key = opening.IdKey()
        self._id_key_of: str | None = ""
        self.id_key()

    def id_key(self) -> opening.IdKey:
        """Return the secret of an encrypted store, as it is now: another process may rotate keys.

        Raises:
            ConsolidationError: the key does not open it, any longer.
        """
        meta = self.meta
        if meta.id_key != self._id_key_of:
            self._id_key = opening.id_key(self.place, meta, self.cipher)
            self._id_key_of = meta.id_key
        return self._id_key

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Do what :meth:`Connection.changing` does, with a key that is still the store's."""
        with super().changing():
            # What is sealed under a key that was replaced meanwhile would open for nobody.
            self.id_key()
            yield

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
        return rows.unit(np.asarray(self.embedder.embed(contents)), self.dim)

    def check_model(self, model_id: str | None) -> None:
        """Refuse vectors of another model than the store's; an empty store takes the first.

        Raises:
            InputError: the store holds vectors of another model, or of one nobody named.
        """
        if not model_id or model_id == self.meta.model_id:
            return
        # What a commit deleted counts too until it is swept: its vectors are still there.
        if not self.memories.count_rows():
            try:
                with self.exclusive():
                    if not self.memories.count_rows():
                        self.write_meta(model_id=model_id)
            except ReadOnlyError:
                # Whatever model: there is nothing to be found, and nothing can be added.
                return
        # Another process may have been first; it names its model before it adds.
        if model_id == self.meta.model_id:
            return
        raise InputError(
            f"{self.place} holds vectors of {self.meta.model_id or 'an unnamed model'!r}, "
            f"not of {model_id!r}",
            fix="use that model, or move the store: memopt memory reembed",
        )

    def content_id(self, content: Content, category: str = "", turn: int = 0) -> str:
        """Return the id this content gets when none is chosen (keyed in an encrypted store).

        Args:
            turn: 1 for the next id, where other content took the first, and so on.
        """
        return incoming.content_ids(content, category, self.id_key().value, turn)[0]

    def pack(self, table: pa.Table, *, compress: bool = True) -> pa.Table:
        """Return whole rows with their content compressed (and encrypted where the store is).

        Args:
            table: rows as they are stored, or all opened.
        """
        opened = self.unpack(table) if any(table["codec"].to_pylist()) else table
        return payload.seal(
            opened, compress=compress, cipher=self.cipher, store_key=self.id_key().value
        )

    def unpack(self, table: pa.Table) -> pa.Table:
        """Return stored rows with their content back in the plain columns.

        Raises:
            ConsolidationError: a row is damaged, or holds what was written for another.
        """
        key, only_tied = self.id_key()
        return payload.unseal(table, self.cipher, key, only_tied=only_tied)
