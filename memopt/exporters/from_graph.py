"""Other forms of a graph that was imported; the graph itself is the reference, never torch.

Nothing is built from ``weights.parquet``: that is a copy of what the graph holds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from memopt.bundle import Bundle, Variant
from memopt.errors import ExportError, MissingExtra, brief
from memopt.exporters import check, onnx, openvino
from memopt.exporters.fuse import fuse
from memopt.exporters.half import to_half
from memopt.files import staged_directory
from memopt.graphs.samples import samples
from memopt.graphs.session import feeds
from memopt.progress import Step

_log = logging.getLogger(__name__)
Case = tuple[Mapping[str, Any], Mapping[str, Any]]


def export_graph(
    bundle: Bundle, *, format: str, precision: str, fused: bool, limit: int, say: Step
) -> tuple[Variant, ...]:
    """Write another form of an imported ONNX graph, check it against the graph, and record it.

    ``openvino`` translates it; ``onnx`` in fp16 halves its weights, and in fp32 fuses operators
    for ONNX Runtime where its layers are of a kind that memopt knows.

    Args:
        bundle: an imported one.
        format, precision, fused: as of :func:`memopt.exporters.base.export`.
        limit: bytes of weights that stay inside an ONNX file.
        say: called with a line before each step.

    Raises:
        ExportError: the graph is no float32 ONNX graph, no task's, or has nothing to be fused.
    """
    source = _source(bundle)
    say("compute the graph's own answers")
    output = source.output
    own = onnx.runner(bundle.file(source), (output,))
    cases: list[Case] = []
    for size in (1, 3):
        for _, feed in feeds(bundle, samples(bundle), source.inputs, batch=size):
            answer = np.asarray(own(feed)[output], np.float32)
            cases.append((feed, {output: answer}))
    with staged_directory(bundle.path) as folder:
        if format == "openvino":
            variants = _openvino(bundle, source, precision, cases, folder, say)
        else:
            variants = _onnx(bundle, source, precision, fused, cases, folder, limit, say)
        made_of = (source.check or {}).get("made_of") or {}
        variants = [replace(v, check={**(v.check or {}), "made_of": made_of}) for v in variants]
        names = dict.fromkeys(n for v in variants for n in (*v.companions, v.file))
        bundle.add_variants(
            *variants,
            event={
                "event": "export",
                "format": format,
                "precision": precision,
                "source": source.name,
                "variants": [variant.name for variant in variants],
            },
            staged={name: folder / name for name in names},
        )
    return tuple(variants)


def _source(bundle: Bundle) -> Variant:
    """Return the variant that came with the import, if others can be made of it."""
    imported = [v for v in bundle.manifest.variants.values() if v.method == "import"]
    told = f"{bundle.path} was imported: its graph is its source"
    if bundle.task.answer == "any":
        raise ExportError(
            f"{told}, and memopt makes no inputs to check another form of it with",
            fix="run it as it is: memopt " + bundle.task.command,
        )
    for variant in imported:
        if variant.format == "onnx" and variant.precision == "fp32" and not variant.fused:
            return variant
    found = ", ".join(v.name for v in imported) or "none"
    raise ExportError(
        f"{told} ({found}), and other forms are made of float32 ONNX graphs of standard operators",
        fix="run it as it is, or import the float graph that it was made of",
    )


def _openvino(
    bundle: Bundle,
    source: Variant,
    precision: str,
    cases: list[Case],
    folder: Path,
    say: Step,
) -> list[Variant]:
    half = precision == "fp16"
    file = folder / "openvino" / f"openvino_model{'_fp16' if half else ''}.xml"
    say(f"write and check {file.name}")
    beside = openvino.to_openvino(bundle.file(source), file, half=half)
    options = openvino.compile_options(precision)
    run = openvino.runner(file, (source.output,), options)
    name = f"openvino-{precision}"
    return [
        Variant(
            name=name,
            format="openvino",
            precision=precision,
            file=f"openvino/{file.name}",
            companions=tuple(f"openvino/{other}" for other in beside),
            options=options,
            inputs=source.inputs,
            output=source.output,
            check=_compare(run, cases, precision, name),
        )
    ]


def _onnx(
    bundle: Bundle,
    source: Variant,
    precision: str,
    fused: bool,
    cases: list[Case],
    folder: Path,
    limit: int,
    say: Step,
) -> list[Variant]:
    from onnx import load

    graph = load(str(bundle.file(source)))
    if precision == "fp16":
        stem, name, made, report = "model_fp16", "onnx-fp16", to_half(graph), None
    else:
        made, report = _fused(bundle, graph) if fused else (None, None)
        stem, name = "model_fused", f"{source.name}-fused"
    if made is None:
        raise ExportError(
            f"{bundle.path} was imported: its graph is its source, and is there as {source.name}; "
            "nothing in it is of a kind that memopt fuses",
            fix="use --format openvino, or --precision fp16",
        )
    file = folder / "onnx" / f"{stem}.onnx"
    say(f"write and check {file.name}")
    beside = onnx.save_onnx(made, file, limit=limit)
    record = _compare(onnx.runner(file, (source.output,)), cases, precision, name)
    told = {"fusion": asdict(report)} if report is not None else {}
    return [
        replace(
            source,
            name=name,
            precision=precision,
            file=f"onnx/{file.name}",
            companions=tuple(f"onnx/{other}" for other in beside),
            target="cpu" if report is not None else "any",
            fused=report is not None,
            method="export",
            check={**record, **told},
            benchmark=None,
        )
    ]


def _fused(bundle: Bundle, graph: Any) -> tuple[Any, Any]:
    try:
        faster, report = fuse(graph, bundle.config())
    except MissingExtra:
        raise
    except Exception as error:  # noqa: BLE001 - patterns meet graphs that nobody has seen
        _log.info("no fused graph of %s: %s", bundle.path, brief(error))
        return None, None
    return (faster, report) if report.fused else (None, None)


def _compare(run: Any, cases: list[Case], precision: str, name: str) -> dict[str, Any]:
    record = check.compare(run, cases, check.TOLERANCES[precision], name=name, alone=False)
    return {**record, "reference": "the imported graph"}
