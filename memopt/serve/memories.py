"""What agents and HTTP clients may do with a memory store, and its routes under /v1/memories."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import asdict
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta, Struct

from memopt.errors import ConfigurationError, InputError
from memopt.serve.exchange import Reply, Service
from memopt.serve.failures import Refusal

if TYPE_CHECKING:
    from memopt.memory.lifecycle.llm import LanguageModel
    from memopt.memory.session import Session

# A memory is a thought, not a book; an encoder reads the first few hundred words.
MOST_CHARACTERS = 20_000
# Longer texts, which came another way, are cut in a list of hits; `show` gives them whole.
SHOWN_CHARACTERS = 4_000
MOST_HITS = 50

Category = Annotated[str, Meta(max_length=128, description="What it belongs to, as: people")]
Moment = Annotated[datetime | None, Meta(description="RFC 3339, as 2026-11-23T10:00:00Z")]
MemoryId = Annotated[str, Meta(min_length=1, max_length=512, description="The exact id")]


class MemoryRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """A text to remember; one that is there already is not stored twice."""

    text: Annotated[str, Meta(min_length=1, max_length=MOST_CHARACTERS)]
    category: Category = ""
    timestamp: Moment = None
    expires_at: Moment = None


class MemorySearchRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """What to look for; ``since`` is inclusive, ``until`` is not."""

    query: Annotated[str, Meta(min_length=1, max_length=4_000)]
    top_k: Annotated[int, Meta(ge=1, le=MOST_HITS)] = 5
    category: Category | None = None
    since: Moment = None
    until: Moment = None


class Memories:
    """An open store and what may be asked of it. Every method blocks, and may run in any thread.

    Args:
        session: the store, opened with its redaction, key and embedder.
        llm: writes the summaries of a consolidation, as of ``--llm``. Clients cannot choose it:
            nothing they say sends a text elsewhere.

    Raises:
        ConfigurationError: the store has no bundle that embeds texts, or ``llm`` is unknown.
    """

    def __init__(self, session: Session, *, llm: str = "extractive") -> None:
        store = session.store
        if store.embedder is None:
            raise ConfigurationError(
                f"{store.place} names no bundle that encodes texts",
                fix="name one once: memopt memory add STORE TEXT --model BUNDLE",
            )
        self._session, self._store = session, store
        self._llm = _writer(session, llm)
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let a consolidation under way end after the batch at work."""
        self._stop.set()

    def remember(self, request: MemoryRequest) -> dict[str, Any]:
        """Store a text, redacted as the command line redacts it; return its id."""
        from memopt.memory.model.schema import Content, NewMemory

        new = NewMemory(
            content=Content(text=request.text),
            category=request.category,
            timestamp=request.timestamp,
            expires_at=request.expires_at,
            origin="text",
        )
        result = self._store.add(new)
        return {"memory_id": result.ids[0], "added": bool(result.added)}

    def recall(self, request: MemorySearchRequest) -> dict[str, Any]:
        """Return the memories nearest in meaning, words and association, best first."""
        from memopt.memory.model.schema import Filter, as_dict

        where = Filter(
            categories=() if request.category is None else (request.category,),
            since=request.since,
            until=request.until,
        )
        hits = self._session.retriever.retrieve(request.query, top_k=request.top_k, where=where)
        rows = []
        for hit in hits:
            row = as_dict(hit.memory, links=False)
            for name in ("text", "summary"):
                if len(text := str(row.get(name, ""))) > SHOWN_CHARACTERS:
                    row |= {name: text[:SHOWN_CHARACTERS], f"{name}_characters": len(text)}
            rows.append({"score": round(hit.final_score, 6), **row})
        return {"memories": rows}

    def show(self, memory_id: str) -> dict[str, Any]:
        """Return one memory, whole.

        Raises:
            InputError: there is none of that id.
        """
        from memopt.memory.model.schema import as_dict

        return as_dict(self._store.get(memory_id))

    def forget(self, memory_id: str) -> dict[str, Any]:
        """Erase one memory and the summaries made of it; no file holds its bytes any more.

        Raises:
            InputError: there is none of that id.
        """
        from memopt.memory.privacy.erase import forget

        self._store.get_many([memory_id], links=False)
        result = forget(self._store, [memory_id])
        return {"forgotten": result.memories, "bytes_freed": result.bytes_freed}

    def consolidate(self, *, dry_run: bool) -> dict[str, Any]:
        """Summarise what is read often and archive what is old, as the settings say."""
        from memopt.config import load_config
        from memopt.memory.lifecycle import consolidation, from_settings, worker

        recipe = from_settings.recipe(load_config().consolidation)
        if dry_run:
            report, size = consolidation.plan(self._store, recipe), self._store.stats()
            saved = worker.Saving(
                report=report, before=size.bytes_on_disk, after=size.bytes_on_disk
            )
        else:
            run = partial(consolidation.consolidate, llm=self._llm, stop=self._stop)
            saved = worker.saving(self._store, partial(run, self._store, recipe))
        return dict(worker.document(saved, worker.waiting(self._store)))

    def stats(self) -> dict[str, Any]:
        """Count what is there, by tier, modality and category."""
        values = asdict(self._store.stats())
        return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in values.items()}


def _writer(session: Session, llm: str) -> LanguageModel | None:
    from memopt.memory.lifecycle.llm import language_model

    if llm == "extractive":
        return None
    redact = session.store.redact
    # Without the store's own redaction, what is sent is redacted all the same.
    return language_model(llm, redact=redact) if redact else language_model(llm)


async def add(x: Service, body: MemoryRequest) -> Reply:
    """Remember a text."""
    return Reply(json=await _done(x, _memories(x).remember, body))


async def search(x: Service, body: MemorySearchRequest) -> Reply:
    """The memories that answer a question, best first."""
    return Reply(json=await _done(x, _memories(x).recall, body))


async def get(x: Service, memory_id: str) -> Reply:
    """One memory, whole."""
    return Reply(json=await _one(x, _memories(x).show, memory_id))


async def delete(x: Service, memory_id: str) -> Reply:
    """Erase one memory from the disk, and the summaries made of it."""
    return Reply(json=await _one(x, _memories(x).forget, memory_id))


async def _done(x: Service, verb: Any, given: Any) -> Any:
    """Do it in a thread, for the client that asks: the access log names it, not the server."""
    from memopt.memory.privacy.access_log import acting

    with acting(x.client):
        return await asyncio.to_thread(verb, given)


async def _one(x: Service, verb: Any, memory_id: str) -> Any:
    try:
        return await _done(x, verb, memory_id)
    except InputError as error:
        raise Refusal(404, str(error), kind="not_found_error") from error


def _memories(x: Service) -> Memories:
    if x.memories is None:
        raise Refusal(404, "this server has no memory", kind="not_found_error",
                      fix="start it with --memory STORE")  # fmt: skip
    memories: Memories = x.memories
    return memories
