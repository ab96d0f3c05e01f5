"""Who writes the summaries of a consolidation: a language model, and where it fails extraction."""

from __future__ import annotations

import time

import pyarrow as pa

from memopt.errors import ConsolidationError, MemoptError
from memopt.memory.lifecycle import summary
from memopt.memory.lifecycle.llm import Summariser
from memopt.memory.lifecycle.plan import ConsolidationRecipe, Group
from memopt.memory.lifecycle.summary import Cover
from memopt.memory.memory_store import MemoryStore
from memopt.memory.model.schema import Content
from memopt.metrics import fallback

# The event of a summary that the language model did not make.
FALLBACK = "llm-fallback"
# After so many failures in a row a language model is not asked again in this run: each costs its
# whole timeout.
_GIVE_UP = 2
# TF-IDF vectors of two texts are farther apart than sentence embeddings.
_WORD_FIDELITY = 0.5


class SummaryWriter:
    """Writes the summaries of one run.

    Attributes:
        fallbacks: how many summaries the language model did not make.
        waited: seconds it was waited for.
    """

    def __init__(
        self, store: MemoryStore, recipe: ConsolidationRecipe, llm: Summariser | None
    ) -> None:
        self._store, self._recipe, self._llm = store, recipe, llm
        self._refusals = 0
        self.fallbacks = 0
        self.waited = 0.0

    def write(self, opened: pa.Table, group: Group) -> list[Cover]:
        """Return texts that stand for a group, each with the rows it stands for.

        Raises:
            ConsolidationError: no text holds what the group says.
        """
        said = opened["text"].to_pylist()
        worded = [at for at, text in enumerate(said) if text and text.strip()]
        everything = tuple(range(opened.num_rows))
        if not worded:
            return [Cover(_of_media(opened, group), everything)]
        texts = [said[at] for at in worded]
        embed, bound = self._comparison(texts)
        answer = self._asked(texts, group, embed, bound)
        if answer is not None:
            return [Cover(answer, everything)]
        length = self._recipe.summary_length
        words = summary.with_words(embed, texts)
        covers = summary.cover(texts, words, length=length)
        left = len(texts) - len({place for part in covers for place in part.of})
        if covers or left < 2 or self._recipe.originals == "drop":
            # Nothing is said of a text that was not said whole; it stays.
            return [Cover(part.text, tuple(worded[at] for at in part.of)) for part in covers]
        # Long texts, which stay in the archive: more sentences until it is what they are about.
        wrong: str | None = "nothing fits"
        for most in (3, 6, 12):
            answer = _cut(summary.extract(texts, words, most=most), length)
            wrong = summary.problem(answer, texts, embed, bound)
            if wrong is None:
                return [Cover(answer, everything)]
        raise ConsolidationError(f"no summary of {len(texts)} texts holds: {wrong}")

    def _asked(
        self, texts: list[str], group: Group, embed: summary.Embed, bound: float
    ) -> str | None:
        """Return what the language model made of ``texts``; None where that is nothing to keep."""
        llm = self._llm
        if llm is None:
            return None
        if self._refusals >= _GIVE_UP:
            reason = f"{llm.name} is given up on for this run"
        else:
            try:
                answer = self._answer(llm, texts, group)
                wrong = self._wrong(answer, texts, embed, bound)
                if wrong is None:
                    return answer
                reason = f"the summary by {llm.name} was rejected: {wrong}"
            except Exception as error:  # noqa: BLE001 - a client of the caller's may raise anything
                self._refusals += 1
                reason = error.problem if isinstance(error, MemoptError) else repr(error)
        self.fallbacks += 1
        self._store.event(FALLBACK, f"{reason}; sentences were extracted", group.ids)
        fallback(llm.name, "extractive", "llm", told=reason)
        return None

    def _answer(self, llm: Summariser, texts: list[str], group: Group) -> str:
        prompt = summary.prompt(texts, group.category)
        if self._store.redact:
            prompt = self._store.redact(prompt)
        begin = time.monotonic()
        try:
            answer = llm.complete(summary.SYSTEM, prompt)
        finally:
            self.waited += time.monotonic() - begin
        self._refusals = 0
        return answer

    def _wrong(
        self, answer: str, texts: list[str], embed: summary.Embed, bound: float
    ) -> str | None:
        """Say why an answer is no summary of ``texts``, None where it is."""
        recipe = self._recipe
        if not answer.strip():
            return "it is empty"
        if len(answer) > recipe.summary_length:
            return f"it has {len(answer)} characters, above {recipe.summary_length}"
        lost = summary.lost(answer, texts) if recipe.originals == "drop" else []
        if lost:
            return f"it lost {', '.join(lost[:3])}"
        return summary.problem(answer, texts, embed, bound)

    def _comparison(self, texts: list[str]) -> tuple[summary.Embed, float]:
        embedding, fidelity = self._store.embedding, self._recipe.fidelity
        if embedding.embedder is None:
            return summary.word_vectors(texts), min(fidelity, _WORD_FIDELITY)
        return lambda parts: embedding.embed([Content(text=part) for part in parts]), fidelity


def _of_media(opened: pa.Table, group: Group) -> str:
    names = (("has_vision", "pictures"), ("has_audio", "sounds"))
    kinds = " and ".join(what for flag, what in names if any(opened[flag].to_pylist()))
    about = f" of {group.category}" if group.category else ""
    return f"{len(group.ids)} {kinds}{about}"


def _cut(text: str, most: int) -> str:
    """Shorten to whole words."""
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0]
