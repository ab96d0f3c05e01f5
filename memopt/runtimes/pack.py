"""Pack a bundle for another machine: the variants it runs and what they need, nothing else."""

from __future__ import annotations

import gzip
import os
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from memopt.bundle import MANIFEST, Bundle, Manifest, Variant, open_bundle, stamp
from memopt.errors import BundleError, ConfigurationError
from memopt.files import atomic_path, sha256_file, staged_directory
from memopt.runtimes.providers import AUTO_ORDER, canonical
from memopt.runtimes.selection import candidates, of_task, runnable

ARCHIVES = (".tar", ".tar.gz", ".tgz")
# What a fast tokenizer.json was made from; the engine reads that file alone.
_VOCABULARIES = (
    *("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json"),
    *("spiece.model", "sentencepiece.bpe.model", "spm.model", "tokenizer.model"),
)
_HOSTS = ("openvino", "cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What :func:`pack` wrote: the folder or archive, its variants and the bytes in it."""

    path: Path
    variants: tuple[str, ...]
    bytes: int  # of the files in the bundle
    bytes_before: int  # of the whole source, caches included


def pack(
    bundle: str | Path | Bundle,
    output: str | Path,
    *,
    target: str = "cpu",
    variants: Sequence[str] = (),
) -> Packed:
    """Write a bundle that holds only what ``target`` needs, and opens there without a warning.

    Args:
        bundle: a bundle folder, the name of a built bundle, or a Bundle.
        output: a folder that is not there yet, or a ``.tar``, ``.tar.gz`` or ``.tgz`` file that
            holds one.
        target: the provider that will run it (``cpu``: ONNX Runtime alone), or auto for any.
        variants: names; empty takes the one that an engine would take on the target: the fastest
            that was measured and passed, else the float one.

    Returns:
        What was written. Weights, other variants, caches and reports are left out; hashes are
        checked on the way and kept, and so are the checks and measurements of each variant.

    Raises:
        BundleError: no such variant, one that the target cannot run or that failed its gate, or a
            file that is missing or differs from its hash.
        ConfigurationError: ``output`` is there already or lies inside the bundle.
        DeviceError: an unknown target.
    """
    source = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    output, provider = Path(output), canonical(target)
    archive = output.name.endswith(ARCHIVES)
    if output.exists() and (archive or not output.is_dir() or any(output.iterdir())):
        raise ConfigurationError(f"{output} is there already", fix="give another path")
    if output.absolute().is_relative_to(source.path.absolute()):
        raise ConfigurationError(f"{output} lies inside {source.path}", fix="give another path")
    wanted = _wanted(source, provider, variants)
    names = _files(source.manifest, wanted)
    manifest = _manifest(source.manifest, wanted, names, provider)
    with staged_directory(output.absolute().parent) as staged:
        folder = staged / "bundle"
        for name in names:
            _copy(source, name, folder / name)
        (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        size = _size(folder)
        if archive:
            _archive(folder, output, output.name.partition(".tar")[0].removesuffix(".tgz"))
        else:
            if output.is_dir():
                output.rmdir()
            folder.rename(output)
    return Packed(
        path=output,
        variants=tuple(v.name for v in wanted),
        bytes=size,
        bytes_before=_size(source.path),
    )


def _wanted(bundle: Bundle, provider: str, names: Sequence[str]) -> list[Variant]:
    hosts = AUTO_ORDER if provider == "auto" else (provider,)
    if names:
        wanted = [bundle.variant(name) for name in dict.fromkeys(names)]
        for variant in wanted:
            if not variant.passed:
                raise BundleError(
                    f"variant {variant.name!r} failed its quality gate and no engine would take it",
                    fix=f"see: memopt info {bundle.path}",
                )
            if not of_task(variant, bundle) or not any(runnable(variant, h) for h in hosts):
                raise BundleError(
                    f"variant {variant.name!r} cannot run on {provider}",
                    fix="give another --target, or leave --variants out",
                )
        return wanted
    # The order of an engine on the target, whatever is installed here.
    passing = [c for c in candidates(bundle, provider, "auto") if c.variant.passed]
    for candidate in passing:
        if candidate.provider in hosts and candidate.variant.name in bundle.manifest.variants:
            return [candidate.variant]
    raise BundleError(
        f"no variant of {bundle.path} runs on {provider}", fix=f"run: memopt export {bundle.path}"
    )


def _files(manifest: Manifest, wanted: Sequence[Variant]) -> list[str]:
    graphs = {n for v in manifest.variants.values() for n in (v.file, *v.companions)}
    keep = {n for v in wanted for n in (v.file, *v.companions)}
    fast = "tokenizer.json" in manifest.files

    def small(name: str) -> bool:
        path = PurePosixPath(name)
        return path.suffix != ".parquet" and not (fast and path.name in _VOCABULARIES)

    return [n for n in manifest.files if n in keep or (n not in graphs and small(n))]


def _manifest(
    manifest: Manifest, wanted: Sequence[Variant], names: Sequence[str], provider: str
) -> Manifest:
    variants = {v.name: v for v in wanted}
    chosen = {}
    for machine, record in manifest.chosen.items():
        # A choice that is not here would be a fallback, told about at every opening.
        if not isinstance(record, dict):
            continue
        name, device = record.get("variant"), record.get("device")
        there = name in variants and provider in ("auto", device)
        kept = {k: v for k, v in record.items() if there or k not in ("variant", "device")}
        alone = record.get("single")
        if isinstance(alone, dict) and not (
            alone.get("variant") in variants and provider in ("auto", alone.get("device"))
        ):
            del kept["single"]
        if kept:
            chosen[machine] = kept
    event = {"event": "pack", "target": provider, "variants": list(variants)}
    return replace(
        manifest,
        variants=variants,
        files={name: manifest.files[name] for name in names},
        chosen=chosen,
        history=(*manifest.history, stamp(event)),
    )


def _copy(bundle: Bundle, name: str, target: Path) -> None:
    path = bundle.path / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        shutil.copyfile(path, target)
        if sha256_file(target) == bundle.manifest.files[name]["sha256"]:
            return
    what = "differs from its hash in the manifest" if path.is_file() else "is missing"
    raise BundleError(f"{path} {what}", fix=f"run: memopt info {bundle.path} --verify")


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _archive(folder: Path, output: Path, top: str) -> None:
    """Write the folder as a tar file that is the same for the same files."""
    when = int(os.environ.get("SOURCE_DATE_EPOCH", 0))

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime, entry.mode = when, 0o755 if entry.isdir() else 0o644
        return entry

    with atomic_path(output) as path, path.open("wb") as raw:
        packed = gzip.GzipFile("", "wb", 6, raw, when) if output.suffix != ".tar" else raw
        with packed, tarfile.open(fileobj=packed, mode="w|") as tar:
            for entry in [folder, *sorted(folder.rglob("*"))]:
                name = str(Path(top) / entry.relative_to(folder))
                tar.add(entry, name, recursive=False, filter=plain)
