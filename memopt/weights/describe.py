"""Read a model folder's own files and say what the model is: task, pooling, length, dimension."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memopt.bundle import POOLINGS, TASKS, Manifest, read_json
from memopt.errors import BundleError, ConfigurationError, WeightsError
from memopt.registry import nearest

_IMAGE = {
    *("vit", "deit", "beit", "data2vec-vision", "dinov2", "dinov2_with_registers", "dinov3_vit"),
    *("swin", "swinv2", "convnext", "convnextv2", "resnet", "vit_mae", "ijepa"),
    *("clip_vision_model", "siglip_vision_model", "siglip2_vision_model"),
}
_AUDIO = {
    *("whisper", "wav2vec2", "wav2vec2-conformer", "wav2vec2-bert", "hubert", "wavlm", "unispeech"),
    *("unispeech-sat", "data2vec-audio", "sew", "audio-spectrogram-transformer"),
}
# Two towers in one checkpoint: the image tower is the default, --task embedding takes the text one.
_DUAL = {"clip", "siglip", "siglip2", "chinese_clip", "altclip"}
_OWN_HEAD = {*_DUAL, "clip_text_model", "siglip_text_model", "siglip2_text_model"} | {
    m for m in _IMAGE if m.startswith(("clip", "siglip"))
}
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_ST_POOLING = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
_ST_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# RoBERTa and its kin count positions from pad_token_id + 1, so that many fewer tokens fit.
_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "longformer"}
# transformers writes this huge number where a tokenizer has no limit.
_NO_LIMIT = 10**9


def describe(
    folder: Path,
    *,
    name: str,
    source: str,
    known: Mapping[str, Any] | None = None,
    task: str | None = None,
) -> Manifest:
    """Return the manifest of the model in ``folder``, before anything was exported.

    Args:
        folder: config.json and, for text, tokenizer and sentence-transformers files.
        name: the bundle's name.
        source: what to record as its origin.
        known: the model's YAML entry; its task, pooling, normalize, max_length and dimension win
            over what the files say.
        task: overrules both.

    Raises:
        WeightsError: no usable config.json, or sentence-transformers modules memopt does not run.
        ConfigurationError: an unknown task, or an unknown key in the YAML entry.
    """
    known = dict(known or {})
    allowed = {"source", "revision", "task", "pooling", "normalize", "max_length", "dimension"}
    allowed |= {"quantize"}  # a recipe, read by memopt quantize
    if unknown := set(known) - allowed:
        key = sorted(unknown)[0]
        raise ConfigurationError(
            f"models/{name}.yaml: unknown key {key!r}", fix=nearest(key, allowed)
        )
    try:
        config = read_json(folder / "config.json")
    except BundleError as error:
        raise WeightsError(
            error.problem, fix="give the folder of a Hugging Face model, with its config.json"
        ) from error
    architecture, model_type = _identity(folder, config)
    modules = _modules(folder)
    task = task or known.get("task") or _task(architecture, model_type, modules)
    if task not in TASKS:
        raise ConfigurationError(f"task {task!r} is not known", fix=nearest(task, TASKS))
    modality = {"image-embedding": "image", "audio-embedding": "audio"}.get(task, "text")
    if task == "text-generation" or (not modules and task != "embedding"):
        pooling, dimension = _default_pooling(task, model_type), None
    else:
        pooling, dimension = _sentence_pooling(folder, modules, model_type)
    pooling = known.get("pooling", pooling)
    if pooling not in POOLINGS:
        raise ConfigurationError(
            f"pooling {pooling!r} is not known", fix=nearest(pooling, POOLINGS)
        )
    if task != "text-generation":
        dimension = known.get("dimension", dimension) or _dimension(config, modality, architecture)
    length = known.get("max_length", _max_length(folder, config)) if modality == "text" else None
    return Manifest(
        name=name,
        task=task,
        modality=modality,
        architecture=architecture,
        model_type=model_type,
        pooling=pooling,
        normalize=known.get("normalize", any(m.endswith("Normalize") for m in modules)),
        max_length=length,
        dimension=dimension,
        source=source,
    )


def _identity(folder: Path, config: Mapping[str, Any]) -> tuple[str, str]:
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for key, value in (("architectures", architectures), ("model_type", model_type)):
        if not value or not (isinstance(value, str) or isinstance(value[0], str)):
            raise WeightsError(
                f"{folder / 'config.json'} has no {key} (it says {value!r})",
                fix="add it, as transformers' save_pretrained does",
            )
    first = architectures if isinstance(architectures, str) else architectures[0]  # type: ignore[index]
    return str(first), str(model_type)


def _modules(folder: Path) -> list[str]:
    """Return the types of the sentence-transformers modules in order, empty when there are none."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    import json

    try:
        types = [str(m["type"]).rpartition(".")[2] for m in json.loads(path.read_text("utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path} is not a list of modules ({error})") from error
    runs = ("Transformer", "Pooling", "Normalize", "CLIPModel")
    other = [t for t in types if t not in runs]
    if other:
        raise WeightsError(
            f"{path} has a {other[0]} module, which memopt does not run",
            fix=f"models made of {', '.join(runs[:3])} can be converted",
        )
    return types


def _task(architecture: str, model_type: str, modules: list[str]) -> str:
    if model_type in _AUDIO:
        return "audio-embedding"
    if model_type in _IMAGE or (
        model_type in _DUAL and "Text" not in architecture and "Transformer" not in modules
    ):
        return "image-embedding"
    if architecture.endswith(_CAUSAL) and not modules:
        return "text-generation"
    return "embedding"


def _default_pooling(task: str, model_type: str) -> str:
    if task == "text-generation":
        return "none"
    if model_type in _OWN_HEAD:
        return "model"
    return "cls" if task == "image-embedding" else "mean"


def _sentence_pooling(folder: Path, modules: list[str], model_type: str) -> tuple[str, int | None]:
    path = next(iter(sorted(folder.glob("[0-9]_Pooling/config.json"))), None)
    if "Pooling" not in modules or path is None:
        return _default_pooling("embedding", model_type), None
    config = read_json(path)
    modes = config.get("pooling_mode", [m for flag, m in _ST_FLAGS.items() if config.get(flag)])
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _ST_POOLING:
        raise WeightsError(
            f"{path} asks for pooling {' + '.join(modes) or 'none'}, which memopt does not do",
            fix=f"one of {', '.join(_ST_POOLING)} can be converted",
        )
    size = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    return _ST_POOLING[modes[0]], size


def _max_length(folder: Path, config: Mapping[str, Any]) -> int | None:
    text = {**config, **(config.get("text_config") or {})}
    limits = []
    for key in ("max_position_embeddings", "n_positions"):
        if isinstance(text.get(key), int) and text[key] > 0:
            offset = (text.get("pad_token_id") or 0) + 1
            limits.append(text[key] - (offset if text["model_type"] in _OFFSET_POSITIONS else 0))
    for file, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        if (folder / file).is_file():
            value = read_json(folder / file).get(key)
            if isinstance(value, int | float) and 0 < value < _NO_LIMIT:
                limits.append(int(value))
    return min(limits, default=None)


def _dimension(config: Mapping[str, Any], modality: str, architecture: str) -> int | None:
    tower = config.get("vision_config" if modality == "image" else "text_config") or {}
    keys = ["hidden_size", "d_model", "dim", "n_embd"]
    projected = architecture.endswith(("WithProjection", "CLIPModel"))
    # A projection has its own width; SigLIP's text head calls it projection_size.
    places = [(config, ["projection_dim"])] if projected else []
    places += [(tower, ["projection_size"])] if modality == "text" else []
    places += [(tower, keys), (config, keys)]
    for place, names in places:
        for key in names:
            if isinstance(place.get(key), int):
                return int(place[key])
    return None
