"""Transcriber: what is said in a sound, by a Whisper, without torch and without transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from memopt.bundle import read_json
from memopt.errors import ConfigurationError, InputError
from memopt.runtimes.audio import AudioFrontEnd
from memopt.runtimes.engines.rewriter import PairWriter
from memopt.runtimes.generate.continuation import Continuation
from memopt.runtimes.generate.request import Request
from memopt.runtimes.generate.sampling import Sampler, Sampling
from memopt.runtimes.generate.speech import FRAME, Piece, SpeechTokens, Spoken, pieces_of
from memopt.runtimes.generate.words import Words

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Sounds whose windows go through the model together: a window of Whisper is 1,500 places.
AT_ONCE = 8
Progress = Callable[[float, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """What is said from ``start`` to ``end``, in seconds; tokens include marks of time."""

    start: float
    end: float
    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcription:
    """What is said in a sound.

    Attributes:
        text: all of it.
        language: the code that was heard or given, None where the model knows one only.
        seconds: the sound's length.
        segments: its parts, in order; without timestamps one a window.
        finish: ``stop``, or ``cancelled``.
    """

    text: str
    language: str | None
    seconds: float
    segments: tuple[Utterance, ...]
    finish: str = "stop"


class _Heard:
    """One sound, and how far it is read."""

    def __init__(self, features: NDArray[np.float32], seconds: float) -> None:
        self.features, self.seconds = features, seconds
        self.seek = 0
        self.language: int | None = None
        self.segments: list[Utterance] = []
        self.finish = ""

    @property
    def left(self) -> int:
        return int(self.features.shape[1]) - self.seek

    def window(self, frames: int) -> NDArray[np.float32]:
        part = self.features[:, self.seek : self.seek + frames]
        return np.pad(part, ((0, 0), (0, frames - part.shape[1])))


class Transcriber(PairWriter):
    """Writes what is said in sounds of any length, in windows of 30 s, one behind the other.

    Where a sound is longer, each window begins behind the last whole segment of the one before, by
    the model's own marks of time. Always the likeliest token; a provider that fails in the middle
    hands the window to the next one, which goes on at the same token.

    Args:
        path_or_bundle, device, variant, ...: as of :class:`memopt.runtimes.task_engine.Engine`.

    >>> Transcriber("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks: ClassVar[tuple[str, ...]] = ("automatic-speech-recognition",)

    def after_fork(self) -> None:
        """In a child of fork(): nothing of the parent's sounds is kept."""
        super().after_fork()
        self._windows: NDArray[Any] = np.empty(0, np.float32)

    def transcribe(
        self,
        sounds: Any,
        *,
        language: str | None = None,
        task: str | None = None,
        timestamps: bool = False,
        max_new_tokens: int | None = None,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> list[Transcription]:
        """Write what is said in each sound.

        Args:
            sounds: a path, encoded bytes, an array at the model's rate, (samples, rate), or a list
                of such; other rates are resampled.
            language: its code (``en``); None lets the model hear it, where it knows several.
            task: ``transcribe`` or ``translate`` (into English); None is the checkpoint's own.
            timestamps: cut the text at the model's marks of time; sounds over 30 s always are.
            max_new_tokens: of a window; None is what the model has room for.
            progress: called with (seconds done, seconds in all) behind each window.
            cancel: set from another thread, it ends the work behind the token of now.

        Raises:
            InputError: an empty sound, or one that cannot be read.
            ConfigurationError: a language, task or number that cannot be.
            DeviceError: no provider is left.
        """
        items = sounds if isinstance(sounds, list) else [sounds]
        how = (language, task, timestamps, max_new_tokens)
        self._plan(*how, begin=None)  # what cannot be is told before any sound is read
        found: list[Transcription] = []
        for first in range(0, len(items), AT_ONCE):
            group = [self._read_sound(first + n, s) for n, s in enumerate(items[first:][:AT_ONCE])]
            for _ in self._heard(group, how, progress, cancel):
                pass
            found += [self._transcription(sound) for sound in group]
        return found

    def stream(
        self,
        sound: Any,
        *,
        language: str | None = None,
        task: str | None = None,
        timestamps: bool = True,
        max_new_tokens: int | None = None,
    ) -> Iterator[Utterance]:
        """Yield the segments of one sound, window by window; arguments as of :meth:`transcribe`."""
        how = (language, task, timestamps, max_new_tokens)
        self._plan(*how, begin=None)
        heard = self._read_sound(0, sound)
        for fresh in self._heard([heard], how, None, None):
            yield from fresh[0]

    def _read_sound(self, number: int, sound: Any) -> _Heard:
        problem = self._front_end().check(sound)
        front: Any = self._front_end()
        samples = sound[0] if isinstance(sound, tuple) else sound
        if problem is None and isinstance(samples, np.ndarray) and not samples.size:
            problem = "is empty: it has no samples"
        if problem is not None:
            raise InputError(f"sound {number} {problem}")
        try:
            wave = front.waveform(sound)
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError(f"sound {number} cannot be read: {error}") from error
        return _Heard(front.log_mel(wave, whole=True), len(wave) / front.rate)

    def _heard(
        self,
        sounds: list[_Heard],
        how: tuple[str | None, str | None, bool, int | None],
        progress: Progress | None,
        cancel: threading.Event | None,
    ) -> Iterator[list[list[Utterance]]]:
        """Write window after window of some sounds; yield each one's new segments."""
        language, task, timestamps, most = how
        # A sound of several windows is cut at marks of time, so they have to be there.
        marked = [timestamps or sound.left > self._frames for sound in sounds]
        while open_now := [n for n, s in enumerate(sounds) if s.left > 0 and not s.finish]:
            for kind in (True, False):
                rows = [n for n in open_now if marked[n] is kind]
                if not rows:
                    continue
                group = [sounds[n] for n in rows]
                written = self._window(group, language, task, kind, most, cancel)
                fresh: list[list[Utterance]] = [[] for _ in sounds]
                for n, pieces in zip(rows, written, strict=True):
                    fresh[n] = pieces
                yield fresh
            if progress is not None:
                all_of_it = sum(sound.seconds for sound in sounds)
                done = sum(min(sound.seek * FRAME, sound.seconds) for sound in sounds)
                progress(done, all_of_it)

    def _window(
        self,
        sounds: list[_Heard],
        language: str | None,
        task: str | None,
        timestamps: bool,
        most: int | None,
        cancel: threading.Event | None,
    ) -> list[list[Utterance]]:
        with self._writing.taken():
            rows, requests = [], []
            for sound in sounds:
                spoken, request = self._plan(language, task, timestamps, most, begin=sound.language)
                words = Words(self._tokenizer)
                rows.append(
                    Continuation([self._tokens.start], Sampler(Sampling(), 0, spoken), words)
                )
                requests.append((spoken, request))
            self._windows = np.stack([sound.window(self._frames) for sound in sounds])
            for _ in self._written(rows, requests[0][1], cancel):
                pass
        return [
            self._cut(sound, row, spoken)
            for sound, row, (spoken, _) in zip(sounds, rows, requests, strict=True)
        ]

    def _plan(
        self,
        language: str | None,
        task: str | None,
        timestamps: bool,
        most: int | None,
        *,
        begin: int | None,
    ) -> tuple[Spoken, Request]:
        """Return the rules of a window and how long its text may get.

        Args:
            language, task, timestamps, most: as of :meth:`transcribe`.
            begin: the token of the language that was heard before.
        """
        if most is not None and (not isinstance(most, int) or most < 1):
            raise ConfigurationError(f"max_new_tokens is {most!r}", fix="give 1 or more")
        stated = self._tokens.beginning(language, task, timestamps)
        beginning = tuple(
            begin if token is None and begin is not None else token for token in stated
        )
        room = self._places - len(beginning)
        limit = self._asked.settings.get("max_length") or self._places
        room = min(room, int(limit)) if most is None else min(room, most)
        rules = self._asked.rules(self._ends, begin=len(beginning), most=room)
        spoken = Spoken(self._tokens, beginning, rules, timestamps, min(self._ends, default=0))
        # The beginning but its first token is written too, by rule.
        return spoken, Request(max_new_tokens=len(beginning) - 1 + room)

    def _cut(self, sound: _Heard, row: Continuation, spoken: Spoken) -> list[Utterance]:
        told = len(spoken.beginning) - 1
        if spoken.beginning[1:2] == (None,) and row.tokens:
            sound.language = row.tokens[0]
        elif told and spoken.beginning[1] in self._tokens.languages.values():
            sound.language = spoken.beginning[1]
        frames = min(self._frames, sound.left)
        marks = self._tokens.marks
        pieces, ahead = pieces_of(row.tokens[told:], marks, sound.seek, frames)
        if row.finish == "cancelled":
            sound.finish = "cancelled"
        sound.seek += ahead
        fresh = [self._utterance(piece, sound.seconds) for piece in pieces if piece.tokens]
        sound.segments += fresh
        return fresh

    def _utterance(self, piece: Piece, seconds: float) -> Utterance:
        text = self._text(piece.tokens)
        start, end = (min(max(0.0, at), seconds) for at in (piece.start, piece.end))
        return Utterance(start=start, end=end, text=text, tokens=piece.tokens)

    def _text(self, tokens: Sequence[int]) -> str:
        words = [token for token in tokens if token < self._tokens.marks]
        return str(self._tokenizer.decode(words, skip_special_tokens=True))

    def _transcription(self, sound: _Heard) -> Transcription:
        # Characters may be cut between two segments, so the whole is not their sum.
        text = self._text([token for part in sound.segments for token in part.tokens])
        codes = {token: name.strip("<|>") for name, token in self._tokens.languages.items()}
        return Transcription(
            text=text,
            language=codes.get(sound.language) if sound.language is not None else None,
            seconds=sound.seconds,
            segments=tuple(sound.segments),
            finish=sound.finish or "stop",
        )

    def _source(self, rows: list[Continuation]) -> dict[str, NDArray[Any]]:
        return {"input_features": self._windows}

    def _make_front(self, inputs: Sequence[str]) -> AudioFrontEnd:
        return AudioFrontEnd(self._bundle, ("input_features",))

    @cached_property
    def _tokens(self) -> SpeechTokens:
        settings = dict(self._asked.settings)
        if settings.get("forced_decoder_ids") is None:
            settings["forced_decoder_ids"] = self._config.get("forced_decoder_ids")
        return SpeechTokens.of(self._asked.start, settings)

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_json(self._bundle.path / "config.json")

    @cached_property
    def _frames(self) -> int:
        """How many frames a window has: the encoder halves them."""
        return 2 * int(self._config.get("max_source_positions", 1500))

    @cached_property
    def _places(self) -> int:
        """How many tokens the decoder has places for."""
        return int(self._config.get("max_target_positions", 448))
