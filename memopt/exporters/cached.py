"""A language model traced with its cache: each attention becomes one marker node.

transformers lets anyone add an implementation of attention. Ours puts ``memopt::CachedAttention``
into the graph in place of the arithmetic: query, key and value of the new tokens, the layer's keys
and values so far, and what hides padding. :mod:`memopt.exporters.lower` writes each marker as
standard operators or as the one operator that a runtime has for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from memopt.errors import ExportError
from memopt.runtimes.chain import MASK_BIAS

IMPLEMENTATION = "memopt_cached"
DOMAIN, MARKER = "memopt", "CachedAttention"
_tape: ContextVar[Any] = ContextVar("tape")


@cache
def tape_class() -> Any:
    """Return the cache that is traced with; made on first use because it needs torch."""
    from transformers.cache_utils import Cache

    class Tape(Cache):  # type: ignore[misc]
        """Keys and values of each layer: those given, and those that its attention gave."""

        def __init__(self, past: Sequence[Any], total: Any) -> None:
            self.layers: list[Any] = []
            self.past, self.total = past, total
            self.present: dict[int, tuple[Any, Any]] = {}
            self.layer: int | None = None

        def update(self, key: Any, value: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
            """Remember whose attention comes next; it takes the new keys and values as they are."""
            self.layer = layer_idx
            return key, value

        def get_seq_length(self, layer_idx: int = 0) -> int:
            """Return 0: positions are given, and a model that asks gets them wrong and is told."""
            return 0

        def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
            """Return (keys in all, 0)."""
            return self.total, 0

    return Tape


def _attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Any, None]:
    """Put a marker into the graph: the interface of transformers' attention functions.

    Args:
        module: the attention layer.
        query: (batch, heads, new, size), rotated.
        key: (batch, heads of keys, new, size), rotated.
        value: as ``key``.
        mask: (batch, 1, 1, total), what is added to scores of padding.
    """
    import torch

    tape = _tape.get()
    layer, tape.layer = tape.layer, None
    unknown = sorted(n for n in ("s_aux", "position_bias", "indices") if more.get(n) is not None)
    if layer is None or unknown or 2 * layer + 1 >= len(tape.past):
        what = ", ".join(unknown) or "attention without a cache"
        raise ExportError(f"{type(module).__name__} has {what}")
    batch, heads, new, size = query.shape
    kept, width = key.shape[1], value.shape[3]
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{MARKER}",
        [query, key, value, tape.past[2 * layer], tape.past[2 * layer + 1], mask],
        {
            "scale": float(size**-0.5 if scaling is None else scaling),
            "softcap": float(softcap or 0.0),
            "window": int(sliding_window or 0),
        },
        dtypes=[query.dtype] * 3,
        shapes=[
            (batch, new, heads * width),
            (batch, kept, tape.total, size),
            (batch, kept, tape.total, width),
        ],
        version=1,
    )
    tape.present[layer] = (outputs[1], outputs[2])
    return outputs[0].reshape(batch, new, heads, width), None


@contextmanager
def marked(model: Any) -> Iterator[None]:
    """Let a model's attention put markers into the graph while the block runs."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@cache
def module_class() -> Any:
    """Return the module that is traced; made on first use because it needs torch."""
    import torch

    class Cached(torch.nn.Module):  # type: ignore[misc]
        """Tokens, mask, positions, then keys and values of each layer -> those now, and logits."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> Any:
            input_ids, attention_mask, position_ids, *past = values
            tape = tape_class()(past, attention_mask.shape[1])
            token = _tape.set(tape)
            try:
                with marked(self.model):
                    result = self.model(
                        input_ids=input_ids,
                        attention_mask=(1.0 - attention_mask[:, None, None, :].float()) * MASK_BIAS,
                        position_ids=position_ids,
                        past_key_values=tape,
                        use_cache=True,
                    )
            finally:
                _tape.reset(token)
            missing = sorted(set(range(len(past) // 2)) - tape.present.keys())
            if missing:
                raise ExportError(f"layer {missing[0]} attends in a way of its own")
            kept = [value for layer in sorted(tape.present) for value in tape.present[layer]]
            return (*kept, result.logits)

    return Cached


@cache
def plain_class() -> Any:
    """Return the module of a model whose attention is its own: its arithmetic is traced as it is.

    ALiBi's (BLOOM, Falcon, MPT) is. Such a graph has standard operators only.
    """
    import inspect

    import torch
    from transformers import DynamicCache

    class Plain(torch.nn.Module):  # type: ignore[misc]
        """As ``Cached``, with transformers' own cache."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model
            self.takes = inspect.signature(model.forward).parameters

        def forward(self, *values: Any) -> Any:
            input_ids, attention_mask, position_ids, *past = values
            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            given = {"attention_mask": attention_mask, "position_ids": position_ids}
            result = self.model(
                input_ids=input_ids,
                past_key_values=cache,
                use_cache=True,
                **{name: value for name, value in given.items() if name in self.takes},
            )
            kept = [value for layer in cache.layers for value in (layer.keys, layer.values)]
            return (*kept, result.logits)

    return Plain
