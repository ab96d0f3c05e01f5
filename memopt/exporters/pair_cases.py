"""What the two graphs of an encoder and decoder are traced with, checked with and compared to."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from memopt.errors import ExportError
from memopt.exporters.halves import cross_names, filled, kept, nothing_like, own_names
from memopt.exporters.interface import Signature
from memopt.positions import position_limit
from memopt.runtimes.keys_values import PAST
from memopt.runtimes.torch_model import LoadedModel

LOGITS = "logits"
SOURCE_MASK = "encoder_attention_mask"
# The longest text that a check runs: T5's distances are all one from 128 tokens on.
LONGEST = 144
Feeds = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model: layers of the decoder, heads and their size, longest source and answer."""

    layers: int
    heads: int
    size: int
    sound: bool  # the source is a log-mel spectrum of one length
    source: int | None  # most places of a source, None where any
    target: int | None


@dataclass(frozen=True, slots=True)
class Turn:
    """One check of the decoder: ``new`` tokens behind ``past`` ones, of sources so long."""

    batch: int
    past: int
    new: int
    source: int
    padded: bool = False


def sizes_of(loaded: LoadedModel) -> Sizes:
    """Run a model once and see what it keeps.

    Raises:
        ExportError: it keeps something else than keys and values of a source and a text.
    """
    import torch

    config, module = loaded.config, loaded.module
    takes = inspect.signature(module.forward).parameters
    kind, sound = config.model_type, "input_features" in takes
    if not {"encoder_outputs", "decoder_input_ids", "past_key_values"} <= set(takes):
        raise ExportError(f"{kind} is no model of an encoder and a decoder with a cache")
    if "input_ids" not in takes and not sound:
        raise ExportError(
            f"{kind} hears {next(iter(takes))}, and memopt computes input_features",
            fix="convert a Whisper",
        )
    states = source_states(loaded, source_of(loaded, 1, 2, False, np.random.default_rng(0)))
    token = torch.zeros((1, 1), dtype=torch.long)
    with torch.no_grad():
        result = module(encoder_outputs=states, decoder_input_ids=token, use_cache=True)
    cache = result.past_key_values
    if not hasattr(cache, "cross_attention_cache"):
        raise ExportError(f"{kind} keeps something else of a source than keys and values")
    cross, own = (kept(c) for c in (cache.cross_attention_cache, cache.self_attention_cache))
    shapes = {(v.shape[1], v.shape[3]) for v in (*cross, *own) if v is not None and v.ndim == 4}
    if len(shapes) != 1 or len(cross) != len(own):
        raise ExportError(f"{kind} keeps keys and values of several shapes")
    ((heads, size),) = shapes
    stated = config.to_dict()
    limit = position_limit(stated)
    source = int(cross[0].shape[2]) if sound else limit
    target = stated.get("max_target_positions") if sound else limit
    return Sizes(len(cross) // 2, int(heads), int(size), sound, source, target)


def signatures(sizes: Sizes) -> tuple[Signature, Signature]:
    """Return names and dynamic axes of the encoder's graph and of the decoder's."""
    text = {0: "batch", 1: "source"}
    cross, own = cross_names(sizes.layers, PAST), own_names(sizes.layers, PAST)
    if sizes.sound:
        axes, source_axes = {"input_features": {0: "batch"}}, {0: "batch"}
    else:
        axes, source_axes = (
            dict.fromkeys(("input_ids", "attention_mask"), text),
            {
                0: "batch",
                2: "source",
            },
        )
    first = Signature(tuple(axes), cross_names(sizes.layers), axes)
    masks = () if sizes.sound else (SOURCE_MASK,)
    dynamic: dict[str, dict[int, str]] = {"input_ids": {0: "batch", 1: "new"}}
    dynamic |= dict.fromkeys(masks, text)
    dynamic |= {name: {0: "batch", 2: "past"} for name in own}
    dynamic |= dict.fromkeys(cross, source_axes)
    return first, Signature(tuple(dynamic), (*own_names(sizes.layers), LOGITS), dynamic)


def source_of(
    loaded: LoadedModel, batch: int, length: int, padded: bool, random: np.random.Generator
) -> dict[str, Any]:
    """Return a batch of sources: tokens with their mask, or spectra; row 0 is never padded."""
    config = loaded.config
    if "input_features" in inspect.signature(loaded.module.forward).parameters:
        shape = (batch, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": random.normal(0, 1, shape).astype(np.float32)}
    mask = np.ones((batch, length), np.int64)
    if padded:
        for row in range(1, batch):
            mask[row, max(1, length - 1 - row * length // (batch + 1)) :] = 0
    ids = tokens_of(loaded, (batch, length), random)
    pad = config.pad_token_id or 0
    return {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask}


def tokens_of(loaded: LoadedModel, shape: tuple[int, ...], random: np.random.Generator) -> Any:
    """Return token ids that are no padding."""
    rows = loaded.module.get_input_embeddings().weight.shape[0]
    pad = loaded.config.pad_token_id or 0
    ids = random.integers(0, rows, shape)
    return np.where(ids == pad, (pad + 1) % rows, ids)


def turn_of(loaded: LoadedModel, sizes: Sizes, turn: Turn, seed: int) -> dict[str, Any]:
    """Return the decoder's inputs for one check, each an array of its own."""
    random = np.random.default_rng(seed)
    length = sizes.source if sizes.sound and sizes.source else turn.source
    feeds = {"input_ids": tokens_of(loaded, (turn.batch, turn.new), random)}
    if not sizes.sound:
        source = source_of(loaded, turn.batch, length, turn.padded, random)
        feeds[SOURCE_MASK] = source["attention_mask"]
    for names, places in ((own_names, turn.past), (cross_names, length)):
        for name in names(sizes.layers, PAST):
            shape = (turn.batch, sizes.heads, places, sizes.size)
            feeds[name] = random.normal(0, 1, shape).astype(np.float32)
    return feeds


def source_checks(sizes: Sizes) -> tuple[tuple[int, int, bool], ...]:
    """Return (batch, length, padded) of the sources that the encoder is checked with."""
    if sizes.sound:
        return (1, 0, False), (2, 0, False)
    longest = min(LONGEST, sizes.source or LONGEST)
    plan = ((1, 1, False), (1, 9, False), (3, 12, True), (4, 7, True), (2, longest, True))
    return tuple((b, min(n, longest), p) for b, n, p in plan)


def turn_checks(sizes: Sizes) -> tuple[Turn, ...]:
    """Return beginnings and continuations of several sizes."""
    longest = min(LONGEST, sizes.target or LONGEST)
    source = min(33, sizes.source or 33)
    plan = (
        Turn(1, 0, 1, min(5, source)),
        Turn(1, 0, 4, 1),
        Turn(3, 0, 3, min(12, source), padded=True),
        Turn(1, 9, 1, min(7, source)),
        Turn(4, 12, 1, source, padded=True),
        Turn(2, 7, 5, min(9, source), padded=True),
        Turn(2, longest - 1, 1, source),
    )
    return tuple(turn for turn in plan if turn.past + turn.new <= longest)


def source_states(loaded: LoadedModel, feeds: Feeds) -> Any:
    """Return what the untouched encoder makes of sources."""
    import torch

    given = {name: torch.from_numpy(value) for name, value in feeds.items()}
    with torch.no_grad():
        return loaded.module.get_encoder()(**given)


def source_reference(loaded: LoadedModel, sizes: Sizes, feeds: Feeds) -> dict[str, Any]:
    """Return the keys and values that the untouched model keeps of sources, by name."""
    import torch

    batch = len(next(iter(feeds.values())))
    masks = {n: torch.from_numpy(v) for n, v in feeds.items() if n == "attention_mask"}
    with torch.no_grad():
        result = loaded.module(
            encoder_outputs=source_states(loaded, feeds),
            decoder_input_ids=torch.zeros((batch, 1), dtype=torch.long),
            use_cache=True,
            **masks,
        )
    values = kept(result.past_key_values.cross_attention_cache)
    return {n: v.numpy() for n, v in zip(cross_names(sizes.layers), values, strict=True)}


def turn_reference(loaded: LoadedModel, sizes: Sizes, feeds: Feeds) -> dict[str, Any]:
    """Return what the untouched decoder keeps and says, by name."""
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    own, cross = (
        [tensors[name] for name in names(sizes.layers, PAST)] for names in (own_names, cross_names)
    )
    masks = {"attention_mask": tensors[SOURCE_MASK]} if SOURCE_MASK in tensors else {}
    with torch.no_grad():
        result = loaded.module(
            encoder_outputs=nothing_like(cross),
            decoder_input_ids=tensors["input_ids"],
            past_key_values=filled(own, cross),
            use_cache=True,
            **masks,
        )
    values = kept(result.past_key_values.self_attention_cache)
    answers = {n: v.numpy() for n, v in zip(own_names(sizes.layers), values, strict=True)}
    return answers | {LOGITS: result.logits.numpy()}
