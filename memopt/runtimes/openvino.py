"""The native OpenVINO backend; reads OpenVINO graphs, and ONNX graphs of standard operators."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from memopt.bundle import Bundle
from memopt.errors import DeviceError
from memopt.extras import require
from memopt.runtimes.base import TOKENS_ON_CPU, Placement, Settings, one_by_one, usual_streams
from memopt.runtimes.cpu import BF16, cpu_features, usable_cpus
from memopt.runtimes.heap import drop_pages, trim_heap
from memopt.runtimes.limits import resident_mb
from memopt.runtimes.openvino_axes import last_axis, takes_one_row
from memopt.runtimes.openvino_core import compile_known, open_core
from memopt.runtimes.openvino_file import is_segmented
from memopt.runtimes.openvino_shapes import HEIGHTS, FixedShapes, SharedRows
from memopt.runtimes.processes import keep_for_ever
from memopt.runtimes.segments import ROW, sharing

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future
    from pathlib import Path

    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows
    from memopt.runtimes.profile import Kernel

# float32 unless the variant says otherwise: on a processor with bf16 the default would be bf16, an
# error of 1e-2 on a matrix product that nobody asked for.
_DEFAULTS = {"INFERENCE_PRECISION_HINT": "f32"}
# A shape other than the last one costs the plugin 1.3 ms of a MiniLM's 3; padding to few widths
# costs a tenth of that.
SINGLE_STEP = 16
# Compiling for streams takes as long as some thousand sentences and doubles the memory: a job that
# ends sooner does not pay for it.
BATCHES_BEFORE_STREAMS = 16
# Compiled for one shape a MiniLM answers a short text in two thirds of the time. That takes 0.4 s
# and the weights once more, so only for small models, short texts, and shapes that come often.
SINGLES_BEFORE_FIXED = 64
_MOST_FIXED, _WIDEST_FIXED, _MOST_FIXED_BYTES = 3, 64, 64 << 20
# Single texts and shared rows have so many in all, each about as large as the file.
_GRAPHS = _MOST_FIXED + len(HEIGHTS) + 1
# Calls of so many short texts come before graphs of their shared rows are compiled.
_CALLS_BEFORE_ROWS = 8
# Kernels made for shapes seen before: the plugin keeps 5,000 of each kind and stream, and oneDNN
# below it 1,024 of all models, for ever. A service whose batches come in every shape would grow by
# a gigabyte. MiniLM in int8, calls of 1 to 39 texts: 551 MB with 100 and 1,024, 331 MB with these,
# at 1.09x the speed; full batches as fast as before. With 100 of oneDNN's they lose 4 %.
_KERNELS_KEPT = "30"
_PRIMITIVES_KEPT = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "200")
_warming = threading.Lock()
_warm = False


def probe(name: str) -> str:
    """Compile and run one matrix product; return what answered.

    Raises:
        Exception: OpenVINO does not work here.
    """
    import numpy as np

    ov = _openvino()
    from openvino import opset13 as ops

    x = ops.parameter([2, 2], np.float32)
    model = ov.Model([ops.matmul(x, x, False, False)], [x])
    core = open_core()
    core.compile_model(model, "CPU")([np.eye(2, dtype=np.float32)])
    return f"openvino {ov.__version__.split('-')[0]}, devices {', '.join(core.available_devices)}"


class OpenvinoBackend:
    """A variant compiled twice at most: for latency at once, for throughput when batches come.

    A model compiled for throughput splits the cores into streams, which more than one batch can
    fill; a single sentence then would run on one stream's cores only.

    Raises:
        DeviceError: the file or its output is missing.
        Exception: whatever openvino raises on a graph it cannot compile.
    """

    def __init__(self, bundle: Bundle, candidate: Placement, settings: Settings) -> None:
        from concurrent.futures import ThreadPoolExecutor

        _openvino()
        path = bundle.file(candidate.variant)
        if not path.is_file():
            raise DeviceError(f"{path} is missing", fix=f"run: memopt export {bundle.path}")
        self._threads = settings.threads or usable_cpus()
        self.tokens = TOKENS_ON_CPU
        self.step, self.row = SINGLE_STEP, 0
        self.streams = settings.streams or usual_streams(self._threads)
        measured = settings.openvino_options or {}
        options = {**_DEFAULTS, **candidate.variant.options, **measured}
        if options["INFERENCE_PRECISION_HINT"] == "bf16" and not BF16 & cpu_features():
            # The plugin would imitate bf16, slower than float32.
            options["INFERENCE_PRECISION_HINT"] = "f32"
        self._device = options.pop("DEVICE", "CPU")
        self._options = options
        self._core = open_core()
        self._path = path
        self._weights = path.with_suffix(".bin")
        self._output = candidate.variant.output
        model = self._core.read_model(path)
        segmented = is_segmented(model)
        names = {name for port in model.outputs for name in port.get_names()}
        if self._output not in names:
            raise DeviceError(f"{path} has no output {self._output!r}", fix="export it again")
        model = self._only_output(model)
        self.inputs = tuple(port.get_any_name() for port in model.inputs)
        self._one_row = takes_one_row(model)
        self.dimension = last_axis(model.output(0).get_partial_shape())
        self._model = model
        self._lock = threading.Lock()
        # Not OpenVINO's AsyncInferQueue: when an inference fails it never calls back (2026.4), and
        # whoever waits for that batch would wait for ever instead of falling back.
        self._pool = ThreadPoolExecutor(self.streams, "memopt-openvino")
        self._closed = False
        self._whole: Any = None
        told = (candidate.variant.check or {}).get("graph") or {}
        self._named = [record["name"] for record in told.get("outputs", ())]
        self._single = self._compile(1)
        self._submitted = 0
        self._many: _Requests | None = self._single if self.streams == 1 else None
        weights = self._weights
        size = weights.stat().st_size if weights.is_file() else _MOST_FIXED_BYTES + 1
        limit = settings.memory_limit_mb
        room = limit is None or resident_mb() + _GRAPHS * size / 2**20 <= limit
        small = size <= _MOST_FIXED_BYTES and room
        self._fixed = self._shapes(1, SINGLES_BEFORE_FIXED, _MOST_FIXED) if small else None
        self._rows = self._rows_many = None
        if segmented:
            self.row = ROW
            self._rows_many = self._shared_rows(self.streams, HEIGHTS, small)
            # Several rows are several batches where several run at once.
            alone = self.streams > 1
            self._rows = self._shared_rows(1, (1,), small) if alone else self._rows_many

    def _only_output(self, model: Any) -> Any:
        """Return the model that computes and copies out only what is asked for."""
        if len(model.outputs) == 1:
            return model
        return _openvino().Model([model.output(self._output)], model.get_parameters())

    def _compile_options(self, streams: int) -> dict[str, str]:
        own = {"CPU_RUNTIME_CACHE_CAPACITY": _KERNELS_KEPT} if self._device == "CPU" else {}
        return {
            **own,
            # Pinning fails or hurts where the cores are shared or only partly ours, unless it was
            # measured to help.
            "ENABLE_CPU_PINNING": "NO",
            **self._options,
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
            "NUM_STREAMS": str(streams),
            "INFERENCE_NUM_THREADS": str(self._threads),
        }

    def _shaped(self, shape: tuple[int, ...] | None) -> Any:
        if shape is None:
            return self._model
        model = self._only_output(self._core.read_model(self._path))
        model.reshape({name: list(shape) for name in self.inputs})
        return model

    def _shapes(self, streams: int, before: int, most: int) -> FixedShapes:
        return FixedShapes(lambda shape: self._compile(streams, shape), before, most)

    def _shared_rows(self, streams: int, heights: tuple[int, ...], small: bool) -> SharedRows:
        shapes = self._shapes(streams, _CALLS_BEFORE_ROWS, len(heights)) if small else None
        return SharedRows(self.inputs, heights, shapes)

    def _compile(self, streams: int, shape: tuple[int, ...] | None = None) -> _Requests:
        """Return the model compiled for so many streams, and for one shape of all its inputs.

        Engines of one model in a process share it, weights and buffers and all.
        """
        settings = self._compile_options(streams)

        def make() -> Any:
            return compile_known(self._core, self._shaped(shape), self._device, settings)

        stat = self._path.stat()
        file = (str(self._path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        key = (*file, self._output, self._device, shape, *sorted(settings.items()))
        return _shared(key, make, self._weights)

    def run(self, feed: Feed) -> Rows:
        """Run one batch in the calling thread, on all cores."""
        return self._infer(self._fixed_for(feed) or self._single, feed, self._rows)

    def _fixed_for(self, feed: Feed) -> Any:
        """Return the graph of this shape, None while there is none."""
        if self._fixed is None:
            return None
        first = feed[self.inputs[0]]
        short = first.ndim == 2 and first.shape[0] == 1 and first.shape[1] <= _WIDEST_FIXED
        return self._fixed.get(first.shape) if short else None

    def bound(self, feed: Feed) -> Callable[[], object]:
        """Return a run of the session alone, its inputs bound."""
        request = (self._fixed_for(feed) or self._single).compiled.create_infer_request()
        request.infer([feed[name] for name in self.inputs], share_inputs=True, share_outputs=True)
        return partial(request.infer, share_outputs=True)

    def kernels(self, feed: Feed, runs: int) -> list[Kernel]:
        """Return the kernels of one run, as the plugin counts them."""
        from memopt.runtimes.profile import openvino_kernels

        shape = feed[self.inputs[0]].shape if self._fixed_for(feed) else None
        inputs = [feed[name] for name in self.inputs]
        options = {**self._compile_options(1), "PERF_COUNT": "YES"}
        compiled = compile_known(self._core, self._shaped(shape), self._device, options)
        return openvino_kernels(compiled, inputs, runs)

    def submit(self, feed: Feed) -> Future[Rows]:
        """Run one batch on the next free stream; the first few go to the model compiled already."""
        with self._lock:
            # Rows that texts share have graphs of their own.
            self._submitted += not (self._rows_many and sharing(feed))
            if self._many is None and self._submitted > BATCHES_BEFORE_STREAMS:
                self._many = self._compile(self.streams)
            requests = self._many or self._single
        return self._pool.submit(self._infer, requests, feed, self._rows_many)

    def _infer(self, requests: _Requests, feed: Feed, rows: SharedRows | None) -> Rows:
        if self._closed:
            raise DeviceError("the model on openvino is closed")
        if rows is not None and sharing(feed):
            return rows.infer(requests, feed)

        def run(part: Feed) -> list[Rows]:
            return [requests.infer([part[name] for name in self.inputs])]

        return one_by_one(run, feed)[0] if self._one_row else run(feed)[0]

    def run_all(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the graph as it is, in the calling thread; return every output by name."""
        import numpy as np

        with self._lock:
            if self._closed:
                raise DeviceError("the model on openvino is closed")
            if self._whole is None:
                # Compiled anew: what serves batches computes one output only.
                self._whole = compile_known(self._core, self._path, self._device, self._options)
        results = self._whole(dict(feed))
        found = {}
        for port in self._whole.outputs:
            # A value may have several names, of which the graph's record says one.
            names = port.get_names()
            name = next((known for known in self._named if known in names), min(names))
            found[name] = np.array(results[port])
        return found

    def free(self) -> None:
        """Nothing is kept that could be given back."""

    def info(self) -> dict[str, Any]:
        """Return what runs where."""
        compiled = self._single.compiled
        return {
            "runtime": f"openvino {_openvino().__version__.split('-')[0]}",
            "threads": self._threads,
            "streams": self.streams,
            "nodes": {f"openvino-{self._device}": len(compiled.get_runtime_model().get_ops())},
            "options": dict(self._options),
            "inference_precision": compiled.get_property("INFERENCE_PRECISION_HINT").to_string(),
        }

    def close(self) -> None:
        """Take no more work; a run that another thread is in ends first."""
        if self._closed:
            return
        self._closed = True
        self._whole = None
        self._pool.shutdown(wait=False)
        self._single.drop()
        # With one stream both kinds of rows are one: what is shared is given back once.
        for shapes in {self._fixed, self._rows, self._rows_many}:
            if shapes is not None:
                shapes.close()
        if self._many is not None and self._many is not self._single:
            self._many.drop()


class _Requests:
    """A compiled model and its idle infer requests; a request serves one run at a time.

    ``users`` counts the backends that have it. The plugin maps the file ``weights`` and packs what
    it reads there at the first run of each request: the pages read are then given back, and with
    them what compiling left behind.
    """

    def __init__(self, compiled: Any, weights: Path) -> None:
        self.compiled = compiled
        self.users = 0
        self._weights = weights
        self._idle: list[Any] = []

    def infer(self, inputs: list[Any]) -> Rows:
        """Run one batch and return the first output as float32, copied out of the request."""
        import numpy as np

        try:
            request, first = self._idle.pop(), False  # atomic, as is append: no lock needed
        except IndexError:
            request, first = self.compiled.create_infer_request(), True
        request.infer(inputs, share_inputs=True, share_outputs=True)
        if first:
            trim_heap()
            drop_pages(self._weights)
        rows = np.array(request.get_output_tensor(0).data, dtype=np.float32)
        self._idle.append(request)
        return rows

    def drop(self) -> None:
        """Say that one backend less has it; the last one's idle requests are forgotten."""
        with _compiling:
            self.users -= 1
            if self.users <= 0:
                self._idle.clear()


# What is compiled in this process, by file and settings, as long as a backend has it.
_compiled: WeakValueDictionary[tuple[Any, ...], _Requests] = WeakValueDictionary()
_compiling = threading.Lock()


def _forget() -> None:
    """In a child of fork(): what the parent compiled is not shared, nor the locks it held."""
    global _compiled, _compiling, _warming
    for requests in _compiled.values():
        keep_for_ever(requests)
    _compiled, _compiling, _warming = WeakValueDictionary(), threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _shared(key: tuple[Any, ...], make: Callable[[], Any], weights: Path) -> _Requests:
    """Return the compiled model of this key, made by ``make`` when no backend has it."""
    with _compiling:
        found = _compiled.get(key)
        if found is None:
            found = _compiled[key] = _Requests(make(), weights)
        found.users += 1
        return found


def _openvino() -> Any:
    # oneDNN reads it once, at its first kernel. Whoever set it had a reason.
    os.environ.setdefault(*_PRIMITIVES_KEPT)
    openvino = require("openvino", extra="openvino", why="run on OpenVINO")
    _warm_up(openvino)
    return openvino


def _warm_up(openvino: Any) -> None:
    """Hand the binding its first array while no other thread can.

    pybind11 loads numpy's C interface on the first array it is given, behind a static guard that it
    waits for with the GIL held: two threads that both bring the first one wait for each other for
    ever. A service whose first request is a batch over two streams would hang so.
    """
    import numpy as np

    global _warm
    with _warming:
        if not _warm:
            openvino.Tensor(np.zeros(1, np.int64))
            _warm = True
