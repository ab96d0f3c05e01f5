"""Damaged input of every kind ends in one of our errors, or in nothing."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mutate import mutate
from run import attempt, corpus
from targets import TARGETS

# What `make test` spends on a target; MEMOPT_FUZZ_SECONDS spends more, with new inputs.
SLOW = {"memory_import": 20, "media": 40, "settings": 80}
INPUTS, SECONDS = 400, float(os.environ.get("MEMOPT_FUZZ_SECONDS", 0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_refused_clearly(name: str) -> None:
    """Good files, all that an earlier run found worth keeping, and changed copies of them."""
    target, pool = TARGETS[name], corpus(TARGETS[name])
    rng = random.Random(None if SECONDS else 0)
    tried = list(pool) + [
        mutate(rng.choice(pool), pool, rng) for _ in range(SLOW.get(name, INPUTS))
    ]
    for data in tried:
        failed(name, data)
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        failed(name, mutate(rng.choice(pool), pool, rng))
    assert target.seeds()


def failed(name: str, data: bytes) -> None:
    error = attempt(TARGETS[name], data)
    if error is not None:
        raise AssertionError(f"{name} raised {type(error).__name__} for {data[:300]!r}") from error


@pytest.mark.parametrize("name", [n for n in TARGETS if n not in ("records", "media", "stream")])
def test_the_seeds_are_good(name: str) -> None:
    """A target that refused its own seeds would test nothing behind the first check."""
    for data in TARGETS[name].seeds():
        TARGETS[name].run(data)
