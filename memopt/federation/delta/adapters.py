"""Weights from where people keep them: a PEFT adapter folder, safetensors, Parquet."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from memopt.errors import SyncError
from memopt.federation.delta.arrays import Array, Weights, check_weights, dtype_name, raw
from memopt.federation.trust.vault import Vault
from memopt.files import atomic_path
from memopt.weights.reader import WeightLoader
from memopt.weights.safetensors import METADATA, new_header, open_safetensors
from memopt.weights.writer import write_weights as write_parquet

ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# The adapter's config travels as one more tensor, so that it is hashed, signed and versioned too.
CONFIG_TENSOR = "__adapter_config__"
_LIKE_METADATA = re.compile(r"__metadata___*")


def read_weights(path: str | Path) -> dict[str, Array]:
    """Read a PEFT adapter folder, a .safetensors file or a .parquet weight file.

    Raises:
        SyncError: nothing at ``path`` that holds weights.
        WeightsError: the file is damaged.
    """
    path = Path(path)
    if path.is_dir() and (path / ADAPTER_FILE).is_file():
        weights = read_safetensors(path / ADAPTER_FILE)
        config = path / CONFIG_FILE
        if config.is_file():
            weights[CONFIG_TENSOR] = np.frombuffer(config.read_bytes(), np.uint8)
        return weights
    if path.is_file() and path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.is_file() and path.suffix == ".parquet":
        with WeightLoader(path) as loader:
            return check_weights({name: np.array(array) for name, array in loader.items()})
    raise SyncError(
        f"no weights at '{path}'",
        fix=f"give a PEFT adapter folder (with {ADAPTER_FILE}), a .safetensors or a .parquet file",
    )


def write_weights(path: str | Path, weights: Weights) -> None:
    """Write weights where :func:`read_weights` finds them: whole files, renamed into place.

    ``path`` ending in .safetensors or .parquet is a file, anything else an adapter folder.
    """
    path = Path(path)
    tensors = {name: array for name, array in weights.items() if name != CONFIG_TENSOR}
    if path.suffix == ".parquet":
        write_parquet(path, tensors)
        return
    if path.suffix == ".safetensors":
        write_safetensors(path, tensors)
        return
    if CONFIG_TENSOR in weights:
        text = raw(weights[CONFIG_TENSOR]).tobytes()
        try:
            json.loads(text)
        except ValueError as error:
            raise SyncError(f"the adapter's config is not JSON ({error})") from error
        with atomic_path(path / CONFIG_FILE) as temporary:
            temporary.write_bytes(text)
    write_safetensors(path / ADAPTER_FILE, tensors)


def read_safetensors(path: Path, content: bytes | None = None) -> dict[str, Array]:
    """Read every tensor of a safetensors file, dtypes kept (bfloat16 and float8 too).

    Args:
        content: what the file holds, where that is in memory already.
    """
    opened = open_safetensors(path, content)
    return check_weights({name: opened.read(name) for name in opened.tensors})


def write_safetensors(path: Path, weights: Weights) -> None:
    """Write a safetensors file, names in order: the same weights give the same bytes."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.writelines(safetensors_parts(weights))


def safetensors_parts(weights: Weights) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, a tensor at a time.

    Raises:
        SyncError: a tensor has the name under which the format keeps other things.
    """
    if METADATA in weights:
        raise SyncError(
            f"a safetensors file cannot hold a tensor called {METADATA!r}",
            fix="write .parquet, or call it something else",
        )
    arrays = sorted(weights.items())
    header = new_header((name, dtype_name(a), a.shape, a.nbytes) for name, a in arrays)
    yield len(header).to_bytes(8, "little")
    yield header
    for name in sorted(weights):
        yield raw(np.ascontiguousarray(weights[name])).data


def kept_parts(weights: Weights) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file for :func:`read_kept`; any name may be in it."""
    return safetensors_parts({_kept_name(name): array for name, array in weights.items()})


def _kept_name(name: str) -> str:
    """Keep the format's own name, and those that look like this, apart by one more underscore."""
    return f"{name}_" if _LIKE_METADATA.fullmatch(name) else name


def _given_name(name: str) -> str:
    return name[:-1] if name != METADATA and _LIKE_METADATA.fullmatch(name) else name


def read_kept(path: Path, vault: Vault) -> dict[str, Array]:
    """Read every tensor of a safetensors file that ``vault`` keeps.

    Raises:
        WeightsError: it is no such file.
        SyncFailure: it is sealed, and the key does not open it.
    """
    content = vault.read(path) if vault.sealed(path) else None
    weights = read_safetensors(path, content)
    return {_given_name(name): array for name, array in weights.items()}
