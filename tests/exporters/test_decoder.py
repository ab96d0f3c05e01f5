"""Language models with a cache: every kind of attention writes what transformers writes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers

from memopt.bundle import Bundle
from memopt.errors import ExportError
from memopt.exporters import decoder
from memopt.exporters.base import export
from memopt.weights.convert import convert
from tests.parameters import mostly_slow

_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
# Class without its ending, config; the window is shorter, then longer than the texts.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-short": ("Mistral", {**_GROUPED, "sliding_window": 8}),
    "mistral-long": ("Mistral", {**_GROUPED, "sliding_window": 1000}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 16}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 16},
    ),
    "gemma2": ("Gemma2", {**_GROUPED, "head_dim": 16, "sliding_window": 8}),
    "gemma3": (
        "Gemma3",
        {**_GROUPED, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 6},
    ),
    "phi3": ("Phi3", _GROUPED),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": ("GPTNeoX", _SIZES),
    "olmo2": ("Olmo2", _GROUPED),
    "smollm3": ("SmolLM3", _GROUPED),
    "granite": ("Granite", _GROUPED),
    "stablelm": ("StableLm", _GROUPED),
    "falcon": ("Falcon", {**_SIZES, "alibi": False}),
    "bloom": ("Bloom", {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
# Its attention is not told what to do by transformers' interface: standard operators only.
OWN = ("falcon", "bloom")


def built(folder: Path, name: str, config: dict[str, Any]) -> Bundle:
    torch.manual_seed(0)
    head = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    text = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    model = getattr(transformers, head)(getattr(transformers, text)(**config)).eval()
    with torch.no_grad():
        for values in model.parameters():
            if values.ndim >= 2:
                # Not the usual .02, with which a wrong window hardly shows.
                values.normal_(0.0, 1.5 * (values.shape[0] / values.numel()) ** 0.5)
    model.save_pretrained(folder / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no tokenizer
        return convert(folder / "source", folder / "bundle")


@pytest.mark.parametrize("kind", mostly_slow(KINDS, "mistral-short"))
def test_every_kind_writes_what_torch_writes(kind: str, tmp_path: Path) -> None:
    """Both graphs give torch's logits in every cut and padding, and its tokens over 64 steps."""
    variants = export(built(tmp_path, *KINDS[kind]))
    names = ["onnx-fp32"] if kind in OWN else ["onnx-fp32", "onnx-fp32-fused"]
    assert [variant.name for variant in variants] == names
    for variant in variants:
        assert variant.check is not None
        assert variant.check["min_cosine"] >= 0.99999
        assert variant.check["greedy_tokens"] > 50
    graph = onnx.load(tmp_path / "bundle" / variants[0].file)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    found = [node.op_type for node in onnx.load(tmp_path / "bundle" / variants[-1].file).graph.node]
    layers = KINDS[kind][1].get("num_hidden_layers", 2)
    assert found.count("GroupQueryAttention") == (0 if kind in OWN else layers)


@pytest.mark.slow
def test_a_graph_that_forgets_its_window_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong operator is found by the check, and no file is written."""
    bundle = built(tmp_path, *KINDS["mistral-short"])
    hidden = decoder.lower._hidden
    monkeypatch.setattr(decoder.lower, "_hidden", lambda g, n, q, m, window: hidden(g, n, q, m, 0))
    with pytest.raises(ExportError, match="does not give the answers of torch"):
        export(bundle)
    assert not (bundle.path / "onnx").exists()


def test_a_model_without_keys_and_values_says_so(tmp_path: Path) -> None:
    """State-space models keep something else of a text."""
    config = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    with pytest.raises(ExportError, match="mamba keeps no keys and values"):
        export(built(tmp_path, "Mamba", config))
