"""Whisper's way of writing what it hears: its beginning, its marks of time, its segments.

Radford et al. 2022, https://arxiv.org/abs/2212.04356; in numbers and order as transformers has it
(generation_whisper.py and WhisperTimeStampLogitsProcessor, 5.23).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import BundleError, ConfigurationError
from memopt.registry import nearest
from memopt.runtimes.generate.rules import Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray

TASKS = ("transcribe", "translate")
# Seconds between two marks of time, and between two frames of features.
MARK, FRAME = 0.02, 0.01
# Frames between two marks: the encoder halves their number.
STRIDE = 2


@dataclass(frozen=True, slots=True)
class SpeechTokens:
    """The tokens of a checkpoint that stand for no words.

    Attributes:
        start: begins every text.
        languages: ``<|en|>`` to its token; empty where there is one language only.
        tasks: ``transcribe`` and ``translate`` to their tokens.
        forced: the beginning that older checkpoints state, None where the language is to be heard.
        without: says that no marks of time follow; None where the model has none.
        first: the latest mark that a text may begin with, counted from 0.
    """

    start: int
    languages: Mapping[str, int]
    tasks: Mapping[str, int]
    forced: tuple[int | None, ...]
    without: int | None
    first: int | None

    @classmethod
    def of(cls, start: int, settings: Mapping[str, Any]) -> SpeechTokens:
        """Read them from ``generation_config.json``.

        Raises:
            BundleError: the tokens that the older setting states have gaps.
        """
        stated = settings.get("forced_decoder_ids") or ()
        if [place for place, _ in stated] != list(range(1, len(stated) + 1)):
            raise BundleError(f"forced_decoder_ids {stated} do not follow each other from 1 on")
        several = settings.get("is_multilingual", True) is not False
        return cls(
            start,
            settings.get("lang_to_id") or {} if several else {},
            settings.get("task_to_id") or {} if several else {},
            tuple(token for _, token in stated),
            settings.get("no_timestamps_token_id"),
            settings.get("max_initial_timestamp_index"),
        )

    @property
    def marks(self) -> int:
        """The token of second 0; all from there on are marks of time."""
        return 1 << 30 if self.without is None else self.without + 1

    def beginning(
        self, language: str | None, task: str | None, timestamps: bool
    ) -> tuple[int | None, ...]:
        """Return the tokens that a text begins with, None where the language is to be heard.

        Raises:
            ConfigurationError: an unknown language or task, or marks of time that are not there.
        """
        known = self._language(language)
        made: list[int | None] = [self.start]
        if language is None and task is None:
            made += self.forced
        if known is not None:
            made[1:2] = [known]
        elif self.languages and (len(made) < 2 or made[1] is None):
            made[1:2] = [None]
        else:
            made = [token for token in made if token is not None]
        if task is not None:
            made.append(self._task(task))
        elif known is not None and self.tasks and not set(self.tasks.values()) & set(made):
            made.append(self.tasks["transcribe"])
        if timestamps and self.without is None:
            raise ConfigurationError(
                "the model has no marks of time", fix="leave timestamps out, or give 30 s at most"
            )
        if timestamps and made[-1] == self.without:
            made.pop()
        elif not timestamps and self.without is not None and made[-1] != self.without:
            made.append(self.without)
        return tuple(made)

    def _language(self, language: str | None) -> int | None:
        if language is None:
            return None
        token = f"<|{language.lower().strip('<|>')}|>"
        if token not in self.languages:
            codes = [name.strip("<|>") for name in self.languages]
            fix = nearest(language, codes) if codes else "leave it out: it knows one only"
            raise ConfigurationError(f"language {language!r} is not known to the model", fix=fix)
        return self.languages[token]

    def _task(self, task: str) -> int:
        if task not in self.tasks:
            fix = nearest(task, self.tasks) if self.tasks else "leave it out: it only transcribes"
            raise ConfigurationError(f"task {task!r} is not known to the model", fix=fix)
        return self.tasks[task]


@dataclass(frozen=True, slots=True)
class Spoken:
    """The rules of one window: its beginning first, then the checkpoint's, then marks of time.

    Attributes:
        tokens: of the checkpoint.
        beginning: as :meth:`SpeechTokens.beginning` gives it; the decoder is given the first token
            and is made to say the others.
        rules: of what follows.
        timestamps: whether marks of time are written.
        end: the token that ends a text.
    """

    tokens: SpeechTokens
    beginning: tuple[int | None, ...]
    rules: Rule
    timestamps: bool
    end: int

    def __call__(self, scores: NDArray[Any], seen: Sequence[int]) -> NDArray[Any]:
        """Return the scores with those of forbidden tokens at minus infinity."""
        if len(seen) < len(self.beginning):
            token = self.beginning[len(seen)]
            only = [*self.tokens.languages.values()] if token is None else [token]
            made = np.full(len(scores), -np.inf)
            made[only] = scores[only]
            return made
        made = self.rules(scores, seen)
        written = seen[len(self.beginning) :]
        return timed(made, written, self.tokens, self.end) if self.timestamps else made


def timed(
    scores: NDArray[Any], written: Sequence[int], tokens: SpeechTokens, end: int
) -> NDArray[Any]:
    """Return scores by which marks of time come in pairs, never fall, and come first.

    Args:
        scores: (vocabulary,).
        written: the tokens behind the beginning.
        tokens: of the checkpoint, which has marks.
        end: the token that ends a text; those before it are words.
    """
    made, marks = np.array(scores, np.float64), tokens.marks
    made[tokens.without] = -np.inf
    last = len(written) >= 1 and written[-1] >= marks
    before = len(written) < 2 or written[-2] >= marks
    if last:
        # Behind a pair words come, behind a single mark another one or the end.
        made[slice(marks, None) if before else slice(0, end)] = -np.inf
    given = [token for token in written if token >= marks]
    if given:
        made[marks : given[-1] + (not (last and not before))] = -np.inf
    if not written:
        made[:marks] = -np.inf
        if tokens.first is not None:
            made[marks + tokens.first + 1 :] = -np.inf
    words, times = made[:marks], made[marks:]
    if times.size and np.isfinite(times).any():
        top = times.max()
        # All marks together likelier than any word: it is a mark.
        if top + np.log(np.exp(times - top).sum()) > words.max():
            made[:marks] = -np.inf
    return made


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens between two marks of time, in seconds of the whole sound."""

    start: float
    end: float
    tokens: tuple[int, ...]


def pieces_of(tokens: Sequence[int], marks: int, seek: int, frames: int) -> tuple[list[Piece], int]:
    """Cut what was written of one window at its marks of time.

    Args:
        tokens: what was written, without its end.
        marks: the token of second 0.
        seek: the frame at which the window begins.
        frames: how many it has.

    Returns:
        The pieces, and how many frames on the next window begins: behind the last whole piece.

    >>> pieces_of([100, 7, 150, 150, 8, 9], 100, 0, 3000)
    ([Piece(start=0.0, end=1.0, tokens=(100, 7, 150, 150))], 100)
    """
    is_mark = [token >= marks for token in tokens]
    ends = [n + 1 for n in range(len(tokens) - 1) if is_mark[n] and is_mark[n + 1]]
    offset = seek * MARK / STRIDE
    if not ends:
        place = frames // STRIDE
        given = [token for token in tokens if token >= marks]
        if given and given[-1] != marks:
            place = given[-1] - marks
        return [Piece(offset, offset + place * MARK, tuple(tokens))], frames
    alone = is_mark[-2:] == [False, True]  # nothing is said behind the last mark
    if alone:
        ends.append(len(tokens))
    else:
        ends[-1] += 1  # the beginning of what is not whole
    found, begin = [], 0
    for number, stop in enumerate(ends):
        part = tokens[begin:stop]
        last = part[-2 if number == len(ends) - 1 and not alone else -1]
        start, end = (offset + (token - marks) * MARK for token in (part[0], last))
        found.append(Piece(start, end, tuple(part)))
        begin = stop
    # A model may say the same mark twice where none are asked for: the window is over then.
    ahead = frames if alone else (tokens[begin - 2] - marks) * STRIDE
    return found, ahead if ahead > 0 else frames
