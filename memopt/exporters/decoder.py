"""A language model with its cache to a graph: the functions of :mod:`memopt.exporters.interface`.

One graph does both: a prompt, with nothing in the cache, and one token more, or several. Inputs are
``input_ids`` (batch, new), ``attention_mask`` (batch, total), 0 where padding is, before a
prompt, ``position_ids`` (batch, new) and for each layer ``past_key_values.N.key`` and ``.value``
(batch, heads, past, size); outputs ``present.N.key``, ``present.N.value`` and ``logits``: the names
of Optimum, onnxruntime-genai and transformers.js.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np

from memopt.bundle import Manifest, Variant, read_json
from memopt.errors import ExportError
from memopt.exporters import check, lower
from memopt.exporters.cached import module_class, plain_class
from memopt.exporters.check import Run, Tolerance
from memopt.exporters.fuse import FusionReport
from memopt.exporters.fuse_decoder import fuse_norms, keep_last
from memopt.exporters.genai import GENAI_CONFIG, genai_config
from memopt.exporters.interface import Signature
from memopt.graphs.ir import drop_unused, from_proto, to_proto
from memopt.positions import position_limit
from memopt.runtimes.keys_values import PAST, PRESENT, held, padded, places
from memopt.runtimes.torch_model import LoadedModel, load_model

__all__ = [
    "check_shapes",
    "compare",
    "example",
    "faster",
    "finish",
    "load_model",
    "portable",
    "reference",
    "signature",
    "trace_shape",
    "wrap",
]
_log = logging.getLogger(__name__)
LOGITS = "logits"
PLAIN = ("input_ids", "attention_mask", "position_ids")
# The longest text that a check runs: it passes the windows of all models that are tried.
LONGEST = 96
_FIX = "nothing was written; ArrowEngine(BUNDLE, device='torch') runs the bundle without a graph"
STEPS = 64  # tokens that a graph writes beside torch


@dataclass(frozen=True, slots=True)
class Step:
    """One check: ``new`` tokens behind ``past`` ones; all rows but the first are padded."""

    batch: int
    past: int
    new: int
    padding: Literal["", "left"] = ""


def signature(loaded: LoadedModel, manifest: Manifest, task: str) -> Signature:
    """Return the names and dynamic axes of a graph with a cache.

    Raises:
        ExportError: the model keeps something else than keys and values.
    """
    del manifest, task
    count = len(_shapes(loaded))
    parts = [f"{n}.{part}" for n in range(count) for part in ("key", "value")]
    past, now = ([prefix + part for part in parts] for prefix in (PAST, PRESENT))
    axes = {
        "input_ids": {0: "batch", 1: "new"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "new"},
    }
    return Signature(
        (*PLAIN, *past), (*now, LOGITS), axes | {name: {0: "batch", 2: "past"} for name in past}
    )


def wrap(loaded: LoadedModel, manifest: Manifest, task: str) -> Any:
    """Return the module that is traced; its attentions become markers where they can be told to."""
    module = module_class()(loaded.module).eval()
    feeds = example(loaded, signature(loaded, manifest, task).inputs, trace_shape(task), 0)
    import torch

    try:
        with torch.no_grad():
            module(*(torch.from_numpy(value) for value in feeds.values()))
    except Exception as error:  # noqa: BLE001 - a model's own code; it is traced as it is then
        _log.info("%s attends in its own way: %s", loaded.config.model_type, error)
        return plain_class()(loaded.module).eval()
    return module


def trace_shape(task: str) -> Step:
    """Return the step to trace with: no dimension is 0 or 1, nor like another one."""
    del task
    return Step(2, 5, 3)


def check_shapes(loaded: LoadedModel, task: str, max_length: int | None) -> tuple[Step, ...]:
    """Return prompts and continuations of several sizes, with and without padding."""
    del task
    stated = position_limit(loaded.config.to_dict())
    longest = min([LONGEST, *(n for n in (stated, max_length) if n)])
    plan = (
        Step(1, 0, 1),
        Step(1, 0, 9),
        Step(3, 0, 12, "left"),
        Step(1, 9, 1),
        Step(3, 12, 1, "left"),
        Step(2, 7, 5),
        Step(4, 10, 4, "left"),
        Step(1, 0, longest),
        Step(2, longest - 1, 1, "left"),
    )
    return tuple(step for step in plan if step.past + step.new <= longest)


def example(loaded: LoadedModel, names: tuple[str, ...], shape: Any, seed: int) -> dict[str, Any]:
    """Return seeded inputs of one step, each an array of its own; row 0 is never padded."""
    step: Step = shape
    random = np.random.default_rng(seed)
    total = step.past + step.new
    rows = loaded.module.get_input_embeddings().weight.shape[0]
    mask = np.ones((step.batch, total), np.int64)
    if step.padding:
        for row in range(1, step.batch):
            # Of a prompt some of its own tokens, of a continuation only such as were there before.
            mask[row, : max(1, row * (step.past or step.new) // (step.batch + 1))] = 0
    feeds: dict[str, Any] = {
        "input_ids": random.integers(0, rows, (step.batch, step.new)),
        "attention_mask": mask,
        "position_ids": places(mask, step.new),
    }
    for layer, shapes in enumerate(_shapes(loaded)):
        for part, (heads, size) in zip(("key", "value"), shapes, strict=True):
            past = random.normal(0, 1, (step.batch, heads, step.past, size)).astype(np.float32)
            feeds[f"{PAST}{layer}.{part}"] = past
    return {name: feeds[name] for name in names}


def reference(loaded: LoadedModel, manifest: Manifest, task: str, feeds: dict[str, Any]) -> Any:
    """Return what the untouched model answers, in eager attention, with transformers' own cache.

    Where rows are padded only the logits are given: what padding leaves in the cache is never read.
    """
    del manifest, task
    import torch
    from transformers import DynamicCache

    takes = inspect.signature(loaded.module.forward).parameters
    tensors = {
        name: torch.from_numpy(value)
        for name, value in feeds.items()
        if name not in PLAIN or name in takes
    }
    count = len(_shapes(loaded))
    cache = DynamicCache()
    for layer in range(count):
        parts = (tensors.pop(f"{PAST}{layer}.{part}") for part in ("key", "value"))
        cache.update(*parts, layer)
    with torch.no_grad():
        result = loaded.module(**tensors, past_key_values=cache, use_cache=True)
    answers = {}
    if feeds["attention_mask"].all():
        for layer in range(count):
            kept = result.past_key_values.layers[layer]
            answers[f"{PRESENT}{layer}.key"] = kept.keys.numpy()
            answers[f"{PRESENT}{layer}.value"] = kept.values.numpy()
    logits = result.logits.numpy()
    # What the model says behind padding is never read either.
    real = feeds["attention_mask"][:, -logits.shape[1] :].astype(bool)
    answers[LOGITS] = logits if real.all() else np.where(real[..., None], logits, 0)
    return answers


def portable(graph: Any) -> Any:
    """Return the graph (``onnx.ModelProto`` with markers) in standard operators."""
    model = from_proto(graph)
    lower.to_standard(model)
    return to_proto(model)


def faster(graph: Any, config: Any) -> tuple[Any, FusionReport]:
    """Return the graph with ONNX Runtime's GroupQueryAttention, where a model asks no more of it.

    Its past and present may be one buffer; a continuation by several tokens takes one row at a
    time (microsoft/onnxruntime: group_query_attention.cc).
    """
    model = from_proto(graph)
    if not lower.groupable(model):
        return graph, FusionReport()
    before, count = len(model.graph), len(lower.markers(model))
    lower.to_grouped(model, position_limit(config) or 0)
    norms = fuse_norms(model)
    keep_last(model)
    drop_unused(model)
    report = FusionReport(
        attention=count,
        skip_layer_norm=norms,
        nodes_before=before,
        nodes_after=len(model.graph),
    )
    return to_proto(model), report


def finish(variant: Variant, bundle: Path, staged: Path) -> Variant:
    """Return the fused variant with what onnxruntime-genai needs, written to ``staged``."""
    if not variant.fused:
        return variant
    config, more = read_json(bundle / "config.json"), bundle / "generation_config.json"
    generation = read_json(more) if more.is_file() else {}
    made = genai_config(config, generation, variant.file, shared=True)
    (staged / GENAI_CONFIG).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return replace(variant, companions=(*variant.companions, GENAI_CONFIG))


def compare(
    run: Run, loaded: LoadedModel, cases: Sequence[Any], tolerance: Tolerance, name: str
) -> dict[str, Any]:
    """Run a graph on every case, then let it write token by token beside torch.

    Raises:
        ExportError: it gives other logits than torch, or writes another text.
    """
    settled = _settled(run)
    record = check.compare(settled, cases, tolerance, name=name, alone=False)
    return record | {"greedy_tokens": walk(settled, loaded, tolerance, name)}


def _settled(run: Run) -> Run:
    """Return ``run`` with the logits of padding at 0, and a continuation one row at a time."""

    def settled(feeds: Mapping[str, Any]) -> dict[str, Any]:
        batch, new = feeds["input_ids"].shape
        mask = feeds["attention_mask"]
        if batch > 1 and 1 < new < mask.shape[1]:
            rows = [{n: v[i : i + 1] for n, v in feeds.items()} for i in range(batch)]
            answers = [run(row) for row in rows]
            outputs = {n: np.concatenate([a[n] for a in answers]) for n in answers[0]}
        else:
            outputs = dict(run(feeds))
        kept = mask[:, -new:].astype(bool)
        outputs[LOGITS] = np.where(kept[..., None], outputs[LOGITS], 0)
        return outputs

    return settled


def walk(run: Run, loaded: LoadedModel, tolerance: Tolerance, name: str) -> int:
    """Write greedily from prompts of several lengths, padded in one batch; torch has each alone.

    Returns:
        How many tokens were equal. A row ends where torch's two likeliest tokens are closer than
        the tolerance: either is right there.

    Raises:
        ExportError: another token than torch's.
    """
    import torch

    random = np.random.default_rng(9)
    limit = position_limit(loaded.config.to_dict()) or LONGEST
    lengths = [n for n in (7, 1, 4) if n + 2 <= limit]
    steps = min(STEPS, limit - max(lengths))
    rows = loaded.module.get_input_embeddings().weight.shape[0]
    prompts = [random.integers(0, rows, n).tolist() for n in lengths]
    expected: list[list[tuple[int, float]]] = []
    with torch.no_grad():
        for prompt in prompts:
            expected.append(_written(loaded, prompt, steps))
    return _followed(run, prompts, expected, tolerance, name)


def _written(loaded: LoadedModel, prompt: list[int], steps: int) -> list[tuple[int, float]]:
    """Return torch's greedy tokens, each with its lead over the next one relative to its size."""
    import torch
    from transformers import DynamicCache

    cache, ids, found = DynamicCache(), torch.tensor([prompt]), []
    for _ in range(steps):
        result = loaded.module(input_ids=ids, past_key_values=cache, use_cache=True)
        found.append(check.likeliest(result.logits[0, -1]))
        ids = torch.tensor([[found[-1][0]]])
    return found


def _followed(
    run: Run,
    prompts: list[list[int]],
    expected: list[list[tuple[int, float]]],
    tolerance: Tolerance,
    name: str,
) -> int:
    feeds: dict[str, Any] = dict(padded(prompts))
    mask, batch = feeds["attention_mask"], len(prompts)
    equal, open_rows = 0, set(range(batch))
    for step in range(len(expected[0])):
        outputs = run(feeds)
        for row in sorted(open_rows):
            got = int(outputs[LOGITS][row, -1].argmax())
            where = f"{name}: token {step + 1} behind a prompt of {len(prompts[row])}"
            if check.same_token(got, expected[row][step], tolerance, where, _FIX):
                equal += 1
            else:
                open_rows.discard(row)
        mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], axis=1)
        feeds = {
            "input_ids": np.array([[tokens[step][0]] for tokens in expected], np.int64),
            "attention_mask": mask,
            "position_ids": places(mask, 1),
            **held(outputs),
        }
    return equal


def _shapes(loaded: LoadedModel) -> list[tuple[tuple[int, int], ...]]:
    """Return (heads, size) of the keys and of the values of each layer, as a first token has them.

    Raises:
        ExportError: the model cannot be told how to attend, or keeps something else.
    """
    if loaded.module in _known:
        return _known[loaded.module]
    import torch
    from transformers import DynamicCache

    module, kind = loaded.module, loaded.config.model_type
    if "past_key_values" not in inspect.signature(module.forward).parameters:
        raise ExportError(f"{kind} keeps no keys and values of a text")
    cache = DynamicCache()
    ids = torch.zeros((1, 1), dtype=torch.long)
    with torch.no_grad():
        module(input_ids=ids, past_key_values=cache, use_cache=True)
    found = []
    for layer in cache.layers:
        parts = (getattr(layer, "keys", None), getattr(layer, "values", None))
        if any(part is None or part.ndim != 4 or part.shape[2] != 1 for part in parts):
            raise ExportError(f"{kind} keeps something else of a text than keys and values")
        found.append(tuple((int(p.shape[1]), int(p.shape[3])) for p in parts if p is not None))
    _known[loaded.module] = found
    return found


# Of models that are in memory: it keeps none of them there.
_known: WeakKeyDictionary[Any, list[tuple[tuple[int, int], ...]]] = WeakKeyDictionary()
