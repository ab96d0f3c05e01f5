"""What an adapter's config says of its LoRA pairs: the scaling and the rank of each product B A.

PEFT adds ``scaling * B A`` to a weight, ``scaling`` being ``lora_alpha / r``, or
``lora_alpha / sqrt(r)`` with ``use_rslora`` (Kalajdzievski 2023, arXiv:2312.03732); patterns in the
config may give single layers another rank or alpha. Adapters of different rank or alpha can only be
averaged when that is taken into account, and the result must say what it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from memopt.federation.delta.adapters import CONFIG_TENSOR
from memopt.federation.delta.arrays import Array, Weights, raw
from memopt.federation.failures import SyncFailure
from memopt.federation.limits import short, strict_json

_PLAIN = re.compile(r"[\w.-]+\Z")
_PREFIX = "base_model.model."
_SUFFIX = re.compile(r"\.lora_(embedding_)?A(\.weight)?\Z")


def read_config(weights: Weights) -> dict[str, Any] | None:
    """Return the adapter's config, None when the weights came without one.

    Raises:
        SyncFailure: it is not a JSON object.
    """
    if CONFIG_TENSOR not in weights:
        return None
    return strict_json(raw(weights[CONFIG_TENSOR]).tobytes(), what="the adapter's config")


def scaling(config: Mapping[str, Any] | None, name: str, rank: int) -> float:
    """Return what PEFT multiplies the product of the pair ``name`` (its A) with.

    Args:
        config: the adapter's; None is taken as a scaling of 1.
        name: of the pair's A.
        rank: of the pair.

    >>> scaling({"r": 8, "lora_alpha": 16}, "base_model.model.q.lora_A.weight", 8)
    2.0
    """
    if rank == 0:
        return 0.0
    if config is None or "lora_alpha" not in config:
        return 1.0
    alpha = _of_layer(config, "alpha_pattern", name, config["lora_alpha"])
    try:
        number = float(alpha) if type(alpha) in (int, float) else float("nan")
    except OverflowError:
        number = float("inf")
    if not np.isfinite(number):
        raise SyncFailure("malformed", f"{name}: lora_alpha {short(alpha)} is not a number")
    return float(number / (rank**0.5 if config.get("use_rslora") is True else rank))


def config_of(config: Mapping[str, Any], pairs: Mapping[str, tuple[int, float]]) -> Array:
    """Return ``config`` as a tensor, true for pairs of these ranks and scalings.

    Args:
        config: what is kept where it is right already.
        pairs: name of A -> (rank, scaling).
    """
    result = dict(config)
    power = 0.5 if config.get("use_rslora") is True else 1.0
    ranks = {name: rank for name, (rank, _) in pairs.items()}
    alphas = {name: scale * rank**power for name, (rank, scale) in pairs.items()}
    if pairs:
        first = next(iter(pairs))
        result |= {"r": ranks[first], "lora_alpha": _number(alphas[first])}
        result["rank_pattern"] = {
            layer(name): rank for name, rank in ranks.items() if rank != ranks[first]
        }
        result["alpha_pattern"] = {
            layer(name): _number(alpha)
            for name, alpha in alphas.items()
            if not np.isclose(alpha, alphas[first], rtol=1e-12)
        }
    import json

    return np.frombuffer(json.dumps(result, indent=2, sort_keys=True).encode(), np.uint8)


def layer(name: str) -> str:
    """Return the name that PEFT's patterns match, of the pair whose A has this name.

    >>> layer("base_model.model.h.0.attn.lora_A.weight")
    'h.0.attn'
    """
    return _SUFFIX.sub("", name.removeprefix(_PREFIX))


def _of_layer(config: Mapping[str, Any], pattern: str, name: str, default: Any) -> Any:
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise SyncFailure("malformed", f"the adapter's {pattern} is not an object")
    for key, value in patterns.items():
        # PEFT takes regular expressions here (peft.utils.other.get_pattern_key). These are a
        # peer's, and some expressions take for ever: only plain names are taken.
        if not _PLAIN.match(key):
            raise SyncFailure("malformed", f"{pattern} {key!r:.80} is not a layer's plain name")
        if layer(name) == key or layer(name).endswith(f".{key}"):
            return value
    return default


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
