"""Write Hugging Face folders of real size and random weights, where the hub cannot be reached.

The configurations are those of openai/clip-vit-base-patch32 and openai/whisper-tiny; the weights
are seeded noise. Good for export checks, sizes and speed, not for quality.

    python benchmarks/make_models.py /tmp/models
    memopt convert /tmp/models/clip-vit-base-patch32 -o /tmp/models/clip
    memopt export /tmp/models/clip --format onnx
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

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


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "clip-vit-base-patch32": (clip, CLIP_PROCESSOR),
    "whisper-tiny": (whisper, WHISPER_PROCESSOR),
}


def make(name: str, folder: Path) -> Path:
    """Write one model folder: config.json, model.safetensors, preprocessor_config.json."""
    build, processor = MODELS[name]
    torch.manual_seed(0)
    target = folder / name
    build().save_pretrained(target)
    (target / "preprocessor_config.json").write_text(json.dumps(processor, indent=1) + "\n")
    return target


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
    main()
