"""What goes in and comes out for each task: heads, signatures, and inputs to trace and check with.

A head follows sentence-transformers: pooling over the tokens the mask keeps, then normalise
(Reimers and Gurevych 2019, https://arxiv.org/abs/1908.10084, section 3).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from memopt.bundle import Manifest
from memopt.errors import ExportError
from memopt.exporters.masks import attention_arguments
from memopt.exporters.pooling import pool_numpy, pool_torch, without_prompt
from memopt.graphs.session import Observe
from memopt.positions import position_limit
from memopt.runtimes.torch_model import LoadedModel, load_model, reset
from memopt.runtimes.vectors import unit_rows

# Bytes of one layer's attention scores, or of the logits, that a check may take: 2,364 tokens of 12
# heads. Torch and the runtime hold a few such arrays at once.
LONGEST_SCORES = 256 << 20
__all__ = [
    "check_shapes",
    "example",
    "load_model",
    "reference",
    "signature",
    "trace_shape",
    "wrap",
]
OUTPUTS = ("last_hidden_state", "sentence_embedding")


@dataclass(frozen=True, slots=True)
class Signature:
    """Names of a graph's inputs and outputs, and which axes of each input are dynamic."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]


@dataclass(frozen=True, slots=True)
class Shape:
    """One check: ``batch`` rows of ``length`` tokens or samples; ``padding`` is where, if anywhere.

    Of a padded batch the first row is whole and the others get shorter and shorter.
    """

    batch: int
    length: int
    padding: Literal["", "left", "right"] = ""


def signature(loaded: LoadedModel, manifest: Manifest, task: str) -> Signature:
    """Return the graph signature of docs/architecture.md for this model and task.

    Raises:
        ExportError: the model must be given something that memopt does not make.
    """
    own = _signature(loaded, task)
    takes = inspect.signature(loaded.call).parameters
    needed = [
        name
        for name, parameter in takes.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in own.inputs
    ]
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    # A mask that gets lost in **kwargs is a mask that is not used: padding would change vectors.
    foreign = [
        name for name in own.inputs if name not in takes and (not free or name == "attention_mask")
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
    if task in ("embedding", "text-generation"):
        names = ["input_ids", "attention_mask"]
        forward = inspect.signature(loaded.call).parameters
        if (
            task == "embedding"
            and "token_type_ids" in forward
            and getattr(loaded.config, "type_vocab_size", 0) > 1
        ):
            names.append("token_type_ids")
        outputs = OUTPUTS if task == "embedding" else ("logits",)
        axes = {0: "batch", 1: "sequence"}
        return Signature(tuple(names), outputs, {name: dict(axes) for name in names})
    if task == "image-embedding":
        return Signature(("pixel_values",), OUTPUTS, {"pixel_values": {0: "batch"}})
    if loaded.config.model_type == "whisper":
        # The encoder's position table fixes 30 s of audio: only the batch is dynamic.
        return Signature(("input_features",), OUTPUTS, {"input_features": {0: "batch"}})
    axes = {0: "batch", 1: "samples"}
    return Signature(("input_values",), OUTPUTS, {"input_values": axes})


@cache
def _module_classes() -> Any:
    """Return the wrapper class; made on first use because it needs torch."""
    import torch

    class Headed(torch.nn.Module):  # type: ignore[misc]
        """The model, called with positional graph inputs, plus its pooling and normalise head."""

        def __init__(
            self, loaded: LoadedModel, inputs: tuple[str, ...], pooling: str, normalize: bool
        ) -> None:
            super().__init__()
            self.model = loaded.module
            self.config = loaded.config
            self.method = loaded.method or "forward"
            self.skip = loaded.skip
            self.keep = loaded.keep
            self.inputs = inputs
            self.pooling = pooling
            self.normalize = normalize

        def forward(self, *values: Any) -> Any:
            named = dict(zip(self.inputs, values, strict=True))
            mask = named.get("attention_mask")
            masked = attention_arguments(self.model, self.config, mask)
            result = getattr(self.model, self.method)(**named | masked)
            if self.pooling == "logits":
                return (result.logits,)
            hidden = result.last_hidden_state
            pooled = pool_torch(result, hidden, without_prompt(mask, self.skip), self.pooling)
            if self.normalize:
                pooled = torch.nn.functional.normalize(pooled, p=2.0, dim=-1)
            return hidden, pooled if self.keep is None else pooled[:, : self.keep]

    return Headed


def wrap(loaded: LoadedModel, manifest: Manifest, task: str) -> Any:
    """Return a torch module that maps the graph's inputs, in order, to its outputs."""
    pooling = "logits" if task == "text-generation" else manifest.pooling
    if pooling == "none":
        pooling = "mean"
    names = signature(loaded, manifest, task).inputs
    module = _module_classes()(loaded, names, pooling, manifest.normalize)
    return module.eval()


def reference(loaded: LoadedModel, manifest: Manifest, task: str, feeds: dict[str, Any]) -> Any:
    """Return the outputs of the untouched model on ``feeds``, with the head in numpy.

    Independent of the graph on purpose: the model makes its own mask, and pooling is written a
    second time.
    """
    import torch

    reset(loaded.module, loaded.config)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        if task == "text-generation":
            return {"logits": loaded.module(**tensors, use_cache=False).logits.numpy()}
        result = loaded.call(**tensors)
    if getattr(result, "last_hidden_state", None) is None:
        raise ExportError(
            f"{loaded.config.model_type} gives {type(result).__name__} and no last_hidden_state: "
            "memopt does not know what stands for its input",
            fix="choose another --task, or an encoder of text, pictures or sound",
        )
    hidden = result.last_hidden_state.numpy()
    _refuse_missing_class_token(loaded, manifest, feeds, hidden)
    mask = feeds.get("attention_mask", np.ones(hidden.shape[:2], dtype=np.int64))
    if loaded.skip:
        mask = mask * (np.cumsum(mask, axis=1) > loaded.skip)
    pooled = pool_numpy(result, hidden, mask, manifest.pooling)
    if manifest.normalize:
        pooled = unit_rows(pooled)
    return {"last_hidden_state": hidden, "sentence_embedding": pooled[:, : loaded.keep]}


def _refuse_missing_class_token(
    loaded: LoadedModel, manifest: Manifest, feeds: dict[str, Any], hidden: np.ndarray
) -> None:
    """Refuse to take the first patch, a corner of the picture, for what stands for all of it."""
    patch = getattr(loaded.config, "patch_size", None)
    if manifest.pooling != "cls" or "pixel_values" not in feeds or not isinstance(patch, int):
        return
    high, wide = feeds["pixel_values"].shape[2:]
    if hidden.ndim == 3 and hidden.shape[1] <= (high // patch) * (wide // patch):
        raise ExportError(
            f"{loaded.config.model_type} has no class token: its {hidden.shape[1]} tokens are "
            "patches, and pooling 'cls' would take the first of them",
            fix="convert it again, or set pooling 'mean' or 'model' in memopt.json",
        )


def example(loaded: LoadedModel, names: tuple[str, ...], shape: Shape, seed: int) -> dict[str, Any]:
    """Return seeded inputs of one shape, each an array of its own; row 0 is never padded."""
    generator = np.random.default_rng(seed)
    config = loaded.config
    feeds: dict[str, Any] = {}
    if "input_ids" in names:
        # Of two towers the text's has it; some configs name a token that the table has no row of.
        text = getattr(config, "text_config", None) or config
        pad = getattr(text, "pad_token_id", None)
        rows = _vocabulary(loaded, text)
        pad = pad if isinstance(pad, int) and 0 <= pad < rows else 0
        ids = generator.integers(0, rows, (shape.batch, shape.length))
        ids[ids == pad] = (pad + 1) % rows
        mask = np.ones((shape.batch, shape.length), dtype=np.int64)
        if shape.padding:
            for row in range(1, shape.batch):
                kept = shape.length - 1 - row * shape.length // (shape.batch + 1)
                mask[row, max(1 + loaded.skip, kept) :] = 0
        if shape.padding == "left":
            mask = np.ascontiguousarray(mask[:, ::-1])
        ids[mask == 0] = pad
        eos = getattr(config, "eos_token_id", None)
        if config.model_type in ("clip", "clip_text_model") and isinstance(eos, int):
            # CLIP pools at the end-of-text token: every row has one, at its last kept place.
            ids[ids == eos] = (eos + 1) % rows
            last = shape.length - 1 - mask[:, ::-1].argmax(axis=1)
            ids[np.arange(shape.batch), last] = eos
        feeds["input_ids"] = ids.astype(np.int64)
        feeds["attention_mask"] = mask
        if "token_type_ids" in names:
            types = np.zeros_like(mask)
            types[:, shape.length // 2 :] = 1
            feeds["token_type_ids"] = types * mask
    elif "pixel_values" in names:
        feeds["pixel_values"] = generator.normal(0, 1, (shape.batch, *_picture(loaded)))
    elif "input_features" in names:
        frames = config.max_source_positions * 2
        feeds["input_features"] = generator.normal(0, 1, (shape.batch, config.num_mel_bins, frames))
    else:
        feeds["input_values"] = generator.normal(0, 1, (shape.batch, shape.length))
    return {n: v.astype(np.float32) if v.dtype.kind == "f" else v for n, v in feeds.items()}


def _vocabulary(loaded: LoadedModel, config: Any) -> int:
    """Return how many token ids the model takes."""
    try:
        table = loaded.module.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        table = None  # of two towers transformers does not say which one's
    rows = getattr(getattr(table, "weight", None), "shape", (None,))[0]
    rows = rows or getattr(config, "vocab_size", None)
    if not isinstance(rows, int):
        raise ExportError(
            f"{config.model_type} has no table of tokens: memopt does not know what ids it takes",
            fix="choose another --task, or an encoder of text whose config.json has a vocab_size",
        )
    return rows


def _picture(loaded: LoadedModel) -> tuple[int, int, int]:
    """Return (channels, height, width) of what the image front end gives this model."""
    if loaded.picture is not None:
        return loaded.picture
    config = getattr(loaded.config, "vision_config", None) or loaded.config
    size = getattr(config, "image_size", None)
    if size is None:
        raise ExportError(
            f"config.json of this {loaded.config.model_type} has no image_size, and there is no "
            "preprocessor_config.json beside it",
            fix="convert a folder that has the model's preprocessor_config.json",
        )
    high, wide = (size, size) if isinstance(size, int) else size
    return getattr(config, "num_channels", 3), high, wide


def check_shapes(loaded: LoadedModel, task: str, max_length: int | None) -> tuple[Shape, ...]:
    """Return the shapes every export is checked on: at least four, with padding where it exists."""
    if task in ("embedding", "text-generation"):
        limit = _longest(loaded, task, max_length)
        longest = min(limit, 128)
        plan: tuple[tuple[int, int, Literal["", "left", "right"]], ...] = (
            (1, 1, ""),
            (1, 3, ""),
            (2, 8, "right"),
            (5, 17, "right"),
            (4, 33, "left"),
            (3, longest, "right"),
            # Some models do something else with long texts (BigBird attends in blocks).
            *(((1, limit, ""),) if limit > longest else ()),
        )
        # A prompt that is not pooled leaves nothing of a text shorter than itself.
        limit = max(limit, min(loaded.skip + 17, max_length or loaded.skip + 17))
        plan = tuple((b, min(length + loaded.skip, limit), side) for b, length, side in plan)
        return tuple(Shape(b, max(1, length), side) for b, length, side in plan)
    if task == "image-embedding" or loaded.config.model_type == "whisper":
        return tuple(Shape(batch, 0) for batch in (1, 2, 3, 4))
    return tuple(
        Shape(batch, length) for batch, length in ((1, 4_000), (2, 16_000), (3, 9_001), (1, 32_000))
    )


def _longest(loaded: LoadedModel, task: str, max_length: int | None) -> int:
    """Return the most tokens to check with: all that a text may have, or what memory allows."""
    config = loaded.config
    stated = position_limit(config.to_dict())
    limit = min(max_length or stated or 512, stated or max_length or 512)
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
    heads = heads if isinstance(heads, int) and heads > 0 else 12
    limit = min(limit, int((LONGEST_SCORES / 4 / heads) ** 0.5))
    if task == "text-generation":
        limit = min(limit, LONGEST_SCORES // 4 // loaded.module.config.vocab_size)
    return max(limit, 1)


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


def trace_shape(task: str) -> Shape:
    """Return the shape to trace with: no dimension is 0 or 1, which would be taken as fixed."""
    return Shape(2, 16_000, "") if task == "audio-embedding" else Shape(2, 8, "right")
