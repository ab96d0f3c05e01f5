"""Rewriter: a text made of a text by a model of encoder and decoder: T5, BART, Marian."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from memopt.bundle import read_json
from memopt.errors import ConfigurationError, InputError
from memopt.runtimes.base import Opener
from memopt.runtimes.engines.writer import TextWriter, TokenWriter
from memopt.runtimes.generate.continuation import Continuation
from memopt.runtimes.generate.pair import open_pair
from memopt.runtimes.generate.request import Request
from memopt.runtimes.generate.rules import Asked, read_asked
from memopt.runtimes.generate.sampling import Sampler
from memopt.runtimes.generate.structure import forms
from memopt.runtimes.generate.words import Words

if TYPE_CHECKING:
    from numpy.typing import NDArray

_log = logging.getLogger(__name__)


class PairWriter(TokenWriter):
    """Writes with two graphs: an encoder that reads a source once, a decoder that goes on.

    Every row of a batch begins with as many tokens, so none is padded but behind its end.

    >>> PairWriter("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self._asked.left_out:
            _log.warning(
                "%s asks for %s: memopt writes greedily unless temperature is given, with one beam",
                self._bundle.path,
                ", ".join(self._asked.left_out),
            )

    def _opener(self, provider: str) -> Opener:
        super()._opener(provider)  # raises where it is not there
        return cast(Opener, open_pair)

    @abstractmethod
    def _source(self, rows: list[Continuation]) -> dict[str, NDArray[Any]]:
        """Return what the encoder reads, one row a text."""

    def _prefill(self, rows: list[Continuation], request: Request, decoder: Any) -> Any:
        decoder.encode(self._source(rows))
        widest = max(len(row.read) for row in rows)
        # Rows that have ended may be shorter: nobody reads what follows them.
        ids = [row.read + [0] * (widest - len(row.read)) for row in rows]
        return decoder.forward(np.array(ids, np.int64))[:, None]

    def _step(self, rows: list[Continuation], decoder: Any, proposed: list[int]) -> Any:
        ids = np.array([[row.read[-1]] for row in rows], np.int64)
        return decoder.forward(ids)[:, None]

    @cached_property
    def _asked(self) -> Asked:
        return read_asked(self._bundle.path)


class Rewriter(PairWriter, TextWriter):
    """Writes a translation, a summary or an answer of a text, with one variant of a bundle.

    The encoder reads each text once. What ``generation_config.json`` asks of a text is kept:
    tokens forced, forbidden or not repeated; beams are not, and that is told. A provider that
    fails in the middle hands the text to the next one, which goes on at the same token.

    Args:
        path_or_bundle, device, variant, ...: as of :class:`memopt.runtimes.task_engine.Engine`.

    >>> Rewriter("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks: ClassVar[tuple[str, ...]] = ("text2text-generation",)

    def _rows(self, texts: Sequence[str], request: Request) -> list[Continuation]:
        if request.speculate or request.context != "refuse":
            raise ConfigurationError(
                "speculate and context='slide' are of models that go on from a prompt",
                fix="leave them out",
            )
        limit, asked = request.limit(self._stated), self._asked
        forced = {"forced_bos_token_id", "forced_eos_token_id"} & {
            name for name, value in asked.settings.items() if value is not None
        }
        wanted = forms(len(texts), **request.form)
        if any(wanted) and forced:
            raise ConfigurationError(
                f"the model forces tokens ({', '.join(sorted(forced))}), which no form allows for",
                fix="leave schema, regex and grammar out",
            )
        guides = [self._structure.guide(form) if form else None for form in wanted]
        # The beginning is a token too.
        rules = asked.rules(self._ends, begin=1, most=min(request.max_new_tokens, limit - 1))
        rows = []
        for number, (text, guide) in enumerate(zip(texts, guides, strict=True)):
            source = self._encoded(number, text)
            if len(source) > limit:
                raise InputError(
                    f"prompt {number} has {len(source)} tokens, and the encoder reads {limit}",
                    fix="shorten it, or cut it into several",
                )
            sampler = Sampler(self._sampling(request), number, rules)
            words = Words(self._tokenizer, request.stops)
            rows.append(Continuation([asked.start], sampler, words, guide, source))
        return rows

    def _sampling(self, request: Request) -> Any:
        """Return how tokens are chosen; the checkpoint's penalty is kept where none is asked."""
        stated = self._asked.settings.get("repetition_penalty")
        if request.sampling.repetition_penalty != 1.0 or not stated:
            return request.sampling
        return replace(request.sampling, repetition_penalty=float(stated))

    def _source(self, rows: list[Continuation]) -> dict[str, NDArray[Any]]:
        width = max(len(row.source) for row in rows)
        ids = np.full((len(rows), width), self._padding, np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row.source)], mask[number, : len(row.source)] = row.source, 1
        return {"input_ids": ids, "attention_mask": mask}

    @cached_property
    def _padding(self) -> int:
        stated = read_json(self._bundle.path / "config.json").get("pad_token_id")
        return stated if isinstance(stated, int) else 0
