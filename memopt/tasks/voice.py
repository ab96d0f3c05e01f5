"""Probabilities of speech, step by step, to the times when somebody speaks.

The rules are those of Silero's ``get_speech_timestamps`` with its defaults (silero-vad 6.2.3,
MIT): speech begins at the threshold, ends 0.15 below it, and short pauses do not end it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Speech goes on this far below the threshold; Silero's own number, and its floor.
_BELOW, _FLOOR = 0.15, 0.01


@dataclass(frozen=True, slots=True)
class Segment:
    """Seconds from ``start`` to ``end`` in which somebody speaks.

    ``score`` is the mean probability of speech over its steps.
    """

    start: float
    end: float
    score: float


def segments_of(
    probabilities: NDArray[np.float32],
    samples: int,
    *,
    step: int,
    rate: int,
    threshold: float = 0.5,
    min_speech: float = 0.25,
    min_silence: float = 0.1,
    padding: float = 0.03,
) -> list[Segment]:
    """Return the segments of a sound.

    Args:
        probabilities: of speech in each step, (steps,).
        samples: of the whole sound.
        step, rate: samples of a step, and of a second.
        threshold, min_speech, min_silence, padding: as of ``VoiceDetector.segments``.

    >>> loud = np.array([0.9] * 20 + [0.0] * 20, np.float32)
    >>> [found] = segments_of(loud, 40 * 512, step=512, rate=16000)
    >>> found.start, found.end
    (0.0, 0.67)
    """
    raw = _spoken(probabilities, samples, step, threshold, min_speech * rate, min_silence * rate)
    found = []
    for start, end in _padded(raw, samples, padding * rate):
        steps = probabilities[start // step : -(-end // step)]
        found.append(Segment(start / rate, end / rate, float(steps.mean())))
    return found


def _spoken(
    probabilities: NDArray[np.float32],
    samples: int,
    step: int,
    threshold: float,
    min_speech: float,
    min_silence: float,
) -> list[tuple[int, int]]:
    """Return the first and last sample of each segment, before padding."""
    lower = max(threshold - _BELOW, _FLOOR)
    found: list[tuple[int, int]] = []
    start = quiet = None
    for number, probability in enumerate(probabilities.tolist()):
        here = number * step
        if probability >= threshold:
            quiet = None
            start = here if start is None else start
        elif probability < lower and start is not None:
            # Silero takes a pause that begins at sample 0 for none; there is no speech before it.
            quiet = here if quiet is None else quiet
            if here - quiet >= min_silence:
                if quiet - start > min_speech:
                    found.append((start, quiet))
                start = quiet = None
    if start is not None and samples - start > min_speech:
        found.append((start, samples))
    return found


def _padded(found: list[tuple[int, int]], samples: int, padding: float) -> list[tuple[int, int]]:
    """Return the segments with padding at both ends, a short pause shared by its neighbours."""
    starts, ends = [start for start, _ in found], [end for _, end in found]
    for number, (start, end) in enumerate(found):
        if number == 0:
            starts[0] = int(max(0, start - padding))
        if number == len(found) - 1:
            ends[number] = int(min(samples, end + padding))
            continue
        pause = starts[number + 1] - end
        if pause < 2 * padding:
            ends[number] += pause // 2
            starts[number + 1] = max(0, starts[number + 1] - pause // 2)
        else:
            ends[number] = int(min(samples, end + padding))
            starts[number + 1] = int(max(0, starts[number + 1] - padding))
    return list(zip(starts, ends, strict=True))
