"""Language models' graphs take keys and values of what came before: of a whole text, none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Feed = Mapping[str, NDArray[Any]]
PAST = "past_key_values."


def from_nothing(shapes: Mapping[str, Sequence[Any]]) -> Callable[[Feed], Feed]:
    """Return what adds to a whole text's inputs those of a graph with a cache: an empty one.

    Args:
        shapes: of the graph's inputs by name; (batch, heads, past, size) of keys and values.

    >>> import numpy as np
    >>> give = from_nothing({"input_ids": ("b", "s"), "past_key_values.0.key": ("b", 2, "p", 8)})
    >>> give({"input_ids": np.zeros((3, 5), np.int64)})["past_key_values.0.key"].shape
    (3, 2, 0, 8)
    """
    past = {name: shape for name, shape in shapes.items() if name.startswith(PAST)}
    if not past:
        return lambda feed: feed

    def give(feed: Feed) -> Feed:
        made = dict(feed)
        batch = len(feed["input_ids"])
        if "position_ids" in shapes and "position_ids" not in made:
            mask = feed["attention_mask"].astype(np.int64)
            made["position_ids"] = np.maximum(mask.cumsum(axis=1) - 1, 0)
        for name, shape in past.items():
            if name not in made:
                made[name] = np.zeros((batch, int(shape[1]), 0, int(shape[3])), np.float32)
        return made

    return give
