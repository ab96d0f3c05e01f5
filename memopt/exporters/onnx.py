"""torch to portable ONNX, with the names of the weights kept.

Naming rule: an initializer that holds a weight is called as in the checkpoint. The dynamo exporter
stores a linear layer's matrix transposed, (in, out) instead of (out, in), under an invented name;
it gets its weight's name back. Where the same weight is also used untransposed (tied embeddings),
the transposed one is called ``<name>.transposed``.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import ExportError
from memopt.exporters.model import LoadedModel
from memopt.exporters.tasks import Signature
from memopt.extras import require

DEFAULT_OPSET = 20
OPSETS = range(18, 24)  # what torch's dynamo exporter writes
# protobuf refuses messages past 2 GiB; the rest of the graph needs room too.
EXTERNAL_DATA_BYTES = 1_900_000_000


def to_onnx(
    module: Any, feeds: Mapping[str, Any], signature: Signature, loaded: LoadedModel, opset: int
) -> Any:
    """Trace ``module`` and return a checked ``onnx.ModelProto`` with standard operators only.

    Args:
        module: positional graph inputs -> tuple of outputs.
        feeds: example inputs by name; every one an array of its own.
        signature: names and dynamic axes.
        loaded: the model inside, for the weight names.
        opset: ONNX operator set of the default domain.

    Raises:
        ExportError: torch cannot trace or translate the model; names the operator when torch does.
    """
    import torch

    onnx = require("onnx", extra="export", why="write an ONNX graph")
    require("onnxscript", extra="export", why="write an ONNX graph")
    # It warns that torchvision is not installed, for operators no text or audio model has.
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    registration.setLevel(logging.ERROR)
    dynamic_axis = torch.export.Dim.DYNAMIC
    # A copy each: the exporter merges inputs that are one tensor object into one graph input.
    arguments = tuple(torch.from_numpy(feeds[name].copy()) for name in signature.inputs)
    dynamic = tuple(
        dict.fromkeys(signature.dynamic[name], dynamic_axis) for name in signature.inputs
    )
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                arguments,
                input_names=list(signature.inputs),
                output_names=[f"{name}__out" for name in signature.outputs],
                dynamic_shapes=(dynamic,),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"{loaded.config.model_type} does not export: {_reason(error)}",
            fix="try another --opset, or report the architecture",
        ) from error
    model = program.model_proto
    _tidy(model, onnx)
    _name_outputs(model, signature)
    _name_dimensions(model, signature)
    _name_weights(model, loaded, onnx)
    foreign = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if foreign:
        raise ExportError(f"the graph uses operators of {sorted(foreign)}, not only standard ones")
    return model


def save_onnx(model: Any, target: Path, *, limit: int = EXTERNAL_DATA_BYTES) -> tuple[str, ...]:
    """Write a model; weights go beside it when the whole would pass ``limit`` bytes.

    Returns:
        Names of the further files, relative to the folder of ``target``.

    Raises:
        ExportError: the ONNX checker refuses the file.
    """
    onnx = require("onnx", extra="export", why="write an ONNX graph")
    target.parent.mkdir(parents=True, exist_ok=True)
    companions: tuple[str, ...] = ()
    if model.ByteSize() > limit:
        companions = (f"{target.name}.data",)
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        onnx.save_model(
            copy, target, save_as_external_data=True, location=companions[0], size_threshold=1024
        )
    else:
        target.write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(target), full_check=not _contrib(model))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the ONNX checker refuses {target.name}: {_reason(error)}") from error
    return companions


def runner(path: Path, outputs: tuple[str, ...]) -> Any:
    """Return feeds -> outputs on ONNX Runtime's CPU provider."""
    onnxruntime = require("onnxruntime", extra="cpu", why="check the exported graph")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        found = session.run(list(outputs), {k: v for k, v in feeds.items() if k in names})
        return dict(zip(outputs, found, strict=True))

    return run


def to_fp16(model: Any) -> Any:
    """Return a copy with float16 weights and arithmetic, float32 inputs and outputs.

    Uses onnxruntime's converter; constants past float16's range are clamped to its largest value.
    """
    require("onnxruntime", extra="cpu", why="convert a graph to float16")
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about every clamped constant
        return convert_float_to_float16(copy, keep_io_types=True, disable_shape_infer=False)


def _contrib(model: Any) -> bool:
    return any(node.domain not in ("", "ai.onnx") for node in model.graph.node)


def _tidy(model: Any, onnx: Any) -> None:
    """Drop what is not the graph: stack traces and paths."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.doc_string = ""
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    model.graph.doc_string = ""
    model.doc_string = ""
    model.graph.name = "memopt"
    model.producer_name, model.producer_version = "memopt", ""
    used = {node.domain for node in model.graph.node} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    del model.functions[:]


def _name_outputs(model: Any, signature: Signature) -> None:
    # An output called like an inner value makes an invalid graph, so inner ones step aside first.
    wanted = set(signature.outputs)
    inner = {name for node in model.graph.node for name in node.output} & wanted
    _rename(model, {name: f"{name}__inner" for name in inner})
    _rename(model, {f"{name}__out": name for name in signature.outputs})


def _name_dimensions(model: Any, signature: Signature) -> None:
    symbols: dict[str, str] = {}
    for value in model.graph.input:
        for axis, kind in signature.dynamic[value.name].items():
            symbols[value.type.tensor_type.shape.dim[axis].dim_param] = kind
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = symbols.get(dimension.dim_param, dimension.dim_param)


def _name_weights(model: Any, loaded: LoadedModel, onnx: Any) -> None:
    own = {f"model.{name}": weight for name, weight in loaded.names.items()}
    present = {tensor.name for tensor in model.graph.initializer}
    renames: dict[str, str] = {}
    taken: set[str] = set()
    for name in present & set(own):
        if own[name] not in taken:
            renames[name] = own[name]
            taken.add(own[name])
    transposed = {}
    for name, parameter in loaded.module.named_parameters():
        if parameter.ndim == 2 and name in loaded.names:
            values = np.ascontiguousarray(parameter.detach().numpy().T)
            transposed.setdefault(_digest(values), loaded.names[name])
    for tensor in model.graph.initializer:
        if tensor.name in renames or len(tensor.dims) != 2:
            continue
        weight = transposed.get(_digest(onnx.numpy_helper.to_array(tensor)))
        if weight is None:
            continue
        name = weight if weight not in taken else f"{weight}.transposed"
        if name not in taken:
            renames[tensor.name] = name
            taken.add(name)
    for name in present - set(renames):
        if name.startswith("model."):
            renames[name] = name.removeprefix("model.")
    inner = {name for node in model.graph.node for name in node.output}
    inner |= {value.name for value in model.graph.input}
    _rename(model, {old: new for old, new in renames.items() if new not in inner})


def _digest(values: np.ndarray) -> tuple[tuple[int, ...], str]:
    return values.shape, hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


def _rename(model: Any, names: Mapping[str, str]) -> None:
    if not names:
        return
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = names[name]
        for index, name in enumerate(node.output):
            if name in names:
                node.output[index] = names[name]
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)


def _reason(error: BaseException) -> str:
    """Return the line of torch's long message that names the operator or the cause."""
    seen: BaseException | None = error
    texts = []
    while seen is not None:
        texts.append(str(seen))
        seen = seen.__cause__
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    for marker in (
        "No ONNX function found",
        "No decompositions",
        "target",
        "Unsupported",
        "Could not",
    ):
        for line in lines:
            if marker in line:
                return line[:400]
    return (lines or [type(error).__name__])[-1][:400]
