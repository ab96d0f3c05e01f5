"""A few inputs of every kind, for checks of graphs that come without torch's own answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from memopt.bundle import Bundle

_TEXTS = (
    "A kettle boils.",
    "The second of two sentences is a good deal longer than the first one, and says no more.",
    "yes",
    "Where is the station, and when does the last train of the evening leave for the coast?",
    "Übergrößenträger",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z",
)
_SIZES = ((40, 60), (300, 200), (224, 224))
_RATE = 16_000


def samples(bundle: Bundle) -> list[Any]:
    """Return inputs of the bundle's kind: texts, pictures or sounds of several sizes, seeded.

    >>> from pathlib import Path
    >>> from memopt.bundle import Manifest
    >>> manifest = Manifest(
    ...     name="m", task="reranking", modality="text", architecture="B", model_type="bert"
    ... )
    >>> samples(Bundle(Path("m"), manifest))[1][1]
    'A kettle boils.'
    """
    row = bundle.task
    if row.modality == "text":
        pairs = [(text, _TEXTS[i - 1]) for i, text in enumerate(_TEXTS)]
        return pairs if row.takes == "pair" else [*_TEXTS]
    random = np.random.default_rng(0)
    if row.modality == "image":
        return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in _SIZES]
    lengths = (_RATE, 9_001, 2 * _RATE)
    return [random.normal(0, 0.1, length).astype(np.float32) for length in lengths]
