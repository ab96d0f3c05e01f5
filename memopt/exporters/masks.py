"""Attention masks in the form a graph can hold: what each family of models must be given."""

from __future__ import annotations

import math
from typing import Any

from memopt.runtimes.chain import MASK_BIAS

# Encoders whose mask function hands a ready 4-D mask through unchanged.
FOUR_D_MASK = frozenset(
    {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "mpnet", "electra", "t5"}
)
CAUSAL_MASK = frozenset({"llama", "qwen2", "qwen3", "gpt2", "mistral"})


def attention_arguments(model: Any, config: Any, mask: Any) -> dict[str, Any]:
    """Return what a model is called with in place of its ``attention_mask``, if anything."""
    if mask is None:
        return {}
    kind = config.model_type
    if kind in FOUR_D_MASK and not getattr(config, "is_decoder", False):
        return {"attention_mask": (1.0 - mask[:, None, None, :].float()) * MASK_BIAS}
    if kind in CAUSAL_MASK:
        return {"attention_mask": _causal_masks(mask, config), "use_cache": False}
    if kind == "big_bird":
        model.set_attention_type("original_full")
        return {"attention_mask": _block_mask(mask, config)}
    return {}


def _causal_masks(mask: Any, config: Any) -> Any:
    """Return the mask of every layer, or one per kind of layer where only some see a window.

    ``is_causal: false`` in the config makes an encoder of a decoder: each token sees all.
    """
    causal = getattr(config, "is_causal", None) is not False
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds:
        return {
            "full_attention": _hidden(mask, None, causal),
            "sliding_attention": _hidden(mask, window, causal),
        }
    # Of those without layer types only Mistral's have a window, and all of its layers do.
    return _hidden(mask, window if config.model_type == "mistral" else None, causal)


def _block_mask(mask: Any, config: Any) -> Any:
    """Return BigBird's attention in blocks as a mask of every text, by its own number of tokens.

    Zaheer et al. 2020, https://arxiv.org/abs/2007.14062, as transformers computes it outside of
    training: the first and the last block see and are seen by all, others see their neighbours;
    the random blocks are then all the first one, which so counts that many times more. A text of no
    more than 5 + 2 x random blocks is not cut into blocks.
    """
    import torch

    size, random = config.block_size, config.num_random_blocks
    padding = (1.0 - mask[:, None, None, :].float()) * MASK_BIAS
    if config.attention_type != "block_sparse":
        return padding
    length = mask.sum(1)[:, None, None, None]
    last = (length + (size - 1)) // size - 1
    block = torch.arange(mask.shape[1], device=mask.device) // size
    query, key = block[None, None, :, None], block[None, None, None, :]
    edge = (query == 0) | (query == last)
    visible = edge | (key == 0) | (key == last) | ((query - key).abs() <= 1)
    more = ((key == 0) & ~edge).float() * math.log(1 + random)
    long = (length > (5 + 2 * random) * size).float()
    return padding + long * (more + (~visible).float() * MASK_BIAS)


def _hidden(mask: Any, window: int | None, causal: bool) -> Any:
    """Return what is added to the scores: MASK_BIAS where a token may not look."""
    import torch

    padding = 1.0 - mask[:, None, None, :].float()
    if not causal and window is None:
        return padding * MASK_BIAS
    positions = torch.arange(mask.shape[1], device=mask.device)
    distance = positions[:, None] - positions[None, :]
    if causal:
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    else:
        hidden = distance.abs() > window
    return torch.maximum(hidden.float()[None, None], padding) * MASK_BIAS
