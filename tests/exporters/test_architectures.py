"""Every promised architecture exports, and gives what transformers gives for the same checkpoint.

The models are tiny, of real config classes, with seeded random weights. The reference here is
transformers' own ``from_pretrained`` on the source folder: it shares nothing with memopt's loader.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers

from memopt.bundle import Bundle, Variant, open_bundle
from memopt.exporters.base import export
from memopt.runtimes.base import Placement, Settings
from memopt.runtimes.keys_values import PAST, from_nothing
from memopt.runtimes.providers import opener
from memopt.weights.convert import convert
from memopt.weights.reader import WeightLoader
from tests.parameters import mostly_slow

_TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 48,
}
_IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_TOWERS = {"text_config": _TEXT, "vision_config": _IMAGE}
_CLIP_TOWERS = {**_TOWERS, "text_config": {**_TEXT, "eos_token_id": 98}}
# Grouped-query attention, as the real models have it.
_DECODER = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A checkpoint class with a small config, and how to export it."""

    cls: str
    config: str
    settings: dict[str, Any]
    task: str = "embedding"
    pooling: str | None = None  # written as sentence-transformers modules; None: memopt's default
    towers: dict[str, dict[str, Any]] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    # Checkpoints with a task head have a prefix ("bert.") and may lack the pooler.
    "bert": Architecture(
        cls="BertForMaskedLM", config="BertConfig", settings=_TEXT, pooling="mean"
    ),
    "roberta": Architecture(
        cls="RobertaForMaskedLM",
        config="RobertaConfig",
        settings={**_TEXT, "pad_token_id": 1, "type_vocab_size": 1},
        pooling="max",
    ),
    "distilbert": Architecture(
        cls="DistilBertModel",
        config="DistilBertConfig",
        settings={
            "vocab_size": 99,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 48,
        },
        pooling="mean",
    ),
    "mpnet": Architecture(
        cls="MPNetModel",
        config="MPNetConfig",
        settings={**_TEXT, "pad_token_id": 1},
        pooling="mean",
    ),
    "deberta-v2": Architecture(
        cls="DebertaV2Model",
        config="DebertaV2Config",
        settings={
            **_TEXT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "share_att_key": True,
            "position_biased_input": False,
            "norm_rel_ebd": "layer_norm",
            "type_vocab_size": 0,
        },
        pooling="mean",
    ),
    "modernbert": Architecture(
        cls="ModernBertModel",
        config="ModernBertConfig",
        settings={
            **_TEXT,
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        pooling="cls",
    ),
    "xlm-roberta": Architecture(
        cls="XLMRobertaModel",
        config="XLMRobertaConfig",
        settings={**_TEXT, "pad_token_id": 1, "type_vocab_size": 1},
        pooling="cls",
    ),
    "t5": Architecture(
        cls="T5ForConditionalGeneration",
        config="T5Config",
        settings={
            "vocab_size": 99,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
        },
        pooling="mean",
    ),
    "clip-vision": Architecture(
        cls="CLIPModel",
        config="CLIPConfig",
        settings={"projection_dim": 24},
        towers=_CLIP_TOWERS,
        task="image-embedding",
    ),
    "clip-text": Architecture(
        cls="CLIPModel",
        config="CLIPConfig",
        settings={"projection_dim": 24},
        towers=_CLIP_TOWERS,
        task="embedding",
    ),
    "siglip-vision": Architecture(
        cls="SiglipModel",
        config="SiglipConfig",
        settings={},
        towers=_TOWERS,
        task="image-embedding",
    ),
    # Two towers without classes of their own: asked through get_image_features and so on.
    "chinese-clip-vision": Architecture(
        cls="ChineseCLIPModel",
        config="ChineseCLIPConfig",
        settings={"projection_dim": 24},
        towers=_TOWERS,
        task="image-embedding",
    ),
    "chinese-clip-text": Architecture(
        cls="ChineseCLIPModel",
        config="ChineseCLIPConfig",
        settings={"projection_dim": 24},
        towers=_TOWERS,
    ),
    # Its encoder's embeddings lie in the file under the name of what they are shared with.
    "marian": Architecture(
        cls="MarianMTModel",
        config="MarianConfig",
        settings={
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 48,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        pooling="mean",
    ),
    "vit": Architecture(
        cls="ViTModel", config="ViTConfig", settings=_IMAGE, task="image-embedding"
    ),
    "dinov2": Architecture(
        cls="Dinov2Model", config="Dinov2Config", settings=_IMAGE, task="image-embedding"
    ),
    "whisper": Architecture(
        cls="WhisperForConditionalGeneration",
        config="WhisperConfig",
        settings={
            "vocab_size": 99,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "num_mel_bins": 16,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 30,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
        task="audio-embedding",
    ),
    "wav2vec2": Architecture(
        cls="Wav2Vec2Model",
        config="Wav2Vec2Config",
        settings={
            **{k: v for k, v in _TEXT.items() if k != "max_position_embeddings"},
            "conv_dim": [16, 16, 16],
            "conv_kernel": [10, 3, 2],
            "conv_stride": [5, 2, 2],
            "num_feat_extract_layers": 3,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        task="audio-embedding",
    ),
    "llama": Architecture(
        cls="LlamaForCausalLM", config="LlamaConfig", settings=_DECODER, task="text-generation"
    ),
    "qwen2": Architecture(
        cls="Qwen2ForCausalLM",
        config="Qwen2Config",
        settings={**_DECODER, "tie_word_embeddings": True},
        task="text-generation",
    ),
    # Qwen3-Embedding: the decoder as an encoder, last kept token, left padding in the wild.
    "qwen3": Architecture(
        cls="Qwen3Model", config="Qwen3Config", settings=_DECODER, pooling="last"
    ),
    "qwen3-generation": Architecture(
        cls="Qwen3ForCausalLM", config="Qwen3Config", settings=_DECODER, task="text-generation"
    ),
    # Every layer sees 6 tokens back; below, every second layer does.
    "mistral": Architecture(
        cls="MistralForCausalLM",
        config="MistralConfig",
        settings={**_DECODER, "sliding_window": 6},
        task="text-generation",
    ),
    "qwen2-window": Architecture(
        cls="Qwen2Model",
        config="Qwen2Config",
        settings={
            **_DECODER,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
        pooling="last",
    ),
    "gpt2": Architecture(
        cls="GPT2LMHeadModel",
        config="GPT2Config",
        settings={"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 48},
        task="text-generation",
    ),
}


def make_source(name: str, folder: Path) -> Architecture:
    """Write the Hugging Face folder of a tiny model: config.json, safetensors, ST modules."""
    chosen = ARCHITECTURES[name]
    torch.manual_seed(0)
    config_class = getattr(transformers, chosen.config)
    config = config_class(**chosen.settings, **chosen.towers)
    config.architectures = [chosen.cls]
    model = getattr(transformers, chosen.cls)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # The usual std of 0.02 makes a nearly linear model whose attention is uniform: masks,
            # activations and orders of heads would hardly show in the outputs.
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.25)
            elif parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if chosen.pooling:
        types = ("Transformer", "Pooling", "Normalize")
        modules = [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{t}" if t == "Pooling" else "",
                "type": f"sentence_transformers.models.{t}",
            }
            for i, t in enumerate(types)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        flag = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "last": "lasttoken"}
        pooling = {"word_embedding_dimension": 32, f"pooling_mode_{flag[chosen.pooling]}": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return chosen


# Beside MiniLM, a BERT, one of each other build is in every run: picture, waveform, decoder.
_ALWAYS = ("vit", "qwen3-generation")


NAMES = mostly_slow(ARCHITECTURES, *_ALWAYS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Return the exported bundle of an architecture, made on first use."""
    root = tmp_path_factory.mktemp("architectures")

    def bundle(name: str) -> Bundle:
        folder = root / name
        if not folder.exists():
            chosen = make_source(name, folder / "source")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no tokenizer.json: these models embed no text
                converted = convert(folder / "source", folder / "bundle", task=chosen.task)
            export(converted)
        return open_bundle(folder / "bundle")

    return bundle


def _feeds(session: Any, config: Any, length: int = 11) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(7)
    feeds: dict[str, np.ndarray] = {}
    inputs = {value.name: value.shape for value in session.get_inputs()}
    for value in session.get_inputs():
        if value.name.startswith(PAST) or value.name == "position_ids":
            continue
        if value.name == "input_ids":
            feeds["input_ids"] = generator.integers(3, 90, (3, length))
            feeds["input_ids"][:, 5] = 98  # CLIP pools at its highest token, the end of the text
        elif value.name == "attention_mask":
            mask = np.ones((3, length), dtype=np.int64)
            mask[1, 8:] = 0
            mask[2, 6:] = 0
            feeds["attention_mask"] = mask
        elif value.name == "token_type_ids":
            feeds["token_type_ids"] = np.tile(np.arange(length) % 2, (3, 1))
        elif value.name == "pixel_values":
            feeds["pixel_values"] = generator.normal(size=(3, 3, 32, 32)).astype(np.float32)
        elif value.name == "input_features":
            feeds["input_features"] = generator.normal(size=(3, 16, 60)).astype(np.float32)
        else:
            feeds["input_values"] = generator.normal(size=(2, 7_001)).astype(np.float32)
    if "attention_mask" in feeds:
        pad = getattr(config, "pad_token_id", None) or 0
        feeds["input_ids"][feeds["attention_mask"] == 0] = pad
    return dict(from_nothing(inputs)(feeds))


def _expected(name: str, source: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What transformers computes for these inputs, pooled and normalised in numpy."""
    chosen = ARCHITECTURES[name]
    model = getattr(transformers, chosen.cls).from_pretrained(source).eval()
    plain = {key: value for key, value in feeds.items() if not key.startswith(PAST)}
    tensors = {key: torch.from_numpy(value) for key, value in plain.items()}
    with torch.no_grad():
        if chosen.task == "text-generation":
            return {"logits": model(**tensors).logits.numpy()}
        if name.startswith("chinese-clip"):
            image = chosen.task == "image-embedding"
            result = (model.get_image_features if image else model.get_text_features)(**tensors)
            pooled = result.pooler_output
        elif name.startswith("clip"):
            tower = model.vision_model if chosen.task == "image-embedding" else model.text_model
            projection = (
                model.visual_projection
                if chosen.task == "image-embedding"
                else model.text_projection
            )
            result = tower(**tensors)
            pooled = projection(result.pooler_output)
        elif name == "siglip-vision":
            result = model.vision_model(**tensors)
            pooled = result.pooler_output
        else:
            if name in ("whisper", "t5", "marian"):
                model = model.get_encoder()
            elif hasattr(model, "base_model"):
                model = model.base_model
            result = model(**tensors)
            pooled = None
    hidden = result.last_hidden_state.numpy()
    if pooled is None:
        keep = feeds.get("attention_mask", np.ones(hidden.shape[:2])).astype(bool)
        kind = chosen.pooling or ("cls" if chosen.task == "image-embedding" else "mean")
        pools = {
            "mean": lambda rows: rows.mean(0),
            "max": lambda rows: rows.max(0),
            "cls": lambda rows: rows[0],
            "last": lambda rows: rows[-1],
        }
        rows = [pools[kind](h[k]) for h, k in zip(hidden, keep, strict=True)]
        pooled = torch.from_numpy(np.stack(rows))
    if chosen.pooling:
        pooled = torch.nn.functional.normalize(pooled, dim=-1)
    return {"last_hidden_state": hidden, "sentence_embedding": pooled.numpy()}


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_gives_what_transformers_gives(name: str, made: Callable[[str], Bundle]) -> None:
    """The portable graph's outputs equal those of the checkpoint opened by transformers itself."""
    bundle = made(name)
    variant = bundle.variant("onnx-fp32")
    session = ort.InferenceSession(bundle.file(variant), providers=["CPUExecutionProvider"])
    config = transformers.AutoConfig.from_pretrained(bundle.path)
    feeds = _feeds(session, config)
    expected = _expected(name, bundle.path.parent / "source", feeds)
    found = dict(zip(expected, session.run(list(expected), feeds), strict=True))
    for output, wanted in expected.items():
        got = found[output]
        assert got.shape == wanted.shape
        if wanted.ndim == 3 and "attention_mask" in feeds:
            keep = feeds["attention_mask"].astype(bool)
            got, wanted = got[keep], wanted[keep]
        np.testing.assert_allclose(got, wanted, atol=3e-5 * max(1.0, float(np.abs(wanted).max())))
    assert variant.check is not None
    assert variant.check["min_cosine"] >= 0.99999
    assert len(variant.check["shapes"]) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_standard_and_its_weights_keep_their_names(
    name: str, made: Callable[[str], Bundle]
) -> None:
    """Only standard operators; every 2-D float constant is a weight of the checkpoint by name."""
    bundle = made(name)
    model = onnx.load(bundle.file(bundle.variant("onnx-fp32")))
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert [entry.domain for entry in model.opset_import] == [""]
    with WeightLoader(bundle.weights) as loader:
        names = set(loader.names())
    # wav2vec2's weight-normalised convolution has no plain weight in the checkpoint.
    names |= {"encoder.pos_conv_embed.conv.weight"}
    # Marian's positions are computed, and transformers no longer stores them.
    names |= {"embed_positions.weight"}
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) > 64:
            # DeBERTa's positions, projected: they are computed from weights.
            projected = tensor.name.endswith(("c2p_positions", "p2c_positions"))
            assert projected or tensor.name.removesuffix(".transposed") in names
    batch = {value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input}
    assert batch == {"batch"}


ENCODERS = mostly_slow(
    (n for n, a in ARCHITECTURES.items() if a.task != "text-generation"), *_ALWAYS
)
TORCH = Variant(name="torch-fp32", format="onnx", precision="fp32", file="weights.parquet")


@pytest.mark.parametrize("name", ENCODERS)
def test_the_torch_backend_gives_what_the_graph_gives(
    name: str, made: Callable[[str], Bundle]
) -> None:
    """The reference runs every encoder that exports, through its own pooling and mask."""
    bundle = made(name)
    variant = bundle.variant("onnx-fp32")
    session = ort.InferenceSession(bundle.file(variant), providers=["CPUExecutionProvider"])
    feeds = _feeds(session, transformers.AutoConfig.from_pretrained(bundle.path))
    (wanted,) = session.run(["sentence_embedding"], feeds)
    backend = opener("torch")(bundle, Placement("torch", TORCH), Settings(threads=1))
    np.testing.assert_allclose(
        backend.run(feeds), wanted, atol=1e-5 * max(1.0, float(np.abs(wanted).max()))
    )
    backend.close()
