"""Which kernels a variant runs, with their share of its time, and the instructions they are of."""

from __future__ import annotations

import re
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
    from memopt.runtimes.profile import Kernel

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
    kernels: list[Kernel] = []
    clock = clock_under(lambda: kernels.extend(_kernels(bundle, placement, settings, inputs)))
    tells = placement.provider == "openvino"  # ONNX Runtime knows operators alone
    names = [f"{k.kind} {k.implementation}" if tells else k.kind for k in kernels]
    return {
        "kernels": _shares(kernels, names),
        "instruction_sets": instruction_sets(names) if tells else None,
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


def _kernels(
    bundle: Bundle, placement: Placement, settings: Settings, inputs: Sequence[Any]
) -> list[Kernel]:
    opened = OpenvinoBackend if placement.provider == "openvino" else OnnxBackend
    with closing(opened(bundle, placement, settings)) as backend:
        return backend.kernels(_batch(bundle, inputs, backend.inputs), RUNS)


def _batch(bundle: Bundle, inputs: Sequence[Any], names: Sequence[str]) -> Feed:
    _, feed = next(iter(feeds(bundle, list(inputs[:BATCH]), names, batch=BATCH)))
    return feed


def _shares(kernels: Sequence[Kernel], names: Sequence[str]) -> list[Mapping[str, Any]]:
    whole = sum(kernel.ms for kernel in kernels) or 1.0
    return [
        {"name": name, "nodes": kernel.count, "share": round(kernel.ms / whole, 4)}
        for kernel, name in zip(kernels, names, strict=True)
    ]
