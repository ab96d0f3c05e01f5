"""A language model opened on a provider: tokens in, logits out, keys and values kept between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from memopt.bundle import Bundle, Variant
from memopt.errors import BundleError, DeviceError
from memopt.runtimes.base import Placement, Settings
from memopt.runtimes.cpu import usable_cpus
from memopt.runtimes.keys_values import BEAM, KEEP, PAST, PRESENT
from memopt.runtimes.onnx import OnnxBackend
from memopt.runtimes.openvino_core import compile_known, open_core

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A buffer of keys and values is made this much longer than asked for, so that it seldom grows.
SLACK = 256


class Decoder(Protocol):
    """A model and the texts it has read so far, one a row."""

    def begin(self, batch: int, capacity: int) -> None:
        """Forget every text; ``capacity`` tokens a row are to come."""

    def forward(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Read (batch, new) more tokens; return the logits (batch, vocabulary) of the last.

        Args:
            ids: the tokens.
            mask: (batch, total), 0 where a row has padding.
            positions: (batch, new), of each token in its row.
        """

    def verify(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Read as :meth:`forward` does; return the logits (batch, new, vocabulary) of each."""

    def rewind(self, length: int) -> None:
        """Forget what was read behind the first ``length`` tokens."""

    def info(self) -> dict[str, Any]:
        """Return what :meth:`Engine.device_info` shows."""

    def close(self) -> None:
        """Free the session."""


def open_decoder(bundle: Bundle, candidate: Placement, settings: Settings) -> Decoder:
    """Open a variant on a provider.

    Raises:
        BundleError: its graph has no cache.
        DeviceError: no decoder runs there.
    """
    if candidate.provider == "openvino" and candidate.variant.format == "openvino":
        return OpenvinoDecoder(bundle, candidate, settings)
    if candidate.provider in ("openvino", "torch"):
        raise DeviceError(
            f"{candidate} writes no text", fix="use an OpenVINO variant there, or ONNX Runtime"
        )
    return OnnxDecoder(bundle, candidate, settings)


def _without_cache(bundle: Bundle, candidate: Placement) -> BundleError:
    return BundleError(
        f"{candidate.variant.name} of {bundle.path} has no cache: it was exported by an older "
        "memopt",
        fix=f"run: memopt export {bundle.path} --format {candidate.variant.format}",
    )


class OnnxDecoder:
    """A graph of ONNX Runtime.

    With ``GroupQueryAttention`` past and present are one buffer that is written in place, through
    IO binding; of the portable graph the present of one step is the past of the next.
    """

    def __init__(self, bundle: Bundle, candidate: Placement, settings: Settings) -> None:
        backend = OnnxBackend(bundle, candidate, settings)
        self._backend, self._session = backend, backend.session
        self.inputs = backend.inputs
        self._shapes = {
            item.name.removeprefix(PAST): (item.shape[1], item.shape[3])
            for item in self._session.get_inputs()
            if item.name.startswith(PAST)
        }
        if not self._shapes:
            backend.close()
            raise _without_cache(bundle, candidate)
        optional = {item.name for item in self._session.get_overridable_initializers()}
        self._last_only = KEEP in optional
        self._shared = candidate.variant.fused
        self._length, self._capacity = 0, 0
        self._held: dict[str, Any] = {}
        self._bound: Any = None  # the buffers in _held, of a graph that writes in place
        found = {item.name: item.shape for item in self._session.get_outputs()}
        self._vocabulary = found["logits"][-1]

    def begin(self, batch: int, capacity: int) -> None:
        """Make empty buffers; see :class:`Decoder`."""
        self._length, self._bound = 0, None
        self._capacity = capacity + SLACK if self._shared else 0
        self._held = {
            name: ort_value(np.zeros((batch, heads, self._capacity, size), np.float32))
            for name, (heads, size) in self._shapes.items()
        }

    def forward(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the graph once; see :class:`Decoder`."""
        if self._last_only and ids.shape[1] > 1:
            return self._read(self._feed(ids, mask, positions), mask.shape[1])
        return self.verify(ids, mask, positions)[:, -1]

    def verify(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the graph once for the logits of each token; see :class:`Decoder`."""
        feed, total = self._feed(ids, mask, positions), mask.shape[1]
        logits = self._in_place(feed) if self._shared else self._copied(feed)
        self._length = total
        return logits

    def _in_place(self, feed: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Run the graph on its one buffer: what stays the same is bound once."""
        if self._bound is None:
            self._bound = self._session.io_binding()
            for name, value in self._held.items():
                self._bound.bind_ortvalue_input(PAST + name, value)
                self._bound.bind_ortvalue_output(PRESENT + name, value)
        for name, array in feed.items():
            self._bound.bind_cpu_input(name, array)
        if not isinstance(self._vocabulary, int):
            self._bound.bind_output("logits")
            self._session.run_with_iobinding(self._bound)
            return np.asarray(self._bound.get_outputs()[-1].numpy(), np.float32)
        logits = np.empty((*feed["input_ids"].shape, self._vocabulary), np.float32)
        where = logits.shape, logits.ctypes.data
        self._bound.bind_output("logits", "cpu", 0, np.float32, *where)
        self._session.run_with_iobinding(self._bound)
        return logits

    def _copied(self, feed: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Run the portable graph: the present of one step is the past of the next."""
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name, value in self._held.items():
            binding.bind_ortvalue_input(PAST + name, value)
            binding.bind_output(PRESENT + name)
        binding.bind_output("logits")
        self._session.run_with_iobinding(binding)
        *present, logits = binding.get_outputs()
        self._held = dict(zip(self._held, present, strict=True))
        return np.asarray(logits.numpy(), np.float32)

    def _feed(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        if self._shared and mask.shape[1] > self._capacity:
            self._grow(mask.shape[1] + SLACK)
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {n: np.ascontiguousarray(v) for n, v in feed.items() if n in self.inputs}

    def _read(self, feed: dict[str, NDArray[Any]], total: int) -> NDArray[np.float32]:
        """Run the graph for the logits of the last token alone, which IO binding cannot ask for."""
        for name, value in self._held.items():
            feed[PAST + name] = np.ascontiguousarray(value.numpy()[:, :, : self._length])
        feed[KEEP] = np.array([-1], np.int64)
        outputs = [*(PRESENT + name for name in self._held), "logits"]
        *present, logits = self._session.run(outputs, feed)
        self._bound = None
        for (name, old), new in zip([*self._held.items()], present, strict=True):
            whole = np.zeros(old.shape(), np.float32)
            whole[:, :, :total] = new
            self._held[name] = ort_value(whole)
        self._length = total
        return np.asarray(logits[:, -1], np.float32)

    def rewind(self, length: int) -> None:
        """Keep the first tokens; see :class:`Decoder`."""
        if not self._shared:
            self._held = {
                name: ort_value(np.ascontiguousarray(value.numpy()[:, :, :length]))
                for name, value in self._held.items()
            }
        self._length = length

    def info(self) -> dict[str, Any]:
        """Return what the backend tells."""
        return self._backend.info()

    def close(self) -> None:
        """Free buffers and session."""
        self._held, self._bound = {}, None
        self._backend.close()

    def _grow(self, capacity: int) -> None:
        self._bound = None
        for name, value in self._held.items():
            old = value.numpy()
            new = np.zeros((*old.shape[:2], capacity, old.shape[3]), np.float32)
            new[:, :, : self._length] = old[:, :, : self._length]
            self._held[name] = ort_value(new)
        self._capacity = capacity


class OpenvinoDecoder:
    """A stateful model of OpenVINO; see :mod:`memopt.exporters.stateful`."""

    def __init__(self, bundle: Bundle, candidate: Placement, settings: Settings) -> None:
        self._threads = settings.threads or usable_cpus()
        options = latency_options(candidate.variant, self._threads)
        core = open_core()
        model = core.read_model(str(bundle.file(candidate.variant)))
        self._choosing = _add_keep(model)
        self._compiled: Any = compile_known(core, model, "CPU", options)
        self.inputs = tuple(n for port in self._compiled.inputs for n in port.get_names())
        if BEAM not in self.inputs:
            raise _without_cache(bundle, candidate)
        self._request: Any = self._compiled.create_infer_request()
        self._length = 0

    def begin(self, batch: int, capacity: int) -> None:
        """Empty the states; see :class:`Decoder`."""
        del batch, capacity  # states grow by themselves
        self._request.reset_state()
        self._length = 0

    def forward(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the model once; see :class:`Decoder`."""
        return self._run(ids, mask, positions, 1)[:, -1]

    def verify(
        self, ids: NDArray[np.int64], mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the model once for the logits of each token; see :class:`Decoder`."""
        return self._run(ids, mask, positions, ids.shape[1])

    def _run(
        self,
        ids: NDArray[np.int64],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        keep: int,
    ) -> NDArray[np.float32]:
        feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given = {n: np.ascontiguousarray(v) for n, v in feed.items() if n in self.inputs}
        given[BEAM] = np.arange(len(ids), dtype=np.int32)
        if self._choosing:
            given[KEEP] = np.array([-keep], np.int64)
        self._request.infer(given)
        self._length = mask.shape[1]
        return np.array(self._request.get_tensor("logits").data[:, -keep:], np.float32)

    def rewind(self, length: int) -> None:
        """Keep the first tokens; see :class:`Decoder`."""
        if length == self._length:
            return
        import openvino

        for state in self._request.query_state():
            state.state = openvino.Tensor(np.ascontiguousarray(state.state.data[:, :, :length]))
        self._length = length

    def info(self) -> dict[str, Any]:
        """Return what runs it."""
        return {"runtime": "openvino", "threads": self._threads, "streams": 1}

    def close(self) -> None:
        """Free the model."""
        self._request = self._compiled = None


def latency_options(variant: Variant, threads: int) -> dict[str, Any]:
    """Return how OpenVINO opens what writes one token after the other."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        **variant.options,
    }


def ort_value(array: NDArray[Any]) -> Any:
    """Return an array in memory that ONNX Runtime can bind to inputs and outputs."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)


def _add_keep(model: Any) -> bool:
    """Let an OpenVINO model be told for how many tokens logits are wanted; say whether it can."""
    from openvino import opset13 as ops

    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in ("Tanh", "Multiply", "Divide", "Add"):
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul" or len(node.input_value(0).get_partial_shape()) != 3:
        return False
    begin = ops.parameter([1], np.int64, name=KEEP)
    begin.output(0).set_names({KEEP})
    end, step, axis = (ops.constant(np.array([n], np.int64)) for n in (1 << 40, 1, 1))
    last = ops.slice(node.input_value(0), begin, end, step, axis)
    node.input(0).replace_source_output(last.output(0))
    model.add_parameters([begin])
    model.validate_nodes_and_infer_types()
    return True
