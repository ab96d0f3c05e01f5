"""Generator: text from a language model, without torch and without transformers."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from memopt.bundle import read_json
from memopt.errors import BundleError, ConfigurationError, DeviceError, InputError
from memopt.positions import position_limit
from memopt.runtimes.base import Opener
from memopt.runtimes.generate.chat import Message, prompt_of
from memopt.runtimes.generate.decoders import open_decoder
from memopt.runtimes.generate.sampling import Sampler, Sampling
from memopt.runtimes.generate.words import Words, end_tokens
from memopt.runtimes.keys_values import padded, places
from memopt.runtimes.task_engine import Engine

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A prompt is read in parts: the logits of every token of a part are in memory at once.
CHUNK = 256
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What a model wrote.

    Attributes:
        text: without the prompt, and without what ended it.
        tokens: their ids.
        logprobs: of each token, in the model's own distribution, natural logarithm.
        finish: ``stop`` (the model or a stop string ended it), ``length`` or ``cancelled``.
        prompt_tokens: how many the prompt has.
        reused_tokens: how many of those were not read again, as the last prompt began with them.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    prompt_tokens: int
    reused_tokens: int = 0


class _Row:
    """One text that is being written."""

    def __init__(self, prompt: list[int], sampler: Sampler, words: Words) -> None:
        self.prompt, self.sampler, self.words = prompt, sampler, words
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish = ""
        self.known = 0  # tokens that the decoder had read for the last text

    @property
    def all(self) -> list[int]:
        return self.prompt + self.tokens


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
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        max_context: int | None = None,
        cancel: threading.Event | None = None,
        **sampling: Any,
    ) -> list[Generation]:
        """Write what follows each prompt.

        Args:
            prompts: one text or several, of any lengths.
            max_new_tokens: at most so many.
            stop: texts that end it; they are not part of the answer.
            max_context: tokens of prompt and answer together; None is what the model was made for.
            cancel: set from another thread, it ends the texts where they are.
            sampling: see :class:`memopt.runtimes.generate.sampling.Sampling`; greedy by default.

        Raises:
            InputError: an empty prompt, or one longer than the context.
            ConfigurationError: a number out of its range.
            DeviceError: no provider is left.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        rows = self._rows(texts, stop, Sampling(**sampling), max_new_tokens, max_context)
        for _ in self._write(rows, max_new_tokens, self._limit(max_context), cancel):
            pass
        return [_generation(row) for row in rows]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        stop: str | Sequence[str] = (),
        max_context: int | None = None,
        **sampling: Any,
    ) -> Iterator[str]:
        """Yield what follows one prompt as it is written, in pieces of whole characters.

        Closing the iterator ends the text. Arguments and errors are those of :meth:`generate`.
        """
        rows = self._rows([prompt], stop, Sampling(**sampling), max_new_tokens, max_context)
        return self._write(rows, max_new_tokens, self._limit(max_context))

    async def astream(self, prompt: str, **options: Any) -> AsyncIterator[str]:
        """Yield as :meth:`stream` does, without holding up the event loop."""
        import asyncio

        pieces = self.stream(prompt, **options)
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        finally:
            pieces.close()  # type: ignore[attr-defined]

    def chat(self, messages: Sequence[Message], **options: Any) -> Generation:
        """Answer a conversation, written by the bundle's own template.

        Args:
            messages: each with ``role`` and ``content``.
            options: of :meth:`generate`.

        Raises:
            BundleError: the bundle has no template, or a broken one.
            InputError: messages that the template refuses.
        """
        return self.generate(self.chat_prompt(messages), **options)[0]

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """Return the prompt that :meth:`chat` gives the model."""
        return prompt_of(self._bundle.path, messages, self._special)

    def _rows(
        self,
        texts: Sequence[str],
        stop: str | Sequence[str],
        sampling: Sampling,
        most: int,
        context: int | None,
    ) -> list[_Row]:
        if not isinstance(most, int) or most < 1:
            raise ConfigurationError(f"max_new_tokens is {most!r}", fix="give 1 or more")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(stops):
            raise ConfigurationError("a stop string is empty", fix="leave it out")
        limit = self._limit(context)
        rows = []
        for number, text in enumerate(texts):
            ids = self._encoded(number, text)
            if len(ids) >= limit:
                raise InputError(
                    f"prompt {number} has {len(ids)} tokens, and there is room for {limit} with "
                    "the answer",
                    fix="shorten it, or raise max_context where the model allows",
                )
            rows.append(_Row(ids, Sampler(sampling, number), Words(self._tokenizer, stops)))
        return rows

    def _encoded(self, number: int, text: str) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"prompt {number} is {type(text).__name__}", fix="give text")
        ids: list[int] = self._tokenizer.encode(text).ids
        if not ids:
            raise InputError(f"prompt {number} is empty", fix="give a text to go on from")
        return ids

    def _limit(self, context: int | None) -> int:
        stated = position_limit(self._config) or 1 << 20
        if context is None:
            return stated
        if not isinstance(context, int) or not 1 < context <= stated:
            raise ConfigurationError(
                f"max_context is {context!r}", fix=f"give 2 to {stated}, the model's own"
            )
        return context

    def _prefill(self, rows: list[_Row], most: int, decoder: Any) -> Any:
        """Let the decoder read the texts, but what it knows; return the logits behind them."""
        widest = max(len(row.all) for row in rows)
        known = rows[0].known = self._known(rows, decoder)
        if not known:
            decoder.begin(len(rows), widest + most)
        ids, mask, positions = padded([row.all for row in rows]).values()
        # ONNX Runtime's attention takes a prompt in parts only where it is alone.
        step = CHUNK if len(rows) == 1 else widest
        logits: Any = None
        self._read, self._reader = [], None
        for begin in range(known, widest, step):
            end = min(begin + step, widest)
            logits = decoder.forward(ids[:, begin:end], mask[:, :end], positions[:, begin:end])
        self._mask = mask
        return logits

    def _known(self, rows: list[_Row], decoder: Any) -> int:
        """Return how many tokens of a single text the decoder has read already, and keep those."""
        if len(rows) != 1 or decoder is not self._reader:
            return 0
        wanted = rows[0].all[:-1]  # the last one is read anew: its logits are what is asked for
        pairs = zip(self._read, wanted, strict=False)
        known = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        known = min(len(self._read), len(wanted)) if known is None else known
        if known:
            decoder.rewind(known)
        return known

    def _write(
        self, rows: list[_Row], most: int, limit: int, cancel: threading.Event | None = None
    ) -> Iterator[str]:
        """Write all rows to their end once no other text is written; yield the first row's."""
        with self._writing:
            yield from self._written(rows, most, limit, cancel)

    def _written(
        self, rows: list[_Row], most: int, limit: int, cancel: threading.Event | None
    ) -> Iterator[str]:
        """Write all rows to their end, on whichever provider can; yield the first row's text."""
        decoder: Any = None
        logits: Any = None
        while not all(row.finish for row in rows):
            backend = self._chain.backend
            try:
                if backend is not decoder:
                    # The first, or one that took over: it reads what is there and goes on.
                    logits = self._prefill(rows, most, backend)
                    decoder = backend
                else:
                    logits = self._step(rows, decoder)
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
                piece = self._taken(row, logits[number], most, limit)
                if cancel is not None and cancel.is_set():
                    row.finish = row.finish or "cancelled"
                if row.finish:
                    piece += row.words.finish()
                if piece and number == 0:
                    yield piece
        if len(rows) == 1:
            # The last token was written but not read.
            self._read, self._reader = rows[0].all[:-1], decoder

    def _taken(self, row: _Row, logits: NDArray[np.float32], most: int, limit: int) -> str:
        """Choose the next token of one text; return what it adds to it."""
        token, logprob = row.sampler.pick(logits, row.all)
        if token in self._ends:
            row.finish = "stop"
            return ""
        row.tokens.append(token)
        row.logprobs.append(logprob)
        piece = row.words.add(token)
        if row.words.stopped:
            row.finish = "stop"
        elif len(row.tokens) >= most or len(row.all) >= limit:
            row.finish = "length"
        return piece

    def _step(self, rows: list[_Row], decoder: Any) -> Any:
        """Let the decoder read the last token of each text; those that ended read padding."""
        ids = np.array([[row.tokens[-1] if row.tokens else row.prompt[-1]] for row in rows])
        live = np.array([[0 if row.finish else 1] for row in rows])
        self._mask = np.concatenate([self._mask, live], axis=1)
        return decoder.forward(ids.astype(np.int64), self._mask, places(self._mask, 1))

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
    def _config(self) -> dict[str, Any]:
        return read_json(self._bundle.path / "config.json")

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


def _generation(row: _Row) -> Generation:
    return Generation(
        text=row.words.text,
        tokens=tuple(row.tokens),
        logprobs=tuple(row.logprobs),
        finish=row.finish,
        prompt_tokens=len(row.prompt),
        reused_tokens=row.known,
    )
