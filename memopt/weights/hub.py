"""Download a model from the Hugging Face hub, or take it from the hub's local cache."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memopt.errors import WeightsError, brief
from memopt.extras import require
from memopt.weights.modules import MODULES, ROUTES, WEIGHED, Module, json_object, read_modules

_WAIT_AND_RETRY = (408, 429)  # too slow, too many: the hub's state, not an answer


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model's files in the hub's cache; ``told`` says so where the hub was not asked."""

    folder: Path
    told: tuple[str, ...] = ()


def download(
    source: str,
    revision: str | None,
    side_files: Sequence[str],
    weights: Callable[[str, list[str]], list[str]],
) -> Snapshot:
    """Return the folder of a hub id's files; only what is wanted and not there is downloaded.

    A hub that cannot be reached, is slow or fails leaves what is in the cache; one that answers
    that there is no such model, revision or permission is believed.

    Args:
        source: ``owner/name``.
        revision: branch, tag or commit; None is the main branch.
        side_files: glob patterns of the small files that travel with a model.
        weights: (where, file names of one folder) -> those of them that hold the weights.

    Raises:
        WeightsError: the hub refuses, the download breaks off, or nothing is cached.
        MissingExtra: huggingface_hub is not installed.
    """
    hub = require("huggingface_hub", extra="export", why=f"download {source}")
    errors = require("huggingface_hub.errors", extra="export", why=f"download {source}")
    constants = require("huggingface_hub.constants", extra="export", why="read its settings")
    # The HTTP client's own base class: httpx's up to huggingface_hub 1, httpx2's from 2 on.
    client_error = errors.HfHubHTTPError.__bases__[0]
    if constants.HF_HUB_OFFLINE:
        return _cached(source, revision, side_files, "HF_HUB_OFFLINE is set")
    try:
        # Without a limit a hub that accepts and stays silent would be waited for for ever.
        wait = constants.HF_HUB_ETAG_TIMEOUT
        info = hub.HfApi().model_info(source, revision=revision, timeout=wait)
        listed = [entry.rfilename for entry in info.siblings or ()]
    except errors.RevisionNotFoundError as error:
        raise WeightsError(
            f"{source} has no revision {revision!r}", fix="name a branch, a tag or a commit of it"
        ) from error
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{source} is gated: its owner asks for an agreement first",
            fix="accept it on the model's page, then run: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"the hub has no model {source!r} that you may read", fix="check the name, or log in"
        ) from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{source!r} is not a hub id: {error}", fix="give owner/name") from error
    except (client_error, errors.OfflineModeIsEnabled, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status < 500 and status not in _WAIT_AND_RETRY:
            raise WeightsError(
                f"the hub refuses {source} (HTTP status {status})",
                fix="check your token with: hf auth whoami",
            ) from error
        why = f"HTTP status {status}" if status else f"{type(error).__name__}: {brief(error)}"
        return _cached(source, revision, side_files, f"the hub does not answer ({why})")
    except (ValueError, KeyError, TypeError) as error:
        return _cached(source, revision, side_files, f"no hub answers there ({brief(error)})")
    try:
        return Snapshot(_fetch(hub, source, revision or "main", listed, side_files, weights))
    except (client_error, OSError, ValueError) as error:
        raise WeightsError(
            f"{source} cannot be downloaded: {brief(error)}",
            fix="run it again: what arrived is kept",
        ) from error


def _fetch(
    hub: Any,
    source: str,
    revision: str,
    listed: list[str],
    side_files: Sequence[str],
    weights: Callable[[str, list[str]], list[str]],
) -> Path:
    """Download side files, then the weights: a cache that was cut off has no weights."""
    places = [""]
    folder: Path | None = None

    def get(name: str) -> None:
        nonlocal folder, revision
        path = Path(hub.hf_hub_download(source, name, revision=revision))
        if folder is None:
            folder = path.parents[len(Path(name).parts) - 1]
            # The first file fixes the commit, and writes down what the branch's name stands for.
            revision = folder.name

    modules: tuple[Module, ...] = ()
    if MODULES in listed:
        get(MODULES)
        assert folder is not None
        modules = read_modules(folder)
        places += [m.path for m in modules if m.path]
    models = [next((m.path for m in modules), "")]
    if modules and modules[0].kind == "Router":
        # All of its routes: which one is meant is not known here.
        config = next((name for name in ROUTES if _below(models[0], name) in listed), ROUTES[0])
        get(_below(models[0], config))
        stated = json_object((folder or Path()) / _below(models[0], config)).get("types") or {}
        parts = [_below(models[0], str(name)) for name in stated]
        places += parts
        tensors = [_parent(name) for name in listed if name.endswith(".safetensors")]
        models = [part for part in parts if part in tensors]
    sides = [name for name in listed if _beside(name, places, side_files)]
    wanted = []
    for path in [*models, *(m.path for m in modules if m.kind in WEIGHED)]:
        own = [Path(name).name for name in listed if _parent(name) == path]
        wanted += [_below(path, name) for name in weights(_below(source, path), own)]
    for name in dict.fromkeys([*sides, *wanted]):
        get(name)
    if folder is None:
        raise WeightsError(f"{source} has no files", fix="check the name")
    return folder


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}".strip("/")


def _beside(name: str, places: Sequence[str], patterns: Sequence[str]) -> bool:
    path = Path(name)
    return _parent(name) in places and any(fnmatch.fnmatch(path.name, p) for p in patterns)


def _parent(name: str) -> str:
    parent = Path(name).parent.as_posix()
    return "" if parent == "." else parent


def _cached(source: str, revision: str | None, side_files: Sequence[str], why: str) -> Snapshot:
    hub = require("huggingface_hub", extra="export", why=f"read {source} from the cache")
    errors = require("huggingface_hub.errors", extra="export", why=f"download {source}")
    # Files nobody needs for the numbers may be missing.
    needed = [pattern for pattern in side_files if not pattern.startswith("LICENSE")]
    try:
        folder = Path(
            hub.snapshot_download(
                source, revision=revision, local_files_only=True, allow_patterns=needed
            )
        )
    except errors.LocalEntryNotFoundError as error:
        part = "only in part" if "IncompleteSnapshot" in type(error).__name__ else "not"
        raise WeightsError(
            f"{source} is {part} in the local hub cache and cannot be downloaded: {why}",
            fix="unset HF_HUB_OFFLINE with a network, or give a local folder",
        ) from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{source!r} is not a hub id: {error}", fix="give owner/name") from error
    if why.startswith("HF_HUB_OFFLINE"):
        return Snapshot(folder)
    return Snapshot(folder, (f"{source} is taken from the local cache as it is there: {why}",))
