"""The steps behind a model, in numpy: written a second time on purpose, see ``answers``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from memopt.runtimes.chain import own_vector, refuse_unpoolable
from memopt.runtimes.vectors import unit_rows
from memopt.weights.chain import OWN, TOKENS, VECTOR, DenseStep, NormStep, PoolStep, Step

_erf = np.vectorize(math.erf, otypes=[np.float64])
# As torch.nn's classes of these names, with their defaults.
_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "SiLU": lambda x: x / (1 + np.exp(-x)),
    "ELU": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "LeakyReLU": lambda x: np.where(x > 0, x, 0.01 * x),
    "Mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
}
_EPSILON = 1e-5  # of torch.nn.LayerNorm


def run_chain_numpy(
    steps: Sequence[Step],
    result: Any,
    mask: np.ndarray,
    kept: np.ndarray,
    weights: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Return what :func:`memopt.runtimes.chain.run_chain` does, as float32 arrays.

    Args:
        steps, result, mask, kept: as there.
        weights: name -> tensor.
    """
    hidden = getattr(result, "last_hidden_state", None)
    features = {} if hidden is None else {TOKENS: hidden.numpy()}
    arrays = {name: tensor.detach().numpy().astype(np.float64) for name, tensor in weights.items()}
    for step in steps:
        if isinstance(step, PoolStep):
            tokens = features.get(TOKENS, np.empty(0))
            pooled = mask if step.include_prompt else kept
            parts = [pool_numpy(result, tokens, mask, pooled, mode) for mode in step.modes]
            features[VECTOR] = np.concatenate(parts, axis=1)
        elif isinstance(step, DenseStep):
            features[step.gives] = _dense(step, features[step.takes], arrays)
        elif isinstance(step, NormStep):
            features[VECTOR] = _layer_norm(step, features[VECTOR], arrays)
        else:
            features[step.gives] = unit_rows(features[step.takes])
    return {name: values.astype(np.float32) for name, values in features.items()}


def pool_numpy(
    result: Any, hidden: np.ndarray, mask: np.ndarray, kept: np.ndarray, mode: str
) -> np.ndarray:
    """Return the pooled output of a model, one row an input."""
    if mode == OWN:
        return np.asarray(own_vector(result).numpy())
    refuse_unpoolable(hidden, mode)
    if hidden.shape[1] != mask.shape[1]:
        mask = kept = np.ones(hidden.shape[:2], dtype=np.int64)
    rows = []
    for tokens, seen, pooled in zip(hidden, mask.astype(bool), kept.astype(bool), strict=True):
        inside = tokens[pooled] if pooled.any() else tokens[:1]
        # Numbered from the first token that is no padding; those not pooled are counted too.
        weights = (np.arange(len(tokens)) - seen.argmax() + 1)[pooled]
        rows.append(_MODES[mode](inside, weights if pooled.any() else np.ones(1)))
    return np.stack(rows)


_MODES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cls": lambda tokens, _: tokens[0],
    "lasttoken": lambda tokens, _: tokens[-1],
    "max": lambda tokens, _: tokens.max(0),
    "mean": lambda tokens, _: tokens.mean(0),
    "mean_sqrt_len_tokens": lambda tokens, _: tokens.sum(0) / math.sqrt(len(tokens)),
    "weightedmean": lambda tokens, weights: np.average(tokens, axis=0, weights=weights),
}


def _dense(step: DenseStep, values: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    out = values @ weights[f"{step.prefix}linear.weight"].T
    if step.bias:
        out = out + weights[f"{step.prefix}linear.bias"]
    out = _ACTIVATIONS[step.activation](out)
    if step.residual:
        projection = weights.get(f"{step.prefix}residual.weight")
        out = out + (values if projection is None else values @ projection.T)
    return np.asarray(out)


def _layer_norm(
    step: NormStep, values: np.ndarray, weights: Mapping[str, np.ndarray]
) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True) + _EPSILON)
    scale, shift = (weights[name] for name in step.weights)
    return np.asarray(centred / spread * scale + shift)
