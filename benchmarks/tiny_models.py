"""Tiny random models of transformers' types, in a folder as their users have it, and their answers.

What ``coverage.py`` sweeps: a config of the type's real shape with small numbers in it, seeded
weights, a word-level tokenizer or the type's own processor, and what transformers answers.
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MOST_WEIGHTS = 60_000_000
# What a config may call its sizes, and a small one that the others go with.
_COUNTS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_block_layers"), 2),
    **dict.fromkeys(("vocab_size", "text_vocab_size", "n_words", "entity_vocab_size"), 120),
    "num_queries": 12,
}
_PLACES = {
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    "image_size": 64,
}
_WIDTHS = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embedding_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 64),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size"), 8),
    **dict.fromkeys(("projection_dim", "projection_size"), 24),
    "emb_dim": 32,
}
# Lists of one number a stage: one block each.
_DEPTHS = ("depths", "depth", "layer_depths", "num_blocks", "layers_per_stage")
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
# A small backbone in place of a detector's ResNet-50, which may be timm's.
_RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_RT_DETR: dict[str, Any] = {
    "encoder_in_channels": [16, 24, 32],
    "encoder_hidden_dim": 32,
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0,
}
_D_FINE = {"encoder_hidden_dim": 32, "decoder_in_channels": [32, 32, 32], "num_denoising": 0}
# What introspection cannot know; over what it says.
SPECIAL: dict[str, dict[str, Any]] = {
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16]},
    "big_bird": {"attention_type": "original_full"},
    "whisper": {"max_source_positions": 50},
    "longformer": {"attention_window": [8, 8]},
    "led": {"attention_window": [8, 8]},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "align": {"vision_config": {"width_coefficient": 0.5, "depth_coefficient": 0.5}},
    "canine": {"max_position_embeddings": 2048},
    "audio-spectrogram-transformer": {"max_length": 128, "num_mel_bins": 128},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "funnel": {"block_sizes": [1, 1], "block_repeats": [1, 1], "num_decoder_layers": 1},
    "rt_detr": _RT_DETR,
    "rt_detr_v2": _RT_DETR,
    "d_fine": _D_FINE,
    "deimv2": _D_FINE,
    "yolos": {"image_size": [64, 96], "num_detection_tokens": 10},
}
# Encoder-decoder models that sentence-transformers embeds with their encoder; it takes what
# AutoModel gives of the others (https://github.com/UKPLab/sentence-transformers).
ENCODER_ONLY = frozenset(
    {
        *("t5", "mt5", "umt5", "longt5", "prophetnet", "switch_transformers", "blenderbot"),
        *("blenderbot-small", "m2m_100", "pegasus", "pegasus_x", "moonshine", "whisper", "marian"),
        *("t5gemma", "speech_to_text", "moonshine_streaming"),
    }
)
_WORDS = ("the", "cat", "sleeps", "on", "a", "warm", "keyboard", "rain", "is", "expected")
TEXTS = ("the cat", " ".join(_WORDS), " ".join(_WORDS * 4))
# Labels of a head: more than one, and no two tasks alike.
LABELS = {"text-classification": 3, "token-classification": 5}


def modality(cls: Any) -> str:
    """Return text, image or audio for what takes one input of one kind, else other."""
    if hasattr(cls, "get_image_features") and hasattr(cls, "get_text_features"):
        return "image"  # two towers: what memopt takes by default
    if hasattr(cls, "get_audio_features") and hasattr(cls, "get_text_features"):
        return "text"
    name, kinds = cls.main_input_name, cls.input_modalities
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    forward = inspect.signature(cls.forward).parameters
    if name == "input_ids" and kinds == {"text"} and "input_ids" in forward:
        return "text"
    if name == "pixel_values" and "pixel_values" in forward and not kinds & {"video", "audio"}:
        return "image"
    if name in ("input_values", "input_features") and "audio" in kinds | {"audio"}:
        return "audio"
    return "other"


def small(config: Any, kind: str, level: int) -> dict[str, Any]:
    """Return arguments for a small config of this class, from what its default one has.

    ``level`` 0 makes everything small, 1 leaves widths, 2 leaves positions and images too, 3 all.
    """
    sizes = {**(_COUNTS if level < 3 else {}), **(_PLACES if level < 2 else {})}
    sizes |= _WIDTHS if level < 1 else {}
    made: dict[str, Any] = {}
    names = {*config.to_dict(), *inspect.signature(type(config).__init__).parameters}
    known = set(config.attribute_map)
    for name in sorted(names - known - {"self", "kwargs"}):
        value = getattr(config, name, None)
        if name in _SPECIAL:
            if isinstance(value, int) and not isinstance(value, bool) and value >= 10:
                made[name] = 2
        elif name in sizes and isinstance(value, int) and not isinstance(value, bool):
            made[name] = min(value, sizes[name])
        elif name in sizes and isinstance(value, list | tuple) and name == "image_size":
            made[name] = [sizes[name]] * len(value)
        elif name in _DEPTHS and isinstance(value, list | tuple) and level < 3:
            made[name] = [1] * len(value)
        elif hasattr(value, "model_type") and hasattr(value, "to_dict"):
            made[name] = (
                _backbone(value, kind) if name == "backbone_config" else small(value, "", level)
            )
    return {**made, **SPECIAL.get(kind, {})}


def _backbone(config: Any, kind: str) -> Any:
    """Return a small ResNet in place of a detector's, other backbones as they are."""
    import transformers

    if config.model_type == "rt_detr_resnet":
        return type(config)(**_RESNET, out_features=["stage2", "stage3", "stage4"])
    if config.model_type not in ("resnet", "timm_backbone"):
        return config
    several = ["stage2", "stage3", "stage4"] if kind == "deformable_detr" else ["stage4"]
    return transformers.ResNetConfig(**_RESNET, out_features=several)


def tiny_config(kind: str, cls: Any, task: str, level: int) -> Any:
    """Return a small config of the type, for a head of ``task`` where that has labels."""
    import transformers

    base = transformers.AutoConfig.for_model(kind)
    config = type(base)(**small(base, kind, level))
    config.architectures = [cls.__name__]
    if task.endswith("-classification"):
        config.num_labels = LABELS.get(task, 4)
    if task == "text-classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # language models look for the last token before it
    return config


def build(kind: str, cls: Any, task: str, folder: Path) -> str:
    """Write the folder of a tiny model of this type; return why it could not be, if so."""
    import torch

    why = ""
    for level in range(4):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            config = tiny_config(kind, cls, task, level)
            with torch.device("meta"):
                size = sum(p.numel() for p in cls(config).parameters())
            if size > MOST_WEIGHTS:
                why = why or f"{size:,} weights"
                continue
            torch.manual_seed(0)
            model = cls(config).eval()
            _seed(model)
            model.save_pretrained(folder)
            what = modality(cls)
            front_end(kind, config, what, folder)
            if what != "other":
                reference(kind, folder, what, task, "mean", inputs(what, task)[:1])
            return ""
        except Exception as error:  # noqa: BLE001 - of anything: the next level is tried
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return why


def _seed(model: Any) -> None:
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            # The usual std of 0.02 makes a nearly linear model, in which masks hardly show.
            if parameter.ndim >= 2 and parameter.numel():
                parameter.normal_(0.0, (parameter.shape[0] / parameter.numel()) ** 0.5)
            elif parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)


def front_end(kind: str, config: Any, what: str, folder: Path) -> None:
    """Write a tokenizer, or the processor that transformers has for the type."""
    if what == "text":
        _tokenizer(config, folder)
    elif what == "image":
        _image_processor(kind, config, folder)
    elif what == "audio":
        _feature_extractor(kind, config, folder)


def _tokenizer(config: Any, folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pad = getattr(config, "pad_token_id", None)
    pad = pad if isinstance(pad, int) and 0 <= pad < 10 else 0
    free = [i for i in range(10) if i != pad]
    vocabulary = {"[PAD]": pad, "[UNK]": free[2], "[CLS]": free[3], "[SEP]": free[4]}
    vocabulary |= {word: 10 + i for i, word in enumerate(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", free[3]), ("[SEP]", free[4])],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


def _image_processor(kind: str, config: Any, folder: Path) -> None:
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    names: Any = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind, {})
    # Without torchvision some types have none of their own.
    processor = getattr(transformers, names.get("pil") or "ViTImageProcessorPil")
    size = getattr(getattr(config, "vision_config", config), "image_size", 64)
    size = size if isinstance(size, int) else size[0]
    default = processor.size or {"height": 0, "width": 0}
    edges = {"shortest_edge": 64, "longest_edge": 96}
    made = processor(size=edges if set(default) == set(edges) else dict.fromkeys(default, size))
    if getattr(processor, "crop_size", None) is not None:
        made.crop_size = {"height": size, "width": size}
    made.save_pretrained(folder)


def _feature_extractor(kind: str, config: Any, folder: Path) -> None:
    import transformers
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES

    fallback = "Wav2Vec2FeatureExtractor"
    extractor = getattr(transformers, FEATURE_EXTRACTOR_MAPPING_NAMES.get(kind, fallback))
    given = {}
    if extractor.__name__ == "WhisperFeatureExtractor":
        frames = 2 * getattr(config, "max_source_positions", 50)
        # Whole seconds: 100 frames each.
        given = {"feature_size": config.num_mel_bins, "chunk_length": max(1, frames // 100)}
    elif extractor.__name__ == "ASTFeatureExtractor":
        given = {"max_length": config.max_length, "num_mel_bins": config.num_mel_bins}
    extractor(**given).save_pretrained(folder)


def inputs(what: str, task: str) -> list[Any]:
    """Return three inputs of three lengths or sizes."""
    generator = np.random.default_rng(0)
    if what == "text":
        pairs = task == "question-answering"
        return [(text[:7], text) for text in TEXTS] if pairs else list(TEXTS)
    if what == "image":
        sizes = ((64, 64), (50, 90), (120, 70))
        return [generator.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    return [generator.normal(0, 0.1, n).astype(np.float32) for n in (9_001, 16_000, 24_000)]


def calibration(what: str, folder: Path) -> Path:
    """Write 24 inputs to quantize with; return the file or folder."""
    from PIL import Image

    generator = np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    if what == "text":
        lines = [" ".join(generator.choice(_WORDS, 3 + i)) for i in range(24)]
        (folder / "texts.txt").write_text("\n".join(lines))
        return folder / "texts.txt"
    for number in range(24):
        if what == "image":
            pixels = generator.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        else:
            import soundfile

            samples = generator.normal(0, 0.1, 8_000 + 100 * number)
            soundfile.write(folder / f"{number}.wav", samples.clip(-1, 1), 16_000)
    return folder


def reference(
    kind: str, folder: Path, what: str, task: str, pooling: str, items: Sequence[Any]
) -> list[np.ndarray]:
    """Return the answer to each input as transformers computes it, alone and so without padding."""
    import torch
    import transformers

    from memopt.tasks.table import task_of

    auto = getattr(transformers, task_of(task).model)
    model = auto.from_pretrained(folder, attn_implementation="eager").eval()
    if kind in ENCODER_ONLY and task_of(task).embeds:
        model = model.get_encoder()
    towers = {"image": "get_image_features", "text": "get_text_features"}
    call = getattr(model, towers.get(what, "forward"), model.forward)
    make = _feeds(folder, what)
    takes = inspect.signature(call).parameters
    types = getattr(model.config, "type_vocab_size", 0) or 0
    rows = []
    for item in items:
        feeds = {name: value for name, value in make(item).items() if name in takes}
        if types <= 1:
            feeds.pop("token_type_ids", None)
        with torch.no_grad():
            result = call(**feeds)
        rows.append(_answer(result, task, pooling))
    return rows


def _feeds(folder: Path, what: str) -> Any:
    import transformers
    from PIL import Image

    if what == "text":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

        def text(item: Any) -> dict[str, Any]:
            given = (item,) if isinstance(item, str) else item
            return dict(tokenizer(*given, return_tensors="pt", return_token_type_ids=True))

        return text
    if what == "image":
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        return lambda item: dict(processor(Image.fromarray(item), return_tensors="pt"))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    rate = extractor.sampling_rate
    return lambda item: dict(extractor(item, sampling_rate=rate, return_tensors="pt"))


def _answer(result: Any, task: str, pooling: str) -> np.ndarray:
    if task == "question-answering":
        ends = (result.start_logits[0].numpy(), result.end_logits[0].numpy())
        return np.stack(ends, axis=1)
    if task == "object-detection":
        return np.concatenate([result.logits[0].numpy(), result.pred_boxes[0].numpy()], axis=1)
    if not task.endswith("embedding"):
        return np.asarray(result.logits[0].numpy())
    if pooling == "model":
        names = ("image_embeds", "text_embeds", "pooler_output", "cls_token_value")
        values = [getattr(result, name, None) for name in names]
        return np.asarray(next(v for v in values if v is not None).flatten(1).numpy()[0])
    hidden = result.last_hidden_state[0].numpy()
    pools = {"mean": lambda: hidden.mean(0), "cls": lambda: hidden[0], "last": lambda: hidden[-1]}
    return np.asarray(pools[pooling]())
