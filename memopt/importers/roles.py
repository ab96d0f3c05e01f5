"""Recognise what the inputs and outputs of a graph are, and so which task it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from memopt.errors import ConfigurationError, ExportError
from memopt.importers.graph_file import GraphFile
from memopt.registry import nearest
from memopt.runtimes.engines.graph import Port
from memopt.tasks.table import Task, task_of, task_of_class
from memopt.weights.sentence import Sentence

# What TensorFlow's BERT and onnxruntime's own examples call the same things.
ALIASES = {
    "input_word_ids": "input_ids",
    "input_mask": "attention_mask",
    "input_type_ids": "token_type_ids",
    "segment_ids": "token_type_ids",
}
# Our names of inputs -> the kind of input and the type that its front end gives.
OURS = {
    "input_ids": ("text", "int64"),
    "attention_mask": ("", "int64"),
    "token_type_ids": ("text", "int64"),
    "pixel_values": ("image", "float32"),
    "input_values": ("audio", "float32"),
    "input_features": ("audio", "float32"),
}
_LEADING = {"text": "input_ids", "image": "pixel_values", "audio": "input_values"}
_EMBEDDING = {"text": "embedding", "image": "image-embedding", "audio": "audio-embedding"}
_CLASSES = {
    "text": "text-classification",
    "image": "image-classification",
    "audio": "audio-classification",
}
# Names of outputs that are an input's vector, and of those that are its tokens'; the first wins.
_VECTORS = ("sentence_embedding", "text_embeds", "image_embeds", "embedding", "embeddings")
_TOKENS = ("last_hidden_state", "token_embeddings", "hidden_states")
# Inputs of Silero's graphs of voice activity, with the state they hand on.
_VOICE = ({"input", "state"}, {"input", "h", "c"})
POOLINGS = ("mean", "cls", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedHead:
    """What is added behind a graph's own outputs.

    Attributes:
        kind: vector, spans or boxes.
        sources: the graph's outputs that it is made of.
        output: what it is called.
        pooling: of a vector made of tokens, "" where there is nothing to pool.
        normalize: whether a vector is made unit length.
        keep: how many leading numbers of it are kept, None for all.
    """

    kind: str
    sources: tuple[str, ...]
    output: str
    pooling: str = ""
    normalize: bool = False
    keep: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """What a graph is for.

    Attributes:
        task: its task's name.
        rename: its names of inputs -> ours.
        answer: the output that engines ask for.
        pooling: what the manifest says of it.
        head: what has to be added for the answer, None for nothing.
        told: what was concluded, a line each.
    """

    task: str
    rename: Mapping[str, str]
    answer: str
    pooling: str = "none"
    head: AddedHead | None = None
    told: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user said of a graph; everything may be left out."""

    task: str | None = None
    rename: Mapping[str, str] | None = None
    output: str | None = None
    pooling: str | None = None
    normalize: bool | None = None


def recognise(
    graph: GraphFile, wishes: Wishes, config: Mapping[str, Any], sentence: Sentence | None
) -> Roles:
    """Return what a graph is for.

    Args:
        graph: as read.
        wishes: what the user said.
        config: the model's config.json, {} where there is none.
        sentence: the sentence-transformers pipeline beside it, None where there is none.

    Raises:
        ExportError: it cannot be told, or it is not what the user says; the message says which
            option helps.
        ConfigurationError: an option names what is not there.
    """
    _check(graph, wishes)
    sentence = sentence if sentence is not None and sentence.embeds else None
    rename = _renamed(graph, wishes)
    names = dict(zip(rename.values(), graph.inputs, strict=True))
    if wishes.task == "graph" or _plain(graph, names, wishes):
        return Roles(task="graph", rename={}, answer=wishes.output or graph.outputs[0].name)
    if wishes.task in (None, "voice-activity") and _hears_voices(graph):
        return Roles(task="voice-activity", rename={}, answer=graph.outputs[0].name)
    modality = _modality(names)
    _refuse_foreign(graph, names, modality)
    row = task_of(wishes.task) if wishes.task else _task(graph, modality, wishes, config, sentence)
    if row.modality != modality:
        raise ExportError(
            f"{graph.path} takes {', '.join(names)}, which is {modality}, and task {row.name} takes"
            f" {row.modality}",
            fix="choose another --task",
        )
    vector = row.embeds
    roles = _embedding(graph, row, wishes, sentence) if vector else _other(graph, row, wishes)
    used = {theirs: ours for theirs, ours in rename.items() if theirs != ours}
    told = tuple(f"its input {theirs} is taken as {ours}" for theirs, ours in used.items())
    return replace(roles, rename=used, told=(*told, *roles.told))


def _check(graph: GraphFile, wishes: Wishes) -> None:
    inputs = [port.name for port in graph.inputs]
    outputs = [port.name for port in graph.outputs]
    if wishes.task is not None and task_of(wishes.task).family:
        raise ConfigurationError(
            f"a graph of task {wishes.task} cannot be imported", fix="use --task graph"
        )
    for theirs, ours in (wishes.rename or {}).items():
        if theirs not in inputs:
            raise ConfigurationError(
                f"--rename: the graph has no input {theirs!r}", fix=nearest(theirs, inputs)
            )
        if ours not in OURS:
            raise ConfigurationError(
                f"--rename: {ours!r} is no input that memopt gives", fix=nearest(ours, list(OURS))
            )
    if wishes.output is not None and wishes.output not in outputs:
        raise ConfigurationError(
            f"--output: the graph has no output {wishes.output!r}",
            fix=nearest(wishes.output, outputs),
        )
    if wishes.pooling is not None and wishes.pooling not in (*POOLINGS, "none"):
        raise ConfigurationError(
            f"--pooling {wishes.pooling!r} is not known", fix=nearest(wishes.pooling, POOLINGS)
        )


def _renamed(graph: GraphFile, wishes: Wishes) -> dict[str, str]:
    """Return each input's name -> ours."""
    said = dict(wishes.rename or {})
    rename = {p.name: said.get(p.name, ALIASES.get(p.name, p.name)) for p in graph.inputs}
    known = [ours for ours in rename.values() if ours in OURS]
    if not known and wishes.task not in (None, "graph") and len(rename) == 1:
        # One input of one kind: there is nothing to mix up.
        leading = _LEADING.get(task_of(wishes.task or "graph").modality)
        rename = {theirs: leading or theirs for theirs in rename}
    twice = [ours for ours in rename.values() if list(rename.values()).count(ours) > 1]
    if twice:
        raise ConfigurationError(f"--rename: two inputs would be called {twice[0]!r}")
    return rename


def _plain(graph: GraphFile, names: Mapping[str, Port], wishes: Wishes) -> bool:
    """Whether nobody says what the graph is, and its inputs do not either."""
    if wishes.task is not None or _hears_voices(graph):
        return False
    modalities = {OURS[name][0] for name in names if name in OURS} - {""}
    return len(modalities) != 1 or bool(set(names) - set(OURS))


def _hears_voices(graph: GraphFile) -> bool:
    names = {port.name for port in graph.inputs}
    return names - {"sr"} in _VOICE


def _modality(names: Mapping[str, Port]) -> str:
    found = {OURS[name][0] for name in names if name in OURS} - {""}
    return min(found) if len(found) == 1 else " and ".join(sorted(found)) or "nothing known"


def _refuse_foreign(graph: GraphFile, names: Mapping[str, Port], modality: str) -> None:
    if modality not in _LEADING:
        raise ExportError(
            f"{graph.path} takes {', '.join(names)}: that is {modality}",
            fix=f"name its input with --rename {next(iter(names))}=input_ids (or pixel_values, "
            "input_values, input_features), or use --task graph",
        )
    foreign = [str(port) for name, port in names.items() if name not in OURS]
    if foreign:
        raise ExportError(
            f"{graph.path} also takes {', '.join(foreign)}, which memopt does not make of "
            f"{modality}",
            fix="name it with --rename THEIRS=OURS, or use --task graph",
        )
    if modality == "text" and "attention_mask" not in names:
        raise ExportError(
            f"{graph.path} takes no attention_mask: what it answers would depend on the padding of "
            "a batch",
            fix="export it with its mask, or use --task graph",
        )


def _task(
    graph: GraphFile,
    modality: str,
    wishes: Wishes,
    config: Mapping[str, Any],
    sentence: Sentence | None,
) -> Task:
    """Return the task that the outputs, and beside them the config, speak of."""
    outputs = {port.name: port for port in graph.outputs}
    embeds = task_of(_EMBEDDING[modality])
    if sentence is not None or wishes.pooling is not None:
        return embeds
    if {"start_logits", "end_logits"} <= set(outputs):
        return task_of("question-answering")
    if {"logits", "pred_boxes"} <= set(outputs):
        return task_of("object-detection")
    if "logits" not in outputs:
        return embeds
    stated = task_of_class(str((config.get("architectures") or [""])[0]))
    if stated is not None and stated.modality == modality:
        one = stated.name == "text-classification" and _width(outputs["logits"]) == 1
        regression = config.get("problem_type") == "regression"
        return task_of("reranking") if one and not regression else stated
    if len(outputs["logits"].shape or ()) == 2:
        one = modality == "text" and _width(outputs["logits"]) == 1
        return task_of("reranking" if one else _CLASSES[modality])
    raise ExportError(
        f"{graph.path} gives logits ({outputs['logits']}), and no config.json says what of",
        fix="say --task, or --config with the model's config.json",
    )


def _width(port: Port) -> int | str | None:
    return port.shape[-1] if port.shape else None


def _embedding(graph: GraphFile, row: Task, wishes: Wishes, sentence: Sentence | None) -> Roles:
    outputs = {port.name: port for port in graph.outputs}
    usual = [name for name in (*_VECTORS, *_TOKENS) if name in outputs]
    answer = wishes.output or next(iter(usual), None)
    told: tuple[str, ...] = ()
    if answer is None and len(outputs) == 1:
        answer = next(iter(outputs))
        told = (f"its one output {answer} is taken as the answer",)
    if answer is None:
        raise ExportError(
            f"{graph.path} gives {', '.join(map(str, outputs.values()))}: none of them is called "
            "as vectors are",
            fix="choose one with --output NAME, or use --task graph",
        )
    rank = len(outputs[answer].shape or ()) or (3 if answer in _TOKENS else 2)
    if rank not in (2, 3):
        raise ExportError(
            f"{graph.path}: the output {outputs[answer]} is neither a vector an input nor one a "
            "token",
            fix="choose another with --output NAME",
        )
    normalize = wishes.normalize
    if normalize is None:
        normalize = bool(sentence and sentence.normalize)
    keep = sentence.truncate_dim if sentence else None
    pooling = _pooling(graph, outputs[answer], rank, wishes, sentence)
    head = None
    if pooling or normalize or keep:
        head = AddedHead(
            kind="vector",
            sources=(answer,),
            output="sentence_embedding",
            pooling=pooling,
            normalize=normalize,
            keep=keep,
        )
    return Roles(
        task=row.name,
        rename={},
        answer=head.output if head else answer,
        pooling=pooling or "model",
        head=head,
        told=told,
    )


def _pooling(
    graph: GraphFile, answer: Port, rank: int, wishes: Wishes, sentence: Sentence | None
) -> str:
    """Return how the answer is pooled, "" where it is a vector already."""
    if rank == 2:
        if wishes.pooling not in (None, "none"):
            raise ConfigurationError(
                f"--pooling {wishes.pooling}: the output {answer} is a vector an input already",
                fix="leave it out, or choose the tokens with --output NAME",
            )
        return ""
    pooling = wishes.pooling or (sentence.pooling if sentence else None)
    if pooling not in POOLINGS:
        said = f"is pooled by {pooling!r}, which is not added to graphs" if pooling else ""
        raise ExportError(
            f"{graph.path} gives a vector a token ({answer}), "
            + (said or "and nothing says how they become one"),
            fix=f"say --pooling {' or '.join(POOLINGS)}, whichever it was trained for",
        )
    if sentence and not sentence.include_prompt and sentence.prompt:
        raise ExportError(
            f"{graph.path}: its prompt {sentence.prompt!r} is not pooled, which is not added to "
            "graphs",
            fix="convert the model's safetensors",
        )
    return pooling


def _other(graph: GraphFile, row: Task, wishes: Wishes) -> Roles:
    """Return the roles of a graph whose answer is no vector."""
    outputs = {port.name: port for port in graph.outputs}
    if row.name == "question-answering" and row.outputs[-1] not in outputs:
        head = AddedHead(
            kind="spans", sources=("start_logits", "end_logits"), output=row.outputs[-1]
        )
    elif row.name == "object-detection" and row.outputs[-1] not in outputs:
        head = AddedHead(kind="boxes", sources=("logits", "pred_boxes"), output=row.outputs[-1])
    else:
        answer = wishes.output or (row.outputs[-1] if row.outputs[-1] in outputs else None)
        if answer is None and len(outputs) == 1:
            answer = next(iter(outputs))
        if answer is None:
            raise ExportError(
                f"{graph.path} gives {', '.join(outputs)}, and no {row.outputs[-1]}",
                fix="choose one with --output NAME",
            )
        return Roles(task=row.name, rename={}, answer=answer)
    if missing := [name for name in head.sources if name not in outputs]:
        raise ExportError(
            f"{graph.path} gives {', '.join(outputs)}, and no {missing[0]}",
            fix=f"task {row.name} needs {' and '.join(head.sources)}; --task graph needs nothing",
        )
    return Roles(task=row.name, rename={}, answer=head.output, head=head)
