"""What a sentence-transformers folder says: each key is honoured or refused by its name.

The measure is what sentence-transformers itself does with the folder. Files it does not read
without ``modules.json`` are not read here either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from memopt.errors import BundleError, MemoptError, WeightsError
from memopt.weights.chain import OWN, TOKENS, VECTOR, PoolStep, Step, UnitStep, read_chain
from memopt.weights.modules import (
    MODULES,
    SETTINGS,
    Module,
    json_object,
    read_modules,
    refuse_order,
)

# The first of these that says something counts, in sentence-transformers' own order.
TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Modes that one word of the manifest says, with or without normalising; else it says "chain".
POOLINGS = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last", OWN: "model"}
CHAINED = "chain"
_OLD_NAMES = {
    "model_args": "model_kwargs",
    "tokenizer_args": "processor_kwargs",
    "config_args": "config_kwargs",
}
# sentence-transformers puts its own values in place of these.
_REPLACED = {"subfolder", "token", "cache_dir", "revision", "local_files_only", "trust_remote_code"}
# How a model is loaded and run, not what it computes; memopt runs float32 whatever dtype says.
_LOADING = {
    *("dtype", "torch_dtype", "attn_implementation", "device_map", "low_cpu_mem_usage"),
    *("use_safetensors", "use_cache", "provider", "file_name", "export", "add_pooling_layer"),
}
_WITHOUT_EFFECT = {"unpad_inputs", "backend"}
_ONLY_EMPTY = ("query_length", "document_length", "query_expansion", "tokenizer_name_or_path")
_CALLS = {"padding": (True, "longest"), "truncation": (True,), "return_tensors": ("pt",)}


Chain: TypeAlias = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence-transformers pipeline, as far as memopt runs it.

    Attributes:
        modules: in the order they run.
        kind: the class that opens it.
        transformer: the folder of the model's own files, relative to the root; "" is the root.
        chain: what is done with the model's output, step by step.
        truncate_dim: how many leading values are kept, after normalising.
        prompt: what is put before every text by default.
        max_length: ``max_seq_length``, None where the tokenizer and the config decide.
        lower_case: whether texts are lowered before everything else.
        config: overrides of ``config.json``.
        tokenizer: arguments for ``AutoTokenizer.from_pretrained``.
        modalities: what the first module takes.
        similarity: the measure the model was made for, None where it does not say.
    """

    modules: tuple[Module, ...]
    transformer: str = ""
    chain: Chain = ()
    truncate_dim: int | None = None
    prompt: str = ""
    max_length: int | None = None
    lower_case: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    modalities: tuple[str, ...] = ("text",)
    similarity: str | None = None
    kind: str = "SentenceTransformer"

    @property
    def embeds(self) -> bool:
        """Whether it gives one vector an input."""
        return self.kind == "SentenceTransformer"

    @property
    def pooling(self) -> str:
        """One of ``memopt.bundle.POOLINGS``; ``chain`` where one word does not say it all."""
        if not self.embeds:
            return "none"
        pool, units = self.chain[0], set(self.chain[1:])
        simple = isinstance(pool, PoolStep) and len(pool.modes) == 1 and units <= {UnitStep()}
        mode = pool.modes[0] if isinstance(pool, PoolStep) and simple else ""
        return POOLINGS.get(mode, CHAINED)

    @property
    def width(self) -> int | None:
        """What the pooling file says of the token vectors' width."""
        return next((s.width for s in self.chain if isinstance(s, PoolStep)), None)

    @property
    def include_prompt(self) -> bool:
        """Whether the prompt's tokens are pooled too."""
        return all(s.include_prompt for s in self.chain if isinstance(s, PoolStep))

    @property
    def normalize(self) -> bool:
        """Whether the vector comes out at unit length."""
        if not self.embeds:
            return False
        makers = [step for step in self.chain if getattr(step, "gives", VECTOR) == VECTOR]
        return isinstance(makers[-1], UnitStep)


def read_sentence(folder: Path) -> Sentence | None:
    """Return the pipeline in ``folder``, None where it is not a sentence-transformers folder.

    Raises:
        WeightsError: a kind of model, a module or a key that memopt does not honour, named; or a
            file that is missing or damaged.
    """
    try:
        return _read(folder)
    except (TypeError, AttributeError, ValueError, KeyError) as error:
        if isinstance(error, MemoptError):
            raise
        raise WeightsError(
            f"{folder}: its sentence-transformers files hold what that library does not write "
            f"({error})",
            fix="compare them with a model that sentence-transformers saved",
        ) from error


def _read(folder: Path) -> Sentence | None:
    stated = json_object(folder / SETTINGS)
    kind = stated.get("model_type", "SentenceTransformer")
    if kind not in _TASKS:
        raise WeightsError(
            f"{folder / SETTINGS} says model_type {kind!r}, which memopt does not know",
            fix=f"known: {', '.join(_TASKS)}",
        )
    if not (folder / MODULES).is_file():
        return None
    modules = read_modules(folder)
    refuse_order(folder, modules)
    first = modules[0]
    settings, origin = transformer_settings(folder, first.path)
    own_head = _check_settings(settings, origin, first.kind, kind)
    begin = [PoolStep((OWN,))] if own_head else []
    if first.kind == "StaticEmbedding":
        begin = [PoolStep(("mean",))]
    chain = _chain(folder, modules, kind, begin)
    truncate = stated.get("truncate_dim")
    if truncate is not None and (type(truncate) is not int or truncate < 1):
        raise WeightsError(
            f"{folder / SETTINGS}: truncate_dim {truncate!r} is not a whole number above 0"
        )
    limit = settings.get("max_seq_length")
    tokenizer = _arguments(settings, "processor_kwargs")
    limit = tokenizer.get("model_max_length", _call_limit(settings, limit))
    return Sentence(
        modules=modules,
        transformer=first.path,
        chain=chain,
        truncate_dim=truncate,
        prompt=default_prompt(folder),
        max_length=int(limit) if isinstance(limit, int | float) and limit > 0 else None,
        lower_case=bool(settings.get("do_lower_case")),
        config=_arguments(settings, "config_kwargs"),
        tokenizer=tokenizer,
        modalities=_modalities(settings, first.kind),
        similarity=stated.get("similarity_fn_name"),
        kind="MultiVectorEncoder" if kind == "ColBERT" else kind,
    )


# What opens a folder -> the task of transformers that its first module has. PyLate's ColBERT is a
# MultiVectorEncoder of today.
_TASKS = {
    "SentenceTransformer": "feature-extraction",
    "CrossEncoder": "sequence-classification",
    "SparseEncoder": "fill-mask",
    "MultiVectorEncoder": "feature-extraction",
    "ColBERT": "feature-extraction",
}
_LATE = ("MultiVectorEncoder", "ColBERT")


def _chain(folder: Path, modules: tuple[Module, ...], kind: str, begin: Sequence[Step]) -> Chain:
    """Return the steps behind the model; of a kind without any, check that there are none."""
    rest = [m for m in modules[1:] if m.kind != "Dropout"]
    if kind in _LATE:
        kept = [m for m in rest if m.kind != "MultiVectorMask"]
        chain = read_chain(folder, kept, gives=TOKENS)
        # PyLate normalised in its own code.
        return (*chain, UnitStep(TOKENS, TOKENS)) if kind == "ColBERT" else chain
    wanted = {"CrossEncoder": [], "SparseEncoder": ["SpladePooling"]}.get(kind)
    if wanted is None:
        return read_chain(folder, modules[1:], begin)
    if [m.kind for m in rest] != wanted:
        raise WeightsError(
            f"{folder / MODULES}: a {kind} of the modules {', '.join(m.kind for m in modules)} is "
            "not one that memopt runs",
            fix=f"one of {', '.join(['Transformer', *wanted])} can be converted",
        )
    if kind == "CrossEncoder" and default_prompt(folder):
        raise WeightsError(f"{folder / SETTINGS}: a default prompt of pairs is not honoured")
    return ()


def transformer_settings(folder: Path, inside: str) -> tuple[dict[str, Any], Path]:
    """Return what the first module's settings file says, new key names, and which file it is."""
    for name in TRANSFORMER_FILES:
        path = folder / inside / name
        if stated := json_object(path):
            for old, new in _OLD_NAMES.items():
                if old in stated:
                    stated[new] = stated.pop(old)
            return stated, path
    return {}, folder / inside / TRANSFORMER_FILES[0]


def default_prompt(folder: Path) -> str:
    """Return what sentence-transformers puts before every text when nobody asks for a prompt.

    Raises:
        BundleError: the default is not among the prompts.
    """
    name = json_object(folder / SETTINGS).get("default_prompt_name")
    if name is None or not (folder / MODULES).is_file():
        return ""
    known = named_prompts(folder)
    if not isinstance(name, str) or name not in known:
        raise BundleError(
            f"{folder / SETTINGS}: the default prompt {name!r} is not among the prompts "
            f"{list(known)[2:]}"
        )
    return known[name]


def named_prompts(folder: Path) -> dict[str, str]:
    """Return what sentence-transformers puts before a text, by the name of the prompt.

    ``query`` and ``document`` are always there, empty unless the file says something.

    >>> named_prompts(Path("/nowhere"))
    {'query': '', 'document': ''}
    """
    stated = json_object(folder / SETTINGS).get("prompts") if (folder / MODULES).is_file() else {}
    known = stated if isinstance(stated, dict) else {}
    texts = {name: text or "" for name, text in known.items() if isinstance(text or "", str)}
    return {"query": "", "document": "", **texts}


def lower_cased(folder: Path) -> bool:
    """Whether the folder's texts are lowered before its own tokenizer sees them."""
    if not (folder / MODULES).is_file():
        return False
    return bool(transformer_settings(folder, "")[0].get("do_lower_case"))


def _check_settings(settings: Mapping[str, Any], origin: Path, first: str, kind: str) -> bool:
    """Refuse what memopt does not honour; return whether the model pools by itself."""
    allowed = {
        *("max_seq_length", "do_lower_case", "transformer_task", "modality_config"),
        *("module_output_name", "processing_kwargs", *_OLD_NAMES.values()),
        *(_WITHOUT_EFFECT | set(_ONLY_EMPTY)),
    }
    if unknown := sorted(set(settings) - allowed):
        raise WeightsError(f"{origin}: key {unknown[0]!r} is not known, so it is not honoured")
    for key in _ONLY_EMPTY if kind not in _LATE else ():
        if settings.get(key) is not None:
            raise WeightsError(f"{origin}: {key} {settings[key]!r} is not honoured by memopt")
    if (task := settings.get("transformer_task", _TASKS[kind])) != _TASKS[kind]:
        raise WeightsError(
            f"{origin} says transformer_task {task!r}, which is not what memopt runs a {kind} for",
            fix=f"convert a model of transformer_task {_TASKS[kind]!r}",
        )
    for key in set(_arguments(settings, "model_kwargs")) - _LOADING:
        value = settings["model_kwargs"][key]
        raise WeightsError(f"{origin}: model_kwargs {key!r} ({value!r}) is not honoured by memopt")
    for group, call in (settings.get("processing_kwargs") or {}).items():
        if group not in ("common", "text"):
            continue  # of images, or of chat messages, which are no texts
        for key, value in call.items():
            if value not in _CALLS.get(key, ()) and key != "max_length":
                raise WeightsError(
                    f"{origin}: processing_kwargs {key!r} ({value!r}) is not honoured"
                )
    return _own_head(settings, origin, first) if kind == "SentenceTransformer" else False


def _own_head(settings: Mapping[str, Any], origin: Path, kind: str) -> bool:
    config = settings.get("modality_config")
    if config is None:
        return kind == "CLIPModel"
    output = settings.get("module_output_name")
    plain = ("forward", "last_hidden_state"), ("forward", "pooler_output")
    towers = tuple((f"get_{m}_features", "pooler_output") for m in ("text", "image"))
    for modality, entry in config.items():
        if modality not in ("text", "image", "audio"):
            continue  # "message" is for chats, "video" for films: memopt gets neither
        how = (entry.get("method"), entry.get("method_output_name"))
        if (output == "token_embeddings" and how == plain[0]) or (
            output == "sentence_embedding" and how in (plain[1], *towers)
        ):
            continue
        raise WeightsError(
            f"{origin}: modality_config takes {how[1]!r} of {how[0]!r} for {modality} as "
            f"{output!r}, which memopt does not do"
        )
    return bool(output == "sentence_embedding")


def _modalities(settings: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    default = ("text", "image") if kind == "CLIPModel" else ("text",)
    return tuple(settings.get("modality_config") or default)


def _call_limit(settings: Mapping[str, Any], limit: Any) -> Any:
    calls = settings.get("processing_kwargs") or {}
    for group in ("text", "common"):
        value = (calls.get(group) or {}).get("max_length")
        if value is not None:
            return value
    return limit


def _arguments(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in (settings.get(key) or {}).items() if k not in _REPLACED}
