"""``config.json`` of a GGUF file, from its metadata and the shapes of its tensors.

Each architecture is a function: what transformers' class computes otherwise than llama.cpp where a
key is missing is said explicitly. Source: llama.cpp's model loader and convert_hf_to_gguf.py (MIT).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memopt.errors import WeightsError
from memopt.registry import nearest
from memopt.weights.gguf.file import GgufFile
from memopt.weights.gguf.keys import Keys
from memopt.weights.gguf.rotary import rotary

Config = dict[str, Any]
_RMS, _LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
# llama.cpp knows these two by their layers: their queries are scaled by the mean width of a head.
_GEMMA2_27B, _GEMMA3_27B = 46, 62
_GEMMA3_LOCAL_THETA = 10_000.0  # llama.cpp's own, where a file does not say
# GGUF's number of a pooling -> memopt's name.
POOLINGS = {1: "mean", 2: "cls", 3: "last"}


def build_config(file: GgufFile) -> Config:
    """Return the ``config.json`` of the model in a file, as transformers reads it.

    Raises:
        WeightsError: an architecture or a key that memopt does not know, by name, or a key that is
            missing or does not fit the others.
    """
    architecture, keys = file.architecture, Keys(file)
    if architecture not in BUILDERS:
        raise WeightsError(
            f"{file.path} is of architecture {architecture!r}, which memopt does not read",
            fix=nearest(architecture, BUILDERS),
        )
    config = BUILDERS[architecture](keys)
    keys.refuse_rest()
    config["vocab_size"] = _table(file, "token_embd.weight")[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    for name in ("bos", "eos", "pad"):
        key = "padding" if name == "pad" else name
        config[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _table(file: GgufFile, name: str) -> tuple[int, ...]:
    tensor = file.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        raise WeightsError(
            f"{file.path} has no matrix {name!r}", fix="give a whole model, not a part of one"
        )
    return tensor.shape


def _has(keys: Keys, *names: str) -> bool:
    return any(name in keys.file.tensors for name in names)


def _decoder(keys: Keys, architecture: str, model_type: str) -> Config:
    """Return what all decoders with rotary positions have."""
    width, heads = keys.count("embedding_length"), keys.count("attention.head_count")
    size = keys.count("attention.key_length", max(width // heads, 1))
    if size % 2:
        raise keys.wrong("attention.key_length", str(size), "an even number")
    if keys.count("attention.value_length", size) != size:
        raise keys.wrong(
            "attention.value_length", str(keys.get("attention.value_length")), str(size)
        )
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": width,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("attention.head_count_kv", heads),
        "head_dim": size,
        "max_position_embeddings": keys.count("context_length"),
    }


def _whole_rotary(keys: Keys, size: int) -> Config:
    """Return the rotary positions of a model that turns all of a head."""
    turned = keys.count("rope.dimension_count", size)
    if turned != size:
        raise keys.wrong("rope.dimension_count", str(turned), f"a head's {size} values")
    return rotary(keys, size)


def _part_rotary(keys: Keys, size: int) -> Config:
    turned = keys.count("rope.dimension_count", size)
    if turned > size:
        raise keys.wrong("rope.dimension_count", str(turned), f"at most {size}")
    config = rotary(keys, turned)
    return {**config, "partial_rotary_factor": turned / size}


def _plain(keys: Keys, architecture: str, model_type: str) -> Config:
    """Return the config of a decoder of Llama's make."""
    config = _decoder(keys, architecture, model_type)
    return {
        **config,
        **_whole_rotary(keys, config["head_dim"]),
        "rms_norm_eps": keys.number(_RMS),
        "hidden_act": "silu",
    }


def _llama(keys: Keys) -> Config:
    if keys.get("expert_count", 0):
        raise keys.wrong("expert_count", str(keys.get("expert_count")), "0: Mixtral is not read")
    keys.get("expert_used_count")
    query, output = _has(keys, "blk.0.attn_q.bias"), _has(keys, "blk.0.attn_output.bias")
    if query != output:
        raise WeightsError(
            f"{keys.file.path} has biases of queries or of outputs, Llama has both or none",
            fix="convert the safetensors of the model",
        )
    config = _plain(keys, "LlamaForCausalLM", "llama")
    return {**config, "attention_bias": query, "mlp_bias": _has(keys, "blk.0.ffn_up.bias")}


def _qwen2(keys: Keys) -> Config:
    config = _plain(keys, "Qwen2ForCausalLM", "qwen2")
    if not _has(keys, "blk.0.attn_q.bias"):
        raise WeightsError(f"{keys.file.path}: qwen2 without blk.0.attn_q.bias is not read")
    return {**config, "use_sliding_window": False}


def _qwen3(keys: Keys) -> Config:
    return {**_plain(keys, "Qwen3ForCausalLM", "qwen3"), "attention_bias": False}


def _experts(keys: Keys, config: Config) -> Config:
    width = _expert_width(keys, "blk.0.ffn_gate_exps.weight")
    if keys.count("expert_feed_forward_length", width) != width:
        raise keys.wrong("expert_feed_forward_length", "another", f"the {width} of the tensors")
    return {
        **config,
        "num_experts": keys.count("expert_count"),
        "num_experts_per_tok": keys.count("expert_used_count"),
        "moe_intermediate_size": width,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _expert_width(keys: Keys, name: str) -> int:
    tensor = keys.file.tensors.get(name)
    if tensor is None or len(tensor.shape) < 2:
        raise WeightsError(f"{keys.file.path} has no tensor {name!r}", fix="give a whole model")
    return tensor.shape[-2]


def _qwen2_moe(keys: Keys) -> Config:
    config = _experts(keys, _plain(keys, "Qwen2MoeForCausalLM", "qwen2_moe"))
    width = _expert_width(keys, "blk.0.ffn_gate_shexp.weight")
    if keys.count("expert_shared_feed_forward_length", width) != width:
        raise keys.wrong("expert_shared_feed_forward_length", "another", f"the tensors' {width}")
    # llama.cpp does not divide by the sum of the chosen experts' weights here, and does in qwen3.
    return {**config, "shared_expert_intermediate_size": width, "norm_topk_prob": False}


def _qwen3_moe(keys: Keys) -> Config:
    config = _experts(keys, _plain(keys, "Qwen3MoeForCausalLM", "qwen3_moe"))
    return {**config, "norm_topk_prob": True, "attention_bias": False}


def _gemma(keys: Keys, number: str, model_type: str) -> Config:
    config = _plain(keys, f"Gemma{number}ForCausalLM", model_type)
    config.pop("hidden_act")
    return {**config, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}


def _gemma1(keys: Keys) -> Config:
    config = _gemma(keys, "", "gemma")
    return {**config, "hidden_act": "gelu_pytorch_tanh"}


def _scaled_queries(config: Config, wide_layers: int) -> int:
    if config["num_hidden_layers"] == wide_layers:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _gemma2(keys: Keys) -> Config:
    config = _gemma(keys, "2", "gemma2")
    return {
        **config,
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _scaled_queries(config, _GEMMA2_27B),
    }


def _gemma3(keys: Keys) -> Config:
    config = _gemma(keys, "3", "gemma3_text")
    if "final_logit_softcapping" in keys:
        config["final_logit_softcapping"] = keys.number("final_logit_softcapping")
    if "attention.sliding_window_pattern" in keys:
        config["sliding_window_pattern"] = keys.count("attention.sliding_window_pattern")
    return {
        **config,
        "sliding_window": keys.count("attention.sliding_window"),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", _GEMMA3_LOCAL_THETA),
        "query_pre_attn_scalar": _scaled_queries(config, _GEMMA3_27B),
    }


def _phi3(keys: Keys) -> Config:
    config = _decoder(keys, "Phi3ForCausalLM", "phi3")
    size = config.pop("head_dim")
    if size * config["num_attention_heads"] != config["hidden_size"]:
        raise keys.wrong("attention.key_length", str(size), "hidden size / heads")
    window = keys.get("attention.sliding_window")
    return {
        **config,
        **_part_rotary(keys, size),
        "rms_norm_eps": keys.number(_RMS),
        "hidden_act": "silu",
        "sliding_window": window or None,
    }


def _gpt2(keys: Keys) -> Config:
    width, inner = keys.count("embedding_length"), keys.count("feed_forward_length")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_positions": keys.count("context_length"),
        "n_ctx": keys.count("context_length"),
        "n_embd": width,
        "n_layer": keys.count("block_count"),
        "n_head": keys.count("attention.head_count"),
        "n_inner": None if inner == 4 * width else inner,
        "layer_norm_epsilon": keys.number(_LAYER_NORM),
        "activation_function": "gelu_new",
    }


def _falcon(keys: Keys) -> Config:
    config = _decoder(keys, "FalconForCausalLM", "falcon")
    size, key_heads = config.pop("head_dim"), config.pop("num_key_value_heads")
    inner = config.pop("intermediate_size")
    two_norms = _has(keys, "blk.0.attn_norm_2.weight")
    if key_heads != 1 and not two_norms:
        raise keys.wrong(
            "attention.head_count_kv", str(key_heads), "1 where it has one norm a layer"
        )
    return {
        **config,
        **_whole_rotary(keys, size),
        "ffn_hidden_size": inner,
        "num_kv_heads": key_heads,
        "layer_norm_epsilon": keys.number(_LAYER_NORM),
        "new_decoder_architecture": two_norms,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
    }


def _stablelm(keys: Keys) -> Config:
    config = _decoder(keys, "StableLmForCausalLM", "stablelm")
    size = config.pop("head_dim")
    parallel = not _has(keys, "blk.0.ffn_norm.weight")
    if keys.get("use_parallel_residual", parallel) is not parallel:
        raise keys.wrong(
            "use_parallel_residual", str(not parallel), f"{parallel}, as the tensors say"
        )
    return {
        **config,
        **_part_rotary(keys, size),
        "layer_norm_eps": keys.number(_LAYER_NORM),
        "hidden_act": "silu",
        "use_qkv_bias": _has(keys, "blk.0.attn_q.bias"),
        "use_parallel_residual": parallel,
        "qk_layernorm": False,
    }


def _starcoder2(keys: Keys) -> Config:
    config = _decoder(keys, "Starcoder2ForCausalLM", "starcoder2")
    return {
        **config,
        **_whole_rotary(keys, config["head_dim"]),
        "norm_epsilon": keys.number(_LAYER_NORM),
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": _has(keys, "blk.0.attn_q.bias"),
        # llama.cpp knows no window of this model, so no file says it.
        "sliding_window": None,
    }


def _bert(keys: Keys) -> Config:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": keys.count("embedding_length"),
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": keys.count("block_count"),
        "num_attention_heads": keys.count("attention.head_count"),
        "max_position_embeddings": keys.count("context_length"),
        "type_vocab_size": _table(keys.file, "token_types.weight")[0],
        "layer_norm_eps": keys.number(_LAYER_NORM),
        "hidden_act": "gelu",
    }


BUILDERS: dict[str, Callable[[Keys], Config]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "gemma": _gemma1,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "falcon": _falcon,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
    "bert": _bert,
}
