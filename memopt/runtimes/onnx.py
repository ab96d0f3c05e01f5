"""The ONNX Runtime backend: CPU, CUDA, MIGraphX, CoreML, WebGPU."""

from __future__ import annotations

import contextlib
import io
import threading
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.bundle import Bundle
from memopt.errors import DeviceError
from memopt.extras import require
from memopt.runtimes.base import (
    TOKENS_ON_CPU,
    TOKENS_ON_GPU,
    Placement,
    Settings,
    one_by_one,
    usual_streams,
)
from memopt.runtimes.cpu import usable_cpus
from memopt.runtimes.graph_cache import open_cached
from memopt.runtimes.providers import PROVIDERS

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows
    from memopt.runtimes.profile import Kernel

_CPU = "CPUExecutionProvider"
_WARNING, _FATAL = 2, 4  # ONNX Runtime's log levels; the first is its default
# y = x @ x over (2, 2) float32, opset 17, serialized: what a provider must open to count.
_PROBE = bytes.fromhex(
    "08083a400a110a01780a017812017922064d61744d756c1201675a130a0178120e0a0c080112080a0208020a0208"
    "0262130a0179120e0a0c080112080a0208020a02080242040a001011"
)
# Opening a second session from the cache takes as long as some hundred sentences: a job that ends
# sooner does not pay for it.
BATCHES_BEFORE_STREAMS = 4
# The operators that carry the work. A GPU session may leave shape arithmetic to the CPU, which is
# where ONNX Runtime puts it on purpose, but not these.
_HEAVY = frozenset(
    [
        "MatMul",
        "Gemm",
        "Conv",
        "Attention",
        "MultiHeadAttention",
        "GroupQueryAttention",
        "QAttention",
        "MatMulNBits",
        "FusedMatMul",
        "MatMulInteger",
        "QLinearMatMul",
        "DynamicQuantizeMatMul",
        "QLinearConv",
        "ConvInteger",
        "LayerNormalization",
        "SkipLayerNormalization",
    ]
)


def probe(name: str) -> str:
    """Open and run one matrix product on provider ``name``; return what answered.

    Raises:
        Exception: the provider does not work here.
    """
    import numpy as np

    ort = _onnxruntime()
    session = _session(_PROBE, name, session_options(1), Settings())
    x = np.eye(2, dtype=np.float32)
    session.run(["y"], {"x": x})
    return f"onnxruntime {ort.__version__}, {PROVIDERS[name].execution_provider}"


def session_options(threads: int) -> Any:
    """Return session options with everything explicit that containers get wrong by default."""
    ort = _onnxruntime()
    options = ort.SessionOptions()
    # The default asks for one thread per core of the host and pins them, which fails in containers.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    # Memory patterns are kept per shape: with many sequence lengths they only grow.
    options.enable_mem_pattern = False
    # Threads spin while a run is on (latency) and stop when it ends (the cores are not ours alone).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def takes_one_row(session: Any) -> bool:
    """Whether a graph was made for batches of one: the first axis of all its inputs is 1."""
    shapes = [item.shape for item in session.get_inputs()]
    return bool(shapes) and all(shape and shape[0] == 1 for shape in shapes)


def cpu_session(model: Path | bytes, options: Any) -> Any:
    """Open a graph, a file or serialized, on the CPU."""
    # Here and below without onnxruntime's own fallback, which goes on elsewhere by itself and says
    # so on standard output only, where a command's JSON goes.
    source = str(model) if isinstance(model, Path) else model
    return _onnxruntime().InferenceSession(source, options, providers=[_CPU], enable_fallback=False)


class OnnxBackend:
    """A variant in ONNX Runtime: one session for latency, and one for streams when batches come.

    The first runs on all cores. With more than one stream, ``submit`` uses a second session whose
    runs take ``threads / streams`` cores each; both map the same weights.

    Raises:
        DeviceError: the provider is not there, or would leave heavy operators to the CPU.
        Exception: whatever onnxruntime raises on a graph or device it cannot use.
    """

    def __init__(self, bundle: Bundle, candidate: Placement, settings: Settings) -> None:
        from concurrent.futures import ThreadPoolExecutor

        variant = candidate.variant
        self._provider = candidate.provider
        self._variant = variant
        self._settings = settings
        self._threads = settings.threads or usable_cpus()
        usual = usual_streams(self._threads) if self._provider == "cpu" else 1
        self.streams = settings.streams or usual
        self.tokens = TOKENS_ON_GPU if candidate.provider != "cpu" else TOKENS_ON_CPU
        self.step, self.row = 1, 0
        self._path = bundle.file(variant)
        if not self._path.is_file():
            raise DeviceError(f"{self._path} is missing", fix=f"run: memopt export {bundle.path}")
        session = self._open(self._threads)
        self.inputs = tuple(i.name for i in session.get_inputs())
        self._one_row = takes_one_row(session)
        outputs = {o.name: o for o in session.get_outputs()}
        if variant.output not in outputs:
            raise DeviceError(
                f"{self._path} has no output {variant.output!r}", fix="export it again"
            )
        width = (outputs[variant.output].shape or [None])[-1]
        self.dimension = width if isinstance(width, int) else None
        self._ran = _assignment(session)
        self._session: Any = session
        self._many: Any = session if self.streams == 1 else None
        self._submitted = 0
        self._run_options: Any = None
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self.streams, f"memopt-{candidate.provider}")

    def _open(self, threads: int, profile: Path | None = None) -> Any:
        def options() -> Any:
            made = session_options(threads)
            for key, value in self._variant.options.items():
                made.add_session_config_entry(key, value)
            if profile is not None:
                made.enable_profiling = True
                made.profile_file_prefix = str(profile)
            return made

        if self._provider == "cpu":
            version = _onnxruntime().__version__
            cached = open_cached(self._path, self._variant, options, version)
            if cached is not None:
                return cached
        return _session(self._path, self._provider, options(), self._settings)

    @property
    def session(self) -> Any:
        """The session for latency, for an engine that binds inputs and outputs itself."""
        return self._session

    def run(self, feed: Feed) -> Rows:
        """Run one batch in the calling thread, on all cores."""
        return self._infer(self._session, feed)

    def submit(self, feed: Feed) -> Future[Rows]:
        """Run one batch on the next free stream; the first few go to the session open already."""
        with self._lock:
            self._submitted += 1
            late = self._submitted > BATCHES_BEFORE_STREAMS
            if late and self._many is None and self._session is not None:
                self._many = self._open(max(1, self._threads // self.streams))
        return self._pool.submit(lambda: self._infer(self._many or self._session, feed))

    def _infer(self, session: Any, feed: Feed) -> Rows:
        import numpy as np

        if session is None:
            raise DeviceError(f"the session on {self._provider} is closed")

        def run(part: Feed) -> Any:
            return session.run([self._variant.output], part, self._run_options)

        (rows,) = one_by_one(run, feed) if self._one_row else run(feed)
        return np.asarray(rows, dtype=np.float32)

    def bound(self, feed: Feed) -> Callable[[], object]:
        """Return a run of the session alone, its inputs bound."""
        session = self._session
        binding = session.io_binding()
        for name, values in feed.items():
            binding.bind_cpu_input(name, values)
        binding.bind_output(self._variant.output)
        return partial(session.run_with_iobinding, binding, self._run_options)

    def kernels(self, feed: Feed, runs: int) -> list[Kernel]:
        """Return the kernels of one run, as the runtime's profiler tells them."""
        from memopt.runtimes.profile import onnx_kernels

        opened = partial(self._open, self._threads)
        return onnx_kernels(opened, self._variant.output, feed, runs)

    def run_all(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Run the graph as it is, in the calling thread; return every output by name."""
        session = self._session
        if session is None:
            raise DeviceError(f"the session on {self._provider} is closed")
        names = [item.name for item in session.get_outputs()]
        return dict(zip(names, session.run(names, feed, self._run_options), strict=True))

    def free(self) -> None:
        """From now on give a GPU's memory back after each run, instead of keeping it."""
        if self._provider != "cuda" or self._run_options is not None:
            return
        options = _onnxruntime().RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
        self._run_options = options

    def info(self) -> dict[str, Any]:
        """Return what runs where."""
        return {
            "runtime": f"onnxruntime {_onnxruntime().__version__}",
            "threads": self._threads,
            "streams": self.streams,
            "nodes": self._ran,
        }

    def close(self) -> None:
        """Drop the session; a run that another thread is in ends first."""
        self._pool.shutdown(wait=False)
        with self._lock:
            self._session = self._many = None


def _onnxruntime() -> Any:
    return require("onnxruntime", extra="cpu", why="run ONNX variants")


def _session(model: Path | bytes, name: str, options: Any, settings: Settings) -> Any:
    """Open a session that really runs on provider ``name``."""
    ort = _onnxruntime()
    wanted = PROVIDERS[name].execution_provider
    assert wanted is not None
    if wanted == _CPU:
        return cpu_session(model, options)
    source = str(model) if isinstance(model, Path) else model
    said = io.StringIO()
    if name == "cuda" and hasattr(ort, "preload_dlls"):
        # It prints what it cannot load, and to standard output, where a command's JSON goes.
        with contextlib.redirect_stdout(said):
            ort.preload_dlls()
    # What fails here is in the error that is raised; the library's own pages of it are not needed.
    options.log_severity_level = _FATAL
    ort.set_default_logger_severity(_FATAL)
    try:
        return _gpu_session(source, name, wanted, options, settings, said.getvalue())
    finally:
        ort.set_default_logger_severity(_WARNING)


def _gpu_session(
    source: str | bytes, name: str, wanted: str, options: Any, settings: Settings, said: str
) -> Any:
    ort = _onnxruntime()
    providers: list[Any] | None = [(wanted, _provider_options(name, settings))]
    if wanted not in ort.get_available_providers():
        _add_plugin(ort, name, options)
        providers = None
    # Without this a GPU that cannot be opened becomes a CPU session and a warning (ort#23372).
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = ort.InferenceSession(source, options, providers=providers, enable_fallback=False)
    except Exception as error:
        if "fallback to CPU EP has been explicitly disabled" not in str(error):
            raise
        # Some nodes stay on the CPU. Shape arithmetic may; anything that carries the work may not.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "0")
        session = ort.InferenceSession(source, options, providers=providers, enable_fallback=False)
        if wanted in session.get_providers():
            _refuse_heavy_on_cpu(session, name)
    if wanted not in session.get_providers():
        why = f": {said.splitlines()[0]}" if said else ""
        raise DeviceError(f"onnxruntime cannot start {wanted} here{why}")
    return session


def _add_plugin(ort: Any, name: str, options: Any) -> None:
    provider = PROVIDERS[name]
    assert provider.plugin is not None
    plugin = require(provider.plugin, extra="gpu", why=f"run on {name}")
    if not any(d.ep_name == plugin.get_ep_name() for d in ort.get_ep_devices()):
        ort.register_execution_provider_library(name, plugin.get_library_path())
    devices = [d for d in ort.get_ep_devices() if d.ep_name == plugin.get_ep_name()]
    if not devices:
        raise DeviceError(f"{provider.plugin} found no device for {name}")
    options.add_provider_for_devices(devices[:1], {})


def _provider_options(name: str, settings: Settings) -> dict[str, str]:
    if name != "cuda":
        return {}
    # TF32 rounds the inputs of float32 products to 10 bits: an fp32 variant promises more.
    # The default arena doubles at each extension, which is what runs small cards out of memory.
    options = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    if settings.memory_limit_mb:
        options["gpu_mem_limit"] = str(int(settings.memory_limit_mb * 2**20))
    return options


def _assignment(session: Any) -> dict[str, int]:
    """Return how many nodes each execution provider runs."""
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return dict(counts)


def _refuse_heavy_on_cpu(session: Any, name: str) -> None:
    left = sorted(
        {
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name == _CPU
            for node in part.get_nodes()
            if node.op_type in _HEAVY
        }
    )
    if left:
        raise DeviceError(f"{name} would leave {', '.join(left)} to the CPU")
