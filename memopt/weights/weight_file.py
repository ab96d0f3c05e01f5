"""The weight file of a bundle, written from a checkpoint as it streams by."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from memopt.errors import WeightsError
from memopt.files import sha256_file
from memopt.weights.chain import weight_shapes
from memopt.weights.gguf.folder import GgufModel
from memopt.weights.modules import WEIGHED, Module
from memopt.weights.quantized import QuantizedWeight
from memopt.weights.reader import WeightLoader
from memopt.weights.safetensors import SafetensorsFile, header_json
from memopt.weights.schema import SOURCE_KEY, is_float, numpy_dtype
from memopt.weights.sentence import Sentence
from memopt.weights.sources import checkpoint
from memopt.weights.writer import write_quantized, write_weights

HEADER_KEY = "memopt.safetensors_header"
# isfinite() makes one byte per value; in pieces it never shows beside the tensor.
_FINITE_CHUNK = 1 << 20

Step = Callable[[str, int, int], None]  # weight name, bytes done, bytes in all


def module_shards(root: Path, sentence: Sentence | None) -> dict[Module, SafetensorsFile]:
    """Open the weights of the modules behind the model, one file each.

    Raises:
        WeightsError: a module lacks its weights, or has some of another name or shape.
    """
    found: dict[Module, SafetensorsFile] = {}
    if sentence is None:
        return found
    shapes = weight_shapes(sentence.chain)
    for module in sentence.modules[1:]:
        if module.kind not in WEIGHED:
            continue
        (shard,) = checkpoint(root / module.path)
        wanted = {n: shape for n, shape in shapes.items() if n.startswith(module.prefix)}
        there = {module.prefix + name: tensor.shape for name, tensor in shard.tensors.items()}
        if there != wanted:
            name = sorted(set(there.items()) ^ set(wanted.items()))[0][0]
            raise WeightsError(
                f"{shard.path} does not fit the config.json beside it: {name} is "
                f"{there.get(name, 'missing')}, not {wanted.get(name, 'known')}",
                fix="save the model again with sentence-transformers",
            )
        found[module] = shard
    return found


def write_shards(
    shards: list[SafetensorsFile],
    modules: Mapping[Module, SafetensorsFile],
    path: Path,
    compression: str | None,
    on_step: Step | None,
) -> list[str]:
    """Write the weight file; return the names of weights with NaN or infinite values."""
    # Where the file lay, what its weights are called here, and the file.
    files = [(shard.path.name, "", shard) for shard in shards]
    files += [(f"{m.path}/{shard.path.name}", m.prefix, shard) for m, shard in modules.items()]
    sizes = {
        prefix + t.name: (t.dtype, t.nbytes)
        for _, prefix, shard in files
        for t in shard.tensors.values()
    }
    digests: dict[str, str] = {}
    metadata: dict[str, str] = {}

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for place, prefix, shard in files:
            # A header's tensors cover the file without gaps, so this is the file's own SHA-256.
            header = header_json(shard.path)
            digest = hashlib.sha256(len(header).to_bytes(8, "little") + header)
            for name in shard.tensors:
                array = shard.read(name)
                digest.update(array.reshape(-1).view(np.uint8).data)
                yield prefix + name, array
                del array
            digests[place] = digest.hexdigest()
        metadata[SOURCE_KEY] = json.dumps(digests, sort_keys=True)

    if len(shards) == 1:
        metadata[HEADER_KEY] = header_json(shards[0].path).decode("utf-8")
    for module, shard in modules.items():
        metadata[f"{HEADER_KEY}.{module.path}"] = header_json(shard.path).decode("utf-8")
    return _write_checked(path, stream(), sizes, metadata, compression, on_step)


def rewrite(source: Path, path: Path, compression: str | None, on_step: Step | None) -> list[str]:
    """Write the weight file from another one, V2 dequantized; return what is not finite."""
    with WeightLoader(source) as loader:
        infos = [loader.info(name) for name in loader.names()]
        sizes = {i.name: (i.dtype, i.size * numpy_dtype(i.dtype).itemsize) for i in infos}
        metadata = {SOURCE_KEY: json.dumps({source.name: sha256_file(source)})}
        return _write_checked(path, loader.items(), sizes, metadata, compression, on_step)


def write_gguf(
    model: GgufModel, path: Path, compression: str | None, on_step: Step | None
) -> list[str]:
    """Write the weight file from a GGUF file, dequantized; return what is not finite."""
    sizes = {
        weight.name: (weight.dtype, math.prod(weight.shape) * numpy_dtype(weight.dtype).itemsize)
        for weight in model.weights
    }
    weights = ((weight.name, weight.load()) for weight in model.weights)
    return _write_checked(path, weights, sizes, _gguf_source(model), compression, on_step)


def write_gguf_integers(model: GgufModel, path: Path, compression: str | None) -> dict[str, int]:
    """Write the integers of a GGUF file as schema V2, floats bit for bit beside them.

    Returns:
        How many weights are int8, int4, int2 and float; without integers no file is written.
    """
    counts: Counter[str] = Counter()
    if not any(weight.tensor.kind.quantized for weight in model.weights):
        return {}

    def stream() -> Iterator[tuple[str, QuantizedWeight | np.ndarray]]:
        for name, weight in model.stream():
            counts[f"int{weight.bits}" if isinstance(weight, QuantizedWeight) else "float"] += 1
            yield name, weight
            del weight

    quantizer = {"algorithm": "gguf", "types": model.kinds}
    metadata = {**_gguf_source(model), "memopt.quantizer": json.dumps(quantizer, sort_keys=True)}
    write_quantized(
        path, stream(), metadata=metadata, compression=compression, minima=True, exact=True
    )
    return dict(sorted(counts.items()))


def _gguf_source(model: GgufModel) -> dict[str, str]:
    paths = sorted({tensor.path for tensor in model.file.tensors.values()})
    return {SOURCE_KEY: json.dumps({path.name: sha256_file(path) for path in paths})}


def _write_checked(
    path: Path,
    weights: Iterator[tuple[str, np.ndarray]],
    sizes: Mapping[str, tuple[str, int]],
    metadata: Mapping[str, str],
    compression: str | None,
    on_step: Step | None,
) -> list[str]:
    """Write weights as they come, each looked at; return the names of those not finite.

    Args:
        sizes: dtype and bytes of each.
        metadata: of the file; may grow until the last weight came.
    """
    total, not_finite = sum(size for _, size in sizes.values()), []

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        done = 0
        for name, array in weights:
            if not _finite(array):
                not_finite.append(name)
            yield name, array
            del array
            done += sizes[name][1]
            if on_step:
                on_step(name, done, total)

    write_weights(path, stream(), dtypes=sizes, metadata=metadata, compression=compression)
    return not_finite


def _finite(array: np.ndarray) -> bool:
    if not is_float(array.dtype):
        return True
    flat = array.reshape(-1)
    return all(
        np.isfinite(flat[i : i + _FINITE_CHUNK]).all() for i in range(0, flat.size, _FINITE_CHUNK)
    )
