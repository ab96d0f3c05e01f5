"""``export``: a bundle's weights to checked graphs, whole or not at all."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from memopt.bundle import FORMATS, TASKS, Bundle, Manifest, Variant, open_bundle
from memopt.errors import ConfigurationError, ExportError, MissingExtra, brief
from memopt.exporters import aoti, check, encoder, interface, onnx, openvino, pair, segments
from memopt.exporters.from_graph import export_graph
from memopt.exporters.half import to_half
from memopt.exporters.record import record
from memopt.exporters.refusals import foreseen, refused
from memopt.files import staged_directory
from memopt.progress import Step, silent
from memopt.registry import check_names
from memopt.runtimes.torch_model import LoadedModel
from memopt.runtimes.towers import other_task
from memopt.tasks.table import task_of
from memopt.verified import has_hash
from memopt.weights.reader import WeightLoader

_log = logging.getLogger(__name__)
Case = tuple[Mapping[str, Any], Mapping[str, Any]]  # feeds, reference outputs
EXPORT_PRECISIONS = ("fp32", "fp16", "bf16")
# File and variant names of a second tower in one bundle (CLIP's text side, say).
TOWERS = {"embedding": "text", "image-embedding": "vision", "audio-embedding": "audio"}


@dataclass(frozen=True, slots=True)
class _Job:
    """What every variant of one export shares."""

    bundle: Bundle
    task: str
    precision: str
    loaded: LoadedModel
    signature: interface.Signature
    cases: list[Case]
    folder: Path  # where files wait to be published
    limit: int  # bytes of weights that stay inside an ONNX file
    say: Step

    @property
    def stem(self) -> str:
        """A bundle of two towers keeps the plain file names for the manifest's own task."""
        own = self.task == self.bundle.manifest.task
        return "model" if own else f"{TOWERS.get(self.task, self.task)}_model"

    def name(self, format: str, precision: str) -> str:
        return _name(format, precision, self.task, self.bundle.manifest)


def export(
    bundle: Bundle,
    *,
    format: str = "onnx",
    task: str = "auto",
    precision: str = "fp32",
    opset: int = onnx.DEFAULT_OPSET,
    fused: bool = True,
    external_data_bytes: int = onnx.EXTERNAL_DATA_BYTES,
    on_step: Step = silent,
) -> tuple[Variant, ...]:
    """Export a bundle's weights to a graph, check it against torch, and record it.

    ``onnx`` writes ``onnx/model.onnx`` (standard operators) and, in fp32, ``onnx/model_fused.onnx``
    for ONNX Runtime; ``openvino`` writes ``openvino/openvino_model.xml`` and ``.bin``. bf16 is a
    way of running OpenVINO's fp32 file, so that variant shares it. ``torch-aoti`` compiles
    ``torch-aoti/model.pt2`` for this machine's GPU, or its CPU, and for its version of torch.

    Args:
        bundle: a converted bundle; only its Parquet weights and ``config.json`` are read.
        format: ``onnx``, ``openvino`` or ``torch-aoti``.
        task: one of ``memopt.bundle.TASKS``; ``auto`` is the bundle's own and a second tower's.
        precision: ``fp32``, ``fp16``, or ``bf16`` (openvino, torch-aoti).
        opset: ONNX operator set.
        fused: also write the graph with ONNX Runtime's fused operators (onnx, fp32).
        external_data_bytes: weights past this size go into a file beside the graph.
        on_step: called with a line before each step.

    Returns:
        The new variants, checked on at least four shapes; their ``check`` holds what was measured.

    Raises:
        ExportError: the architecture does not export, or the graph gives other answers than torch;
            nothing is written then.
        ConfigurationError: an unknown format, task, precision or opset.

    >>> from memopt.bundle import Manifest
    >>> manifest = Manifest(
    ...     name="m", task="embedding", modality="text", architecture="BertModel", model_type="bert"
    ... )
    >>> export(Bundle(Path("m"), manifest), opset=7)
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: opset 7 is not supported; choose 18 to 23
    """
    both = task == "auto"
    task = _checked(format, task, precision, opset, bundle.manifest)
    if bundle.imported:
        if task != bundle.manifest.task:
            raise ExportError(
                f"{bundle.path} was imported: its graph is its source, of task "
                f"{bundle.manifest.task}",
                fix="leave --task out",
            )
        return export_graph(
            bundle,
            format=format,
            precision=precision,
            fused=fused,
            limit=external_data_bytes,
            say=on_step,
        )
    _check_weights(bundle.weights)
    bundle.check(bundle.weights.name)
    second = other_task(bundle) if both else None
    how = (precision, opset, fused, external_data_bytes)
    with foreseen(bundle.manifest.model_type, on_step) as step:
        variants = _export(bundle, format, task, *how, step)
        if second is not None:
            bundle = open_bundle(bundle.path)
            variants += _export(bundle, format, second, *how, step)
        return variants


def _export(
    bundle: Bundle,
    format: str,
    task: str,
    precision: str,
    opset: int,
    fused: bool,
    limit: int,
    say: Step,
) -> tuple[Variant, ...]:
    kind = kind_of(task)
    if kind is pair:
        return _pair(bundle, format, task, precision, opset, limit, say)
    say("build the model from weights.parquet")
    loaded = kind.load_model(bundle, task)
    with refused(loaded, task):
        signature = kind.signature(loaded, bundle.manifest, task)
    with staged_directory(bundle.path) as folder:
        say("compute the torch reference")
        with refused(loaded, task):
            cases = reference_cases(loaded, bundle.manifest, task, signature)
        job = _Job(bundle, task, precision, loaded, signature, cases, folder, limit, say)
        if format == "torch-aoti":
            variants = [_package(job)]
        elif format == "onnx":
            variants = _onnx(job, _graph(job, opset), fused=fused)
        else:
            variants = _openvino(job, *_source(job, opset))
        return record(
            bundle,
            variants,
            folder,
            format=format,
            task=task,
            precision=precision,
            opset=opset,
            dimension=_dimension(job),
        )


def _graph(job: _Job, opset: int, module: Any = None) -> Any:
    """Return the model, or a module of it, in standard ONNX operators."""
    loaded, manifest, task = job.loaded, job.bundle.manifest, job.task
    kind = kind_of(task)
    with refused(loaded, task):
        module = module or kind.wrap(loaded, manifest, task)
        feeds = kind.example(loaded, job.signature.inputs, kind.trace_shape(task), seed=0)
        kind.reference(loaded, manifest, task, feeds)
    job.say("trace and translate to ONNX")
    return onnx.to_onnx(module, feeds, job.signature, loaded, opset)


def _source(job: _Job, opset: int) -> tuple[Path, bool]:
    """Return the ONNX file that OpenVINO's is made of, and whether it takes several texts a row."""
    target = job.folder / "source" / "model.onnx"
    shared = segments.segmented(job.loaded, job.task, job.signature, job.cases)
    if shared is not None:
        try:
            onnx.save_onnx(_graph(job, opset, shared), target, limit=job.limit)
        except ExportError as error:
            _log.info("%s: one text a row: %s", job.bundle.path, error)
        else:
            return target, True
    plain = current(job.bundle, _name("onnx", "fp32", job.task, job.bundle.manifest), opset)
    if plain is not None:
        return job.bundle.file(plain), False
    onnx.save_onnx(kind_of(job.task).portable(_graph(job, opset)), target, limit=job.limit)
    return target, False


def _pair(
    bundle: Bundle, format: str, task: str, precision: str, opset: int, limit: int, say: Step
) -> tuple[Variant, ...]:
    if task != bundle.manifest.task:
        raise ExportError(
            f"{bundle.path} has task {bundle.manifest.task}, and two graphs are of a bundle's own",
            fix=f"convert it with --task {task}",
        )
    return pair.export_pair(
        bundle,
        format=format,
        precision=precision,
        opset=opset,
        limit=limit,
        known=current(bundle, "onnx-fp32", opset),
        say=say,
    )


def _checked(format: str, task: str, precision: str, opset: int, manifest: Manifest) -> str:
    check_names("format", [format], FORMATS)
    check_names("task", [task], ("auto", *TASKS))
    check_names("precision", [precision], EXPORT_PRECISIONS)
    if opset not in onnx.OPSETS:
        raise ConfigurationError(
            f"opset {opset} is not supported",
            fix=f"choose {onnx.OPSETS.start} to {onnx.OPSETS.stop - 1}",
        )
    if format == "torch-aoti" and kind_of(manifest.task) is not encoder:
        raise ExportError(
            f"torch-aoti is for models that answer at once, and the task is {manifest.task}",
            fix="use --format onnx or openvino",
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


def kind_of(task: str) -> Any:
    """Return the module that knows how this family of models is loaded, called and checked."""
    family = task_of(task).family
    return importlib.import_module(family) if family else encoder


def reference_cases(
    loaded: LoadedModel, manifest: Manifest, task: str, signature: interface.Signature
) -> list[Case]:
    """Return what a graph is checked with: inputs of several shapes, and torch's answers."""
    cases: list[Case] = []
    kind = kind_of(task)
    for seed, shape in enumerate(kind.check_shapes(loaded, task, manifest.max_length), start=1):
        feeds = kind.example(loaded, signature.inputs, shape, seed)
        cases.append((feeds, kind.reference(loaded, manifest, task, feeds)))
    return cases


def _onnx(job: _Job, graph: Any, *, fused: bool) -> list[Variant]:
    suffix = "" if job.precision == "fp32" else f"_{job.precision}"
    plain = kind_of(job.task).portable(graph)
    if job.precision == "fp16":
        plain = to_half(plain)
    name = job.name("onnx", job.precision)
    variants = [_save(job, plain, f"{job.stem}{suffix}.onnx", name)]
    if fused and job.precision == "fp32":
        variants += _fused(job, graph, name)
    return variants


def _fused(job: _Job, graph: Any, name: str) -> list[Variant]:
    """Return the graph with fused operators, if there is one and it is as right as the other.

    It is only the faster of the two: without it the bundle is whole, and the log says what failed.
    """
    try:
        faster, report = kind_of(job.task).faster(graph, job.loaded.config.to_dict())
        if not report.fused:
            return []
        variant = _save(job, faster, f"{job.stem}_fused.onnx", f"{name}-fused")
    except MissingExtra:
        raise
    except Exception as error:  # noqa: BLE001 - of any kind: patterns meet graphs nobody has seen
        kind = job.loaded.config.model_type
        _log.warning("%s gets no fused graph for ONNX Runtime: %s", kind, brief(error))
        return []
    record = {**(variant.check or {}), "fusion": asdict(report)}
    made = replace(variant, target="cpu", fused=True, check=record)
    return [kind_of(job.task).finish(made, job.bundle.path, job.folder)]


def _save(job: _Job, graph: Any, file_name: str, name: str) -> Variant:
    file = job.folder / "onnx" / file_name
    job.say(f"write and check {file_name}")
    beside = onnx.save_onnx(graph, file, limit=job.limit)
    outputs = tuple(value.name for value in graph.graph.output)
    constants = {tensor.name for tensor in graph.graph.initializer}  # inputs with a default
    tolerance = check.TOLERANCES[job.precision]
    return Variant(
        name=name,
        format="onnx",
        precision=job.precision,
        file=f"onnx/{file_name}",
        companions=tuple(f"onnx/{other}" for other in beside),
        inputs=tuple(value.name for value in graph.graph.input if value.name not in constants),
        output=outputs[-1],
        check=_compared(job, onnx.runner(file, outputs), tolerance, name),
    )


def _compared(job: _Job, run: check.Run, tolerance: check.Tolerance, name: str) -> dict[str, Any]:
    record: dict[str, Any] = kind_of(job.task).compare(run, job.loaded, job.cases, tolerance, name)
    return record


def _package(job: _Job) -> Variant:
    suffix = "" if job.precision == "fp32" else f"_{job.precision}"
    name, file = job.name("torch-aoti", job.precision), f"torch-aoti/{job.stem}{suffix}.pt2"
    options, record = aoti.to_package(
        job.loaded, job.signature, job.cases, job.precision, job.folder / file, job.say
    )
    return Variant(
        name=name,
        format="torch-aoti",
        precision=job.precision,
        file=file,
        target="gpu" if options["device"] == "cuda" else "cpu",
        options=options,
        inputs=job.signature.inputs,
        output=job.signature.outputs[-1],
        check=record,
    )


def _openvino(job: _Job, source: Path, segmented: bool) -> list[Variant]:
    suffix = "_fp16" if job.precision == "fp16" else ""
    file = job.folder / "openvino" / f"openvino_{job.stem}{suffix}.xml"
    job.say(f"write and check {file.name}")
    half = job.precision == "fp16"
    beside = openvino.to_openvino(source, file, half=half, segmented=segmented)
    variants = []
    known = job.bundle.manifest.variants
    for precision in openvino.sharing(job.precision, lambda p: job.name("openvino", p) in known):
        name = job.name("openvino", precision)
        options = openvino.compile_options(precision, cached=job.task == "text-generation")
        run = openvino.runner(file, job.signature.outputs, options)
        if segmented:
            segments.compare_shared(run, job.cases, check.TOLERANCES[precision], name)
        variants.append(
            Variant(
                name=name,
                format="openvino",
                precision=precision,
                file=f"openvino/{file.name}",
                companions=tuple(f"openvino/{other}" for other in beside),
                options=options,
                inputs=job.signature.inputs,
                output=job.signature.outputs[-1],
                check=_compared(job, run, check.TOLERANCES[precision], name),
            )
        )
    return variants


def _name(format: str, precision: str, task: str, manifest: Manifest) -> str:
    tower = "" if task == manifest.task else f"-{TOWERS.get(task, task)}"
    return f"{format}-{precision}{tower}"


def current(bundle: Bundle, name: str, opset: int | None = None) -> Variant | None:
    """Return a float variant if it is of the bundle's present weights, and still whole.

    Args:
        opset: which it must have, None for any.
    """
    manifest = bundle.manifest
    variant = manifest.variants.get(name)
    made_of = ((variant and variant.check) or {}).get("made_of") or {}
    weights = manifest.files.get("weights.parquet", {}).get("sha256")
    if variant is None or weights is None or made_of.get("weights") != weights:
        return None
    if opset not in (None, made_of.get("opset")) or not whole(bundle, variant):
        return None
    return variant


def whole(bundle: Bundle, variant: Variant) -> bool:
    """Say whether a variant's files are all there, as the manifest records them."""
    for name in (variant.file, *variant.companions):
        path, record = bundle.path / name, bundle.manifest.files.get(name)
        if record is None or not path.is_file() or not has_hash(path, record["sha256"]):
            return False
    return True


def _dimension(job: _Job) -> int | None:
    """Return the length of the vectors that torch gave; the manifest's is of its own task."""
    own = job.task == job.bundle.manifest.task
    made = task_of(job.task).answer == "vector" or job.task == "late-interaction"
    vectors = job.cases[0][1].get(job.signature.outputs[-1]) if made else None
    return int(vectors.shape[-1]) if own and vectors is not None else None
