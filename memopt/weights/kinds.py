"""Which model types memopt takes, and what the others are: said by name, before any work is done.

One vector stands for a text, a picture or a sound where a model turns that alone into hidden states
or a vector of its own. What finds boxes, cuts out shapes, speaks, forecasts, or reads two things at
once has states as well, and their mean would pass every check and mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

IMAGE = frozenset(
    {
        *("vit", "deit", "beit", "data2vec-vision", "dinov2", "dinov2_with_registers"),
        *("dinov3_vit", "dinov3_convnext", "swin", "swinv2", "donut-swin", "convnext"),
        *("convnextv2", "resnet", "vit_msn", "ijepa", "efficientnet", "regnet"),
        *("mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "poolformer", "pvt"),
        *("pvt_v2", "focalnet", "bit", "swiftformer", "hiera", "levit", "cvt", "dinat"),
        *("textnet", "pixio", "timm_wrapper", "mlcd", "mlcd_vision_model"),
        *("aimv2_vision_model", "clip_vision_model", "chinese_clip_vision_model"),
        *("siglip_vision_model", "siglip2_vision_model", "tipsv2_vision_model"),
    }
)
AST = "audio-spectrogram-transformer"
AUDIO = frozenset(
    {
        AST,
        *("whisper", "wav2vec2", "wav2vec2-conformer", "hubert", "wavlm", "unispeech"),
        *("unispeech-sat", "data2vec-audio", "sew", "sew-d", "moonshine"),
    }
)
# A table of vectors, one a token, whose mean is the text's; transformers has no such type.
STATIC = "static-embedding"
# Two towers in one checkpoint: the image tower is the default, --task embedding takes the text one.
DUAL = frozenset(
    {"clip", "siglip", "siglip2", "chinese_clip", "altclip", "align", "blip", "metaclip_2"}
)
# Padding changes the answers of these in torch itself, whatever the mask says: texts go through
# them only beside others of as many tokens.
UNPADDED = frozenset({"mobilebert", "convbert", "fnet", "yoso", "nystromformer"})
# Trained on texts padded to the full length without a mask, whose last place stands for the text
# (Zhai et al. 2023, https://arxiv.org/abs/2303.15343).
FULL_LENGTH = frozenset({"siglip", "siglip_text_model", "siglip2", "siglip2_text_model"})
# Of several parts too, of which the text encoder is taken.
_TEXT_PARTS = frozenset({"clap", "t5gemma"})
# Model type -> what it is. Those of several configs (a vision tower and a language model) and those
# without a vocabulary need not be here.
OTHERS: dict[str, str] = {
    name: what
    for what, names in {
        "finds objects in pictures": (
            *("conditional_detr", "dab-detr", "d_fine", "deformable_detr", "deimv2", "detr"),
            *("lw_detr", "rf_detr", "rt_detr", "rt_detr_v2", "table-transformer", "yolos"),
            *("grounding-dino", "mm-grounding-dino", "omdet-turbo", "owlvit", "owlv2"),
            *("pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4"),
        ),
        "cuts pictures into segments": (
            *("mask2former", "maskformer", "maskformer-swin", "oneformer", "segformer"),
            *("seggpt", "eomt", "upernet", "clipseg", "sam", "sam2", "sam3", "sam_hq"),
            *("edgetam", "sam_vision_model", "sam2_vision_model", "sam3_vision_model"),
            *("sam3_lite_text", "sam3_lite_text_text_model", "vitmatte", "vitdet"),
        ),
        "measures depth in pictures": ("depth_anything", "depth_pro", "dpt", "glpn", "zoedepth"),
        "finds points in pictures": (
            *("efficientloftr", "lightglue", "superglue", "superpoint", "vitpose", "sapiens2"),
        ),
        "looks at a random part of every picture": ("vit_mae",),
        "makes pictures larger": ("swin2sr",),
        "draws pictures": ("imagegpt", "glm_image"),
        "reads the letters in pictures": ("mgp-str", "trocr", "nougat", "pix2struct", "uvdoc"),
        "takes videos": (
            *("timesformer", "videomae", "vivit", "vjepa2", "videoprism", "tvp", "xclip"),
            *("videoprism_vision_model", "pe_video_encoder"),
        ),
        "forecasts series of numbers": (
            *("autoformer", "informer", "patchtsmixer", "patchtst", "time_series_transformer"),
            *("timesfm", "timesfm2_5"),
        ),
        "packs sound into codes": (
            *("dac", "encodec", "mimi", "xcodec", "xcodec2", "neucodec", "univnet"),
            *("vibevoice_acoustic_tokenizer", "higgs_audio_v2_tokenizer"),
        ),
        "speaks or makes music": (
            *("bark", "clvp", "csm", "dia", "fastspeech2_conformer", "higgs_audio_v2", "moshi"),
            *("fastspeech2_conformer_with_hifigan", "musicgen", "musicgen_melody", "pop2piano"),
            *("musicgen_decoder", "musicgen_melody_decoder", "speecht5", "vits", "vibevoice"),
            *("pocket_tts", "gradium_phonon_tts"),
        ),
        "hears sound through features that memopt does not compute": (
            *("wav2vec2-bert", "speech_to_text"),
            *("seamless_m4t", "seamless_m4t_v2", "granite_speech5_encoder", "voxtral_encoder"),
            *("voxtral_realtime_encoder", "gemma3n_audio", "parakeet_encoder", "lasr_encoder"),
            *("moonshine_streaming", "nemotron3_5_transcribe_word_timestamp"),
        ),
        "plays games and moves robots": ("decision_transformer", "pi0"),
        "takes anything, laid out as its checkpoint wants it": ("perceiver",),
        "reads text and a picture together": (
            *("blip_2_qformer", "instructblip_qformer", "instructblipvideo_qformer"),
            *("layoutlmv2", "layoutxlm", "lxmert", "udop", "vilt", "visual_bert", "neomme"),
        ),
        "needs the place of every word on its page": ("bros",),
        "reads tables, with seven types of tokens": ("tapas",),
        "reads text and proteins together": ("evolla",),
    }.items()
    for name in names
}
# What a text encoder's config counts its tokens with; CANINE hashes characters.
_VOCABULARY = ("vocab_size", "src_vocab_size", "n_vocab", "n_tokens", "num_hash_buckets")


def refusal(config: Mapping[str, Any]) -> str | None:
    """Return what kind of model a ``config.json`` is of, if memopt has no vector for it.

    >>> refusal({"model_type": "detr"})
    'finds objects in pictures'
    >>> refusal({"model_type": "new", "vision_config": {"model_type": "vit"}})
    'is made of several models (vision_config)'
    >>> refusal({"model_type": "bert", "vocab_size": 30522}) is None
    True
    """
    kind = str(config.get("model_type"))
    if kind in OTHERS:
        return OTHERS[kind]
    if kind in IMAGE | AUDIO | DUAL | _TEXT_PARTS:
        return None
    parts = [
        name
        for name, part in config.items()
        if isinstance(part, Mapping) and part.get("model_type")
    ]
    if parts:
        return f"is made of several models ({', '.join(sorted(parts))})"
    if not any(config.get(name) for name in _VOCABULARY) and not _usual_vocabulary(kind):
        return "has no vocabulary, and is none of the encoders of pictures or sounds it knows"
    return None


def _usual_vocabulary(kind: str) -> bool:
    """Whether the type's own defaults have a vocabulary: a config may state only what differs."""
    try:
        from transformers import CONFIG_MAPPING

        usual = CONFIG_MAPPING[kind]()
    except ImportError:
        return True  # not known here; the export, which needs transformers, tells
    except Exception:  # noqa: BLE001 - unknown, or a config that cannot be made of nothing
        return False
    return any(getattr(usual, name, None) for name in _VOCABULARY)
