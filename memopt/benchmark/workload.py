"""Inputs to measure with when the user gives none: seeded, with realistic lengths."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from memopt.bundle import Manifest
from memopt.errors import InputError
from memopt.quantization.accuracy.calibration import read

# Lengths of the STS benchmark's sentences: median 10 words, log-normal, cut at 60.
_MEDIAN_WORDS, _SIGMA, _MOST_WORDS = 10, 0.45, 60
# Everyday words, one token each for most tokenizers: made-up ones are three tokens long.
_TEXT = """
a about after again all also an and another any are around as at away back bank be because been
before best big black blue book both boy building but by call car case cat child children city
close cold come could country court day dog door down each early eat end even every eye face
family far farm field find fire first fish five food for four free friend from game girl give
go gold good government great green group guitar hand hard have he head heart help her high
him his home horse hot hour house how if in into is it its just keep kind know land large last
late left less life light line little live long look low made make man many market may men
money more morning most mother mountain move music must name near new news next night no north
not now number of off office old on one only open or other our out over paper park part people
piano place plane play police power president price rain read red right river road room run
said same saw say school sea see she shop show side small snow so some song south stand state
station still stop store story street strong sun table take talk team tell ten than that the
their them then there they thing this three through time to today together town train tree
turn two under up us very walk wall war was water way we week well west what when where which
white who why will wind window with without woman women wood word work world would year yellow
yes young
"""
_WORDS = _TEXT.split()
IMAGE_SIZE = 224
AUDIO_SECONDS, AUDIO_RATE = 30, 16_000


def default_inputs(
    manifest: Manifest, count: int, *, seed: int = 0, pairs: bool = False
) -> list[Any]:
    """Return ``count`` inputs for the bundle's modality, the same for the same seed.

    Text is str; an image is uint8 (224, 224, 3); audio is float32 (480000,), 30 s at 16 kHz.

    >>> from types import SimpleNamespace as N
    >>> a, b = (default_inputs(N(modality="text"), 3) for _ in range(2))
    >>> a == b and len(a) == 3
    True
    """
    generator = np.random.default_rng(seed)
    if pairs:
        return [(_sentence(generator), _sentence(generator)) for _ in range(count)]
    if manifest.modality == "text":
        return [_sentence(generator) for _ in range(count)]
    if manifest.modality == "image":
        images = (count, IMAGE_SIZE, IMAGE_SIZE, 3)
        return list(generator.integers(0, 256, images, dtype=np.uint8))
    samples = (count, AUDIO_SECONDS * AUDIO_RATE)
    return list(generator.normal(0, 0.1, samples).astype(np.float32))


def read_inputs(
    path: Path, modality: str, limit: int | None = None, *, pairs: bool = False
) -> list[Any]:
    """Read inputs to measure with: texts of a file, or the images or sounds of a folder.

    The same files as for calibration: every text column of .csv, .tsv and .parquet, lines of .txt,
    strings of .jsonl, each row's texts in turn; a folder gives its files' paths, sorted.

    Raises:
        InputError: missing, empty, not UTF-8, or of another modality.
    """
    if not path.exists():
        raise InputError(f"no inputs at {str(path)!r}", fix="check the path")
    found = (item for record in read(path, modality=modality, pairs=pairs) for item in record.items)
    inputs = list(islice(found, limit))
    if not inputs:
        raise InputError(f"{path} is empty: nothing to measure with", fix="give some inputs")
    return inputs


def _sentence(generator: np.random.Generator) -> str:
    words = round(float(generator.lognormal(np.log(_MEDIAN_WORDS), _SIGMA)))
    places = generator.integers(len(_WORDS), size=min(max(words, 2), _MOST_WORDS))
    return " ".join(_WORDS[place] for place in places)
