"""Pooling, twice on purpose: in torch for the graph, in numpy for what it is checked with."""

from __future__ import annotations

from typing import Any

import numpy as np

from memopt.errors import ExportError
from memopt.exporters.masks import MASK_BIAS


def without_prompt(mask: Any, skip: int) -> Any:
    """Return the mask of what is pooled: without the first ``skip`` tokens that it keeps."""
    return mask * (mask.cumsum(1) > skip) if skip else mask


def pool_torch(result: Any, hidden: Any, mask: Any, pooling: str) -> Any:
    """Return the pooled output of a model, one row an input."""
    import torch

    if pooling == "model":
        return _own(result)
    _refuse_unpoolable(hidden, pooling, "the model")
    if pooling == "cls":
        # With left padding the first kept token is not the first one.
        return hidden[:, 0] if mask is None else _at(hidden, mask.argmax(dim=1))
    if mask is None:
        return {"mean": hidden.mean(1), "max": hidden.amax(1), "last": hidden[:, -1]}[pooling]
    kept = mask.unsqueeze(-1).to(hidden.dtype)
    if pooling == "mean":
        return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
    if pooling == "max":
        return (hidden + (1.0 - kept) * MASK_BIAS).amax(1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    return _at(hidden, (mask * positions).argmax(dim=1))


def _refuse_unpoolable(hidden: Any, pooling: str, what: str) -> None:
    if hidden.ndim != 3:
        raise ExportError(
            f"{what} gives hidden states of shape {tuple(hidden.shape)}, which have no tokens for "
            f"pooling {pooling!r}",
            fix="convert it again; its own pooled output is pooling 'model'",
        )


def _at(hidden: Any, index: Any) -> Any:
    picked = index[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, picked).squeeze(1)


def _own(result: Any) -> Any:
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        value = getattr(result, name, None)
        if value is not None:
            return value.flatten(1)  # convolutional models keep two axes of length 1
    raise ExportError(
        f"the model has no pooled output (it gives {type(result).__name__})",
        fix="set pooling 'cls' or 'mean' in memopt.json, whichever it was trained for",
    )


def pool_numpy(result: Any, hidden: np.ndarray, mask: np.ndarray, pooling: str) -> np.ndarray:
    """Return the pooled output of a model, one row an input."""
    if pooling == "model":
        return np.asarray(_own(result).numpy())
    _refuse_unpoolable(hidden, pooling, "the model")
    if hidden.shape[1] != mask.shape[1]:
        mask = np.ones(hidden.shape[:2], dtype=np.int64)
    rows = []
    for tokens, keep in zip(hidden, mask.astype(bool), strict=True):
        kept = tokens[keep] if keep.any() else tokens[:1]
        picked = {"cls": kept[0], "last": kept[-1], "max": kept.max(0), "mean": kept.mean(0)}
        rows.append(picked["mean" if pooling == "none" else pooling])
    return np.stack(rows)
