"""Open a graph in the runtime it is for, and run it on inputs of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memopt.bundle import Bundle
from memopt.errors import InputError
from memopt.runtimes.base import one_by_one
from memopt.runtimes.batching import Budget, UnusableItems
from memopt.runtimes.frontend import make_front_end
from memopt.runtimes.keys_values import BEAM, StatefulRun, from_nothing, with_positions
from memopt.runtimes.onnx import cpu_session, session_options, takes_one_row
from memopt.runtimes.openvino_axes import takes_one_row as openvino_takes_one_row
from memopt.runtimes.openvino_core import compile_known, open_core

Feed = Mapping[str, NDArray[Any]]
# Runs the graph and returns the values named when it was opened, in that order.
Observe = Callable[[Feed], Sequence[NDArray[Any]]]
Run = Callable[[Feed], NDArray[np.float32]]

# Both sides of every comparison get the same two numbers.
THREADS = 2
# Rows of one calibration batch: its activations are what calibration memory is made of.
BATCH = 8
# Tokens at most in one, for a front end that asks.
TOKENS = 1024


def open_onnx(graph: Path | bytes, outputs: Sequence[str], options: Any = None) -> Observe:
    """Open an ONNX graph on the CPU; inputs that it does not have are left out.

    Args:
        graph: the file, or the model as bytes.
        outputs: the values to return.
        options: session options other than the usual ones.
    """
    return _observed(cpu_session(graph, options or session_options(THREADS)), outputs)


def _observed(session: Any, outputs: Sequence[str]) -> Observe:
    inputs = {item.name: item.shape for item in session.get_inputs()}
    complete = from_nothing(inputs)

    def run(feed: Feed) -> Sequence[NDArray[Any]]:
        given = {name: value for name, value in complete(feed).items() if name in inputs}
        return list(session.run(list(outputs), given))

    if takes_one_row(session):
        return lambda feed: one_by_one(run, feed)
    return run


def open_openvino(
    graph: Path | Any, outputs: Sequence[str | int], options: Mapping[str, Any]
) -> Observe:
    """Open an OpenVINO graph, a file or a model in memory, on the CPU with these compile options.

    Inputs that it does not have are left out; ``outputs`` are names or positions.
    """
    compiled = compile_known(open_core(), graph, "CPU", options)
    inputs = {name: _sizes(port) for port in compiled.inputs for name in port.get_names()}
    if BEAM in inputs:
        stateful = StatefulRun(compiled)
        names = [_output_name(compiled, output) for output in outputs]

        def kept(feed: Feed) -> Sequence[NDArray[Any]]:
            made = stateful(with_positions(feed))
            return [made[name] for name in names]

        return kept
    one_row = openvino_takes_one_row(compiled)
    complete = from_nothing(inputs)

    def run(feed: Feed) -> Sequence[NDArray[Any]]:
        given = complete(feed)
        results = compiled({name: value for name, value in given.items() if name in inputs})
        return [np.array(results[output]) for output in outputs]

    if one_row:
        return lambda feed: one_by_one(run, feed)
    return run


def _output_name(compiled: Any, output: str | int) -> str:
    """Return what :class:`StatefulRun` calls an output: one without a name by its position."""
    if isinstance(output, str):
        return output
    return str(next(iter(compiled.outputs[output].get_names()), output))


def _sizes(port: Any) -> tuple[int | None, ...]:
    return tuple(None if d.is_dynamic else d.get_length() for d in port.get_partial_shape())


def open_graph(
    graph: Path | Any, format: str, output: str, options: Mapping[str, str] | None = None
) -> Run:
    """Open a graph and return a function from inputs to one output as float32.

    Args:
        graph: the file, or for OpenVINO also a model in memory.
        format: "onnx" or "openvino".
        output: which output to return.
        options: given to OpenVINO, which may lack those of speed alone.
    """
    if format == "openvino":
        usual = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
        observe = open_openvino(graph, [output], {**usual, **(options or {})})
    else:
        observe = open_onnx(graph, [output])

    def run(feed: Feed) -> NDArray[np.float32]:
        return np.asarray(observe(feed)[0], np.float32)

    return run


def open_whole(
    graph: Path, format: str, options: Mapping[str, str] | None = None
) -> Callable[[Feed], dict[str, NDArray[Any]]]:
    """Open a graph's file and return a function from inputs to every output by name.

    Of a language model what its cache then holds is among them, under the names of the outputs
    that a graph without states has.

    Args:
        graph, format, options: as of :func:`open_graph`.
    """
    if format == "openvino":
        usual = {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
        compiled = compile_known(open_core(), graph, "CPU", {**usual, **(options or {})})
        inputs = {name: _sizes(port) for port in compiled.inputs for name in port.get_names()}
        if BEAM in inputs:
            stateful = StatefulRun(compiled)
            return lambda feed: stateful(with_positions(feed))
        outputs = [name for port in compiled.outputs for name in sorted(port.get_names())[:1]]
        observe = open_openvino(graph, outputs, {**usual, **(options or {})})
    else:
        session = cpu_session(graph, session_options(THREADS))
        outputs = [item.name for item in session.get_outputs()]
        observe = _observed(session, outputs)
    return lambda feed: dict(zip(outputs, observe(feed), strict=True))


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
    front, budget = make_front_end(bundle, inputs), Budget(batch_size=batch, tokens=TOKENS)
    for item in items:
        reason = front.check(item)
        if reason:
            raise InputError(f"calibration input {str(item)[:60]!r} {reason}")
    for chunk in front.chunks(items):
        try:
            batches = front.prepare([items[i] for i in chunk], budget)
        except UnusableItems as error:
            number, reason = next(iter(error.reasons.items()))
            where = str(items[int(chunk[number])])[:120]
            raise InputError(f"calibration input {where!r} {reason}") from error
        for group in batches:
            yield [int(chunk[row]) for row in group.rows], group.feed
