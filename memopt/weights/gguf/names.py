"""What GGUF calls the weights of an architecture, what transformers does, and how they differ.

llama.cpp's converter moves rows (the query's and key's of Llama, for its own rotary), adds 1 to
Gemma's norms, turns GPT-2's matrices and joins experts; the table says what to undo.
Source: llama.cpp's convert_hf_to_gguf.py and gguf-py's ``tensor_mapping.py`` (MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# What is done to a weight: see memopt.weights.gguf.checkpoint.
HEADS, TURNED, LESS_ONE, FUSED_HEADS, EXPERTS, ROW = (
    *("heads", "turned", "less one", "fused heads", "experts", "row"),
)


@dataclass(frozen=True, slots=True)
class Names:
    """The weights of one architecture.

    Attributes:
        top: GGUF's stem -> transformers', outside of the layers.
        layer: the same within a layer; the ending (``.weight``, ``.bias``) stays.
        layers: transformers' prefix of a layer.
        optional: stems that need not be there.
        changes: stem -> what llama.cpp's converter did.
    """

    top: Mapping[str, str]
    layer: Mapping[str, str]
    layers: str = "model.layers.{}."
    optional: frozenset[str] = frozenset({"output"})
    changes: Mapping[str, str] = field(default_factory=dict)


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_DENSE = {**_ATTENTION, **_GATED, **_NORMS}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_EXPERT_CHANGES = {stem: EXPERTS for stem in _EXPERTS if stem.endswith("_exps")}


def _less_one(*stems: str) -> dict[str, str]:
    return dict.fromkeys(stems, LESS_ONE)


NAMES: dict[str, Names] = {
    "llama": Names(_TOP, _DENSE, changes={"attn_q": HEADS, "attn_k": HEADS}),
    "qwen2": Names(_TOP, _DENSE),
    "qwen3": Names(_TOP, {**_DENSE, **_HEAD_NORMS}),
    "qwen2moe": Names(
        _TOP,
        {**_ATTENTION, **_NORMS, **_EXPERTS, **_SHARED},
        changes={**_EXPERT_CHANGES, "ffn_gate_inp_shexp": ROW},
    ),
    "qwen3moe": Names(
        _TOP, {**_ATTENTION, **_NORMS, **_HEAD_NORMS, **_EXPERTS}, changes=_EXPERT_CHANGES
    ),
    "gemma": Names(_TOP, _DENSE, changes=_less_one("output_norm", *_NORMS)),
    "gemma2": Names(
        _TOP,
        {**_ATTENTION, **_GATED, **_FOUR_NORMS},
        changes=_less_one("output_norm", *_FOUR_NORMS),
    ),
    "gemma3": Names(
        _TOP,
        {**_ATTENTION, **_GATED, **_FOUR_NORMS, **_HEAD_NORMS},
        changes=_less_one("output_norm", *_FOUR_NORMS, *_HEAD_NORMS),
    ),
    "phi3": Names(
        _TOP,
        {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            **_NORMS,
        },
    ),
    "gpt2": Names(
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        {
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
            "attn_norm": "ln_1",
            "ffn_norm": "ln_2",
        },
        layers="transformer.h.{}.",
        changes=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), TURNED),
    ),
    "falcon": Names(
        {
            "token_embd": "transformer.word_embeddings",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        {
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
            "attn_norm": "input_layernorm",
            "attn_norm_2": "ln_attn",
        },
        layers="transformer.h.{}.",
        optional=frozenset({"output", "attn_norm_2"}),
        changes={"attn_qkv": FUSED_HEADS},
    ),
    "stablelm": Names(_TOP, _DENSE, optional=frozenset({"output", "ffn_norm"})),
    "starcoder2": Names(
        _TOP, {**_ATTENTION, **_NORMS, "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
    ),
    "bert": Names(
        {
            "token_embd": "embeddings.word_embeddings",
            "position_embd": "embeddings.position_embeddings",
            "token_types": "embeddings.token_type_embeddings",
            "token_embd_norm": "embeddings.LayerNorm",
        },
        {
            "attn_q": "attention.self.query",
            "attn_k": "attention.self.key",
            "attn_v": "attention.self.value",
            "attn_output": "attention.output.dense",
            "attn_output_norm": "attention.output.LayerNorm",
            "ffn_up": "intermediate.dense",
            "ffn_down": "output.dense",
            "layer_output_norm": "output.LayerNorm",
        },
        layers="encoder.layer.{}.",
    ),
}
# Falcon's larger models have two norms side by side, of which the first goes before the MLP.
FALCON_TWO_NORMS = {"attn_norm": "ln_mlp"}
# Tables of rotary factors: the config has what they are made of.
ROTARY_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
