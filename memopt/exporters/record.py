"""What an export leaves in a bundle: its variants, and how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from memopt.bundle import Bundle, Variant

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino")


def record(
    bundle: Bundle,
    variants: Sequence[Variant],
    folder: Path,
    *,
    format: str,
    task: str,
    precision: str,
    opset: int,
    dimension: int | None = None,
) -> tuple[Variant, ...]:
    """Move the files of checked variants into the bundle, and write them into its manifest.

    Args:
        folder: where the files wait.
        format, precision, opset: as of :func:`memopt.exporters.base.export`.
        task: which they are for; the manifest's own needs no mention.
        dimension: of the vectors, where the manifest is to say it.
    """
    made_of = {"weights": bundle.manifest.files["weights.parquet"]["sha256"], "opset": opset}
    other = "" if task == bundle.manifest.task else task
    variants = tuple(
        replace(v, check={**(v.check or {}), "made_of": made_of}, task=other) for v in variants
    )
    # The graph after what it needs: a reader never sees a graph whose weights are not there yet.
    names = dict.fromkeys(n for v in variants for n in (*v.companions, v.file))
    bundle.add_variants(
        *variants,
        event={
            "event": "export",
            "format": format,
            "task": task,
            "precision": precision,
            "opset": opset,
            "variants": [variant.name for variant in variants],
            "versions": versions(),
        },
        staged={name: folder / name for name in names},
        dimension=dimension,
    )
    return variants


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
