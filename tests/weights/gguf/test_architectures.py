"""A GGUF file of each architecture gives the model that it was written from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from memopt.runtimes.torch_model import load_model
from memopt.weights.convert import convert
from tests.weights.gguf.kit import CASES, TOKENS, Case, make_model, write_case

IDS = torch.tensor(np.random.default_rng(5).integers(3, len(TOKENS), (2, 21)))


def logits(module: Any) -> np.ndarray:
    """Return a model's logits of the same tokens."""
    with torch.no_grad():
        return module(IDS).logits.numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bundle_answers_as_the_model_that_was_written(case: Case, tmp_path: Path) -> None:
    """Names, moved rows, norms and rotary positions are undone: the logits are the model's own."""
    model = make_model(case)
    file = write_case(tmp_path / "model.gguf", case, model)
    bundle = convert(file, tmp_path / "bundle")
    loaded = load_model(bundle, "text-generation")
    np.testing.assert_allclose(logits(loaded.module), logits(model), atol=2e-5)
    assert bundle.manifest.task == "text-generation"
    if case.peer:
        peer = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file=file.name, attn_implementation="eager"
        )
        np.testing.assert_allclose(logits(loaded.module), logits(peer.eval()), atol=2e-5)


def test_bert_embeds_with_the_pooling_its_file_says(tmp_path: Path) -> None:
    """An encoder's states are the model's own, and the bundle's task is embedding."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = BertConfig(**sizes, num_attention_heads=4, vocab_size=10, max_position_embeddings=32)
    model = BertModel(config, add_pooling_layer=False).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, 2)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "bert")
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.CLS)
    writer.add_tokenizer_model("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁cat", "s", "▁a", "▁,", "h"]
    writer.add_token_list(words)
    writer.add_token_types([3] * 5 + [1] * 5)
    for name, number in {"padding": 0, "unknown": 1, "cls": 2, "seperator": 3, "mask": 4}.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    for name, parameter in model.named_parameters():
        stem, _, ending = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    bundle = convert(tmp_path / "m.gguf", tmp_path / "bundle")
    manifest = bundle.manifest
    assert (manifest.task, manifest.pooling, manifest.dimension) == ("embedding", "cls", 64)
    loaded = load_model(bundle, "embedding").module
    ids = torch.tensor([AutoTokenizer.from_pretrained(bundle.path)("Cats, a").input_ids])
    assert ids.tolist() == [[2, 5, 6, 8, 7, 3]]
    with torch.no_grad():
        states = model(ids).last_hidden_state.numpy()
        actual = loaded(ids).last_hidden_state.numpy()
    np.testing.assert_allclose(actual, states, atol=1e-5)
    assert not (bundle.path / "generation_config.json").exists()
