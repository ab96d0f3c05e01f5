"""Write Hugging Face folders of real size and random weights, where the hub cannot be reached.

The configurations are those of openai/clip-vit-base-patch32, openai/whisper-tiny and
microsoft/deberta-v3-small (its table of words cut to 30,522); the weights are seeded noise. Good
for export checks, sizes and speed, not for quality.

    python benchmarks/make_models.py /tmp/models
    memopt convert /tmp/models/clip-vit-base-patch32 -o /tmp/models/clip
    memopt export /tmp/models/clip --format onnx
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from command_line import run_main

from memopt.benchmark.workload import default_inputs

WORDS = 30_522
CLIP_PROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 224},
}
WHISPER_PROCESSOR = {
    "chunk_length": 30,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 80,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480_000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": False,
    "sampling_rate": 16_000,
}


def clip() -> Any:
    """CLIP ViT-B/32: both towers, projections to 512."""
    config = transformers.CLIPConfig(
        projection_dim=512,
        text_config={
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "hidden_act": "quick_gelu",
            "bos_token_id": 49406,
            # As in the original repository: 2 selects the highest token id as the end of the text.
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
        },
    )
    return transformers.CLIPModel(config)


def whisper() -> Any:
    """Whisper tiny: four encoder and four decoder layers of 384, 30 s of 80 mel bands."""
    config = transformers.WhisperConfig(
        vocab_size=51865,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        num_mel_bins=80,
        max_source_positions=1500,
        max_target_positions=448,
    )
    return transformers.WhisperForConditionalGeneration(config)


def deberta() -> Any:
    """DeBERTa-v3 small: six layers of 768 that attend by content and by distance."""
    config = transformers.DebertaV2Config(
        vocab_size=WORDS,
        hidden_size=768,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=3072,
        layer_norm_eps=1e-7,
        type_vocab_size=0,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=256,
        max_relative_positions=-1,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
    )
    return transformers.DebertaV2Model(config)


# name: model, and the configuration of its pictures or sounds; None for one of text
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any] | None]] = {
    "clip-vit-base-patch32": (clip, CLIP_PROCESSOR),
    "whisper-tiny": (whisper, WHISPER_PROCESSOR),
    "deberta-v3-small": (deberta, None),
}


def make(name: str, folder: Path) -> Path:
    """Write one model folder: config.json, model.safetensors, and processor or tokenizer."""
    build, processor = MODELS[name]
    torch.manual_seed(0)
    target = folder / name
    build().save_pretrained(target)
    if processor is None:
        write_tokenizer(target)
    else:
        (target / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    return target


def write_tokenizer(folder: Path) -> None:
    """Write a WordPiece tokenizer trained on seeded texts."""
    from tokenizers import BertWordPieceTokenizer

    tokenizer = BertWordPieceTokenizer()
    texts = default_inputs(SimpleNamespace(modality="text"), 2_000, seed=1)  # type: ignore[arg-type]
    tokenizer.train_from_iterator(texts, vocab_size=WORDS, min_frequency=1)
    tokenizer.enable_truncation(512)
    fast = transformers.BertTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, model_max_length=512
    )
    fast.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), action="append")
    arguments = parser.parse_args()
    for name in arguments.model or MODELS:
        print(make(name, arguments.folder))


if __name__ == "__main__":
    run_main(main)
