"""Run a variant's graph, or look inside one, with nothing but the runtime it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.bundle import Bundle
from memopt.errors import InputError
from memopt.extras import require
from memopt.runtimes.batching import UnusableItems
from memopt.runtimes.engine import make_front_end

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[Any]]
    Run = Callable[[Feed], NDArray[np.float32]]

# Both sides of every comparison get the same two numbers.
THREADS = 2
# Rows of one calibration batch: its activations are what calibration memory is made of.
BATCH = 8
# Tokens at most in one, for a front end that asks.
TOKENS = 1024


def open_graph(
    graph: Path | Any, format: str, output: str, options: Mapping[str, str] | None = None
) -> Run:
    """Open a graph and return a function from inputs to one output as float32.

    Args:
        graph: the file, or for OpenVINO also a model in memory.
        format: "onnx" or "openvino".
        output: which output to return.
        options: given to the runtime as they are.
    """
    return _openvino(graph, output, options or {}) if format == "openvino" else _onnx(graph, output)


def feeds(
    bundle: Bundle,
    items: Sequence[Any],
    inputs: Sequence[str],
    *,
    max_length: int | None = None,
    batch: int = BATCH,
) -> Iterator[tuple[list[int], Feed]]:
    """Yield (positions in ``items``, model inputs), batches of similar length, longest first.

    Raises:
        InputError: an item cannot be turned into an input; the message names it.
    """
    if max_length is not None:
        bundle = replace(bundle, manifest=replace(bundle.manifest, max_length=max_length))
    front = make_front_end(bundle, inputs)
    for item in items:
        reason = front.check(item)
        if reason:
            raise InputError(f"calibration input {str(item)[:60]!r} {reason}")
    for chunk in front.chunks(items):
        try:
            batches = front.prepare([items[i] for i in chunk], batch, TOKENS)
        except UnusableItems as error:
            number, reason = next(iter(error.reasons.items()))
            where = str(items[int(chunk[number])])[:120]
            raise InputError(f"calibration input {where!r} {reason}") from error
        for made in batches:
            yield [int(chunk[row]) for row in made.rows], made.feed


def _onnx(path: Path, output: str) -> Run:
    ort = require("onnxruntime", extra="cpu", why="run ONNX variants")
    from memopt.runtimes.onnx import session_options

    session = ort.InferenceSession(
        str(path), session_options(THREADS), providers=["CPUExecutionProvider"]
    )
    wanted = {item.name for item in session.get_inputs()}

    def run(feed: Feed) -> NDArray[np.float32]:
        import numpy as np

        (values,) = session.run([output], {k: v for k, v in feed.items() if k in wanted})
        return np.asarray(values, np.float32)

    return run


def _openvino(graph: Path | Any, output: str, options: Mapping[str, str]) -> Run:
    ov = require("openvino", extra="openvino", why="run OpenVINO variants")
    config = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY", **options}
    compiled = ov.Core().compile_model(graph, "CPU", config)
    request = compiled.create_infer_request()
    wanted = {name for port in compiled.inputs for name in port.get_names()}

    def run(feed: Feed) -> NDArray[np.float32]:
        import numpy as np

        results = request.infer({k: v for k, v in feed.items() if k in wanted})
        return np.array(results[output], np.float32)

    return run
