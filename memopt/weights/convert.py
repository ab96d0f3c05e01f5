"""Source to bundle, and back to safetensors: streaming, checked, whole or not at all."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memopt.bundle import (
    MANIFEST,
    Bundle,
    Manifest,
    create_bundle,
    find_bundle,
    open_bundle,
    read_json,
    stamp,
)
from memopt.errors import BundleError, WeightsError
from memopt.files import publish, staged_directory
from memopt.tasks.table import task_of
from memopt.weights.describe import announcements, describe, model_config
from memopt.weights.flatten import flatten
from memopt.weights.gguf.folder import GgufModel, lay_out, open_model
from memopt.weights.kinds import STATIC
from memopt.weights.modules import MODULES, WEIGHED
from memopt.weights.reader import WeightLoader
from memopt.weights.safetensors import write_safetensors
from memopt.weights.schema import QUANT_BITS
from memopt.weights.sentence import Sentence, read_sentence
from memopt.weights.sources import SIDE_FILES, Source, checkpoint, find_source
from memopt.weights.tokenizer import write_tokenizer
from memopt.weights.weight_file import (
    HEADER_KEY,
    Step,
    module_shards,
    rewrite,
    write_gguf,
    write_gguf_integers,
    write_shards,
)

WEIGHTS = "weights.parquet"
GGUF_WEIGHTS = "weights_gguf.parquet"  # a GGUF file's own integers (schema V2)


def convert(
    source: str | Path,
    output: str | Path | None = None,
    *,
    task: str | None = None,
    compression: str | None = None,
    revision: str | None = None,
    config: str | Path | None = None,
    route: str | None = None,
    on_step: Step | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Bundle:
    """Turn a model's checkpoint into a bundle: ``weights.parquet`` (schema V1), config, tokenizer.

    One tensor is in memory at a time. Everything is written beside ``output`` and renamed into
    place at the end; a bundle already there is replaced only then, and its variants, which were
    made of the old weights, are dropped unless the weights are the same.

    Args:
        source: a Hugging Face folder, a hub id, ``package:NAME/FOLDER``, a name from
            ``models/*.yaml``, a GGUF file, or Parquet weights of schema V1 or V2 (a file, or a
            folder that has them in place of safetensors); those of V2 are dequantized, GGUF's too,
            whose integers are kept beside in ``weights_gguf.parquet``.
        output: the bundle folder; ``models/<name>`` by default.
        task: one of ``memopt.bundle.TASKS``; by default what the config says.
        compression: None (values can be memory-mapped) or "zstd".
        revision: branch, tag or commit of a hub id.
        config: the folder with config.json and tokenizer, for Parquet weights that lie alone.
        route: which model of a sentence-transformers Router (``query`` or ``document``, say).
        on_step: called after each weight.
        on_warning: called with one line for NaN or infinite weights; ``warnings.warn`` by default.

    Raises:
        WeightsError: missing source, damaged or pickled checkpoint, unusable config.
        BundleError: ``output`` is a folder with something else in it.
        ConfigurationError: an unknown task.

    >>> convert("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.WeightsError: no model '/nowhere': not a folder, a hub id (owner/name), \
package:NAME/FOLDER, nor a known model; known: clip-vit-base-patch32, minilm, whisper-tiny
    """
    found = find_source(str(source), revision=revision, config=config)
    bundle = (found.folder / MANIFEST).is_file() and found.parquet is None
    if bundle and not any(found.folder.glob("*.safetensors")):
        raise WeightsError(
            f"{found.folder} is a bundle already",
            fix="go on with memopt export, or back with --to safetensors",
        )
    with TemporaryDirectory(prefix="memopt-") as place:
        if found.gguf is not None:
            if route is not None:
                raise WeightsError(f"{found.gguf} has no Router", fix="leave --route out")
            model = open_model(found.gguf)
            told = lay_out(model, Path(place))
            found = replace(found, folder=Path(place), told=(*found.told, *told))
            return _convert(found, output, task, compression, on_step, on_warning, model)
        if found.parquet is None:
            folder, told = flatten(found.folder, Path(place), route)
            found = replace(found, folder=folder, told=(*found.told, *told))
        return _convert(found, output, task, compression, on_step, on_warning)


def _convert(
    found: Source,
    output: str | Path | None,
    task: str | None,
    compression: str | None,
    on_step: Step | None,
    on_warning: Callable[[str], None] | None,
    gguf: GgufModel | None = None,
) -> Bundle:
    sentence = read_sentence(found.folder)
    files = found.folder / sentence.transformer if sentence else found.folder
    manifest = describe(
        found.folder,
        name=found.name,
        source=found.origin,
        known=gguf.known if gguf else found.known,
        task=task,
        sentence=sentence,
    )
    plain = found.parquet is None and gguf is None
    shards = checkpoint(files) if plain else []
    names = [name for shard in shards for name in shard.order]
    modules = module_shards(found.folder, sentence) if plain else {}
    model = model_config(files, sentence)
    told = [*found.told]
    if not found.known:
        told += announcements(manifest, sentence, model, names)
    target = Path(output) if output is not None else Path("models") / found.name
    _check_target(target)
    with staged_directory(target.resolve().parent) as staging:
        folder = staging / "bundle"
        folder.mkdir()
        _copy_side_files(found.folder, files, folder, sentence)
        if sentence and sentence.config:
            _write_json(folder / "config.json", model)
        reads = manifest.modality == "text" or task_of(manifest.task).answer == "text"
        if reads and manifest.model_type != STATIC:
            told += write_tokenizer(files, folder, manifest.max_length, sentence)
        _one_max_length(folder, manifest.max_length)
        event: dict[str, Any] = {"event": "convert", "source": found.origin}
        if gguf is not None:
            not_finite = write_gguf(gguf, folder / WEIGHTS, compression, on_step)
            kept = write_gguf_integers(gguf, folder / GGUF_WEIGHTS, compression)
            event |= _kept(gguf, kept)
            told += [_integers(target)] if kept else []
        elif found.parquet is not None:
            told += _quantized(found.parquet, target)
            not_finite = rewrite(found.parquet, folder / WEIGHTS, compression, on_step)
        else:
            not_finite = write_shards(shards, modules, folder / WEIGHTS, compression, on_step)
        for line in (*_not_finite(not_finite), *told):
            if gguf is not None:  # laid out in a folder that nobody knows
                line = line.replace(f"{found.folder}/", f"{gguf.file.path}: ")
            (on_warning or _warn)(line)
        event["not_finite"] = not_finite
        made = create_bundle(folder, replace(manifest, history=(stamp(event),)))
        if (target / MANIFEST).is_file():
            return _replace(target, made)
        if target.is_dir():
            target.rmdir()  # empty, as checked
        publish(folder, target)
    return open_bundle(target)


def resolve(
    source_or_bundle: str | Path,
    *,
    task: str | None = None,
    on_step: Step | None = None,
    on_warning: Callable[[str], None] | None = None,
) -> Bundle:
    """Open the bundle of that path or name; where there is none, convert it into ``models/<name>``.

    >>> resolve("minilmm")
    Traceback (most recent call last):
    ...
    memopt.errors.WeightsError: no model 'minilmm': not a folder, a hub id (owner/name), \
package:NAME/FOLDER, nor a known model; did you mean 'minilm'?
    """
    if find_bundle(source_or_bundle):
        return open_bundle(source_or_bundle)
    found = find_source(str(source_or_bundle))
    built = Path("models") / found.name
    if (built / MANIFEST).is_file():
        bundle = open_bundle(built)
        # Two folders may share a name: only the same origin is the same model.
        if bundle.manifest.source == found.origin:
            return bundle
        raise BundleError(
            f"{built} was made from {bundle.manifest.source!r}, not {found.origin!r}",
            fix=f"run: memopt convert {source_or_bundle} -o ANOTHER_FOLDER",
        )
    return convert(source_or_bundle, built, task=task, on_step=on_step, on_warning=on_warning)


def to_safetensors(bundle: Bundle, output: str | Path | None = None) -> Path:
    """Write the bundle's float weights as safetensors, streaming; return the model's file.

    A bundle made from one safetensors file gives that file back bit for bit. Weights of
    sentence-transformers' modules go into files of their own, in their folders beside it.

    Args:
        bundle: an opened bundle.
        output: the file; ``model.safetensors`` in the bundle by default.

    Raises:
        WeightsError: the weights are missing, damaged or quantized.
    """
    path = Path(output) if output is not None else bundle.path / "model.safetensors"
    with WeightLoader(bundle.weights) as loader:
        metadata = loader.metadata
    bundle.check(WEIGHTS)
    sentence = read_sentence(bundle.path)
    modules = [m for m in sentence.modules[1:] if m.kind in WEIGHED] if sentence else []
    for module in modules:
        write_safetensors(
            bundle.weights,
            path.parent / module.path / "model.safetensors",
            header=metadata.get(f"{HEADER_KEY}.{module.path}", "").encode() or None,
            only=module.prefix,
        )
    write_safetensors(
        bundle.weights,
        path,
        header=metadata.get(HEADER_KEY, "").encode() or None,
        without=tuple(module.prefix for module in modules),
    )
    return path


def _check_target(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise BundleError(f"{target} is a file", fix="give a folder with -o")
    if target.is_dir() and not (target / MANIFEST).is_file() and any(target.iterdir()):
        raise BundleError(
            f"{target} is neither empty nor a bundle", fix="give another folder with -o"
        )


def _copy_side_files(root: Path, files: Path, folder: Path, sentence: Sentence | None) -> None:
    """Copy what travels with a model; the model's own files go to the bundle's root."""
    for place in dict.fromkeys((root, files)):
        for pattern in SIDE_FILES:
            for path in sorted(place.glob(pattern)):
                _copy(path, folder / path.relative_to(place))
    if sentence is None:
        return
    for module in sentence.modules[1:]:
        path = root / module.path / "config.json"
        if module.path and path.is_file():
            _copy(path, folder / module.path / "config.json")
    if sentence.transformer:
        entries = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        entries[0]["path"] = ""
        _write_json(folder / MODULES, entries)


def _copy(path: Path, copy: Path) -> None:
    # Read and written anew: a hub cache holds links, which runtimes refuse.
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(path.read_bytes())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _one_max_length(folder: Path, max_length: int | None) -> None:
    """Put the manifest's max length into tokenizer_config.json.

    sentence-transformers takes the limit from its own file, fastembed and transformers from the
    tokenizer's: with two limits in one bundle, long texts would have two embeddings.
    """
    path = folder / "tokenizer_config.json"
    if max_length is None or not path.is_file():
        return
    config = read_json(path)
    if config.get("model_max_length") != max_length:
        _write_json(path, {**config, "model_max_length": max_length})


def _quantized(source: Path, target: Path) -> list[str]:
    with WeightLoader(source) as loader:
        kinds = {loader.info(name).quant_type for name in loader.names()} & set(QUANT_BITS)
    if not kinds:
        return []
    return [
        f"{source} holds {', '.join(sorted(map(str, kinds)))} weights, which the bundle has "
        f"dequantized; a graph with exactly its integers: memopt export {target} --weights {source}"
    ]


def _kept(gguf: GgufModel, counts: dict[str, int]) -> dict[str, Any]:
    """Return what the history says of a GGUF file: its types, and the integers that were kept."""
    said: dict[str, Any] = {"gguf": gguf.file.architecture, "types": gguf.kinds}
    if counts:
        # They stand for what weights.parquet holds, bit for bit: no gate is needed.
        said |= {"file": GGUF_WEIGHTS, "method": "gguf", "kept": counts, "passed": True}
    return said


def _integers(target: Path) -> str:
    return (
        f"the file's own integers are in {GGUF_WEIGHTS}; a graph with exactly them: "
        f"memopt export {target} --weights {GGUF_WEIGHTS}"
    )


def _not_finite(names: list[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return [f"{len(names)} weights hold NaN or infinite values: {shown}"]


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=3)


def _replace(target: Path, made: Bundle) -> Bundle:
    """Put a new bundle's files over those of an old one, weights last, manifest at the end."""
    old = open_bundle(target)
    same = (
        old.manifest.files.get(WEIGHTS, {}).get("sha256") == made.manifest.files[WEIGHTS]["sha256"]
    )
    new = made.manifest

    def change(current: Manifest) -> Manifest:
        kept = {n: r for n, r in current.files.items() if same and (target / n).is_file()}
        return replace(
            new,
            files={**kept, **new.files},
            variants=current.variants if same else {},
            chosen=current.chosen if same else {},
            history=(*current.history, *new.history),
        )

    names = sorted(new.files, key=lambda n: n == WEIGHTS)
    bundle = old.update(change, {name: made.path / name for name in names})
    if not same:
        for name in _derived(old.manifest):
            (target / name).unlink(missing_ok=True)
    return bundle


def _derived(manifest: Manifest) -> set[str]:
    """Graphs made from the old weights: stale, and picked up by other tools if they stayed."""
    files: set[Any] = {n for v in manifest.variants.values() for n in (v.file, *v.companions)}
    return {str(n) for n in files}
