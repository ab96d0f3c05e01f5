"""The packages that an export's history names."""

from __future__ import annotations

from contextlib import suppress
from importlib import metadata

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino")


def versions() -> dict[str, str]:
    """Return the version of each package that is installed.

    >>> set(versions()) <= set(PACKAGES)
    True
    """
    found = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
