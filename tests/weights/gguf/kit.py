"""Small GGUF files of random models, written as llama.cpp's convert_hf_to_gguf.py writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers.pre_tokenizers import ByteLevel

Values = np.ndarray
# Byte-level: one token a byte, a few merges, three that are no text.
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ Ġ", "1 2", "Ġ 1", "Ã ©"]
CONTROL = ["<|bos|>", "<|eos|>", "<|im_end|>"]
LETTERS = sorted(ByteLevel.alphabet())
TOKENS = CONTROL + LETTERS + [merge.replace(" ", "") for merge in MERGES]


@dataclass(frozen=True)
class Case:
    """One architecture: its class, a small config, what its file says, how its tensors differ."""

    name: str
    arch: str
    model: str
    config: dict[str, Any]
    change: Callable[[str, Values, Any], Values] = lambda name, values, config: values
    says: Callable[[gguf.GGUFWriter, Any], None] = lambda writer, config: None
    rms: bool = True
    extra: Callable[[Any], dict[str, Values]] = lambda config: {}
    # Whether transformers' own reading of such a file is right.
    peer: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": len(TOKENS),
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def _turned_heads(name: str, values: Values, config: Any) -> Values:
    """Reorder the rows of queries and keys for llama.cpp's rotary, as its converter does."""
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    if "q_proj" not in name and "k_proj" not in name:
        return values
    split = values.reshape(heads, 2, -1, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _plus_one(name: str, values: Values, config: Any) -> Values:
    return values + 1 if "norm.weight" in name else values


def _turned(name: str, values: Values, config: Any) -> Values:
    return values.T if re.search(r"(c_attn|c_proj|c_fc)\.weight", name) else values


def _falcon(name: str, values: Values, config: Any) -> Values:
    if "query_key_value" not in name:
        return values
    heads, keys = config.num_attention_heads, config.num_kv_heads
    size = config.hidden_size // heads
    groups = values.reshape(keys, heads // keys + 2, size, config.hidden_size)
    parts = (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])
    return np.concatenate([part.reshape(-1, config.hidden_size) for part in parts])


def _gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def _head(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def _window(writer: gguf.GGUFWriter, config: Any) -> None:
    _head(writer, config)
    writer.add_sliding_window(config.sliding_window)


def _experts(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if hasattr(config, "head_dim"):
        _head(writer, config)


def _stablelm(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_parallel_residual(config.use_parallel_residual)


def _llama3(config: Any) -> dict[str, Values]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = config.rope_parameters["rope_theta"] ** -(np.arange(0, 16, 2) / 16)
    return {"rope_freqs.weight": (plain / scaled.numpy()).astype(np.float32)}


def _longrope(config: Any) -> dict[str, Values]:
    rope = config.rope_parameters
    return {
        f"rope_factors_{n}.weight": np.array(rope[f"{n}_factor"], np.float32)
        for n in ("long", "short")
    }


def _original(writer: gguf.GGUFWriter, config: Any) -> None:
    original = config.rope_parameters["original_max_position_embeddings"]
    times = config.max_position_embeddings / original
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(times) / math.log(original)))


_THETA = {"rope_type": "default", "rope_theta": 10_000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "long_factor": [1.5, 2, 3, 4, 5, 6, 7, 8],
    "short_factor": [1, 1, 1.1, 1.2, 1, 1, 1, 1],
    "original_max_position_embeddings": 64,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_BARE = {k: v for k, v in _SMALL.items() if k not in ("intermediate_size", "num_key_value_heads")}

CASES = [
    Case("llama", "llama", "Llama", {}, _turned_heads),
    # transformers leaves biases of Llama out.
    Case(
        "llama-biases",
        "llama",
        "Llama",
        {"attention_bias": True, "mlp_bias": True},
        _turned_heads,
        peer=False,
    ),
    Case(
        "llama-3.1",
        "llama",
        "Llama",
        {"rope_parameters": _LLAMA3},
        _turned_heads,
        extra=_llama3,
        peer=False,
    ),
    Case("qwen2", "qwen2", "Qwen2", {"tie_word_embeddings": True}),
    # transformers takes 128 for the width of a head, whatever the file says.
    Case("qwen3", "qwen3", "Qwen3", {"head_dim": 32}, says=_head, peer=False),
    Case(
        "qwen2moe",
        "qwen2moe",
        "Qwen2Moe",
        {**_MOE, "shared_expert_intermediate_size": 48},
        says=_experts,
        peer=False,
    ),
    Case(
        "qwen3moe",
        "qwen3moe",
        "Qwen3Moe",
        {**_MOE, "norm_topk_prob": True},
        says=_experts,
        peer=False,
    ),
    Case("gemma", "gemma", "Gemma", {"head_dim": 16}, _plus_one, _head, peer=False),
    Case(
        "gemma2",
        "gemma2",
        "Gemma2",
        {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 8},
        _plus_one,
        _gemma2,
    ),
    Case(
        "gemma3",
        "gemma3",
        "Gemma3",
        {
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 8,
            "num_hidden_layers": 7,
        },
        _plus_one,
        _window,
    ),
    Case("phi3", "phi3", "Phi3", {"sliding_window": None}),
    Case(
        "phi3-long",
        "phi3",
        "Phi3",
        {"rope_parameters": _LONG, "original_max_position_embeddings": 64},
        says=_original,
        extra=_longrope,
        peer=False,
    ),
    Case("gpt2", "gpt2", "GPT2", {}, _turned, rms=False),
    Case(
        "falcon", "falcon", "Falcon", {"multi_query": True, "num_kv_heads": 1}, _falcon, rms=False
    ),
    Case(
        "falcon-40b",
        "falcon",
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        _falcon,
        rms=False,
        peer=False,
    ),
    Case("stablelm", "stablelm", "StableLm", {"use_qkv_bias": True}, says=_stablelm, rms=False),
    Case("starcoder2", "starcoder2", "Starcoder2", {"use_bias": True}, rms=False),
]


def make_model(case: Case) -> Any:
    """Return a random model of transformers in float32, every parameter at a value of its own."""
    import transformers

    settings = {**_SMALL, **case.config}
    if case.model == "GPT2":
        settings = {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 1024,
            "vocab_size": len(TOKENS),
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
    if case.model == "Falcon":
        settings = {**_BARE, "ffn_hidden_size": 256, "parallel_attn": True, **case.config}
        settings |= {"alibi": False, "bias": False}
    settings.setdefault("rope_parameters", _THETA) if case.model in ("Llama", "Phi3") else None
    text = "Text" if case.model == "Gemma3" else ""
    config = getattr(transformers, f"{case.model}{text}Config")(**settings)
    config._attn_implementation = "eager"
    head = "LMHeadModel" if case.model == "GPT2" else "ForCausalLM"
    torch.manual_seed(7)
    model = getattr(transformers, f"{case.model}{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def add_tokenizer(writer: gguf.GGUFWriter, pre: str | None = "gpt-2") -> None:
    """Add the byte-level vocabulary above."""
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)


def write_case(path: Path, case: Case, model: Any, kind: Type = Type.F32) -> Path:
    """Write a model's file; matrices as ``kind``, the rest in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, case.arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    inner = getattr(config, "ffn_hidden_size", None) or getattr(config, "intermediate_size", 256)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    if case.model != "GPT2":
        keys = getattr(config, "num_kv_heads", None) or config.num_key_value_heads
        writer.add_head_count_kv(1 if getattr(config, "multi_query", False) and keys == 1 else keys)
        writer.add_rope_freq_base(
            config.rope_parameters.get("rope_theta", 10_000.0)
            if "rope_theta" in config.rope_parameters
            else config.rope_parameters["full_attention"]["rope_theta"]
        )
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        turned = int(size * (config.rope_parameters.get("partial_rotary_factor") or 1))
        writer.add_rope_dimension_count(turned)
    if case.rms:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        names = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
        writer.add_layer_norm_eps(next(getattr(config, n) for n in names if hasattr(config, n)))
    case.says(writer, config)
    add_tokenizer(writer)
    for name, values in tensors(case, model).items():
        add_tensor(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tensor(writer: gguf.GGUFWriter, name: str, values: Values, kind: Type) -> None:
    """Add a tensor: a matrix whose rows are whole blocks in ``kind``, any other in float32."""
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if kind == Type.F32 or values.ndim < 2 or values.shape[-1] % block:
        writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        return
    raw = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind)
    writer.add_tensor(name, raw, raw_dtype=kind)


def tensors(case: Case, model: Any) -> dict[str, Values]:
    """Return a model's tensors under llama.cpp's names, changed as its converter changes them."""
    config = model.config
    arch = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == case.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    out = dict(case.extra(config))
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = case.change(name, parameter.numpy(), config)
        if name.endswith("mlp.experts.gate_up_proj"):
            gate, up = np.split(values, 2, axis=1)
            stem = names.get_name(name.replace("gate_up_proj", "gate_proj"))
            block = re.match(r"model\.layers\.(\d+)", name)[1]
            out[f"blk.{block}.ffn_gate_exps.weight"] = gate
            out[f"blk.{block}.ffn_up_exps.weight"] = up
            continue
        if name.endswith("mlp.experts.down_proj"):
            block = re.match(r"model\.layers\.(\d+)", name)[1]
            out[f"blk.{block}.ffn_down_exps.weight"] = values
            continue
        stem, _, ending = name.rpartition(".")
        stem = names.get_name(stem)
        assert stem is not None, name
        out[f"{stem}.{ending}"] = values
    return out
