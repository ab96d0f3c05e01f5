"""What this machine offers and what stands in the way: the facts behind ``memopt doctor``."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata

from memopt import __version__
from memopt.runtimes.cpu import cpu_features, cpu_model, memory_limit_bytes, usable_cpus
from memopt.runtimes.providers import Status, damaged, detect

# Wheels that all install the package `onnxruntime` over each other.
_SAME_PACKAGE = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-migraphx",
    "onnxruntime-rocm",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-training",
    "ort-nightly",
    "ort-nightly-gpu",
)
_LIBRARIES = (
    "numpy pyarrow tokenizers onnxruntime onnxruntime-gpu openvino torch transformers onnx nncf "
    "pillow scipy soundfile lancedb"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Two things installed that break each other, and the commands that repair it."""

    problem: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Everything ``memopt doctor`` prints; plain data."""

    versions: dict[str, str]
    providers: list[Status]
    cpu: str
    features: list[str]
    cores: int
    cores_of_machine: int
    memory_total_mb: int
    memory_available_mb: int
    memory_limit_mb: int | None
    conflicts: list[Conflict]


def diagnose() -> Diagnosis:
    """Look at this machine; every provider is tried by opening a session on it.

    >>> diagnose().cores >= 1
    True
    """
    import psutil

    memory = psutil.virtual_memory()
    limit = memory_limit_bytes()
    # A limit above what the machine has limits nothing.
    limit = limit if limit is not None and limit < memory.total else None
    return Diagnosis(
        versions=_versions(),
        providers=detect(),
        cpu=cpu_model(),
        features=sorted(cpu_features()),
        cores=usable_cpus(),
        cores_of_machine=os.cpu_count() or 1,
        memory_total_mb=memory.total >> 20,
        memory_available_mb=memory.available >> 20,
        memory_limit_mb=limit >> 20 if limit else None,
        conflicts=conflicts(),
    )


def conflicts() -> list[Conflict]:
    """Return what is installed twice over the same package, or was and left damage."""
    installed = [name for name in _SAME_PACKAGE if _version(name)]
    there = importlib.util.find_spec("onnxruntime") is not None
    if len(installed) > 1:
        problem = f"{' and '.join(installed)} are installed and overwrite each other's files"
    elif there and (damage := damaged()):
        problem = damage
    else:
        return []
    installed = installed or ["onnxruntime"]
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in installed else installed[0]
    fix = f"run: pip uninstall -y {' '.join(installed)} && pip install {keep}"
    return [Conflict(problem=problem, fix=fix)]


def _versions() -> dict[str, str]:
    found = {"memopt": __version__, "python": sys.version.split()[0], "system": platform.platform()}
    for name in _LIBRARIES.split():
        version = _version(name)
        if version:
            found[name] = version
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
