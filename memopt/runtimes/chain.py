"""The steps behind a model, in torch: pooling, dense layers, normalising.

As sentence-transformers' modules do (Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084,
section 3). :mod:`memopt.exporters.chain` computes the same in numpy, written a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from memopt.errors import ExportError
from memopt.weights.chain import (
    OWN,
    TOKENS,
    VECTOR,
    DenseStep,
    NormStep,
    PoolStep,
    Step,
    weight_shapes,
)
from memopt.weights.reader import WeightLoader

# Added to the score of a masked token. exp(-10000) is exactly 0 in float32, a fully padded row
# stays finite, and unlike float32's lowest value it survives a conversion to float16.
MASK_BIAS = -10_000.0
# The last is CvT's class token, which its other outputs do not hold.
_POOLED = ("image_embeds", "text_embeds", "pooler_output", "cls_token_value")
# The least that a count of tokens is taken as: a row of padding only stays finite.
_LEAST = 1e-9


def run_chain(
    steps: Sequence[Step],
    result: Any,
    mask: Any,
    kept: Any = None,
    weights: Mapping[str, Any] | None = None,
    *,
    pool: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Return the named features that ``steps`` leave, ``sentence_embedding`` (batch, width) too.

    Args:
        steps: of :func:`memopt.weights.chain.read_chain`.
        result: what the transformers model returned.
        mask: (batch, tokens), 1 where a token counts; None for pictures and sounds.
        kept: (batch, tokens), 1 where a token is pooled, for steps that leave out the prompt.
        weights: name -> tensor, for steps that have some.
        pool: pools in place of what is written here, called as :func:`_pool`.
    """
    pool = pool or _pool
    features = {TOKENS: getattr(result, "last_hidden_state", None)}
    for step in steps:
        if isinstance(step, PoolStep):
            pooled = mask if step.include_prompt or kept is None else kept
            parts = [pool(result, features[TOKENS], mask, pooled, mode) for mode in step.modes]
            features[VECTOR] = parts[0] if len(parts) == 1 else _torch().cat(parts, dim=-1)
        elif isinstance(step, DenseStep):
            features[step.gives] = _dense(step, features[step.takes], weights or {})
        elif isinstance(step, NormStep):
            features[VECTOR] = _layer_norm(step, features[VECTOR], weights or {})
        else:
            features[step.gives] = _unit(features[step.takes])
    return features


def step_weights(steps: Sequence[Step], loader: WeightLoader) -> dict[str, Any]:
    """Return the weights of ``steps`` as float32 tensors, by the names of the file.

    Raises:
        ExportError: one is missing, or has another shape than the step's config says.
    """
    torch = _torch()
    weights = {}
    for name, shape in weight_shapes(steps).items():
        found = tuple(loader.info(name).shape) if name in loader else None
        if found != shape:
            what = "is missing" if found is None else f"is {found}, not {shape}"
            raise ExportError(
                f"the weights do not fit the modules: {name} {what}",
                fix="convert the model again, from a folder that sentence-transformers saved",
            )
        weights[name] = torch.from_numpy(np.array(loader.load(name), dtype=np.float32))
    return weights


def own_vector(result: Any) -> Any:
    """Return the vector that the model pools by itself (batch, width).

    Raises:
        ExportError: it has none.
    """
    for name in _POOLED:
        value = getattr(result, name, None)
        if value is not None:
            return value.flatten(1)  # convolutional models keep two axes of length 1
    raise ExportError(
        f"the model has no pooled output (it gives {type(result).__name__})",
        fix="set pooling 'cls' or 'mean' in memopt.json, whichever it was trained for",
    )


def refuse_unpoolable(hidden: Any, pooling: str) -> None:
    """Refuse to pool what has no tokens."""
    if hidden.ndim != 3:
        raise ExportError(
            f"the model gives hidden states of shape {tuple(hidden.shape)}, which have no tokens "
            f"for pooling {pooling!r}",
            fix="convert it again; its own pooled output is pooling 'model'",
        )


def _pool(result: Any, hidden: Any, mask: Any, kept: Any, mode: str) -> Any:
    """Return the pooled output of a model, one row an input; positions count in ``mask``."""
    torch = _torch()
    if mode == OWN:
        return own_vector(result)
    refuse_unpoolable(hidden, mode)
    if mask is None:
        mask = kept = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    if mode == "cls":
        # With left padding the first kept token is not the first one.
        return _at(hidden, kept.argmax(dim=1))
    if mode == "lasttoken":
        positions = torch.arange(kept.shape[1], device=kept.device)
        return _at(hidden, (kept * positions).argmax(dim=1))
    weights = kept.unsqueeze(-1).to(hidden.dtype)
    if mode == "max":
        return (hidden + (1.0 - weights) * MASK_BIAS).amax(1)
    if mode == "weightedmean":
        # The first token of the text, its prompt's if it has one, weighs 1, the next 2, ...
        weights = weights * mask.cumsum(1).unsqueeze(-1).to(hidden.dtype)
    count = weights.sum(1).clamp(min=_LEAST)
    count = count.sqrt() if mode == "mean_sqrt_len_tokens" else count
    return (hidden * weights).sum(1) / count


def _at(hidden: Any, index: Any) -> Any:
    picked = index[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, picked).squeeze(1)


def _dense(step: DenseStep, values: Any, weights: Mapping[str, Any]) -> Any:
    torch = _torch()
    bias = weights[f"{step.prefix}linear.bias"] if step.bias else None
    linear = torch.nn.functional.linear
    out = linear(values, weights[f"{step.prefix}linear.weight"], bias)
    out = getattr(torch.nn, step.activation)()(out)
    if not step.residual:
        return out
    name = f"{step.prefix}residual.weight"
    return out + (linear(values, weights[name]) if name in step.weights else values)


def _layer_norm(step: NormStep, values: Any, weights: Mapping[str, Any]) -> Any:
    scale, shift = (weights[name] for name in step.weights)
    return _torch().nn.functional.layer_norm(values, (step.width,), scale, shift)


def _unit(values: Any) -> Any:
    return _torch().nn.functional.normalize(values, p=2.0, dim=-1)


def _torch() -> Any:
    import torch

    return torch
