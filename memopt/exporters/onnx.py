"""torch to portable ONNX, with the names of the weights kept.

Naming rule: an initializer that holds a weight is called as in the checkpoint. The dynamo exporter
stores a linear layer's matrix transposed, (in, out) instead of (out, in), under an invented name;
it gets its weight's name back, as does one that was only reshaped. Where the same weight is also
used untransposed (tied embeddings), the transposed one is called ``<name>.transposed``. A weight
that is computed once from others (weight normalisation) is called as the layer's plain weight.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Mapping, MutableSequence
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import ExportError, MissingExtra, brief
from memopt.exporters.cached import DOMAIN as MARKERS
from memopt.exporters.distances import by_distance
from memopt.exporters.interface import Signature, by_name
from memopt.exporters.patched import Mends, mended
from memopt.extras import require
from memopt.graphs.ir import constant
from memopt.graphs.session import open_onnx
from memopt.runtimes.cpu import usable_cpus
from memopt.runtimes.onnx import session_options
from memopt.runtimes.torch_model import LoadedModel

_log = logging.getLogger(__name__)
DEFAULT_OPSET = 20
OPSETS = range(18, 24)  # what torch's dynamo exporter writes
# protobuf refuses messages past 2 GiB; the rest of the graph needs room too.
EXTERNAL_DATA_BYTES = 1_900_000_000
INLINE_BYTES = 1024  # smaller constants stay in the graph, where shape inference can see them
PAGE = 4096


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
        ExportError: torch cannot trace or translate the model; says why as far as torch does, and
            names the operator.
    """
    ir = require("onnx_ir", extra="export", why="write an ONNX graph")
    require("onnxscript", extra="export", why="write an ONNX graph")
    # It warns that torchvision is not installed, for operators no text or audio model has.
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    registration.setLevel(logging.ERROR)
    try:
        with by_distance(loaded.module):
            program = _translate(module, feeds, signature, opset)
    except Exception as error:  # noqa: BLE001 - torch raises anything; the second way may work
        _log.info("torch on %s: %s", loaded.config.model_type, error)
        try:
            with mended() as mends:
                if mends is None:
                    raise
                program = _translate(module, feeds, signature, opset, mends)
        except Exception as second:  # noqa: BLE001 - the first is what is told
            _log.info("torch with transformers' mends: %s", second)
            raise ExportError(
                f"{loaded.config.model_type} does not export to a graph: {_reason(error)}",
                fix="a bundle runs without one too, with ArrowEngine(BUNDLE, device='torch'); "
                "memopt --debug shows what torch says",
            ) from error
    model = program.model
    _tidy(model)
    _pool_all(model.graph)
    _name_outputs(model.graph, signature)
    _name_dimensions(model.graph, signature)
    _name_weights(model.graph, loaded)
    foreign = {node.domain for node in model.graph} - {"", "ai.onnx", MARKERS}
    if foreign:
        raise ExportError(f"the graph uses operators of {sorted(foreign)}, not only standard ones")
    return ir.to_proto(model)


def _translate(
    module: Any,
    feeds: Mapping[str, Any],
    signature: Signature,
    opset: int,
    mends: Mends | None = None,
) -> Any:
    """Return torch's ONNX program of a module."""
    import torch

    dynamic_axis = torch.export.Dim.DYNAMIC
    # A copy each: the exporter merges inputs that are one tensor object into one graph input.
    arguments = tuple(torch.from_numpy(feeds[name].copy()) for name in signature.inputs)
    dynamic = tuple(
        dict.fromkeys(signature.dynamic[name], dynamic_axis) for name in signature.inputs
    )
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
            custom_translation_table=mends.translations if mends else None,
        )
    if mends is not None:
        mends.finish(program)
    return program


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
    if weight_bytes(model) > limit:
        companions = (f"{target.name}.data",)
        light = _with_weights_beside(model, target.with_name(companions[0]), onnx)
        target.write_bytes(light.SerializeToString(deterministic=True))
    else:
        target.write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(target), full_check=not _contrib(model))
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the ONNX checker refuses {target.name}: {brief(error)}") from error
    return companions


def weight_bytes(model: Any) -> int:
    """Return the size of a model's constants; protobuf cannot measure a message past 2 GiB."""
    return sum(_tensor_bytes(tensor) for tensor in model.graph.initializer)


def _tensor_bytes(tensor: Any) -> int:
    return len(tensor.raw_data) or tensor.ByteSize()


def _with_weights_beside(model: Any, data: Path, onnx: Any) -> Any:
    """Write the large constants to ``data`` and return a copy of the model that points there.

    protobuf neither copies nor serialises more than 2 GiB, so the copy is made without them.
    """
    light = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _copy_field(light, field, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _copy_field(light.graph, field, value)
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            copy = light.graph.initializer.add()
            if len(tensor.raw_data) < INLINE_BYTES:
                copy.CopyFrom(tensor)
                continue
            # Whole pages, so that a runtime can map a weight instead of reading it.
            file.write(bytes(-file.tell() % PAGE))
            place = {"location": data.name, "offset": file.tell(), "length": len(tensor.raw_data)}
            file.write(tensor.raw_data)
            copy.name, copy.data_type = tensor.name, tensor.data_type
            copy.dims.extend(tensor.dims)
            copy.data_location = onnx.TensorProto.EXTERNAL
            for key, entry in place.items():
                copy.external_data.add(key=key, value=str(entry))
    return light


def _copy_field(target: Any, field: Any, value: Any) -> None:
    # Descriptors say it in two ways, each unknown to some of the protobufs that are allowed.
    if isinstance(value, MutableSequence):
        getattr(target, field.name).extend(value)
    elif field.message_type is not None:
        getattr(target, field.name).CopyFrom(value)
    else:
        setattr(target, field.name, value)


def runner(path: Path, outputs: tuple[str, ...], *, exact: bool = False) -> Any:
    """Return feeds -> outputs on ONNX Runtime's CPU provider.

    ONNX Runtime fuses DequantizeLinear + MatMul into MatMulNBits, and by default at level 4:
    activations rounded to int8 (min cosine .9993 on MiniLM). With ``exact`` it
    computes what the graph says.
    """
    try:
        options = session_options(usable_cpus())
        if exact:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        observe = open_onnx(path, outputs, options)
    except MissingExtra:
        raise
    except Exception as error:
        _log.info("onnxruntime on %s: %s", path, error)
        raise ExportError(
            f"ONNX Runtime cannot open {path.name}: {_operator(error) or 'it refuses the graph'}",
            fix="nothing was written; memopt --debug shows what it says",
        ) from error

    def refuse(shape: str, error: Exception) -> ExportError:
        _log.info("onnxruntime on %s: %s", path, error)
        return ExportError(
            f"ONNX Runtime cannot run {path.name} on {shape}: the graph is not of every shape "
            "that the model is",
            fix="nothing was written; memopt --debug shows what it says",
        )

    return by_name(observe, outputs, refuse)


def _operator(error: BaseException) -> str:
    pattern = r"(\w+)\(-?\d+\) is not a registered|implementation for (\w+)\("
    match = re.search(pattern, str(error))
    return f"it has no operator {match[1] or match[2]} of this kind" if match else ""


def _contrib(model: Any) -> bool:
    return any(node.domain not in ("", "ai.onnx") for node in model.graph.node)


def _tidy(model: Any) -> None:
    """Drop what is not the graph: stack traces and paths."""
    graph = model.graph
    made = [value for node in graph for value in node.outputs]
    for part in (model, graph, *graph, *graph.inputs, *graph.initializers.values(), *made):
        part.doc_string = ""
        part.metadata_props.clear()
    graph.name = "memopt"
    model.producer_name, model.producer_version = "memopt", ""
    used = {node.domain for node in graph} | {""}
    for domain in set(graph.opset_imports) - used:
        del graph.opset_imports[domain]
    model.functions.clear()


def _pool_all(graph: Any) -> None:
    """Say plainly where a pool is wider than the picture (EfficientNet's): it is all of it.

    OpenVINO refuses such a kernel, which torch and ONNX Runtime cut to the picture.
    """
    for node in graph:
        kernel = node.attributes.get("kernel_shape")
        shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
        if node.op_type != "AveragePool" or kernel is None or shape is None:
            continue
        sizes = zip(kernel.as_ints(), list(shape)[2:], strict=True)
        if all(isinstance(size, int) and wide >= size for wide, size in sizes):
            padding = node.attributes.get("pads")
            if padding is None or not any(padding.as_ints()):
                node.op_type = "GlobalAveragePool"
                node.attributes.clear()


def _name_outputs(graph: Any, signature: Signature) -> None:
    # An output called like an inner value makes an invalid graph, so inner ones step aside first.
    for value in (value for node in graph for value in node.outputs):
        if value.name in signature.outputs:
            value.name += "__inner"
    for value, name in zip(graph.outputs, signature.outputs, strict=True):
        value.name = name


def _name_dimensions(graph: Any, signature: Signature) -> None:
    import onnx_ir as ir

    symbols: dict[Any, str] = {}
    for value in graph.inputs:
        for axis, kind in signature.dynamic[value.name].items():
            symbols[value.shape[axis]] = kind
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        for axis, size in enumerate(value.shape or ()):
            if size in symbols:
                value.shape[axis] = ir.SymbolicDim(symbols[size])


def _name_weights(graph: Any, loaded: LoadedModel) -> None:
    import onnx_ir as ir

    own = {f"model.{name}": weight for name, weight in loaded.names.items()}
    own |= {f"chain.{number}": name for number, name in enumerate(loaded.head.weights)}
    unnamed = []
    names: dict[Any, str] = {}
    taken: set[str] = set()
    for value in graph.initializers.values():
        weight = own.get(value.name)
        if weight is not None and weight not in taken:
            names[value] = weight
            taken.add(weight)
        elif value.dtype == ir.DataType.FLOAT and len(value.shape):
            unnamed.append(value)
        else:
            names[value] = value.name.removeprefix("model.")
    known = _by_content(loaded) if unnamed else {}
    for value in unnamed:
        array = np.asarray(constant(value))
        options = known.get(_digest(array)) or _computed(loaded, array)
        free = [o for o in options if o not in taken] or [f"{o}.transposed" for o in options]
        # Not a weight: a buffer, or a constant that was computed from weights.
        plain = value.name.removeprefix("model.")
        names[value] = next((name for name in free if name not in taken), plain)
        taken.add(names[value])
    inner = {value.name for node in graph for value in node.outputs}
    inner |= {value.name for value in graph.inputs}
    values = list(graph.initializers.values())
    new = [value.name if names[value] in inner else names[value] for value in values]
    ir.convenience.rename_values(values, new)


def _by_content(loaded: LoadedModel) -> dict[str, list[str]]:
    """Map the hash of each weight's values, as stored and transposed, to the names that have it."""
    known: dict[str, list[str]] = {}

    def add(values: np.ndarray, name: str) -> None:
        for form in (values, values.T) if values.ndim == 2 else (values,):
            names = known.setdefault(_digest(form), [])
            if name not in names:
                names.append(name)

    for name, parameter in loaded.module.named_parameters():
        if name in loaded.names:
            add(parameter.detach().numpy(), loaded.names[name])
    for name, tensor in loaded.head.weights.items():
        add(tensor.detach().numpy(), name)
    return known


def _computed(loaded: LoadedModel, values: np.ndarray) -> list[str]:
    import torch

    return [
        f"{path}.{name}"
        for path, part in loaded.module.named_modules()
        if torch.nn.utils.parametrize.is_parametrized(part)
        for name in part.parametrizations
        # The exporter folds with numpy, torch computes anew: the last bit may differ.
        if getattr(part, name).shape == values.shape
        and np.allclose(getattr(part, name).detach().numpy(), values, rtol=1e-5, atol=1e-7)
    ]


def _digest(values: np.ndarray) -> str:
    """Hash the values in order; the shape is left out, as the exporter folds reshapes."""
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()


# What torch says, in many lines that name its own insides -> what that means.
_REASONS = (
    (r"No ONNX function found for [^']*'(?:aten\.)?([\w.:]+)'", "ONNX has no operator for its {}"),
    (r"No decompositions? [^']*'?(?:aten[.:]+)([\w.]+)", "ONNX has no operator for its {}"),
    (r"[Dd]ata-dependent|GuardOnDataDependent|unbacked symint", "{}its code branches on values"),
    (r"[Cc]onstraints? violated|specializ|marked .* as dynamic", "{}its code fixes a length"),
    (r"(?:_local_scalar_dense|\.item\(\)|\.tolist\(\))", "{}its code reads numbers out of tensors"),
)


def _reason(error: BaseException) -> str:
    """Return what torch's long message comes to, without its words."""
    seen: BaseException | None = error
    text, names = "", []
    while seen is not None:
        text += f"{type(seen).__name__}: {seen}\n"
        names.append(type(seen).__name__)
        seen = seen.__cause__
    for pattern, meaning in _REASONS:
        if match := re.search(pattern, text):
            return meaning.format(match[1] if match.groups() else "")
    return f"torch cannot trace its code ({names[-1]})"
