"""Other layouts, laid out anew as the folder of one sentence-transformers model.

Of a Router one route is taken; a table of static embeddings (sentence-transformers'
StaticEmbedding, model2vec's and wordllama's files) becomes one tensor with a ``config.json``. What
need not change is linked, not copied.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import BundleError, WeightsError
from memopt.files import stays_below
from memopt.registry import nearest
from memopt.weights.kinds import STATIC
from memopt.weights.modules import MODULES, ROUTES, SETTINGS, Module, json_object, read_modules
from memopt.weights.safetensors import SafetensorsFile, new_header, open_safetensors
from memopt.weights.sources import checkpoint

TABLE = "embedding.weight"
_CLASS = "sentence_transformers.models."
_MODEL2VEC = "model2vec"
_TOKENIZER = "tokenizer.json"


def flatten(folder: Path, target: Path, route: str | None = None) -> tuple[Path, tuple[str, ...]]:
    """Return a plain folder of the model, ``folder`` itself where it is one, and lines to tell.

    Args:
        folder: of a source.
        target: a folder that is there and may be filled.
        route: of a Router, which part of it.

    Raises:
        WeightsError: a Router and no such route, a route for another model, or damaged files.
    """
    modules = read_modules(folder) if (folder / MODULES).is_file() else ()
    if modules and modules[0].kind == "Router":
        folder = _one_route(folder, modules, route, target / "route")
        modules = read_modules(folder)
    elif route is not None:
        raise WeightsError(
            f"{folder} has no Router, so there is no route {route!r}", fix="leave --route out"
        )
    if modules and modules[0].kind == "StaticEmbedding":
        place = folder / modules[0].path
        _write_static(target / "static", _only_file(place), place / _TOKENIZER)
        _link_modules(folder, modules[1:], target / "static")
        _link(folder / SETTINGS, target / "static" / SETTINGS)
        return target / "static", _told(json_object(place / "config.json"))
    try:
        config = json_object(folder / "config.json")
    except BundleError as error:
        raise WeightsError(error.problem, fix="give the folder of a Hugging Face model") from error
    if not modules and config.get("model_type") == _MODEL2VEC:
        _write_static(target / "static", _only_file(folder), folder / _TOKENIZER)
        unit = [Module("Normalize", "1_Normalize")] if config.get("normalize") else []
        _write_modules(target / "static", unit)
        return target / "static", _told(config)
    if found := _wordllama(folder):
        _write_static(target / "static", *found)
        _write_modules(target / "static", [])
        return target / "static", ()
    return folder, ()


def _told(config: Mapping[str, Any]) -> tuple[str, ...]:
    if config.get("model_type") != _MODEL2VEC:
        return ()
    return (
        "model2vec itself leaves out unknown words and what is past its max_length; the bundle "
        "answers as sentence-transformers does, which takes all",
    )


def _one_route(folder: Path, modules: Sequence[Module], route: str | None, target: Path) -> Path:
    """Lay out the modules of one route, and what follows the Router, as a folder of their own."""
    place = folder / modules[0].path
    stated = next((c for n in ROUTES if "structure" in (c := json_object(place / n))), {})
    types, routes = stated.get("types"), stated.get("structure")
    if not isinstance(types, dict) or not isinstance(routes, dict) or not routes:
        raise WeightsError(
            f"{place / ROUTES[0]} does not say what the Router's routes are made of",
            fix="save the model again with sentence-transformers",
        )
    if route not in routes:
        known = ", ".join(map(str, routes))
        what = f"has no route {route!r}" if route is not None else "is a Router"
        raise WeightsError(
            f"{folder} {what}: it has a model each for {known}, and a bundle holds one",
            fix=f"convert each: --route {next(iter(routes))}"
            if route is None
            else nearest(route, [str(name) for name in routes]),
        )
    names = [str(name) for name in routes[route]]
    if wrong := [name for name in names if name not in types or not stays_below(name)]:
        raise WeightsError(f"{place / ROUTES[0]} has no module {wrong[0]!r:.200}")
    target.mkdir()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in (MODULES, *ROUTES):
            _link(path, target / path.name)
    entries = []
    for name in names:
        _link(place / name, target / name)
        entries.append((str(types[name]), name))
    rest = [(f"{_CLASS}{module.kind}", module.path) for module in modules[1:]]
    _link_folders(folder, modules[1:], target)
    _write_entries(target, [*entries, *rest])
    return target


def _wordllama(folder: Path) -> tuple[SafetensorsFile, Path] | None:
    """Return the table and the tokenizer of wordllama's package, if ``folder`` is that."""
    ending = "_tokenizer_config.json"
    tokenizers = sorted((folder / "tokenizers").glob(f"*{ending}"))
    pairs = [
        (weights, tokenizer)
        for tokenizer in tokenizers
        for weights in sorted((folder / "weights").glob("*.safetensors"))
        if weights.name.startswith(tokenizer.name.removesuffix(ending) + "_")
    ]
    if len(pairs) > 1:
        raise WeightsError(
            f"{folder} has several tables: {', '.join(w.name for w, _ in pairs)}",
            fix="keep one in a folder of its own, with its tokenizer",
        )
    return (open_safetensors(pairs[0][0]), pairs[0][1]) if pairs else None


def _only_file(place: Path) -> SafetensorsFile:
    files = checkpoint(place)
    if len(files) != 1:
        raise WeightsError(f"{place} has its table in {len(files)} files", fix="save it as one")
    return files[0]


def _write_static(target: Path, table: SafetensorsFile, tokenizer: Path) -> None:
    """Write config, tokenizer and table; one row a token, as the model averages them."""
    if not tokenizer.is_file():
        raise WeightsError(f"{tokenizer} is missing, so texts cannot be taken apart")
    target.mkdir()
    _link(tokenizer, target / _TOKENIZER)
    weights = target / "model.safetensors"
    if list(table.tensors) == [TABLE]:
        _link(table.path, weights)
        shape = table.tensors[TABLE].shape
    else:
        rows = _folded(table)
        header = new_header([(TABLE, rows.dtype.name, rows.shape, rows.nbytes)])
        weights.write_bytes(len(header).to_bytes(8, "little") + header + rows.tobytes())
        shape = rows.shape
    if len(shape) != 2:
        raise WeightsError(f"{table.path}: the table has shape {shape}, not (tokens, width)")
    config = {"architectures": ["StaticEmbedding"], "model_type": STATIC}
    _write_json(target / "config.json", {**config, "vocab_size": shape[0], "hidden_size": shape[1]})
    cut = json_object(tokenizer).get("truncation") or {}
    if cut.get("max_length"):
        _write_json(target / "tokenizer_config.json", {"model_max_length": cut["max_length"]})


def _folded(table: SafetensorsFile) -> np.ndarray:
    """Return model2vec's table with its mapping and its weights applied, a row a token.

    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
    >>> values = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    >>> save_file({"embeddings": values, "mapping": np.array([1, 0, 1])}, path)
    >>> _folded(open_safetensors(path)).tolist()
    [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    """
    known = {"embeddings", "mapping", "weights"}
    if unknown := sorted(set(table.tensors) - known) or sorted({"embeddings"} - set(table.tensors)):
        raise WeightsError(
            f"{table.path} has {', '.join(table.tensors)}: it is no table of static embeddings "
            f"({unknown[0]!r})",
            fix=f"a table is {TABLE!r}, or model2vec's {', '.join(sorted(known))}",
        )
    rows = table.read("embeddings")
    if "mapping" in table.tensors:
        places = table.read("mapping").astype(np.int64)
        if places.min(initial=0) < 0 or places.max(initial=0) >= len(rows):
            raise WeightsError(f"{table.path}: its mapping goes past the {len(rows)} rows it has")
        rows = rows[places]
    if "weights" in table.tensors:
        # As sentence-transformers does: a float16 table becomes float32 by its weights.
        rows = rows.astype(np.promote_types(rows.dtype, np.float32))
        scale = table.read("weights")
        if scale.shape != (len(rows),):
            raise WeightsError(f"{table.path}: {scale.shape} weights for {len(rows)} tokens")
        rows = (rows * scale[:, None]).astype(rows.dtype)
    return np.ascontiguousarray(rows)


def _link_modules(folder: Path, modules: Sequence[Module], target: Path) -> None:
    _link_folders(folder, modules, target)
    _write_modules(target, modules)


def _link_folders(folder: Path, modules: Sequence[Module], target: Path) -> None:
    for module in modules:
        if module.path:
            _link(folder / module.path, target / module.path)


def _write_modules(target: Path, rest: Sequence[Module]) -> None:
    entries = [(f"{_CLASS}{module.kind}", module.path) for module in rest]
    _write_entries(target, [(f"{_CLASS}StaticEmbedding", ""), *entries])


def _write_entries(target: Path, entries: Sequence[tuple[str, str]]) -> None:
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (kind, path) in enumerate(entries)
    ]
    _write_json(target / MODULES, listed)


def _link(path: Path, link: Path) -> None:
    if path.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
