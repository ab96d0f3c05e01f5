"""``export``: a bundle's weights to checked graphs, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from memopt.bundle import FORMATS, TASKS, Bundle, Manifest, Variant
from memopt.errors import ConfigurationError, ExportError
from memopt.exporters import check, onnx, openvino, tasks
from memopt.exporters.fuse import fuse
from memopt.exporters.half import to_half
from memopt.exporters.model import LoadedModel, load_model
from memopt.files import publish, sha256_file, staged_directory
from memopt.registry import nearest
from memopt.weights.reader import WeightLoader

Step = Callable[[str], None]
EXPORT_PRECISIONS = ("fp32", "fp16", "bf16")
PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino")
# File and variant names of a second tower in one bundle (CLIP's text side, say).
TOWERS = {"embedding": "text", "image-embedding": "vision", "audio-embedding": "audio"}


def export(
    bundle: Bundle,
    *,
    format: str = "onnx",
    task: str = "auto",
    precision: str = "fp32",
    opset: int = onnx.DEFAULT_OPSET,
    external_data_bytes: int = onnx.EXTERNAL_DATA_BYTES,
    on_step: Step | None = None,
) -> tuple[Variant, ...]:
    """Export a bundle's weights to a graph, check it against torch, and record it.

    ``onnx`` writes ``onnx/model.onnx`` (standard operators) and, in fp32, ``onnx/model_fused.onnx``
    for ONNX Runtime; ``openvino`` writes ``openvino/openvino_model.xml`` and ``.bin``. bf16 is a
    way of running OpenVINO's fp32 file, so that variant shares it.

    Args:
        bundle: a converted bundle; only its Parquet weights and ``config.json`` are read.
        format: ``onnx`` or ``openvino``.
        task: ``auto`` (the manifest's) or one of ``memopt.bundle.TASKS``.
        precision: ``fp32``, ``fp16`` (onnx, openvino) or ``bf16`` (openvino).
        opset: ONNX operator set.
        external_data_bytes: weights past this size go into a file beside the graph.
        on_step: called with a line before each step.

    Returns:
        The new variants, checked on at least four shapes; their ``check`` holds what was measured.

    Raises:
        ExportError: the architecture does not export, or the graph gives other answers than torch;
            nothing is written then.
        ConfigurationError: an unknown format, task, precision or opset.
    """
    task = _checked(format, task, precision, opset, bundle.manifest)
    say = on_step or (lambda line: None)
    _check_weights(bundle.weights)
    say("build the model from weights.parquet")
    loaded = load_model(bundle, task)
    manifest = bundle.manifest
    signature = tasks.signature(loaded, manifest, task)
    with staged_directory(bundle.path) as folder:
        known = _portable(bundle, task, opset) if format == "openvino" else None
        if known is None:
            module = tasks.wrap(loaded, manifest, task)
            feeds = tasks.example(loaded, signature.inputs, tasks.trace_shape(task), seed=0)
            say("trace and translate to ONNX")
            graph = onnx.to_onnx(module, feeds, signature, loaded, opset)
        say("compute the torch reference")
        cases = _cases(loaded, manifest, task, signature)
        # A graph with two towers keeps the first one's plain names.
        stem = "model" if task == manifest.task else f"{TOWERS.get(task, task)}_model"
        suffix = "" if precision == "fp32" else f"_{precision}"
        common: dict[str, Any] = {
            "inputs": signature.inputs,
            "output": signature.outputs[-1],
        }
        made: list[Variant] = []
        if format == "onnx":
            if precision == "fp16":
                graph = to_half(graph)
            file = folder / "onnx" / f"{stem}{suffix}.onnx"
            say(f"write and check {file.name}")
            beside = onnx.save_onnx(graph, file, limit=external_data_bytes)
            name = _name("onnx", precision, task, manifest)
            made.append(
                Variant(
                    name=name,
                    format="onnx",
                    precision=precision,
                    file=f"onnx/{file.name}",
                    companions=tuple(f"onnx/{other}" for other in beside),
                    check=_compare(onnx.runner(file, signature.outputs), cases, precision, name),
                    **common,
                )
            )
            if precision == "fp32":
                made += _fused(
                    graph, loaded, folder, stem, name, external_data_bytes, cases, common, say
                )
        else:
            source = known or folder / "source" / "model.onnx"
            if known is None:
                onnx.save_onnx(graph, source, limit=external_data_bytes)
            made.append(
                _openvino(source, folder, stem, precision, task, manifest, cases, common, say)
            )
        return _publish(bundle, folder, made, format, task, precision, opset)


def _checked(format: str, task: str, precision: str, opset: int, manifest: Manifest) -> str:
    problems: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("format", format, FORMATS),
        ("task", task, ("auto", *TASKS)),
        ("precision", precision, EXPORT_PRECISIONS),
    )
    for what, value, allowed in problems:
        if value not in allowed:
            raise ConfigurationError(f"unknown {what} {value!r}", fix=nearest(value, allowed))
    if opset not in onnx.OPSETS:
        raise ConfigurationError(
            f"opset {opset} is not supported",
            fix=f"choose {onnx.OPSETS.start} to {onnx.OPSETS.stop - 1}",
        )
    if format == "onnx" and precision == "bf16":
        raise ExportError(
            "ONNX Runtime's CPU provider has no bfloat16 kernels",
            fix="use --format openvino --precision bf16, or --precision fp16",
        )
    return manifest.task if task == "auto" else task


def _check_weights(path: Path) -> None:
    # Views only, no data is read: a damaged file is found before torch takes seconds to import.
    with WeightLoader(path) as loader:
        for name in loader:
            loader.load(name)


def _cases(
    loaded: LoadedModel, manifest: Manifest, task: str, signature: tasks.Signature
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    cases: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
    for seed, shape in enumerate(tasks.check_shapes(loaded, task, manifest.max_length), start=1):
        feeds = tasks.example(loaded, signature.inputs, shape, seed)
        cases.append((feeds, tasks.reference(loaded, manifest, task, feeds)))
    return cases


def _compare(run: Any, cases: Any, precision: str, name: str) -> dict[str, Any]:
    return check.compare(run, cases, check.TOLERANCES[precision], name=name)


def _fused(
    graph: Any,
    loaded: LoadedModel,
    folder: Path,
    stem: str,
    name: str,
    limit: int,
    cases: Any,
    common: dict[str, Any],
    say: Step,
) -> list[Variant]:
    fused, report = fuse(graph, loaded.config.to_dict())
    if not report.fused:
        return []
    file = folder / "onnx" / f"{stem}_fused.onnx"
    say(f"write and check {file.name}")
    beside = onnx.save_onnx(fused, file, limit=limit)
    outputs = tuple(value.name for value in fused.graph.output)
    record = _compare(onnx.runner(file, outputs), cases, "fp32", f"{name}-fused")
    common = {**common, "inputs": tuple(value.name for value in fused.graph.input)}
    return [
        Variant(
            name=f"{name}-fused",
            format="onnx",
            precision="fp32",
            file=f"onnx/{file.name}",
            companions=tuple(f"onnx/{other}" for other in beside),
            target="cpu",
            fused=True,
            check={**record, "fusion": asdict(report)},
            **common,
        )
    ]


def _openvino(
    source: Path,
    folder: Path,
    stem: str,
    precision: str,
    task: str,
    manifest: Manifest,
    cases: Any,
    common: dict[str, Any],
    say: Step,
) -> Variant:
    suffix = "_fp16" if precision == "fp16" else ""
    file = folder / "openvino" / f"openvino_{stem}{suffix}.xml"
    say(f"write and check {file.name}")
    beside = openvino.to_openvino(source, file, half=precision == "fp16")
    # OpenVINO picks bf16 by itself on processors that have it: always say which is meant.
    options = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
    name = _name("openvino", precision, task, manifest)
    run = openvino.runner(file, tuple(cases[0][1]), options)
    return Variant(
        name=name,
        format="openvino",
        precision=precision,
        file=f"openvino/{file.name}",
        companions=tuple(f"openvino/{other}" for other in beside),
        options=options,
        check=_compare(run, cases, precision, name),
        **common,
    )


def _name(format: str, precision: str, task: str, manifest: Manifest) -> str:
    tower = "" if task == manifest.task else f"-{TOWERS.get(task, task)}"
    return f"{format}-{precision}{tower}"


def _portable(bundle: Bundle, task: str, opset: int) -> Path | None:
    """Return the bundle's own portable graph if it is of these weights and still whole."""
    manifest = bundle.manifest
    variant = manifest.variants.get(_name("onnx", "fp32", task, manifest))
    if variant is None or variant.check is None:
        return None
    weights = manifest.files["weights.parquet"]["sha256"]
    if variant.check.get("made_of") != {"weights": weights, "opset": opset}:
        return None
    for name in (variant.file, *variant.companions):
        path = bundle.path / name
        if not path.is_file() or sha256_file(path) != manifest.files[name]["sha256"]:
            return None
    return bundle.file(variant)


def _publish(
    bundle: Bundle,
    folder: Path,
    made: list[Variant],
    format: str,
    task: str,
    precision: str,
    opset: int,
) -> tuple[Variant, ...]:
    weights = bundle.manifest.files["weights.parquet"]["sha256"]
    made_of = {"weights": weights, "opset": opset}
    made = [replace(v, check={**(v.check or {}), "made_of": made_of}) for v in made]
    for variant in made:
        # The graph last: a reader never sees a graph whose weights are not there yet.
        for name in (*variant.companions, variant.file):
            publish(folder / name, bundle.path / name)
    versions = {package: _version(package) for package in PACKAGES}
    bundle.add_variants(
        *made,
        event={
            "event": "export",
            "format": format,
            "task": task,
            "precision": precision,
            "opset": opset,
            "variants": [variant.name for variant in made],
            "versions": {name: version for name, version in versions.items() if version},
        },
    )
    return tuple(made)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
