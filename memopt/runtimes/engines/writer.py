"""What writes tokens one after the other, whatever it reads before: the loop and its verbs."""

from __future__ import annotations

import collections.abc
import threading
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, Unpack

import numpy as np

from memopt.bundle import read_json
from memopt.errors import BundleError, ConfigurationError, DeviceError, InputError, first_line
from memopt.positions import position_limit
from memopt.runtimes.generate.chat import ChatPrompt
from memopt.runtimes.generate.continuation import Continuation, slide
from memopt.runtimes.generate.lookup import Lookup
from memopt.runtimes.generate.request import Options, Request
from memopt.runtimes.generate.sampling import TIE
from memopt.runtimes.generate.structure import Structure
from memopt.runtimes.generate.turn import TextTurn
from memopt.runtimes.generate.words import end_tokens
from memopt.runtimes.task_engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a model wrote.

    Attributes:
        text: without the prompt, and without what ended it.
        tokens: their ids.
        logprobs: of each token, in the model's own distribution, natural logarithm.
        finish: ``stop`` (the model or a stop string ended it, and an answer of a form has it),
            ``length`` or ``cancelled``.
        prompt_tokens: how many the prompt has.
        reused_tokens: how many of those were not read again, as the last prompt began with them.
        dropped_tokens: how many slid out of the context.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    prompt_tokens: int
    reused_tokens: int = 0
    dropped_tokens: int = 0


# Yields the pieces of a text, and returns what was written.
Pieces: TypeAlias = "collections.abc.Generator[str, None, Generation]"


class TokenWriter(Engine):
    """Writes rows of tokens to their end on whichever provider can; a subclass says what they read.

    One text or batch is written at a time. Arguments are those of
    :class:`memopt.runtimes.task_engine.Engine`.

    >>> TokenWriter("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    def after_fork(self) -> None:
        """In a child of fork(): the parent may be in the middle of a text."""
        super().after_fork()
        self._writing = TextTurn()
        self._steady: Any = None  # a decoder that reads one token as it does several

    @abstractmethod
    def _prefill(self, rows: list[Continuation], request: Request, decoder: Any) -> Any:
        """Let the decoder read the texts; return logits (rows, 1, vocabulary) behind each."""

    @abstractmethod
    def _step(self, rows: list[Continuation], decoder: Any, proposed: list[int]) -> Any:
        """Let the decoder read the last token of each text, and those proposed.

        Returns logits (rows, 1 + proposed, vocabulary), behind each proposed token too.
        """

    def _forget(self) -> None:
        """Count on nothing that a decoder has read: it failed."""

    def _remember(self, rows: list[Continuation], decoder: Any) -> None:
        """See what a decoder has read now that the texts are written."""

    def _write(
        self,
        rows: list[Continuation],
        request: Request,
        cancel: threading.Event | None = None,
        reader: int | None = None,
    ) -> Pieces:
        """Write all rows to their end once no other text is written; yield the first row's.

        ``reader`` is the thread that asks for the pieces; None is whichever did last.
        """
        with self._writing.taken(reader, cancel) as own:
            if not own:
                for row in rows:
                    row.finish = "cancelled"
                return _generation(rows[0])
            for piece in self._written(rows, request, cancel):
                yield piece
                self._writing.reader = reader or threading.get_ident()
        return _generation(rows[0])

    def _written(
        self, rows: list[Continuation], request: Request, cancel: threading.Event | None
    ) -> Iterator[str]:
        """Write all rows to their end, on whichever provider can; yield the first row's text."""
        decoder: Any = None
        logits: Any = None
        limit = request.limit(self._stated)
        lookup = Lookup(request.speculate) if request.speculate else None
        while not all(row.finish for row in rows):
            backend = self._chain.backend
            proposed: list[int] = []
            try:
                if slide(rows, request, limit) or backend is not decoder:
                    # The first, or one that took over, or fewer tokens: it reads what is there.
                    logits = self._prefill(rows, request, backend)
                    decoder = backend
                else:
                    if lookup is not None:
                        room = rows[0].room(request.max_new_tokens, limit)
                        proposed = lookup.propose(rows[0].all, room)
                    if proposed and request.exact and decoder is not self._steady:
                        self._prove(rows, decoder, proposed)
                    logits = self._step(rows, decoder, proposed)
                if not np.isfinite(logits).all():
                    raise DeviceError("the model gives logits that are not numbers")
            except ConfigurationError:
                raise
            except Exception as error:  # noqa: BLE001 - any failure of a provider is handed on
                decoder = None
                self._forget()
                self._chain.hand_over(backend, error)
                continue
            for number, row in enumerate(rows):
                if row.finish:
                    continue
                piece = row.take(logits[number], proposed, self._ends, request, limit)
                if cancel is not None and cancel.is_set():
                    row.finish = row.finish or "cancelled"
                if row.finish:
                    piece += row.words.finish()
                if piece and number == 0:
                    yield piece
        self._remember(rows, decoder)

    def _prove(self, rows: list[Continuation], decoder: Any, proposed: list[int]) -> None:
        """Let the decoder read one token alone and with others; it must find the same.

        Raises:
            ConfigurationError: it does not, so that speculation would change the text.
        """
        alone = self._step(rows, decoder, [])[0, 0]
        beside = self._step(rows, decoder, proposed)[0, 0]
        apart = float(np.abs(alone - beside).max())
        if apart >= TIE:
            raise ConfigurationError(
                f"{self._chain.candidate.variant.name} computes several tokens otherwise than one "
                f"(logits differ by {apart:.2g}): with speculate the text would be another",
                fix="leave it out, take a float variant, or allow it: exact=False (--inexact)",
            )
        self._steady = decoder

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        file = self._bundle.path / "tokenizer.json"
        if not file.is_file():
            raise BundleError(f"{self._bundle.path} has no tokenizer.json", fix="convert it again")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise BundleError(
                f"{file} is no tokenizer: {first_line(error)}", fix="convert it again"
            ) from error
        # A prompt is never cut without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @cached_property
    def _structure(self) -> Structure:
        return Structure(self._tokenizer, self._ends)

    @cached_property
    def _stated(self) -> int:
        """How many tokens the model was made for."""
        return position_limit(read_json(self._bundle.path / "config.json")) or 1 << 20

    @cached_property
    def _ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        return end_tokens(self._bundle.path)


class TextWriter(TokenWriter):
    """Writes a text for a text; a subclass says which it reads, and how.

    Arguments are those of :class:`memopt.runtimes.task_engine.Engine`.

    >>> TextWriter("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    @abstractmethod
    def _rows(self, texts: Sequence[str], request: Request) -> list[Continuation]:
        """Return what is to be written, one row a text."""

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        cancel: threading.Event | None = None,
        **options: Unpack[Options],
    ) -> list[Generation]:
        """Write what follows each prompt.

        Args:
            prompts: one text or several, of any lengths.
            cancel: set from another thread, it ends the texts where they are.
            options: see :class:`memopt.runtimes.generate.request.Request` and, for how a token is
                chosen, :class:`memopt.runtimes.generate.sampling.Sampling`; greedy by default.

        Raises:
            InputError: an empty prompt, or one longer than the context.
            ConfigurationError: a value out of its range, or a form that cannot be kept.
            DeviceError: no provider is left.
        """
        texts = _listed(prompts)
        if not isinstance(cancel, threading.Event | None):
            raise ConfigurationError(
                f"cancel is {type(cancel).__name__}", fix="give a threading.Event"
            )
        request = Request.of(options)
        if not texts:
            return []
        rows = self._rows(texts, request)
        for _ in self._write(rows, request, cancel):
            pass
        return [_generation(row) for row in rows]

    def stream(
        self, prompt: str, *, cancel: threading.Event | None = None, **options: Unpack[Options]
    ) -> Pieces:
        """Yield what follows one prompt as it is written, in pieces of whole characters.

        Closing the iterator ends the text; at its end it returns the :class:`Generation`, the
        value of ``yield from``. Options, ``cancel`` and errors are those of :meth:`generate`.
        """
        request = Request.of(options)
        return self._write(self._rows([prompt], request), request, cancel)

    async def astream(self, prompt: str, **options: Unpack[Options]) -> AsyncIterator[str]:
        """Yield as :meth:`stream` does, without holding up the event loop."""
        import asyncio
        from concurrent.futures import ThreadPoolExecutor

        request, cancel = Request.of(options), threading.Event()
        rows = self._rows([prompt], request)
        pieces = self._write(rows, request, cancel, threading.get_ident())
        # A thread of its own: one that waits for its turn holds up none that the text of now needs.
        thread = ThreadPoolExecutor(1, "memopt-stream")
        run = asyncio.get_running_loop().run_in_executor
        try:
            while (piece := await run(thread, next, pieces, None)) is not None:
                yield piece
        finally:
            cancel.set()
            try:
                await run(thread, pieces.close)  # behind the token that is being written
            finally:
                thread.shutdown(wait=False)

    def _encoded(self, number: int, text: str) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"prompt {number} is {type(text).__name__}", fix="give text")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"prompt {number} holds {text[error.start]!a}, which is no character",
                fix="give it as UTF-8",
            ) from error
        # A chat's template has written the tokens that begin a text; twice is another text.
        special = not isinstance(text, ChatPrompt)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        if not ids:
            raise InputError(f"prompt {number} is empty", fix="give a text to go on from")
        return ids


def _listed(prompts: Any) -> list[str]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, collections.abc.Iterable):
        raise InputError(
            f"prompts is {type(prompts).__name__}", fix="give a text, or a list of texts"
        )
    return list(prompts)


def _generation(row: Continuation) -> Generation:
    return Generation(
        text=row.words.text,
        tokens=tuple(row.tokens),
        logprobs=tuple(row.logprobs),
        finish=row.finish,
        prompt_tokens=len(row.source or row.prompt),
        reused_tokens=row.known,
        dropped_tokens=row.dropped,
    )
