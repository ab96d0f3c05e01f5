"""Language models' graphs take keys and values of what came before: of a whole text, none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Feed = Mapping[str, NDArray[Any]]
PAST, PRESENT = "past_key_values.", "present."
BEAM = "beam_idx"
# An input with a default: from which token on logits are wanted, counted from the end as in Slice.
KEEP = "logits_to_keep"
# What the file of an encoder's graph begins with, where a decoder has one of its own.
ENCODER = "encoder_model"


def from_nothing(shapes: Mapping[str, Sequence[Any]]) -> Callable[[Feed], Feed]:
    """Return what adds to a whole text's inputs those of a graph with a cache: an empty one.

    Args:
        shapes: of the graph's inputs by name; (batch, heads, past, size) of keys and values.

    >>> import numpy as np
    >>> give = from_nothing({"input_ids": ("b", "s"), "past_key_values.0.key": ("b", 2, "p", 8)})
    >>> ids = np.ones((3, 5), np.int64)
    >>> give({"input_ids": ids, "attention_mask": ids})["past_key_values.0.key"].shape
    (3, 2, 0, 8)
    """
    past = {name: shape for name, shape in shapes.items() if name.startswith(PAST)}
    if not past:
        return lambda feed: feed

    def give(feed: Feed) -> Feed:
        made = with_positions(feed)
        batch = len(feed["input_ids"])
        for name, shape in past.items():
            if name not in made:
                made[name] = np.zeros((batch, int(shape[1]), 0, int(shape[3])), np.float32)
        return made

    return give


def with_positions(feed: Feed) -> dict[str, NDArray[Any]]:
    """Return a whole text's inputs with the place of each token in its row, padding left out.

    >>> import numpy as np
    >>> with_positions({"attention_mask": np.array([[0, 1, 1]])})["position_ids"].tolist()
    [[0, 0, 1]]
    """
    made = dict(feed)
    if "position_ids" not in made and "attention_mask" in feed:
        made["position_ids"] = places(feed["attention_mask"].astype(np.int64))
    return made


def places(mask: NDArray[np.int64], new: int | None = None) -> NDArray[np.int64]:
    """Return the place of each token in its row, of the last ``new`` ones or all; padding's is 0.

    >>> import numpy as np
    >>> places(np.array([[0, 1, 1, 1]]), 2).tolist()
    [[1, 2]]
    """
    found = np.maximum(mask.cumsum(axis=1) - 1, 0)
    return np.ascontiguousarray(found if new is None else found[:, -new:])


def padded(rows: Sequence[Sequence[int]]) -> dict[str, NDArray[np.int64]]:
    """Return the inputs of texts of several lengths, padded on the left.

    >>> padded([[7, 8], [9]])["input_ids"].tolist()
    [[7, 8], [0, 9]]
    """
    width = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), width), np.int64)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :], mask[number, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": places(mask)}


def held(outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return a step's keys and values by the names under which the next one takes them."""
    return {
        PAST + name.removeprefix(PRESENT): value
        for name, value in outputs.items()
        if name.startswith(PRESENT)
    }


def encoder_of(files: Sequence[str]) -> str | None:
    """Return the encoder's graph among the files beside a decoder's, None where there is none.

    >>> encoder_of(["onnx/decoder_model.onnx.data", "onnx/encoder_model.onnx"])
    'onnx/encoder_model.onnx'
    """
    for file in files:
        name = file.rpartition("/")[2]
        if name.removeprefix("openvino_").startswith(ENCODER) and name.endswith((".onnx", ".xml")):
            return file
    return None


def has_states(model: Any) -> bool:
    """Say whether an ``openvino.Model`` keeps keys and values as states."""
    return any(BEAM in port.get_names() for port in model.inputs)


class StatefulRun:
    """An OpenVINO model that keeps keys and values as states, run as one that is given them.

    Each call is a text of its own: the states are those of the feed's ``past_key_values``, else
    empty; what the call leaves in them is given back as ``present``.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}

    def __call__(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Return the outputs by name, the states among them."""
        import openvino

        self._request.reset_state()
        states = {state.name.partition(PRESENT)[0]: state for state in self._request.query_state()}
        for name, state in states.items():
            past = feed.get(name)
            if past is not None and past.shape[2]:
                state.state = openvino.Tensor(np.ascontiguousarray(past))
        given = {name: value for name, value in feed.items() if name in self._inputs}
        given[BEAM] = np.arange(len(feed["input_ids"]), dtype=np.int32)
        self._request.infer(given)
        made = {
            name: np.array(self._request.get_output_tensor(number).data)
            for number, port in enumerate(self._compiled.outputs)
            for name in port.get_names() or {str(number)}
        }
        kept = {state.name.partition(PRESENT): state for state in self._request.query_state()}
        return made | {a + b: np.array(s.state.data) for (_, a, b), s in kept.items()}
