"""A model compiled ahead of time by torch's inductor: for a GPU, without Python at run time.

The kernels fuse what lies between matrix products, and of a text model's rows no padding is
computed. A package holds native code for one device and one version of torch.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import ExportError, brief
from memopt.exporters.check import TOLERANCES, compare
from memopt.exporters.distances import by_distance
from memopt.exporters.interface import Signature
from memopt.exporters.packed import (
    ATTENTION,
    PACKED,
    PADDED,
    module,
    packable,
    position_offset,
    set_attention,
)
from memopt.extras import require
from memopt.progress import Step, silent
from memopt.runtimes.aoti import Package, compiled_for, pt2_device, trust
from memopt.runtimes.packing import at_least_two, pack
from memopt.runtimes.torch_model import LoadedModel
from memopt.weights.kinds import FULL_LENGTH, UNPADDED

_log = logging.getLogger(__name__)
_HALF_LARGEST = float(np.finfo(np.float16).max)
Cases = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def to_package(
    loaded: LoadedModel,
    signature: Signature,
    cases: Cases,
    precision: str,
    target: Path,
    say: Step = silent,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Compile a model and its head to ``target`` (.pt2) for this machine's GPU, else its CPU.

    Args:
        loaded: in float32; it is changed to ``precision``.
        signature: names of the inputs and their dynamic axes.
        cases: what it is checked with.
        precision: fp32, fp16 or bf16, of the model; the head computes in float32.

    Returns:
        The options to open it with, and the record of the check.

    Raises:
        ExportError: torch cannot compile the model, an activation passes float16's range, or the
            package gives other answers than torch.
    """
    torch = require("torch", extra="export", why="compile a model")
    device = pt2_device()
    answer = signature.outputs[-1]
    cases = [(feeds, {answer: expected[answer]}) for feeds, expected in cases]
    if precision == "fp16":
        _refuse_overflow(loaded, cases)
    layout = _layout(loaded, signature, cases, device)
    set_attention(loaded, ATTENTION if layout == PACKED else "sdpa")
    offset = position_offset(loaded.config)
    options = compiled_for(device) | {"layout": layout}
    if layout == PACKED and offset is not None:
        options["first_position"] = str(offset)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    say(f"compile for {device}, {layout} rows: a minute or two")
    feeds = max((feeds for feeds, _ in cases), key=lambda f: len(next(iter(f.values()))))
    target.parent.mkdir(parents=True, exist_ok=True)
    named = _tensors(feeds, layout, offset, device)
    options["inputs"] = ",".join(named)
    try:
        with by_distance(loaded.module):  # from before it is rounded
            whole = module(loaded, layout, list(named)).to(device)
            loaded.module.to(device=device, dtype=dtype)
            _compile(whole, named, signature, layout, target)
        package = Package(target, options, runners=1)
    except Exception as error:  # anything may go wrong in a compiler
        _log.info("inductor: %s", error)
        raise ExportError(
            f"torch cannot compile this {loaded.config.model_type}: {brief(error)}",
            fix="export it as --format onnx; memopt --debug shows what torch says",
        ) from error
    say("check it")
    trust(target)
    record = compare(
        lambda feeds: {answer: package.run(feeds)}, cases, TOLERANCES[precision], name=target.name
    )
    return options, record


def _compile(
    whole: Any, named: dict[str, Any], signature: Signature, layout: str, target: Path
) -> None:
    import torch

    if sys.version_info < (3, 12):
        # inductor imports setuptools, which takes Python's own distutils' place, and refuses to be
        # imported where another library has undone that.
        os.environ.setdefault("SETUPTOOLS_USE_DISTUTILS", "stdlib")
    from torch._inductor import aoti_compile_and_package
    from torch.export import Dim

    def axes(name: str, value: Any) -> dict[int, Any]:
        dynamic = signature.dynamic.get(name, {}) if layout == PADDED else range(value.ndim)
        return dict.fromkeys(dynamic, Dim.DYNAMIC)

    shapes = {"values": tuple(axes(name, value) for name, value in named.items())}
    with torch.no_grad():
        program = torch.export.export(whole, tuple(named.values()), dynamic_shapes=shapes)
        aoti_compile_and_package(program, package_path=str(target))


def _layout(loaded: LoadedModel, signature: Signature, cases: Cases, device: str) -> str:
    """Return packed rows where the model, asked for them, gives the right answers; else padded."""
    takes = inspect.signature(loaded.call).parameters
    kind = loaded.config.model_type
    named = dict.fromkeys(signature.inputs)
    if device == "cpu" or kind in UNPADDED | FULL_LENGTH or not packable(named, takes):
        return PADDED  # on a processor attention of all tokens with all would cost more
    try:
        packed_answers(loaded, signature, cases)
    except Exception as error:  # noqa: BLE001 - of any kind: models nobody has seen
        _log.info("%s takes no packed rows: %s", kind, brief(error))
        return PADDED
    return PACKED


def packed_answers(loaded: LoadedModel, signature: Signature, cases: Cases) -> dict[str, Any]:
    """Return the record of a comparison of packed rows, in float32 on the CPU, with torch.

    Raises:
        ExportError: they give other answers.
        Exception: whatever the model raises when it is asked for them.
    """
    import torch

    answer = signature.outputs[-1]
    offset = position_offset(loaded.config)
    set_attention(loaded, ATTENTION)

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        count = len(next(iter(feeds.values())))
        named = _tensors(feeds, PACKED, offset, "cpu")
        with torch.no_grad():
            rows = module(loaded, PACKED, list(named))(*named.values())
        return {answer: rows[:count].numpy()}

    return compare(run, cases, TOLERANCES["fp32"], name=PACKED)


def _tensors(
    feeds: Mapping[str, Any], layout: str, offset: int | None, device: str
) -> dict[str, Any]:
    import torch

    enough = at_least_two(feeds)
    named = pack(enough, offset) if layout == PACKED else enough
    return {name: torch.from_numpy(value).to(device) for name, value in named.items()}


def _refuse_overflow(loaded: LoadedModel, cases: Cases) -> None:
    """Refuse float16 where a layer's output passes its range, and name the layer."""
    import torch

    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: Any, given: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
                largest[name] = max(largest.get(name, 0.0), float(output.abs().max()))

        return hook

    hooks = [
        layer.register_forward_hook(watch(name)) for name, layer in loaded.module.named_modules()
    ]
    try:
        with torch.no_grad():
            for feeds, _ in cases:
                named = {n: torch.from_numpy(v) for n, v in feeds.items() if n != "pooling_mask"}
                loaded.call(**named)
    finally:
        for hook in hooks:
            hook.remove()
    name = max(largest, key=lambda name: largest[name], default="")
    if name and largest[name] > _HALF_LARGEST:
        raise ExportError(
            f"activations of {name} reach {largest[name]:.3g}, past float16's {_HALF_LARGEST:,.0f}",
            fix="use --precision bf16",
        )
