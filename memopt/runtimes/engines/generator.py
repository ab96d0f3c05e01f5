"""Generator: text from a language model, without torch and without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Unpack, cast

import numpy as np

from memopt.bundle import read_json
from memopt.errors import ConfigurationError, InputError
from memopt.runtimes.base import Opener
from memopt.runtimes.engines.writer import Generation, TextWriter
from memopt.runtimes.generate.chat import ChatPrompt, Message, check, prompt_of
from memopt.runtimes.generate.continuation import Continuation
from memopt.runtimes.generate.decoders import open_decoder
from memopt.runtimes.generate.lookup import agreeing
from memopt.runtimes.generate.request import Options, Request
from memopt.runtimes.generate.sampling import TIE, Sampler
from memopt.runtimes.generate.structure import forms
from memopt.runtimes.generate.words import Words
from memopt.runtimes.keys_values import padded, places

# A prompt is read in parts: the logits of every token of a part are in memory at once.
CHUNK = 256
# A cache has room for so many tokens of the answer at first, and grows.
AHEAD = 1024
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Generator(TextWriter):
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
        self._read: list[int] = []  # what the decoder holds, of one text
        self._reader: Any = None  # the decoder that holds it
        self._unsteady: Any = None  # one that reads a token alone otherwise than beside others

    def _opener(self, provider: str) -> Opener:
        super()._opener(provider)  # raises where it is not there
        return cast(Opener, open_decoder)

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

    def chat_prompt(self, messages: Sequence[Message]) -> ChatPrompt:
        """Return the prompt that :meth:`chat` gives the model.

        The template writes what begins a text (``bos_token``), so no such token is added to it.
        """
        return ChatPrompt(prompt_of(self._bundle.path, messages, self._special))

    def opening(self, messages: Sequence[Message]) -> int:
        """Return how many tokens stand before the first user's words: the system's, mostly.

        These are what :meth:`chat` keeps where the context slides.
        """
        check(messages)
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

    def _prefill(self, rows: list[Continuation], request: Request, decoder: Any) -> Any:
        """Let the decoder read the texts, but what it knows.

        Returns the logits behind each, (rows, 1, vocabulary).
        """
        widest = max(len(row.read) for row in rows)
        known = self._known(rows, request, decoder)
        if not rows[0].tokens:
            rows[0].known = known
        if not known:
            decoder.begin(len(rows), widest + min(request.max_new_tokens, AHEAD))
        ids, mask, positions = padded([row.read for row in rows]).values()
        # ONNX Runtime's attention takes a prompt in parts only where it is alone.
        step = CHUNK if len(rows) == 1 else widest
        logits: Any = None
        self._forget()
        for begin in range(known, widest, step):
            end = min(begin + step, widest)
            logits = decoder.forward(ids[:, begin:end], mask[:, :end], positions[:, begin:end])
        self._mask = mask
        return logits[:, None]

    def _known(self, rows: list[Continuation], request: Request, decoder: Any) -> int:
        """Return how many tokens of a single text the decoder has read already, and keep those."""
        if len(rows) != 1 or decoder is not self._reader:
            return 0
        wanted = rows[0].read[:-1]  # the last one is read anew: its logits are what is asked for
        known = agreeing(self._read, wanted)
        if not known or (request.exact and not self._reads_alike(decoder, known)):
            return 0
        decoder.rewind(known)
        return known

    def _reads_alike(self, decoder: Any, count: int) -> bool:
        """Say whether a token read alone gives what it gives beside others; asked once a decoder.

        Args:
            count: the first tokens of what it has read that are still wanted; it has them after.
        """
        if count > 1 and decoder not in (self._steady, self._unsteady):
            ids, mask = np.array([self._read[:count]]), np.ones((1, count), np.int64)
            answers = []
            for new in (2, 1):
                decoder.rewind(count - new)
                part = ids[:, -new:], mask, places(mask, new)
                answers.append(decoder.verify(*part)[0, -1])
            if np.abs(answers[0] - answers[1]).max() < TIE:
                self._steady = decoder
            else:
                self._unsteady = decoder
        return decoder is self._steady

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

    def _forget(self) -> None:
        self._read, self._reader = [], None

    def _remember(self, rows: list[Continuation], decoder: Any) -> None:
        if len(rows) == 1:
            # The last token was written but not read.
            self._read, self._reader = rows[0].read[:-1], decoder

    @cached_property
    def _special(self) -> dict[str, str]:
        file = self._bundle.path / "tokenizer_config.json"
        stated = read_json(file) if file.is_file() else {}
        found = {name: stated.get(name) for name in SPECIAL}
        texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in found.items()}
        return {name: text for name, text in texts.items() if isinstance(text, str)}
