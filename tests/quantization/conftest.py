"""Inputs and bundles of the quantization tests."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import pytest

from memopt.bundle import Bundle, open_bundle


def sentences(count: int) -> list[str]:
    """Return distinct English sentences of very different lengths, the same every time."""
    who = ["A man", "Two dogs", "The minister", "A young woman", "Our neighbour", "The company"]
    does = ["is reading", "has sold", "will visit", "did not find", "opened", "lost", "painted"]
    what = ["a book", "the old house", "three cars", "a guitar", "the harbour", "its last ship"]
    where = ["", " in Paris", " near the river, although it rained the whole day", " at 5:30 pm"]
    tail = ["", ", according to a report of the ministry that nobody had expected to see", "!"]
    made = [
        "".join((f"{a} {b} {c}", d, e))
        for a, b, c, d, e in itertools.product(who, does, what, where, tail)
    ]
    random.Random(0).shuffle(made)
    return made[:count]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of 240 sentences, one a line."""
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(sentences(240)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_exported(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny BERT with its float graphs; do not change it."""
    from memopt.exporters.base import export

    folder = tmp_path_factory.mktemp("exported") / "tiny"
    shutil.copytree(tiny.path, folder, ignore=shutil.ignore_patterns(".ort-cache"))
    export(open_bundle(folder), format="onnx")
    export(open_bundle(folder), format="openvino")
    return open_bundle(folder)


@pytest.fixture
def tiny_copy(tiny_exported: Bundle, tmp_path: Path) -> Bundle:
    """A private copy of the exported tiny BERT."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_exported.path, folder, ignore=shutil.ignore_patterns(".ort-cache"))
    return open_bundle(folder)
