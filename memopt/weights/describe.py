"""Read a model folder's own files and say what the model is: task, pooling, length, dimension."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memopt.bundle import POOLINGS, Manifest, read_json
from memopt.errors import BundleError, ConfigurationError, WeightsError
from memopt.positions import counts_distances_alone, position_limit
from memopt.registry import nearest
from memopt.tasks.table import Task, task_of, task_of_class
from memopt.weights.chain import chain_width
from memopt.weights.kinds import AST, AUDIO, DUAL, IMAGE, UNPADDED, refusal
from memopt.weights.sentence import Sentence, read_sentence

# Their first token stands for the picture; the layer that transformers puts behind it is not in
# every checkpoint. What is in neither set gives transformers' own pooled output.
_CLASS_TOKEN = {
    *("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_msn"),
    "data2vec-vision",
}
_PATCHES_ONLY = {"ijepa"}  # neither a class token nor a pooled output: the mean of the patches
_OWN_HEAD = {*DUAL, AST, "clip_text_model", "siglip_text_model", "siglip2_text_model"} | {
    m for m in IMAGE if m.startswith(("clip", "siglip"))
}
_CAUSAL = ("ForCausalLM", "LMHeadModel")
# What old sentence-transformers wrote into the config.json of a reranker.
_CROSS_ENCODER = ("sentence_transformers", "sbert_ce_default_activation_function")
# What sentence-transformers opens a folder with -> its task; a CrossEncoder's labels decide.
_KINDS = {"SparseEncoder": "sparse-embedding", "MultiVectorEncoder": "late-interaction"}
# Keys of a model's YAML entry; `quantize` is a recipe, read by memopt quantize.
_KNOWN = frozenset(
    {"source", "revision", "task", "pooling", "normalize", "max_length", "dimension", "quantize"}
)
# What transformers reads in a classifier's config.
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")
# transformers writes this huge number where a tokenizer has no limit.
_NO_LIMIT = 10**9


def describe(
    folder: Path,
    *,
    name: str,
    source: str,
    known: Mapping[str, Any] | None = None,
    task: str | None = None,
    sentence: Sentence | None = None,
) -> Manifest:
    """Return the manifest of the model in ``folder``, before anything was exported.

    Args:
        folder: config.json and, for text, tokenizer and sentence-transformers files.
        name: the bundle's name.
        source: what to record as its origin.
        known: the model's YAML entry; its task, pooling, normalize, max_length and dimension win
            over what the files say.
        task: overrules both.
        sentence: what ``read_sentence`` returned, where it was read already.

    Raises:
        WeightsError: no usable config.json, a kind of model that has no one vector for its input,
            or sentence-transformers modules memopt does not run.
        ConfigurationError: an unknown task, or an unknown key in the YAML entry.
    """
    known = dict(known or {})
    if unknown := set(known) - _KNOWN:
        key = sorted(unknown)[0]
        raise ConfigurationError(
            f"models/{name}.yaml: unknown key {key!r}", fix=nearest(key, _KNOWN)
        )
    sentence = sentence or read_sentence(folder)
    files = folder / sentence.transformer if sentence else folder
    config = model_config(files, sentence)
    architecture, model_type = _identity(files, config)
    _check_labels(files / "config.json", config)
    row = task_of(task or known.get("task") or _task(architecture, config, sentence))
    if not row.model:
        raise ConfigurationError(
            f"task {row.name} is of finished graphs", fix="memopt import takes them"
        )
    _refuse_other_kinds(files, config, row)
    task, modality = row.name, row.modality
    pooling = known.get("pooling", _pooling(task, model_type, architecture, sentence))
    if pooling not in POOLINGS:
        raise ConfigurationError(
            f"pooling {pooling!r} is not known", fix=nearest(pooling, POOLINGS)
        )
    dimension = None
    if row.name == "sparse-embedding" and isinstance(config.get("vocab_size"), int):
        dimension = config["vocab_size"]
    if row.embeds:
        dimension = _dimension(config, modality, architecture)
        if sentence and sentence.embeds:
            dimension = chain_width(sentence.chain, sentence.width or dimension)
        dimension = known.get("dimension") or dimension
        if sentence and sentence.truncate_dim and dimension:
            dimension = min(dimension, sentence.truncate_dim)
    length = None
    if modality == "text":
        length = known.get("max_length", _max_length(files, config, sentence))
    return Manifest(
        name=name,
        task=task,
        modality=modality,
        architecture=architecture,
        model_type=model_type,
        pooling=pooling,
        normalize=known.get("normalize", bool(sentence and sentence.normalize)),
        max_length=length,
        dimension=dimension,
        source=source,
    )


def model_config(files: Path, sentence: Sentence | None) -> dict[str, Any]:
    """Return ``config.json`` with what a sentence-transformers folder overrides.

    Raises:
        WeightsError: there is none, or the weights are quantized or an adapter.
    """
    try:
        config = read_json(files / "config.json")
    except BundleError as error:
        raise WeightsError(
            error.problem, fix="give the folder of a Hugging Face model, with its config.json"
        ) from error
    if (files / "adapter_config.json").is_file():
        raise WeightsError(
            f"{files} holds an adapter (adapter_config.json), a change of another model's weights",
            fix="merge it first: PeftModel.merge_and_unload().save_pretrained(OUT)",
        )
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise WeightsError(
            f"{files / 'config.json'} says its weights are quantized ({method}): they are integers "
            "or fp8 values with scales, which memopt does not read",
            fix="give the float weights; memopt quantize makes its own",
        )
    # transformers ignores an override that its config class does not know, and so does the model.
    return {**config, **(sentence.config if sentence else {})}


def announcements(
    manifest: Manifest, sentence: Sentence | None, config: Mapping[str, Any], weights: Sequence[str]
) -> list[str]:
    """Return a line for each thing the bundle leaves out or that a user has to know.

    Args:
        manifest: of the bundle.
        sentence: what ``read_sentence`` returned.
        config: the model's ``config.json``.
        weights: names of the checkpoint's tensors.
    """
    lines = []
    head = manifest.architecture.find("For")
    if head > 0 and not sentence and task_of(manifest.task).embeds:
        trunk = manifest.architecture[:head]
        unused = _heads(weights)
        named = f" (head {', '.join(f'{name}.*' for name in unused)} unused)" if unused else ""
        lines.append(
            f"{manifest.architecture} has a head that is left out{named}: the bundle gives the "
            f"embeddings of {trunk} (pooling {manifest.pooling})"
        )
    if manifest.model_type in UNPADDED:
        lines.append(
            f"{manifest.model_type} answers a padded text otherwise than the text alone, in torch "
            "too: only texts of as many tokens go through it together"
        )
    labels = config.get("id2label")
    if task_of(manifest.task).answer == "classes" and isinstance(labels, Mapping):
        gaps = sorted({str(i) for i in range(len(labels))} - {str(key) for key in labels})
        if gaps:
            lines.append(
                f"id2label of config.json has no label {', '.join(gaps)}: what it does not name is "
                "called LABEL_<number>"
            )
    if sentence and sentence.similarity not in (None, "cosine") and not sentence.normalize:
        lines.append(
            f"the model was made for {sentence.similarity!r} similarity: encode with "
            "normalize=False to keep the lengths of its vectors"
        )
    return lines


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


def _check_labels(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse labels that transformers cannot read, and scores that it knows no loss for.

    Raises:
        WeightsError: ``id2label`` is no map, or ``problem_type`` is unknown.
    """
    labels, kind = config.get("id2label"), config.get("problem_type")
    if labels is not None and not isinstance(labels, Mapping):
        raise WeightsError(
            f"{file}: id2label is a {type(labels).__name__}, not a map",
            fix='write it as {"0": "name of the first", "1": ...}',
        )
    if kind is not None and kind not in PROBLEMS:
        raise WeightsError(
            f"{file}: problem_type {kind!r} is not known", fix=nearest(str(kind), PROBLEMS)
        )


def _heads(weights: Sequence[str]) -> list[str]:
    """Return the parts of a checkpoint beside its trunk, by the first word of the names.

    >>> _heads(["bert.embeddings.w", "bert.encoder.w", "classifier.weight", "classifier.bias"])
    ['classifier']
    """
    parts = Counter(name.partition(".")[0] for name in weights)
    if {"embeddings", "encoder"} & set(parts):
        return [part for part in parts if part in _HEADS]  # saved without the trunk's own name
    trunk, _ = max(parts.items(), key=lambda part: part[1], default=("", 0))
    return [part for part in parts if part != trunk]


_HEADS = ("classifier", "pre_classifier", "classification_head", "score", "cls", "lm_head")


def _refuse_other_kinds(files: Path, config: Mapping[str, Any], row: Task) -> None:
    """Refuse a model that has no vector for its input, or whose input memopt does not make."""
    other = refusal(config) if row.embeds or row.modality == "audio" else None
    if other:
        raise WeightsError(
            f"{files / 'config.json'} is of a {config['model_type']}, which {other}: memopt knows "
            "no one vector for what it takes",
            fix="convert an encoder of text, pictures or sound; docs/runtime.md says which",
        )


def _task(architecture: str, config: Mapping[str, Any], sentence: Sentence | None) -> str:
    model_type = str(config["model_type"])
    if sentence and sentence.kind in _KINDS:
        return _KINDS[sentence.kind]
    read = sentence is None or sentence.kind == "CrossEncoder"
    stated = task_of_class(architecture) if read else None
    if stated is not None and stated.name == "text-classification" and model_type in AUDIO:
        return "audio-classification"  # as wav2vec2's heads are called
    if stated is not None and stated.name == "text-classification":
        one = _label_count(config) == 1 and config.get("problem_type") != "regression"
        return "reranking" if one or any(key in config for key in _CROSS_ENCODER) else stated.name
    if stated is not None:
        return stated.name
    if model_type in AUDIO:
        return "audio-embedding"
    pictures = sentence is None or "image" in sentence.modalities
    if model_type in IMAGE or (model_type in DUAL and "Text" not in architecture and pictures):
        return "image-embedding"
    return "embedding"


def _label_count(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    return len(labels) if isinstance(labels, Mapping) else int(config.get("num_labels", 2))


def _pooling(task: str, model_type: str, architecture: str, sentence: Sentence | None) -> str:
    if not task_of(task).embeds:
        return "none"
    if sentence:
        return sentence.pooling
    if task == "embedding" and architecture.endswith(_CAUSAL):
        return "last"  # what sentence-transformers makes of a language model
    if model_type in _OWN_HEAD:
        return "model"
    if task != "image-embedding" or model_type in _PATCHES_ONLY:
        return "mean"
    return "cls" if model_type in _CLASS_TOKEN else "model"


def _max_length(folder: Path, config: Mapping[str, Any], sentence: Sentence | None) -> int | None:
    table = position_limit(config)
    limits = [] if table is None else [table]
    stated: Any = sentence.max_length if sentence else None
    if stated is not None and counts_distances_alone(config):
        return int(stated)
    if stated is None and (folder / "tokenizer_config.json").is_file():
        stated = read_json(folder / "tokenizer_config.json").get("model_max_length")
    if isinstance(stated, int | float) and 0 < stated < _NO_LIMIT:
        limits.append(int(stated))
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
