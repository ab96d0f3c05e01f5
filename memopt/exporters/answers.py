"""What a model's answer should be, in numpy: written a second time on purpose.

The graph's head is :mod:`memopt.runtimes.heads`, in torch; a mistake there shows only beside
something that does not share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from memopt.exporters.chain import run_chain_numpy
from memopt.runtimes.heads import TaskHead
from memopt.weights.chain import TOKENS, VECTOR

Outputs = dict[str, np.ndarray]


def answers(head: TaskHead, result: Any, feeds: Mapping[str, Any]) -> Outputs:
    """Return what is compared of a graph, by the output's name.

    Args:
        head: which answer is wanted.
        result: what the transformers model returned for ``feeds``.
        feeds: the graph's inputs; its mask says which tokens count.
    """
    return _ANSWERS.get(head.task, _logits)(head, result, feeds)


def _vector(head: TaskHead, result: Any, feeds: Mapping[str, Any]) -> Outputs:
    hidden = result.last_hidden_state.numpy()
    mask = feeds.get("attention_mask", np.ones(hidden.shape[:2], dtype=np.int64))
    kept = feeds.get("pooling_mask", mask)
    vectors = run_chain_numpy(head.steps, result, mask, kept, head.weights)[VECTOR]
    return {"last_hidden_state": hidden, VECTOR: vectors[:, : head.keep]}


def _logits(head: TaskHead, result: Any, feeds: Mapping[str, Any]) -> Outputs:
    return {"logits": result.logits.numpy()}


def _spans(head: TaskHead, result: Any, feeds: Mapping[str, Any]) -> Outputs:
    ends = (result.start_logits.numpy(), result.end_logits.numpy())
    return {"span_logits": np.stack(ends, axis=2)}


def _words(head: TaskHead, result: Any, feeds: Mapping[str, Any]) -> Outputs:
    weights = np.log(1 + np.maximum(result.logits.numpy(), 0))
    if head.splade.twice:
        weights = np.log(1 + weights)
    pooled: Any = {"max": np.max, "sum": np.sum}[head.splade.pooling]
    rows = [pooled(tokens[kept], axis=0) for tokens, kept in _kept(weights, feeds)]
    return {"sparse_embedding": np.stack(rows)}


def _tokens(head: TaskHead, result: Any, feeds: Mapping[str, Any]) -> Outputs:
    mask = feeds["attention_mask"]
    features = run_chain_numpy(head.steps, result, mask, mask, head.weights)
    return {"token_embeddings": features[TOKENS]}


def _kept(values: np.ndarray, feeds: Mapping[str, Any]) -> Any:
    return zip(values, feeds["attention_mask"].astype(bool), strict=True)


def _boxes(head: TaskHead, result: Any, feeds: Mapping[str, Any]) -> Outputs:
    logits, boxes = result.logits.numpy(), result.pred_boxes.numpy()
    return {
        "logits": logits,
        "pred_boxes": boxes,
        "detections": np.concatenate([logits, boxes], axis=2),
    }


_ANSWERS: dict[str, Callable[[TaskHead, Any, Mapping[str, Any]], Outputs]] = {
    "embedding": _vector,
    "image-embedding": _vector,
    "audio-embedding": _vector,
    "question-answering": _spans,
    "sparse-embedding": _words,
    "late-interaction": _tokens,
    "object-detection": _boxes,
}
