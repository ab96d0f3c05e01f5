"""Generator: text from a language model, without torch and without transformers."""

from __future__ import annotations

import collections.abc
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeAlias, Unpack, cast

import numpy as np

from memopt.bundle import read_json
from memopt.errors import BundleError, ConfigurationError, DeviceError, InputError
from memopt.positions import position_limit
from memopt.runtimes.base import Opener
from memopt.runtimes.generate.chat import Message, prompt_of
from memopt.runtimes.generate.continuation import Continuation, slide
from memopt.runtimes.generate.decoders import open_decoder
from memopt.runtimes.generate.lookup import Lookup, agreeing
from memopt.runtimes.generate.request import Options, Request
from memopt.runtimes.generate.sampling import Sampler
from memopt.runtimes.generate.structure import Structure, forms
from memopt.runtimes.generate.words import Words, end_tokens
from memopt.runtimes.keys_values import padded, places
from memopt.runtimes.task_engine import Engine

# A prompt is read in parts: the logits of every token of a part are in memory at once.
CHUNK = 256
# A cache has room for so many tokens of the answer at first, and grows.
AHEAD = 1024
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


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


class Generator(Engine):
    """Writes what follows a prompt, with one variant of a bundle on one provider.

    A provider that fails in the middle of a text hands it to the next one, which reads what is
    there and goes on at the same token; see :attr:`events`. One text or batch is written at a time.

    Args:
        path_or_bundle, device, variant, ...: as of :class:`memopt.runtimes.task_engine.Engine`.

    >>> Generator("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks: ClassVar[tuple[str, ...]] = ("text-generation",)

    def after_fork(self) -> None:
        """In a child of fork(): nothing of the parent's texts is kept."""
        super().after_fork()
        self._writing = threading.Lock()
        self._read: list[int] = []  # what the decoder holds, of one text
        self._reader: Any = None  # the decoder that holds it

    def _opener(self, provider: str) -> Opener:
        super()._opener(provider)  # raises where it is not there
        return cast(Opener, open_decoder)

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
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        request = Request.of(options)
        rows = self._rows(texts, request)
        for _ in self._write(rows, request, cancel):
            pass
        return [_generation(row) for row in rows]

    def stream(self, prompt: str, **options: Unpack[Options]) -> Pieces:
        """Yield what follows one prompt as it is written, in pieces of whole characters.

        Closing the iterator ends the text; at its end it returns the :class:`Generation`, the
        value of ``yield from``. Options and errors are those of :meth:`generate`.
        """
        request = Request.of(options)
        return self._write(self._rows([prompt], request), request)

    async def astream(self, prompt: str, **options: Unpack[Options]) -> AsyncIterator[str]:
        """Yield as :meth:`stream` does, without holding up the event loop."""
        import asyncio

        pieces = self.stream(prompt, **options)
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        finally:
            pieces.close()

    def chat(self, messages: Sequence[Message], **options: Unpack[Options]) -> Generation:
        """Answer a conversation, written by the bundle's own template.

        Args:
            messages: each with ``role`` and ``content``.
            options: of :meth:`generate`.

        Raises:
            BundleError: the bundle has no template, or a broken one.
            InputError: messages that the template refuses.
        """
        options = {"keep": self.opening(messages), **options}
        return self.generate(self.chat_prompt(messages), **options)[0]

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """Return the prompt that :meth:`chat` gives the model."""
        return prompt_of(self._bundle.path, messages, self._special)

    def opening(self, messages: Sequence[Message]) -> int:
        """Return how many tokens stand before the first user's words: the system's, mostly.

        These are what :meth:`chat` keeps where the context slides.
        """
        system = [message for message in messages[:1] if message.get("role") == "system"]
        first, second = (
            self._encoded(0, self.chat_prompt([*system, {"role": "user", "content": said}]))
            for said in "ab"
        )
        return agreeing(first, second)

    def _rows(self, texts: Sequence[str], request: Request) -> list[Continuation]:
        if request.speculate and len(texts) != 1:
            raise ConfigurationError(
                f"speculate is {request.speculate} for {len(texts)} prompts",
                fix="speculate on one prompt at a time",
            )
        limit = request.limit(self._stated)
        wanted = forms(len(texts), **request.form)
        guides = [self._structure.guide(form) if form else None for form in wanted]
        rows = []
        for number, (text, guide) in enumerate(zip(texts, guides, strict=True)):
            ids = self._encoded(number, text)
            if len(ids) >= limit and request.context == "refuse":
                raise InputError(
                    f"prompt {number} has {len(ids)} tokens, and there is room for {limit} with "
                    "the answer",
                    fix="shorten it, raise max_context where the model allows, or let it slide: "
                    "context='slide' (--context slide)",
                )
            words = Words(self._tokenizer, request.stops)
            rows.append(Continuation(ids, Sampler(request.sampling, number), words, guide))
        return rows

    def _encoded(self, number: int, text: str) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"prompt {number} is {type(text).__name__}", fix="give text")
        ids: list[int] = self._tokenizer.encode(text).ids
        if not ids:
            raise InputError(f"prompt {number} is empty", fix="give a text to go on from")
        return ids

    def _prefill(self, rows: list[Continuation], most: int, decoder: Any) -> Any:
        """Let the decoder read the texts, but what it knows.

        Returns the logits behind each, (rows, 1, vocabulary).
        """
        widest = max(len(row.read) for row in rows)
        known = self._known(rows, decoder)
        if not rows[0].tokens:
            rows[0].known = known
        if not known:
            decoder.begin(len(rows), widest + min(most, AHEAD))
        ids, mask, positions = padded([row.read for row in rows]).values()
        # ONNX Runtime's attention takes a prompt in parts only where it is alone.
        step = CHUNK if len(rows) == 1 else widest
        logits: Any = None
        self._read, self._reader = [], None
        for begin in range(known, widest, step):
            end = min(begin + step, widest)
            logits = decoder.forward(ids[:, begin:end], mask[:, :end], positions[:, begin:end])
        self._mask = mask
        return logits[:, None]

    def _known(self, rows: list[Continuation], decoder: Any) -> int:
        """Return how many tokens of a single text the decoder has read already, and keep those."""
        if len(rows) != 1 or decoder is not self._reader:
            return 0
        wanted = rows[0].read[:-1]  # the last one is read anew: its logits are what is asked for
        known = agreeing(self._read, wanted)
        if known:
            decoder.rewind(known)
        return known

    def _write(
        self,
        rows: list[Continuation],
        request: Request,
        cancel: threading.Event | None = None,
    ) -> Pieces:
        """Write all rows to their end once no other text is written; yield the first row's."""
        with self._writing:
            yield from self._written(rows, request, cancel)
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
                    logits = self._prefill(rows, request.max_new_tokens, backend)
                    decoder = backend
                else:
                    if lookup is not None:
                        room = rows[0].room(request.max_new_tokens, limit)
                        proposed = lookup.propose(rows[0].all, room)
                    logits = self._step(rows, decoder, proposed)
                if not np.isfinite(logits).all():
                    raise DeviceError("the model gives logits that are not numbers")
            except Exception as error:  # noqa: BLE001 - any failure of a provider is handed on
                decoder = None
                self._read, self._reader = [], None
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
        if len(rows) == 1:
            # The last token was written but not read.
            self._read, self._reader = rows[0].read[:-1], decoder

    def _step(self, rows: list[Continuation], decoder: Any, proposed: list[int]) -> Any:
        """Let the decoder read the last token of each text; those that ended read padding.

        Returns logits (rows, 1 + proposed, vocabulary), behind each proposed token too.
        """
        read = len(rows[0].read) - 1
        if len(rows) == 1 and read < self._mask.shape[1]:
            # Of what was proposed last time not all was right.
            decoder.rewind(read)
            self._mask = self._mask[:, :read]
        ids = np.array([[row.read[-1], *proposed] for row in rows])
        live = np.array([[0 if row.finish else 1] for row in rows])
        self._mask = np.concatenate([self._mask, live.repeat(ids.shape[1], axis=1)], axis=1)
        run = decoder.verify if proposed else decoder.forward
        logits = run(ids.astype(np.int64), self._mask, places(self._mask, ids.shape[1]))
        return logits if proposed else logits[:, None]

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        file = self._bundle.path / "tokenizer.json"
        if not file.is_file():
            raise BundleError(f"{self._bundle.path} has no tokenizer.json", fix="convert it again")
        tokenizer = Tokenizer.from_file(str(file))
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

    @cached_property
    def _special(self) -> dict[str, str]:
        file = self._bundle.path / "tokenizer_config.json"
        stated = read_json(file) if file.is_file() else {}
        found = {name: stated.get(name) for name in SPECIAL}
        texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in found.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}


def _generation(row: Continuation) -> Generation:
    return Generation(
        text=row.words.text,
        tokens=tuple(row.tokens),
        logprobs=tuple(row.logprobs),
        finish=row.finish,
        prompt_tokens=len(row.prompt),
        reused_tokens=row.known,
        dropped_tokens=row.dropped,
    )
