"""What is made of a model's output, in torch: for the graph and for the torch backend.

Embeddings follow sentence-transformers: pooling over the tokens the mask keeps, then normalise
(Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084, section 3). The exporters compute the
same in numpy, written a second time, and compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from memopt.errors import ExportError
from memopt.weights.splade import Splade

# Added to the score of a masked token. exp(-10000) is exactly 0 in float32, a fully padded row
# stays finite, and unlike float32's lowest value it survives a conversion to float16.
MASK_BIAS = -10_000.0
_POOLED = ("image_embeds", "text_embeds", "pooler_output")


@dataclass(frozen=True, slots=True)
class TaskHead:
    """How an answer is made of a model's output.

    ``skip`` leading tokens, a prompt's, are seen by the model but not pooled; ``keep`` leading
    values of the vector are kept after normalising, None for all.
    """

    task: str = "embedding"
    pooling: str = "mean"
    normalize: bool = False
    skip: int = 0
    keep: int | None = None
    splade: Splade = field(default_factory=Splade)


def head_outputs(head: TaskHead, result: Any, mask: Any) -> tuple[Any, ...]:
    """Return a graph's outputs, in the order of its task's row.

    Args:
        head: which answer is wanted.
        result: what the transformers model returned.
        mask: (batch, tokens), 1 where a token counts; None for pictures and sounds.
    """
    return _HEADS.get(head.task, _logits)(head, result, mask)


def without_prompt(mask: Any, skip: int) -> Any:
    """Return the mask of what is pooled: without the first ``skip`` tokens that it keeps."""
    return mask * (mask.cumsum(1) > skip) if skip else mask


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


def _vector(head: TaskHead, result: Any, mask: Any) -> tuple[Any, ...]:
    import torch

    hidden = result.last_hidden_state
    pooled = _pool(result, hidden, without_prompt(mask, head.skip), head.pooling)
    if head.normalize:
        pooled = torch.nn.functional.normalize(pooled, p=2.0, dim=-1)
    return hidden, pooled if head.keep is None else pooled[:, : head.keep]


def _pool(result: Any, hidden: Any, mask: Any, pooling: str) -> Any:
    """Return the pooled output of a model, one row an input."""
    import torch

    if pooling == "model":
        return own_vector(result)
    refuse_unpoolable(hidden, pooling)
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


def _at(hidden: Any, index: Any) -> Any:
    picked = index[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, picked).squeeze(1)


def _logits(head: TaskHead, result: Any, mask: Any) -> tuple[Any, ...]:
    return (result.logits,)


def _spans(head: TaskHead, result: Any, mask: Any) -> tuple[Any, ...]:
    import torch

    start, end = result.start_logits, result.end_logits
    return start, end, torch.stack([start, end], dim=-1)


def _words(head: TaskHead, result: Any, mask: Any) -> tuple[Any, ...]:
    """SPLADE: log-saturated, and of all tokens the most (Formal et al. 2021, arXiv 2109.10086)."""
    import torch

    # A masked token has logit 0, which relu makes of every negative one too.
    logits = result.logits * mask.unsqueeze(-1).to(result.logits.dtype)

    def saturated(values: Any) -> Any:
        once = torch.log1p(torch.relu(values))
        return torch.log1p(once) if head.splade.twice else once

    if head.splade.pooling == "sum":
        return (saturated(logits).sum(1),)
    # What rises with the logit has its most where that has it: a logarithm a word, not a token.
    return (saturated(logits.amax(1)),)


def _tokens(head: TaskHead, result: Any, mask: Any) -> tuple[Any, ...]:
    import torch

    hidden = torch.nn.functional.normalize(result.last_hidden_state, p=2.0, dim=-1)
    return (hidden * mask.unsqueeze(-1).to(hidden.dtype),)


def _boxes(head: TaskHead, result: Any, mask: Any) -> tuple[Any, ...]:
    import torch

    return result.logits, result.pred_boxes, torch.cat([result.logits, result.pred_boxes], dim=-1)


_HEADS: dict[str, Callable[[TaskHead, Any, Any], tuple[Any, ...]]] = {
    "embedding": _vector,
    "image-embedding": _vector,
    "audio-embedding": _vector,
    "question-answering": _spans,
    "sparse-embedding": _words,
    "late-interaction": _tokens,
    "object-detection": _boxes,
}
