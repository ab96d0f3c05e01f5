"""What is made of a model's output, in torch: for the graph and for the torch backend.

Embeddings follow sentence-transformers, see :mod:`memopt.runtimes.chain`. The exporters compute the
same in numpy, written a second time, and compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from memopt.runtimes.chain import run_chain
from memopt.weights.chain import TOKENS, VECTOR, PoolStep, Step, UnitStep
from memopt.weights.splade import Splade

# What the manifest calls a pooling -> sentence-transformers' mode, where the two differ.
_MODES = {"last": "lasttoken"}


@dataclass(frozen=True, slots=True)
class TaskHead:
    """How an answer is made of a model's output.

    ``keep`` leading values of the vector are kept at the end, None for all. ``chain`` stands for
    ``pooling`` and ``normalize`` where these do not say it all, ``weights`` are its tensors by
    name. Without ``include_prompt`` a prompt's tokens are seen by the model but not pooled: the
    graph then takes a ``pooling_mask`` beside the attention mask.
    """

    task: str = "embedding"
    pooling: str = "mean"
    normalize: bool = False
    keep: int | None = None
    splade: Splade = field(default_factory=Splade)
    include_prompt: bool = True
    chain: tuple[Step, ...] = ()
    weights: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is done with the model's output for a vector."""
        if self.chain:
            return self.chain
        pool = PoolStep((_MODES.get(self.pooling, self.pooling),), self.include_prompt)
        return (pool, UnitStep()) if self.normalize else (pool,)


def head_outputs(head: TaskHead, result: Any, mask: Any, kept: Any = None) -> tuple[Any, ...]:
    """Return a graph's outputs, in the order of its task's row.

    Args:
        head: which answer is wanted.
        result: what the transformers model returned.
        mask: (batch, tokens), 1 where a token counts; None for pictures and sounds.
        kept: (batch, tokens), 1 where a token is pooled; None where that is the mask.
    """
    if head.task in _VECTORS:
        return _vector(head, result, mask, kept)
    return _HEADS.get(head.task, _logits)(head, result, mask)


def _vector(head: TaskHead, result: Any, mask: Any, kept: Any) -> tuple[Any, ...]:
    pooled = run_chain(head.steps, result, mask, kept, head.weights)[VECTOR]
    return result.last_hidden_state, pooled if head.keep is None else pooled[:, : head.keep]


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
    # Those of masked tokens too: a query's filling is scored, seen by the model or not.
    return (run_chain(head.steps, result, mask, None, head.weights)[TOKENS],)


def _boxes(head: TaskHead, result: Any, mask: Any) -> tuple[Any, ...]:
    import torch

    return result.logits, result.pred_boxes, torch.cat([result.logits, result.pred_boxes], dim=-1)


_VECTORS = ("embedding", "image-embedding", "audio-embedding")
_HEADS: dict[str, Callable[[TaskHead, Any, Any], tuple[Any, ...]]] = {
    "question-answering": _spans,
    "sparse-embedding": _words,
    "late-interaction": _tokens,
    "object-detection": _boxes,
}
