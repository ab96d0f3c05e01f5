"""``import_graph``: a bundle around a graph that somebody else made; the graph is its source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from memopt.bundle import (
    MANIFEST,
    Bundle,
    Manifest,
    Variant,
    create_bundle,
    open_bundle,
    stamp,
)
from memopt.errors import BundleError, ConfigurationError
from memopt.exporters.onnx import save_onnx
from memopt.files import publish, sha256_file, staged_directory
from memopt.graphs.samples import samples
from memopt.graphs.session import feeds, open_graph
from memopt.importers.adapt_onnx import adapt_onnx
from memopt.importers.adapt_xml import adapt_xml, name_ports
from memopt.importers.changes import Changes, changes_of
from memopt.importers.dialects import read_graph, weights_of
from memopt.importers.graph_file import GraphFile
from memopt.importers.locate import GraphPlace, locate
from memopt.importers.proof import open_source, prove
from memopt.importers.roles import Roles, Wishes, recognise
from memopt.importers.side import Side, add_tokenizer, copy_side, read_side, write_config
from memopt.importers.xml_file import read_model
from memopt.runtimes.openvino_file import save_openvino
from memopt.tasks.table import Task, task_of
from memopt.weights.writer import write_weights

WEIGHTS = "weights.parquet"
# What is added lies beside the graph as it came.
ADAPTED = "adapted"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One import, checked, before anything is written."""

    place: GraphPlace
    graph: GraphFile
    side: Side
    roles: Roles
    changes: Changes
    max_length: int | None

    @property
    def task(self) -> Task:
        return task_of(self.roles.task)


def import_graph(
    source: str | Path,
    output: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    config: str | Path | None = None,
    task: str | None = None,
    rename: Mapping[str, str] | None = None,
    output_name: str | None = None,
    pooling: str | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    on_step: Callable[[str], object] | None = None,
    on_warning: Callable[[str], object] | None = None,
) -> Bundle:
    """Make a bundle around an ONNX or OpenVINO graph; the graph's own files are kept as they are.

    What its task needs and the graph lacks (pooling, a cast, our names of inputs) is added in a
    second file beside it, and that is compared with the graph and numpy on several inputs.

    Args:
        source: a ``.onnx`` or ``.xml`` file, a folder in optimum's layout, or
            ``package:NAME/PATH``.
        output: the bundle folder; ``models/<name>`` by default.
        tokenizer: the folder of its tokenizer, where that lies elsewhere.
        config: config.json, or the folder of it and of preprocessor_config.json.
        task: one of ``memopt.bundle.TASKS``; by default what inputs, outputs and config say, and
            ``graph`` where they say nothing.
        rename: the graph's names of inputs -> ours (input_ids, attention_mask, ...).
        output_name: the output that is the answer.
        pooling: mean, cls or max, for a graph that gives a vector a token.
        normalize: make its vectors unit length; by default what modules.json says.
        max_length: tokens that it takes, by default what its files say.
        on_step: called with a line before each step.
        on_warning: called with each line that the user should know.

    Raises:
        WeightsError: no graph there, or several.
        ExportError: a graph that is damaged, that no runtime here runs, that is not understood, or
            whose tokenizer is another's.
        ConfigurationError: an option that does not fit the graph.
        BundleError: ``output`` is a folder with something else in it.

    >>> import_graph("/nowhere/model.onnx")
    Traceback (most recent call last):
    ...
    memopt.errors.WeightsError: there is no graph '/nowhere/model.onnx'; give a .onnx or .xml \
file, or the folder of one
    """
    say, warn = on_step or _silent, on_warning or _silent
    wishes = Wishes(
        task=task, rename=rename, output=output_name, pooling=pooling, normalize=normalize
    )
    if max_length is not None and (type(max_length) is not int or max_length < 1):
        raise ConfigurationError(f"max_length is {max_length!r}", fix="give 1 or more")
    place = locate(source)
    say("read the graph")
    graph = read_graph(place.graph)
    side = read_side(place.folders, tokenizer, config)
    roles = recognise(graph, wishes, side.config, side.sentence)
    changes = changes_of(graph, roles)
    limit = _limit(max_length, side, changes) if task_of(roles.task).modality == "text" else None
    open_source(graph, [graph.outputs[0].name])
    job = _Job(place=place, graph=graph, side=side, roles=roles, changes=changes, max_length=limit)
    for line in (*place.told, *roles.told, *changes.told):
        warn(line)
    target = Path(output) if output is not None else Path("models") / place.name
    _check_target(target)
    with staged_directory(target.resolve().parent) as staging:
        folder = staging / "bundle"
        folder.mkdir()
        made = _write(job, folder, target.name, say, warn)
        if (target / MANIFEST).is_file():
            return _replace(target, made)
        if target.is_dir():
            target.rmdir()  # empty, as checked
        publish(folder, target)
    return open_bundle(target)


def _limit(asked: int | None, side: Side, changes: Changes) -> int | None:
    """Return how many tokens a text may have.

    Raises:
        ConfigurationError: more are asked for than the graph has places for.
    """
    if asked and changes.length and asked > changes.length:
        raise ConfigurationError(
            f"--max-length {asked} is beyond the graph's {changes.length} tokens",
            fix=f"use {changes.length} or less",
        )
    limits = (asked or side.stated_limit, changes.length)
    return min((limit for limit in limits if limit), default=None)


def _write(
    job: _Job,
    folder: Path,
    name: str,
    say: Callable[[str], object],
    warn: Callable[[str], object],
) -> Bundle:
    """Write all files of the bundle, run it, and return it with its one variant."""
    graph = job.graph
    say("copy the graph and its weights")
    copy_side(job.side, folder)
    if job.task.modality != "any":
        write_config(job.side, folder, graph)
    if job.task.modality == "text":
        for line in add_tokenizer(job.side, folder, job.max_length, graph):
            warn(line)
        if job.max_length is None:
            warn("nothing says how many tokens it takes: texts are never cut; say --max-length")
    for file in (graph.path.name, *graph.beside):
        copy = folder / graph.format / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((graph.path.parent / file).read_bytes())
    digest = _write_weights(graph, folder, warn)
    variant = _variant(job, folder)
    made_of = {"weights": digest, "opset": graph.opset} if digest else {"opset": graph.opset}
    told = {"graph": graph.record(), "made_of": made_of}
    event = {"event": "import", "source": job.place.origin, "sha256": sha256_file(graph.path)}
    manifest = _manifest(job, name)
    bundle = Bundle(folder, manifest)
    check: dict[str, Any] = {"reference": "the imported graph", "shapes": []}
    if job.task.modality not in ("any",) and job.roles.task != "voice-activity":
        say("run it on inputs of several sizes")
        check = prove(bundle, variant, graph, job.changes)
    variant = replace(variant, check={**check, **told})
    dimension = _dimension(job, bundle, variant)
    whole = replace(
        manifest,
        variants={variant.name: variant},
        dimension=dimension,
        history=(stamp({**event, "variants": [variant.name]}),),
    )
    return create_bundle(folder, whole)


def _write_weights(graph: GraphFile, folder: Path, warn: Callable[[str], object]) -> str | None:
    """Write the graph's constants as Parquet; return the file's hash, None without any."""
    sizes = {name: (values.dtype.name, values.nbytes) for name, values in weights_of(graph)}
    if not sizes:
        warn("the graph has no weights: the bundle gets no weights.parquet")
        return None
    path = folder / WEIGHTS
    metadata = {"memopt.source": f"graph {graph.path.name}"}
    write_weights(path, weights_of(graph), dtypes=sizes, metadata=metadata)
    return sha256_file(path)


def _variant(job: _Job, folder: Path) -> Variant:
    """Write what is added, if anything, and return the variant that engines run."""
    graph, changes = job.graph, job.changes
    own = (graph.path.name, *graph.beside)
    files = own
    target = folder / graph.format / f"{graph.path.stem}_{ADAPTED}{graph.path.suffix.lower()}"
    unnamed = graph.format == "openvino" and any(
        not port.get_names()
        for side in (read_model(graph.path),)
        for port in (*side.inputs, *side.outputs)
    )
    if graph.format == "onnx" and changes.needed:
        model = adapt_onnx(graph.path, changes, graph.opset or 0)
        files = (target.name, *save_onnx(model, target))
    elif graph.format == "openvino" and (changes.needed or unnamed):
        model = (
            adapt_xml(graph.path, changes) if changes.inputs else name_ports(read_model(graph.path))
        )
        save_openvino(model, target)
        files = (target.name, target.with_suffix(".bin").name)
    inputs = tuple(change.name for change in changes.inputs)
    return Variant(
        name=f"{graph.format}-{graph.precision}",
        format=graph.format,
        precision=graph.precision,
        file=f"{graph.format}/{files[0]}",
        companions=tuple(f"{graph.format}/{file}" for file in files[1:]),
        fused=graph.fused,
        method="import",
        inputs=inputs or tuple(port.name for port in graph.inputs),
        output=job.roles.answer,
        options={"INFERENCE_PRECISION_HINT": "f32"} if graph.format == "openvino" else {},
    )


def _manifest(job: _Job, name: str) -> Manifest:
    config, row = job.side.config, job.task
    architectures = config.get("architectures") or ["graph"]
    first = architectures if isinstance(architectures, str) else architectures[0]
    normalized = job.changes.head is not None and job.changes.head.normalize
    return Manifest(
        name=name,
        task=row.name,
        modality=row.modality,
        architecture=str(first),
        model_type=str(config.get("model_type") or "graph"),
        pooling=job.roles.pooling,
        normalize=normalized,
        max_length=job.max_length,
        source=job.place.origin,
    )


def _dimension(job: _Job, bundle: Bundle, variant: Variant) -> int | None:
    """Return the length of its vectors, as the front end's inputs give them."""
    if not job.task.embeds:
        return None
    run = open_graph(bundle.file(variant), variant.format, variant.output, variant.options)
    _, feed = next(iter(feeds(bundle, samples(bundle)[:1], variant.inputs)))
    return int(run(feed).shape[-1])


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise BundleError(f"{target} is a file", fix="give a folder with -o")
    if target.is_dir() and not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise BundleError(
            f"{target} is neither empty nor a bundle", fix="give another folder with -o"
        )


def _replace(target: Path, made: Bundle) -> Bundle:
    """Put a new bundle's files over those of an old one, whose graphs go."""
    old = open_bundle(target).manifest
    new = made.manifest
    # The graph after what it needs.
    names = sorted(new.files, key=lambda name: name.endswith((".onnx", ".xml")))
    bundle = open_bundle(target).update(
        lambda now: replace(new, history=(*now.history, *new.history)),
        {name: made.path / name for name in names},
    )
    for name in {n for v in old.variants.values() for n in (v.file, *v.companions)}:
        if name not in new.files:
            (target / name).unlink(missing_ok=True)
    return bundle


def _silent(line: str) -> None:
    pass
