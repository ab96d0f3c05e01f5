"""VoiceDetector: when somebody speaks in a sound, by Silero's graphs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import BundleError, ConfigurationError, InputError
from memopt.runtimes.audio import waveform
from memopt.runtimes.engines.graph import GraphEngine
from memopt.tasks.voice import Segment, segments_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

RATE = 16_000
# Samples of one step at 16 kHz, and how many before it the graph sees again.
STEP, CONTEXT = 512, 64
# Steps in one call of a graph that takes many; Silero's own number.
_STEPS_AT_ONCE = 512
_SOUND = (str, Path, bytes, bytearray, np.ndarray)


class VoiceDetector(GraphEngine):
    """Finds when somebody speaks, as ``silero_vad.get_speech_timestamps`` does by default.

    Arguments and errors are those of :class:`memopt.runtimes.task_engine.Engine`.

    >>> VoiceDetector("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks = ("voice-activity",)

    def segments(
        self,
        sound: Any,
        *,
        threshold: float = 0.5,
        min_speech: float = 0.25,
        min_silence: float = 0.1,
        padding: float = 0.03,
    ) -> list[Segment]:
        """Return when somebody speaks, in order; nothing for silence or a sound of 0 seconds.

        Args:
            sound: a path, encoded bytes, (samples, rate), or mono samples at 16 kHz.
            threshold: how probable speech has to be for one to begin; it goes on down to 0.15
                below that.
            min_speech: seconds; what is shorter is left out.
            min_silence: seconds; what is shorter does not end a segment.
            padding: seconds put at both ends of each.

        Raises:
            InputError: no sound, or one that cannot be read.
            ConfigurationError: a threshold that is no probability, or a negative time.
            DeviceError: the engine is closed, or no provider is left.
        """
        if not 0 < threshold < 1:
            raise ConfigurationError(f"threshold is {threshold!r}", fix="give one between 0 and 1")
        for name, value in (
            ("min_speech", min_speech),
            ("min_silence", min_silence),
            ("padding", padding),
        ):
            if value < 0:
                raise ConfigurationError(f"{name} is {value!r}", fix="give 0 or more seconds")
        wave = self._wave(sound)
        return segments_of(
            self._probabilities(wave),
            len(wave),
            step=STEP,
            rate=RATE,
            threshold=threshold,
            min_speech=min_speech,
            min_silence=min_silence,
            padding=padding,
        )

    def probabilities(self, sound: Any) -> NDArray[np.float32]:
        """Return how probable speech is in each 32 ms, float32 (steps,).

        Raises:
            InputError: no sound, or one that cannot be read.
            DeviceError: the engine is closed, or no provider is left.
        """
        return self._probabilities(self._wave(sound))

    def _wave(self, sound: Any) -> NDArray[np.float32]:
        pair = isinstance(sound, tuple | list) and len(sound) == 2
        if not pair and not isinstance(sound, _SOUND):
            raise InputError(
                f"the sound is {type(sound).__name__}",
                fix="give a path, bytes, an array or (samples, rate)",
            )
        samples = sound[0] if pair else sound
        if isinstance(samples, np.ndarray) and not samples.size:
            return np.empty(0, np.float32)
        try:
            return waveform(sound, RATE)
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError(f"the sound cannot be read: {error}") from error

    def _probabilities(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        if not len(wave):
            return np.empty(0, np.float32)
        names = {port.name for port in self.inputs}
        frames = _frames(wave)
        if names == {"input", "h", "c"}:
            return self._in_blocks(frames)
        if names - {"sr"} != {"input", "state"}:
            raise BundleError(
                f"{self._bundle.path} takes {', '.join(sorted(names))}, and VoiceDetector knows "
                "Silero's graphs of input and state, or h and c",
                fix="run it with memopt.runtimes.engines.graph.GraphEngine",
            )
        rate = {"sr": np.array(RATE, np.int64)} if "sr" in names else {}
        state = np.zeros((2, 1, 128), np.float32)
        found = np.empty(len(frames), np.float32)
        for number, frame in enumerate(frames):
            given = {"input": frame[None], "state": state, **rate}
            results = self._chain.run_all(given)
            found[number], state = results["output"].item(), results["stateN"]
        return found

    def _in_blocks(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        hidden = cell = np.zeros((1, 1, 128), np.float32)
        found = []
        for start in range(0, len(frames), _STEPS_AT_ONCE):
            block = frames[start : start + _STEPS_AT_ONCE]
            results = self._chain.run_all({"input": block, "h": hidden, "c": cell})
            found.append(results["speech_probs"])
            hidden, cell = results["hn"], results["cn"]
        return np.concatenate(found)


def _frames(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the steps of a sound, each behind the end of the one before (steps, 576)."""
    count = -(-len(wave) // STEP)
    whole = np.zeros(CONTEXT + count * STEP, np.float32)
    whole[CONTEXT : CONTEXT + len(wave)] = wave
    windows = np.lib.stride_tricks.sliding_window_view(whole, CONTEXT + STEP)[::STEP]
    return np.ascontiguousarray(windows)
