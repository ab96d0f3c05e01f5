"""Memory limits: what a variant would need, against what it may have."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

from memopt import metrics
from memopt.bundle import Bundle, Variant
from memopt.errors import DeviceError
from memopt.runtimes.base import Placement, Settings

# Measured on MiniLM in float32 and int8, in MB of resident memory from a bare interpreter to a few
# hundred texts encoded: what the library itself takes where it is not loaded yet, how many times
# the weights are there (OpenVINO maps the file and packs a copy), and activations with what the
# runtime keeps for them.
_LIBRARY_MB = {
    "onnx": ("onnxruntime", 40),
    "openvino": ("openvino", 70),
    "torch-aoti": ("torch", 250),
}
_COPIES = {"onnx": 1, "openvino": 2, "torch-aoti": 1}
_WORKSPACE_MB = 100
_OUT_OF_MEMORY = (
    "out of memory",
    "out_of_memory",
    "failed to allocate",
    "can't alloc",  # OpenVINO's nodes
    "cannot allocate memory",  # the system, of a thread's stack too
    "bad_alloc",
    "bad allocation",
    "cudaerrormemoryallocation",
    "cublas_status_alloc_failed",
    "available memory of",  # ONNX Runtime: "Available memory of N is smaller than requested"
)


class OverLimit(DeviceError):
    """Opening this variant there would go past a memory limit: not enough memory."""


@dataclass(frozen=True, slots=True)
class Vram:
    """Memory of the first GPU in MB."""

    used_mb: float
    total_mb: float


def check(bundle: Bundle, candidate: Placement, settings: Settings) -> Settings:
    """Return the settings to open a variant with, its memory limit that of the device.

    Raises:
        OverLimit: it would go past the limits of ``settings``.
    """
    if candidate.provider == "cuda" or candidate.variant.options.get("device") == "cuda":
        size = bundle.file(candidate.variant).stat().st_size / 2**20
        allowed = check_vram(settings.vram_threshold, size)
        limit = min((x for x in (allowed, settings.memory_limit_mb) if x), default=None)
        return replace(settings, memory_limit_mb=limit)
    if settings.memory_limit_mb is not None:
        check_memory(bundle, candidate.variant, settings.memory_limit_mb)
    return settings


def check_memory(bundle: Bundle, variant: Variant, limit_mb: float) -> None:
    """Refuse to open a variant that would take this process past ``limit_mb`` of resident memory.

    An estimate before the fact, as good as its constants: nothing is taken back later.

    Raises:
        OverLimit: naming what is needed and what is allowed.
    """
    names = (variant.file, *variant.companions)
    files = [bundle.path / name for name in names]
    weights = sum(path.stat().st_size for path in files if path.is_file()) / 2**20
    module, size = _LIBRARY_MB[variant.format]
    library = 0 if module in sys.modules else size
    needed = resident_mb() + library + weights * _COPIES[variant.format] + _WORKSPACE_MB
    if needed > limit_mb:
        raise OverLimit(
            f"{variant.name} would need about {needed:.0f} MB (weights {weights:.0f} MB), out of "
            f"memory_limit_mb={limit_mb:g}"
        )


def check_vram(threshold: float, needed_mb: float) -> float | None:
    """Return how many MB of GPU memory may be used, None when the driver does not say.

    Raises:
        OverLimit: the GPU is, or would be, fuller than ``threshold`` (a share of its memory).
    """
    found = vram()
    if found is None:
        return None
    allowed = threshold * found.total_mb - found.used_mb
    if allowed < needed_mb:
        raise OverLimit(
            f"the GPU has {found.used_mb:.0f} of {found.total_mb:.0f} MB in use and "
            f"{needed_mb:.0f} MB more would pass vram_threshold={threshold:g}"
        )
    return allowed


def lacks_memory(error: Exception) -> bool:
    """Return whether what a runtime raised says that it had too little memory.

    >>> lacks_memory(RuntimeError("Exception during initialization: std::bad_alloc"))
    True
    """
    text = str(error).lower()
    return isinstance(error, MemoryError | OverLimit) or any(s in text for s in _OUT_OF_MEMORY)


def vram() -> Vram | None:
    """Return the memory of the first NVIDIA GPU, None where nvidia-smi is not there or fails."""
    try:
        used, total = _nvidia_smi("--query-gpu=memory.used,memory.total")[0]
        return Vram(float(used), float(total))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def show_memory(*, gpu: bool) -> None:
    """Have the metrics show this process's memory, and that of the GPU."""
    metrics.gauge("memory_usage_bytes", lambda: resident_mb() * 2**20, component="process")

    def used() -> float | None:
        found = vram()
        return found.used_mb * 2**20 if found else None

    if gpu:
        metrics.gauge("vram_usage_bytes", used, device="cuda")


def process_vram_mb(pid: int) -> float | None:
    """Return the GPU memory of a process in MB, None where nvidia-smi is not there or fails.

    0.0 for a process that uses no GPU.
    """
    try:
        rows = _nvidia_smi("--query-compute-apps=pid,used_memory")
        return sum(float(used) for owner, used in rows if int(owner) == pid)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _nvidia_smi(query: str) -> list[list[str]]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return [line.split(",") for line in result.stdout.splitlines() if line.strip()]


def resident_mb() -> float:
    """Return this process's resident memory in MB, without importing psutil on Linux.

    >>> resident_mb() > 1
    True
    """
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**20
