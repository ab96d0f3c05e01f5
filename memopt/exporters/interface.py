"""What goes in and comes out of a graph: signature, the module that is traced, reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from memopt.bundle import Manifest
from memopt.errors import ExportError
from memopt.exporters.answers import answers
from memopt.exporters.examples import check_shapes, example, free_picture, trace_shape
from memopt.exporters.masks import attention_arguments
from memopt.graphs.session import Observe
from memopt.runtimes.heads import head_outputs
from memopt.runtimes.torch_model import LoadedModel, load_model, reset
from memopt.tasks.table import task_of
from memopt.weights.kinds import AST, FULL_LENGTH, UNPADDED

__all__ = [
    "check_shapes",
    "example",
    "load_model",
    "reference",
    "signature",
    "trace_shape",
    "wrap",
]


@dataclass(frozen=True, slots=True)
class Signature:
    """Names of a graph's inputs and outputs, and which axes of each input are dynamic."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]


def signature(loaded: LoadedModel, manifest: Manifest, task: str) -> Signature:
    """Return the graph signature of docs/architecture.md for this model and task.

    Raises:
        ExportError: the model must be given something that memopt does not make.
    """
    own = _signature(loaded, task)
    inside = [name for name in own.inputs if name != "pooling_mask"]  # that is the head's
    takes = inspect.signature(loaded.call).parameters
    needed = [
        name
        for name, parameter in takes.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in inside
    ]
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    # A mask that gets lost in **kwargs is a mask that is not used: padding would change vectors.
    foreign = [
        name for name in inside if name not in takes and (not free or name == "attention_mask")
    ]
    if needed or foreign:
        what = [f"needs {name}" for name in needed] + [f"takes no {name}" for name in foreign]
        raise ExportError(
            f"{loaded.config.model_type} cannot be run as {task}, which gives a model "
            f"{' and '.join(own.inputs)}: it {' and '.join(what)}",
            fix="choose another --task, or an encoder of text, pictures or sound alone",
        )
    return own


def _signature(loaded: LoadedModel, task: str) -> Signature:
    row = task_of(task)
    if row.modality == "text":
        forward = inspect.signature(loaded.call).parameters
        names = ["input_ids"]
        kind = loaded.config.model_type
        if kind not in FULL_LENGTH and (kind not in UNPADDED or "attention_mask" in forward):
            names.append("attention_mask")
        if (
            task != "text-generation"
            and "token_type_ids" in forward
            and getattr(loaded.config, "type_vocab_size", 0) > 1
        ):
            names.append("token_type_ids")
        if row.embeds and not loaded.head.include_prompt:
            names.append("pooling_mask")
        axes = {0: "batch", 1: "sequence"}
        return Signature(tuple(names), row.outputs, {name: dict(axes) for name in names})
    if row.modality == "image":
        shape = {0: "batch", 2: "height", 3: "width"} if free_picture(loaded) else {0: "batch"}
        return Signature(("pixel_values",), row.outputs, {"pixel_values": shape})
    if loaded.config.model_type == "whisper":
        # The encoder's position table fixes 30 s of audio: only the batch is dynamic.
        return Signature(("input_features",), row.outputs, {"input_features": {0: "batch"}})
    if loaded.config.model_type == AST:
        return Signature(("input_values",), row.outputs, {"input_values": {0: "batch"}})
    axes = {0: "batch", 1: "samples"}
    return Signature(("input_values",), row.outputs, {"input_values": axes})


@cache
def headed_class() -> Any:
    """Return the wrapper class; made on first use because it needs torch."""
    import torch

    class Headed(torch.nn.Module):  # type: ignore[misc]
        """The model, called with positional graph inputs, plus the head of its task."""

        def __init__(self, loaded: LoadedModel, inputs: tuple[str, ...]) -> None:
            super().__init__()
            self.model = loaded.module
            self.config = loaded.config
            self.method = loaded.method or "forward"
            self.head = loaded.head
            self.chain = torch.nn.ParameterList(loaded.head.weights.values()).requires_grad_(False)
            self.inputs = inputs

        def forward(self, *values: Any) -> Any:
            named = dict(zip(self.inputs, values, strict=True))
            mask, kept = named.get("attention_mask"), named.pop("pooling_mask", None)
            masked = attention_arguments(self.model, self.config, mask)
            result = getattr(self.model, self.method)(**named | masked)
            weights = dict(zip(self.head.weights, self.chain, strict=True))
            return head_outputs(replace(self.head, weights=weights), result, mask, kept)

    return Headed


def wrap(loaded: LoadedModel, manifest: Manifest, task: str) -> Any:
    """Return a torch module that maps the graph's inputs, in order, to its outputs."""
    names = signature(loaded, manifest, task).inputs
    return headed_class()(loaded, names).eval()


def reference(loaded: LoadedModel, manifest: Manifest, task: str, feeds: dict[str, Any]) -> Any:
    """Return the outputs of the untouched model on ``feeds``, with the head in numpy.

    Independent of the graph on purpose: the model makes its own mask, and pooling is written a
    second time.
    """
    import torch

    reset(loaded.module, loaded.config)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        cache = {"use_cache": False} if task == "text-generation" else {}
        tensors.pop("pooling_mask", None)
        result = loaded.call(**tensors, **cache)
    row = task_of(task)
    if not row.embeds and task != "late-interaction":
        return answers(loaded.head, result, feeds)
    if getattr(result, "last_hidden_state", None) is None:
        raise ExportError(
            f"{loaded.config.model_type} gives {type(result).__name__} and no last_hidden_state: "
            "memopt does not know what stands for its input",
            fix="choose another --task, or an encoder of text, pictures or sound",
        )
    _refuse_missing_class_token(loaded, feeds, result.last_hidden_state)
    return answers(loaded.head, result, feeds)


def _refuse_missing_class_token(loaded: LoadedModel, feeds: dict[str, Any], hidden: Any) -> None:
    """Refuse to take the first patch, a corner of the picture, for what stands for all of it."""
    patch = getattr(loaded.config, "patch_size", None)
    if loaded.head.pooling != "cls" or "pixel_values" not in feeds or not isinstance(patch, int):
        return
    high, wide = feeds["pixel_values"].shape[2:]
    if hidden.ndim == 3 and hidden.shape[1] <= (high // patch) * (wide // patch):
        raise ExportError(
            f"{loaded.config.model_type} has no class token: its {hidden.shape[1]} tokens are "
            "patches, and pooling 'cls' would take the first of them",
            fix="convert it again, or set pooling 'mean' or 'model' in memopt.json",
        )


def by_name(
    observe: Observe, outputs: Sequence[str], refuse: Callable[[str, Exception], ExportError]
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return feeds -> outputs by name; what a runtime raises is ``refuse(the shapes, error)``."""

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        try:
            values = observe(feeds)
        except Exception as error:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feeds.items())
            raise refuse(shapes, error) from error
        return dict(zip(outputs, values, strict=True))

    return run
