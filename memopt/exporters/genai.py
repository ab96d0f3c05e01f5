"""``genai_config.json``: what onnxruntime-genai must be told to open a bundle as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memopt.positions import position_limit

GENAI_CONFIG = "genai_config.json"


def genai_config(
    config: Mapping[str, Any], generation: Mapping[str, Any], graph: str, shared: bool
) -> dict[str, Any]:
    """Return the settings of a language model for onnxruntime-genai.

    Args:
        config: the bundle's config.json.
        generation: its generation_config.json, or nothing.
        graph: the ONNX file, relative to the bundle's folder.
        shared: whether past and present may be one buffer (GroupQueryAttention).

    >>> made = genai_config({"num_attention_heads": 4, "hidden_size": 64}, {}, "onnx/m.onnx", True)
    >>> made["model"]["decoder"]["head_size"], made["search"]["past_present_share_buffer"]
    (16, True)
    """

    def token(name: str) -> Any:
        return generation.get(name) if generation.get(name) is not None else config.get(name)

    heads = config.get("num_attention_heads") or config.get("n_head")
    width = config.get("hidden_size") or config.get("n_embd")
    size = config.get("head_dim") or (width // heads if heads and width else None)
    ends = token("eos_token_id")
    last = ends[0] if isinstance(ends, list) and ends else ends
    padding = token("pad_token_id")
    begin = token("bos_token_id")
    longest = position_limit(config) or 2048
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": graph,
        "head_size": size,
        "hidden_size": width,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": heads,
        "num_hidden_layers": config.get("num_hidden_layers") or config.get("n_layer"),
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
    }
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": begin if begin is not None else last,
            "eos_token_id": ends,
            "pad_token_id": padding if padding is not None else last,
            "context_length": longest,
            "vocab_size": config.get("vocab_size"),
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": longest,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": shared,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
