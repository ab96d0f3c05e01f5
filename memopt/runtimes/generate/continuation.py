"""One text that is being written: its tokens, what is read of them, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memopt.runtimes.generate.request import Request
from memopt.runtimes.generate.sampling import Sampler
from memopt.runtimes.generate.structure import Guide
from memopt.runtimes.generate.words import Words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Continuation:
    """One text that is being written.

    Attributes:
        source: the tokens that an encoder reads, of a model that has one.
        tokens, logprobs: of the answer so far.
        read: what the model reads: prompt and answer, less what slid out of the window.
        dropped: how many tokens slid out.
        known: of the prompt, how many the decoder had read for the last text.
        unsure: the last run over several tokens left the next one to rounding.
        finish: why it ended, "" while it goes on.
    """

    def __init__(
        self,
        prompt: list[int],
        sampler: Sampler,
        words: Words,
        guide: Guide | None = None,
        source: Sequence[int] = (),
    ) -> None:
        self.prompt, self.sampler, self.words, self.guide = prompt, sampler, words, guide
        self.source = source
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.read = list(prompt)
        self.dropped = self.known = 0
        self.unsure = False
        self.finish = ""

    @property
    def all(self) -> list[int]:
        """The prompt and what was written."""
        return self.prompt + self.tokens

    def take(
        self,
        logits: NDArray[np.float32],
        proposed: Sequence[int],
        ends: frozenset[int],
        request: Request,
        limit: int,
    ) -> str:
        """Choose the next token, and further ones as long as those proposed are chosen.

        Args:
            logits: (1 + proposed, vocabulary): of the next token, and behind each proposed one.
            ends: tokens that end a text.
            request: how much is to be written.
            limit: tokens the model can read.

        Returns:
            What they add to the text.
        """
        piece = ""
        self.unsure = False
        for place, line in enumerate(logits):
            allowed = self.guide.allowed(len(line)) if self.guide else None
            if proposed and self.sampler.undecided(line, self.all, allowed):
                # A run over this token alone decides, as it would without speculation.
                self.unsure = True
                break
            piece += self._choose(line, allowed, ends, request.max_new_tokens)
            if request.context == "refuse" and len(self.read) >= limit:
                self.finish = self.finish or "length"
            if self.finish or place == len(proposed) or self.tokens[-1] != proposed[place]:
                break
        return piece

    def _choose(
        self,
        logits: NDArray[np.float32],
        allowed: NDArray[np.bool_] | None,
        ends: frozenset[int],
        most: int,
    ) -> str:
        if allowed is not None and not allowed.any():
            self.finish = "stop"
            return ""
        token, logprob = self.sampler.pick(logits, self.all, allowed)
        if token in ends:
            self.finish = "stop"
            return ""
        self.tokens.append(token)
        self.read.append(token)
        self.logprobs.append(logprob)
        piece = self.words.add(token)
        if self.guide:
            self.guide.take(token)
        if self.words.stopped:
            # A stop string may end it in the middle of its form.
            whole = self.guide is None or self.guide.holds(self.words.text)
            self.finish = "stop" if whole else "length"
        elif self.guide and self.guide.closed:
            self.finish = "stop"
        elif len(self.tokens) >= most:
            self.finish = "length"
        return piece

    def room(self, most: int, limit: int) -> int:
        """Return how many tokens may be proposed: none where the last run left it unsure."""
        return 0 if self.unsure else min(most - len(self.tokens) - 1, limit - len(self.read))

    def slide(self, size: int, keep: int) -> None:
        """Let the model read ``size`` tokens from now on: the first ``keep`` and the last ones."""
        if len(self.read) > size:
            self.dropped += len(self.read) - size
            self.read = self.read[:keep] + self.read[len(self.read) - size + keep :]


def slide(rows: Sequence[Continuation], request: Request, limit: int) -> bool:
    """Shorten what is read of the texts that have reached the limit; say whether any has."""
    if request.context != "slide":
        return False
    full = [row for row in rows if not row.finish and len(row.read) >= limit]
    for row in full:
        row.slide(request.window(limit, len(row.tokens)), request.keep)
    return bool(full)
