"""Rotary positions of a GGUF file, as transformers' ``rope_theta`` and ``rope_scaling``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from memopt.errors import WeightsError
from memopt.weights.gguf.blocks import values
from memopt.weights.gguf.keys import Keys

# Llama 3.1 to 3.3's, the only ones that llama.cpp's converter makes a table of.
_LOW, _HIGH, _TRAINED = 1.0, 4.0, 8192
_CLOSE = 1e-5  # of a float32 table made in float32
# Of both runtimes, where a file does not say.
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


def rotary(keys: Keys, size: int) -> dict[str, Any]:
    """Return the keys of a ``config.json`` for the rotary positions.

    Args:
        keys: of the file.
        size: values of a head that are turned.

    Raises:
        WeightsError: a scaling that transformers has not, by name.
    """
    theta = keys.number("rope.freq_base", 10_000.0)
    kind = keys.get("rope.scaling.type", "none")
    config: dict[str, Any] = {"rope_theta": theta}
    if "rope_factors_long.weight" in keys.file.tensors:
        return {**config, **_long(keys, size)}
    if kind == "none" and "rope_freqs.weight" in keys.file.tensors:
        scaling = _llama3(keys, theta, size)
        return {**config, "rope_scaling": scaling} if scaling else config
    if kind == "none":
        linear = keys.number("rope.scale_linear", 1.0)  # of files before 2024
        return config if linear == 1 else {**config, "rope_scaling": _linear(linear)}
    factor = keys.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return config if factor == 1 else {**config, "rope_scaling": _linear(factor)}
    if kind != "yarn":
        raise keys.wrong("rope.scaling.type", repr(kind), "none, linear or yarn")
    betas = {
        name: keys.number(f"rope.scaling.yarn_{name}", usual) for name, usual in _BETAS.items()
    }
    original = keys.count("rope.scaling.original_context_length")
    scaling = {"rope_type": "yarn", "factor": factor, **betas}
    return {**config, "rope_scaling": {**scaling, "original_max_position_embeddings": original}}


def _linear(factor: float) -> dict[str, Any]:
    return {"rope_type": "linear", "factor": factor}


def _llama3(keys: Keys, theta: float, size: int) -> dict[str, Any] | None:
    """Return the scaling that a table of factors was made of.

    Raises:
        WeightsError: the table is of another scaling.
    """
    table = np.asarray(values(keys.file.tensors["rope_freqs.weight"]), np.float64).reshape(-1)
    factor = float(table.max(initial=1.0))
    if (table == 1).all():
        return None
    if table.size != size // 2 or not np.allclose(
        table, llama3_factors(theta, size, factor), rtol=_CLOSE
    ):
        raise WeightsError(
            f"{keys.file.path}: rope_freqs.weight is no table of Llama 3's rotary scaling",
            fix="convert the safetensors of the model",
        )
    return {
        "rope_type": "llama3",
        "factor": float(str(np.float32(factor))),
        "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH,
        "original_max_position_embeddings": _TRAINED,
    }


def llama3_factors(theta: float, size: int, factor: float) -> np.ndarray:
    """Return what Llama 3 divides each rotary frequency by, float64 (size / 2).

    >>> llama3_factors(500000.0, 8, 8.0).round(2).tolist()
    [1.0, 1.0, 2.69, 8.0]
    """
    waves = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
    smooth = np.clip((_TRAINED / waves - _LOW) / (_HIGH - _LOW), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))


def _long(keys: Keys, size: int) -> dict[str, Any]:
    """Return Phi-3's scaling: a table for short texts and one for long ones."""
    tensors = keys.file.tensors
    tables = {}
    for name in ("long", "short"):
        tensor = tensors.get(f"rope_factors_{name}.weight")
        if tensor is None or tensor.shape != (size // 2,):
            raise WeightsError(
                f"{keys.file.path}: rope_factors_{name}.weight is "
                f"{'missing' if tensor is None else list(tensor.shape)}, not [{size // 2}]",
                fix="convert the model again with llama.cpp",
            )
        tables[f"{name}_factor"] = [float(str(v)) for v in values(tensor).astype(np.float32)]
    original = keys.count("rope.scaling.original_context_length")
    scaling: dict[str, Any] = {"rope_type": "longrope", **tables}
    if "rope.scaling.attn_factor" in keys:
        scaling["attention_factor"] = keys.number("rope.scaling.attn_factor")
    keys.get("rope.scaling.type"), keys.get("rope.scaling.factor")
    scaling["original_max_position_embeddings"] = original
    return {"rope_scaling": scaling, "original_max_position_embeddings": original}
