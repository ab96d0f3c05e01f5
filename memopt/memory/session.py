"""The front door: a store with all that keeps it linked, searched fast, logged and private."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from memopt.memory.graph.association import AssociationGraph
from memopt.memory.graph.retriever import MultimodalRetriever
from memopt.memory.io.models import Models, read_models, write_models
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Embedder
from memopt.memory.privacy.access_log import AccessLog
from memopt.memory.privacy.keys import read_cipher
from memopt.memory.privacy.redaction import redactor


@dataclass(frozen=True, slots=True)
class Session:
    """An open store and what goes with it."""

    store: MemoryStore
    graph: AssociationGraph
    retriever: MultimodalRetriever
    log: AccessLog
    models: Models


@contextmanager
def open_memory(
    place: str | Path,
    *,
    embedder: Embedder | None = None,
    models: Models | None = None,
    embed: bool = True,
    key: str | Path | None = None,
    redaction: str = "auto",
    create: bool = True,
    background: bool = True,
) -> Iterator[Session]:
    """Open a memory: texts are redacted, accesses logged, memories linked and indexed.

    Args:
        place: folder or URI of the store; made when absent.
        embedder: makes the vectors; by default the bundles of ``models``.
        models: bundles that are given are remembered beside the store, those that are not are
            recalled.
        embed: open the bundles; reading by id needs none.
        key: file of the key of an encrypted store; by default MEMOPT_MEMORY_KEY, where it is set.
        redaction: what is taken out of texts: 'patterns', 'presidio' (names too), 'auto' (both,
            where presidio is installed) or 'none'.
        create: False refuses a place where no store is.
        background: see :class:`memopt.memory.MemoryStore`.

    Raises:
        ConsolidationError: the place is no store, is newer than this memopt, or the key is wrong.
        ConfigurationError: models that do not go together, an unknown redaction, an unreadable key.

    >>> import tempfile
    >>> import numpy as np
    >>> from memopt.memory import Content, NewMemory
    >>> with open_memory(tempfile.mkdtemp()) as memory:
    ...     content = Content(text="write to ann@example.org")
    ...     _ = memory.store.add(NewMemory(content=content, embedding=np.ones(768)))
    ...     memory.retriever.retrieve(vector=np.ones(768))[0].memory.text
    'write to [EMAIL]'
    """
    known = Models() if "://" in str(place) else read_models(place)
    given = {name: value for name, value in asdict(models or Models()).items() if value}
    chosen = replace(known, **given)
    if embedder is None and embed:
        embedder = chosen.open()
    redact = None if redaction == "none" else redactor(redaction)
    with MemoryStore(
        place,
        embedder=embedder,
        cipher=read_cipher(key),
        redact=redact,
        create=create,
        background=background,
    ) as store:
        if chosen != known:
            write_models(store.place.local, chosen)
        graph = AssociationGraph(store)
        log = AccessLog(store)
        yield Session(store, graph, MultimodalRetriever(store, graph), log, chosen)
