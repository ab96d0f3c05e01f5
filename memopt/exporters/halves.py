"""A model of encoder and decoder as the two modules that are traced.

The encoder gives what the decoder's cross attention looks at: keys and values of each of its
layers, computed once a source. The decoder takes them, and its own of the tokens so far.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from memopt.runtimes.keys_values import PRESENT

PARTS = ("key", "value")


def cross_names(layers: int, prefix: str = PRESENT) -> tuple[str, ...]:
    """Return the names of the keys and values of a source.

    >>> cross_names(1)
    ('present.0.encoder.key', 'present.0.encoder.value')
    """
    return tuple(f"{prefix}{n}.encoder.{part}" for n in range(layers) for part in PARTS)


def own_names(layers: int, prefix: str = PRESENT) -> tuple[str, ...]:
    """Return the names of the keys and values of the tokens so far.

    >>> own_names(1, "past_key_values.")
    ('past_key_values.0.decoder.key', 'past_key_values.0.decoder.value')
    """
    return tuple(f"{prefix}{n}.decoder.{part}" for n in range(layers) for part in PARTS)


def filled(own: Any, cross: Any) -> Any:
    """Return transformers' cache of both, from keys and values of each layer in turn."""
    from transformers import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for layer in range(len(cross) // 2):
        if own:
            cache.self_attention_cache.update(own[2 * layer], own[2 * layer + 1], layer)
        cache.cross_attention_cache.update(cross[2 * layer], cross[2 * layer + 1], layer)
        cache.is_updated[layer] = True
    return cache


def kept(cache: Any) -> tuple[Any, ...]:
    """Return the keys and values of each layer of a cache of one kind, in turn."""
    return tuple(value for layer in cache.layers for value in (layer.keys, layer.values))


def nothing_like(cross: Any) -> Any:
    """Return states in place of the encoder's, which nobody reads once its keys are there."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    batch, _, length, _ = cross[0].shape
    return BaseModelOutput(last_hidden_state=torch.zeros((batch, length, 1)))


@cache
def encoder_class() -> Any:
    """Return the module of the first graph; made on first use because it needs torch."""
    import torch
    from transformers import DynamicCache, EncoderDecoderCache

    class SourceHalf(torch.nn.Module):  # type: ignore[misc]
        """A source, and its mask where texts are padded -> keys and values of each layer."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> Any:
            source = values[0]
            given = {"attention_mask": values[1]} if len(values) > 1 else {}
            states = self.model.get_encoder()(source, **given)
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            # One token through the decoder leaves them there; the rest of it is dropped as unused.
            token = torch.zeros((source.shape[0], 1), dtype=torch.long)
            self.model(
                encoder_outputs=states,
                decoder_input_ids=token,
                past_key_values=cache,
                use_cache=True,
                **given,
            )
            return kept(cache.cross_attention_cache)

    return SourceHalf


@cache
def decoder_class() -> Any:
    """Return the module of the second graph; made on first use because it needs torch."""
    import torch

    class TokenHalf(torch.nn.Module):  # type: ignore[misc]
        """Tokens, the source's mask, own then the source's keys and values -> own, and logits."""

        def __init__(self, model: Any, masked: bool) -> None:
            super().__init__()
            self.model, self.masked = model, masked

        def forward(self, *values: Any) -> Any:
            ids, *past = values
            given = {"attention_mask": past.pop(0)} if self.masked else {}
            own, cross = past[: len(past) // 2], past[len(past) // 2 :]
            cache = filled(own, cross)
            result = self.model(
                encoder_outputs=nothing_like(cross),
                decoder_input_ids=ids,
                past_key_values=cache,
                use_cache=True,
                **given,
            )
            return (*kept(cache.self_attention_cache), result.logits)

    return TokenHalf
