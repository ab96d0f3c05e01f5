"""Which kernels a variant runs, with their share of its time, and the instructions they are of."""

from __future__ import annotations

import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt.bundle import open_bundle
from memopt.graphs.session import feeds
from memopt.runtimes.base import Placement, Settings
from memopt.runtimes.cpu import clock_mhz
from memopt.runtimes.onnx import OnnxBackend
from memopt.runtimes.openvino import OpenvinoBackend
from memopt.runtimes.task_engine import open_task

if TYPE_CHECKING:
    from memopt.bundle import Bundle
    from memopt.runtimes.base import Feed

# A batch as throughput has them; after so many runs threads, caches and clock are as under load.
BATCH, RUNS = 32, 10
# In a kernel's name: brgemm_avx512_vnni_i8, jit_avx512_FP32, gemm_mlas_f32 (which tells none).
_INSTRUCTIONS = re.compile(r"(?:sse|avx|amx|neon|sve|asimd)[a-z0-9]*(?:_(?:core|vnni|amx|fp16))*")


def kernels_of(
    path: str | Path, variant: str, device: str, inputs: Sequence[Any]
) -> dict[str, Any]:
    """Run a batch of a bundle's inputs with a clock on every node, as its engine opens the variant.

    Args:
        path: a bundle folder or name.
        variant: a name, or auto.
        device: a provider, or auto.
        inputs: as of the engine's verb; the first 32 are run.

    Returns:
        ``kernels``: the name of each, how many nodes ran it (``nodes``) and its share of the nodes'
        time (``share``), the largest first; ``instruction_sets``: those in the names, None where
        the runtime does not tell (ONNX Runtime); ``clock_mhz`` of the cores meanwhile, None where
        the system does not say. Empty on a provider that is no CPU.

    Raises:
        BundleError, DeviceError, InputError: as of :class:`memopt.runtimes.task_engine.Engine`.
    """
    with open_task(path, variant=variant, device=device) as engine:
        told, bundle = engine.device_info(), engine.bundle
    if told["device"] not in ("cpu", "openvino"):
        return {}
    placement = Placement(told["device"], open_bundle(bundle.path).variant(told["variant"]))
    settings = Settings(threads=told["threads"], streams=1)
    run = _openvino_times if placement.provider == "openvino" else _onnx_times
    nodes: list[tuple[str, float]] = []
    clock = clock_under(lambda: nodes.extend(run(bundle, placement, settings, inputs)))
    names = instruction_sets(name for name, _ in nodes)
    return {
        "kernels": _shares(nodes),
        "instruction_sets": names if placement.provider == "openvino" else None,
        "clock_mhz": clock,
    }


def instruction_sets(kernels: Iterable[str]) -> list[str]:
    """Return the instruction sets that are part of the names of kernels.

    >>> instruction_sets(["brgemm_avx512_vnni_i8", "jit_avx512_FP32", "brgemm_avx512_amx_i8"])
    ['avx512', 'avx512_amx', 'avx512_vnni']
    >>> instruction_sets(["gemm_mlas_f32", "ref_any_i64"])
    []
    """
    return sorted({found for name in kernels for found in _INSTRUCTIONS.findall(name.lower())})


def clock_under(work: Callable[[], None]) -> int | None:
    """Return the clock in MHz seen halfway through ``work``, None where the system does not say."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            clock = clock_mhz()
            if clock is None:
                return
            seen.append(clock)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return sorted(seen)[len(seen) // 2] if seen else None


def _openvino_times(
    bundle: Bundle, placement: Placement, settings: Settings, inputs: Sequence[Any]
) -> list[tuple[str, float]]:
    """Return kernel and microseconds of each node of the last of some runs."""
    backend = OpenvinoBackend(bundle, placement, settings)
    with closing(backend):
        feed = _batch(bundle, inputs, backend.inputs)
        request = backend.profiled().create_infer_request()
        for _ in range(RUNS):
            request.infer([feed[name] for name in backend.inputs])
    return [
        (f"{node.node_type} {node.exec_type}", node.real_time.total_seconds() * 1e6)
        for node in request.get_profiling_info()
        if node.real_time.total_seconds() > 0
    ]


def _onnx_times(
    bundle: Bundle, placement: Placement, settings: Settings, inputs: Sequence[Any]
) -> list[tuple[str, float]]:
    """Return operator and microseconds of each node of the last of some runs."""
    backend = OnnxBackend(bundle, placement, settings)
    with tempfile.TemporaryDirectory(prefix="memopt-profile-") as folder, closing(backend):
        feed = _batch(bundle, inputs, backend.inputs)
        session = backend.profiled(Path(folder) / "run")
        for _ in range(RUNS):
            session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    last = max(event["ts"] for event in events if event["name"] == "model_run")
    return [
        (event["args"]["op_name"], float(event["dur"]))
        for event in events
        if event["name"].endswith("_kernel_time") and event["ts"] >= last
    ]


def _batch(bundle: Bundle, inputs: Sequence[Any], names: Sequence[str]) -> Feed:
    _, feed = next(iter(feeds(bundle, list(inputs[:BATCH]), names, batch=BATCH)))
    return feed


def _shares(nodes: Sequence[tuple[str, float]]) -> list[Mapping[str, Any]]:
    times: dict[str, list[float]] = {}
    for name, time in nodes:
        times.setdefault(name, []).append(time)
    whole = sum(time for _, time in nodes) or 1.0
    rows = [
        {"name": name, "nodes": len(spent), "share": round(sum(spent) / whole, 4)}
        for name, spent in times.items()
    ]
    return sorted(rows, key=lambda row: -float(str(row["share"])))
