"""Inputs to trace and to check a graph with: of several shapes, lengths and paddings, seeded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from memopt.errors import ExportError
from memopt.positions import counts_distances_alone, position_limit
from memopt.runtimes.torch_model import LoadedModel
from memopt.tasks.table import task_of
from memopt.weights.kinds import AST, FULL_LENGTH, UNPADDED

# Bytes of one layer's attention scores, or of the logits, that a check may take: 2,364 tokens of 12
# heads. Torch and the runtime hold a few such arrays at once.
LONGEST_SCORES = 256 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """One check: ``batch`` rows of ``length`` tokens or samples; ``padding`` is where, if anywhere.

    Of pictures that may have any shape ``length`` is the height, and the width half more.

    Of a padded batch the first row is whole and the others get shorter and shorter.
    """

    batch: int
    length: int
    padding: Literal["", "left", "right"] = ""


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
                mask[row, max(1, kept) :] = 0
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
        if "attention_mask" in names:
            feeds["attention_mask"] = mask
        if "token_type_ids" in names:
            types = np.zeros_like(mask)
            types[:, shape.length // 2 :] = 1
            feeds["token_type_ids"] = types * mask
        if "pooling_mask" in names:
            feeds["pooling_mask"] = _without_prompt(mask)
    elif "pixel_values" in names:
        free = free_picture(loaded)
        size = (3, shape.length, shape.length * 3 // 2) if free else _picture(loaded)
        feeds["pixel_values"] = generator.normal(0, 1, (shape.batch, *size))
    elif "input_features" in names:
        frames = config.max_source_positions * 2
        feeds["input_features"] = generator.normal(0, 1, (shape.batch, config.num_mel_bins, frames))
    elif config.model_type == AST:
        size = (shape.batch, config.max_length, config.num_mel_bins)
        feeds["input_values"] = generator.normal(0, 1, size)
    else:
        feeds["input_values"] = generator.normal(0, 1, (shape.batch, shape.length))
    return {n: v.astype(np.float32) if v.dtype.kind == "f" else v for n, v in feeds.items()}


def _without_prompt(mask: np.ndarray) -> np.ndarray:
    """Return the mask without a prompt of some tokens; a token is left of every row."""
    lengths = np.minimum(np.arange(len(mask)) % 3 + (mask.shape[1] > 2), mask.sum(axis=1) - 1)
    return np.where(mask.cumsum(axis=1) > lengths[:, None], mask, 0)


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


def free_picture(loaded: LoadedModel) -> bool:
    """Say whether the model is given pictures of any shape: detectors keep the picture's own."""
    return loaded.picture is None and task_of(loaded.head.task).answer == "boxes"


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
    if task_of(task).modality == "text":
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
        # What padding changes is only ever given rows of one length.
        bare = loaded.config.model_type in UNPADDED | FULL_LENGTH
        return tuple(
            Shape(b, max(1, min(length, limit)), "" if bare else side) for b, length, side in plan
        )
    if free_picture(loaded):
        return tuple(Shape(batch, high) for batch, high in ((1, 64), (2, 96), (3, 80), (1, 160)))
    if task_of(task).modality == "image" or loaded.config.model_type in ("whisper", AST):
        return tuple(Shape(batch, 0) for batch in (1, 2, 3, 4))
    return tuple(
        Shape(batch, length) for batch, length in ((1, 4_000), (2, 16_000), (3, 9_001), (1, 32_000))
    )


def _longest(loaded: LoadedModel, task: str, max_length: int | None) -> int:
    """Return the most tokens to check with: all that a text may have, or what memory allows."""
    config = loaded.config
    stated = position_limit(config.to_dict())
    limit = max_length or stated or 512
    if not counts_distances_alone(config.to_dict()):
        limit = min(limit, stated or limit)
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
    heads = heads if isinstance(heads, int) and heads > 0 else 12
    limit = min(limit, int((LONGEST_SCORES / 4 / heads) ** 0.5))
    if task_of(task).model in ("AutoModelForCausalLM", "AutoModelForMaskedLM"):
        limit = min(limit, LONGEST_SCORES // 4 // loaded.module.config.vocab_size)
    return max(limit, 1)


def trace_shape(task: str) -> Shape:
    """Return the shape to trace with: no dimension is 0 or 1, which would be taken as fixed."""
    if task_of(task).modality == "audio":
        return Shape(2, 16_000)
    return Shape(2, 96) if task_of(task).answer == "boxes" else Shape(2, 8, "right")
