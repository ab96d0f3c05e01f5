"""A quantized weight file (schema V2) into a runnable graph with exactly its integers.

The bundle's portable fp32 graph keeps its nodes; each float initializer that the file has quantized
becomes the file's integers, scales and zero points. Nothing is quantized again. Two kernels:

- ``portable``: standard DequantizeLinear (blocked for groups, opset 21), read by any runtime;
- ``nbits``: ONNX Runtime's MatMulNBits and GatherBlockQuantized where the layout fits them, which
  keep the weights packed while running; DequantizeLinear elsewhere.

The result is compared with torch running the file's dequantized weights, as every export is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memopt.bundle import Bundle, Variant
from memopt.errors import ConfigurationError, ExportError
from memopt.exporters import check, onnx, tasks
from memopt.exporters.blocks import Blocks, to_blocks
from memopt.extras import require
from memopt.files import sha256_file, staged_directory
from memopt.registry import nearest
from memopt.runtimes.torch_model import load_model
from memopt.weights.layout import is_transposed
from memopt.weights.packing import pack
from memopt.weights.quantized import QuantizedWeight
from memopt.weights.reader import WeightLoader
from memopt.weights.schema import QUANT_BITS

KERNELS = ("nbits", "portable")
# INT4 tensors and blocked DequantizeLinear came with opset 21 (IR version 10).
_OPSET, _IR = 21, 10
# What changed meaning, not only types, between opset 18 and 21.
_CHANGED = {"GroupNormalization"}
_DOMAIN = "com.microsoft"
# ONNX Runtime fuses DequantizeLinear + MatMul into MatMulNBits, and by default at level 4:
# activations rounded to int8 (min cosine .9993 on MiniLM). Level 0 computes what the graph says.
_EXACT = {"session.qdq_matmulnbits_accuracy_level": "0"}


@dataclass(frozen=True, slots=True)
class _Use:
    """One node that reads a weight, and where."""

    node: Any
    position: int


def export_v2(
    bundle: Bundle,
    weights_file: str | Path,
    *,
    kernel: str = "nbits",
    accuracy_level: int = 0,
    on_step: Callable[[str], None] | None = None,
) -> Variant:
    """Write a graph with the integers of ``weights_file``, check it, and record it.

    Args:
        bundle: with its float weights and the portable fp32 graph.
        weights_file: a V2 file; a bare name is looked for in the bundle too.
        kernel: ``nbits`` (ONNX Runtime) or ``portable``.
        accuracy_level: of MatMulNBits: 0 computes in float32, 4 rounds activations to int8, which
            is faster and no longer exact.
        on_step: called with a line before each step.

    Returns:
        The new variant, ``onnx-int4-arrow`` or the like; ``-portable`` is appended for that kernel.
        It has passed its gate when `memopt quantize --method arrow` recorded that of this very
        file in the bundle; otherwise the engine opens it only when it is asked for by name.

    Raises:
        ExportError: no portable graph, a quantized weight the graph does not have under its name,
            or other answers than the dequantized weights give; nothing is written then.
        WeightsError: the file is damaged, not quantized, or not of this model.
        ConfigurationError: an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ConfigurationError(f"kernel {kernel!r} is not known", fix=nearest(kernel, KERNELS))
    say = on_step or (lambda line: None)
    path = _find(bundle, Path(weights_file))
    source = _portable(bundle)
    say(f"put the integers of {path.name} into {source.file}")
    graph, counts = quantized_graph(
        bundle.file(source), bundle.weights, path, kernel=kernel, accuracy_level=accuracy_level
    )
    with WeightLoader(path) as loader:
        precision = _precision(loader)
        settings = json.loads(loader.metadata.get("memopt.quantizer", "{}"))
    suffix = "-gptq" if settings.get("algorithm") == "gptq" else ""
    name = f"onnx-{precision}-arrow{suffix}" + ("-portable" if kernel == "portable" else "")
    stem = "model_" + name.removeprefix("onnx-").replace("-", "_")
    say("compute the torch reference from the dequantized weights")
    task = bundle.manifest.task
    loaded = load_model(bundle, task, path)
    signature = tasks.signature(loaded, bundle.manifest, task)
    cases = []
    shapes = tasks.check_shapes(loaded, task, bundle.manifest.max_length)
    for seed, shape in enumerate(shapes, start=1):
        feeds = tasks.example(loaded, signature.inputs, shape, seed)
        cases.append((feeds, tasks.reference(loaded, bundle.manifest, task, feeds)))
    with staged_directory(bundle.path) as folder:
        file = folder / f"{stem}.onnx"
        say(f"write and check {file.name}")
        beside = onnx.save_onnx(graph, file)
        # int8 activations are a choice of the caller's; their rounding is bfloat16's size.
        tolerance = check.TOLERANCES["bf16" if accuracy_level == 4 else "fp32"]
        run = _runner(file, signature.outputs)
        record = check.compare(run, cases, tolerance, name=name)
        proof = _proof(bundle, path)
        variant = Variant(
            name=name,
            format="onnx",
            precision=precision,
            file=f"onnx/{file.name}",
            companions=tuple(f"onnx/{part}" for part in beside),
            target="any" if kernel == "portable" else "cpu",
            fused=kernel == "nbits",
            options=_EXACT if kernel == "portable" else {},
            method="arrow",
            inputs=source.inputs,
            output=source.output,
            check={**record, "reference": f"torch fp32 with the dequantized {path.name}"},
            recipe=settings or None,
            passed=proof.get("passed") is True,
            validation=proof.get("validation"),
        )
        event = {"event": "export", "weights": path.name, "variants": [name], "nodes": dict(counts)}
        staged = {f"onnx/{part}": folder / part for part in (*beside, file.name)}
        bundle.add_variants(variant, event=event, staged=staged)
    return variant


def _proof(bundle: Bundle, path: Path) -> Mapping[str, Any]:
    """Return what quantizing recorded of this very file, {} when nothing did."""
    known = bundle.manifest.files.get(path.name, {}).get("sha256")
    if known is None or known != sha256_file(path):
        return {}
    of_file = (e for e in reversed(bundle.manifest.history) if e.get("file") == path.name)
    return next(of_file, {})


def quantized_graph(
    graph: Path, float_weights: Path, weights_file: Path, *, kernel: str, accuracy_level: int = 0
) -> tuple[Any, Counter[str]]:
    """Return the graph as an ONNX model with the file's numbers, and how many of each node it got.

    Args:
        graph: the portable fp32 graph.
        float_weights: the V1 file the graph was made of; tells which initializers are transposed.
        weights_file: the V2 file.
        kernel, accuracy_level: see :func:`export_v2`.
    """
    ox = require("onnx", extra="export", why="build the quantized graph")
    model = ox.load(str(graph))
    _raise_opset(model, ox)
    stored = {item.name: item for item in model.graph.initializer}
    uses: dict[str, list[_Use]] = {}
    for node in model.graph.node:
        for position, value in enumerate(node.input):
            uses.setdefault(value, []).append(_Use(node, position))
    editor = _Editor(model, ox, kernel, accuracy_level)
    with WeightLoader(weights_file) as loader, WeightLoader(float_weights) as floats:
        missing = [n for n in loader.names() if n not in floats]
        if missing:
            raise ExportError(
                f"{weights_file} has weight {missing[0]!r}, which {float_weights} does not",
                fix="quantize this bundle's own weights",
            )
        for name in loader.names():
            if name not in stored:
                continue  # a part of the checkpoint the graph does not run, such as a pooler
            item = stored[name]
            turned = is_transposed(ox.numpy_helper.to_array(item), floats.load(name), name=name)
            if loader.info(name).quant_type in QUANT_BITS:
                weight = loader.load_quantized(name)
                weight = weight.transposed() if turned else weight
                editor.replace(name, weight, uses.get(name, []))
            else:
                kept = loader.load(name).astype(ox.helper.tensor_dtype_to_np_dtype(item.data_type))
                kept = np.ascontiguousarray(kept.T if turned else kept)
                item.CopyFrom(ox.numpy_helper.from_array(kept, name))
    if not editor.counts:
        raise ExportError(
            f"no quantized weight of {weights_file} is in {graph}", fix="export the model again"
        )
    editor.finish()
    return model, editor.counts


class _Editor:
    """Replaces float initializers of one model by quantized ones."""

    def __init__(self, model: Any, ox: Any, kernel: str, accuracy_level: int) -> None:
        self._model = model
        self._ox = ox
        self._nbits = kernel == "nbits"
        self._accuracy = accuracy_level
        self._added: list[Any] = []
        self._gone: set[str] = set()
        self.counts: Counter[str] = Counter()

    def replace(self, name: str, weight: QuantizedWeight, uses: list[_Use]) -> None:
        """Serve every use of ``name`` from ``weight``, given in the initializer's own layout."""
        self._gone.add(name)
        kinds = {(use.node.op_type, use.position) for use in uses}
        if self._nbits and kinds == {("MatMul", 1)} and (blocks := to_blocks(weight, rows=1)):
            self._matmul(name, blocks, uses)
        elif self._nbits and kinds == {("Gather", 0)} and (blocks := to_blocks(weight, rows=0)):
            if weight.bits > 2 and all(_axis(use.node) == 0 for use in uses):
                self._gather(name, blocks, uses)
                return
            self._dequantize(name, weight)
        else:
            self._dequantize(name, weight)

    def finish(self) -> None:
        """Drop the float initializers, put dequantizing nodes first."""
        kept = [item for item in self._model.graph.initializer if item.name not in self._gone]
        del self._model.graph.initializer[:]
        self._model.graph.initializer.extend(kept)
        nodes = [*self._added, *self._model.graph.node]
        del self._model.graph.node[:]
        self._model.graph.node.extend(nodes)
        gone = [v for v in self._model.graph.value_info if v.name in self._gone]
        for value in gone:
            self._model.graph.value_info.remove(value)
        if any(node.domain == _DOMAIN for node in self._model.graph.node) and not any(
            entry.domain == _DOMAIN for entry in self._model.opset_import
        ):
            self._model.opset_import.append(self._ox.helper.make_opsetid(_DOMAIN, 1))

    def _store(self, name: str, array: np.ndarray) -> str:
        tensor = self._ox.numpy_helper.from_array(np.asarray(array, order="C"), name)
        self._model.graph.initializer.append(tensor)
        return name

    def _store_integers(self, name: str, values: np.ndarray, bits: int) -> str:
        if bits == 8:
            return self._store(name, values.astype(np.int8))
        # ONNX has no 2-bit type before opset 25; int2 values are the same integers in INT4.
        data = pack(values, 4).tobytes()
        kind = self._ox.TensorProto.INT4
        tensor = self._ox.helper.make_tensor(name, kind, values.shape, data, raw=True)
        self._model.graph.initializer.append(tensor)
        return name

    def _dequantize(self, name: str, weight: QuantizedWeight) -> None:
        inputs = [
            self._store_integers(f"{name}_quantized", weight.integers, weight.bits),
            self._store(f"{name}_scale", weight.scales),
        ]
        if not weight.symmetric:
            inputs.append(
                self._store_integers(f"{name}_zero_point", weight.zero_points, weight.bits)
            )
        options: dict[str, int] = {} if weight.axis == -1 else {"axis": weight.axis}
        if weight.group_size:
            # ONNX wants the smallest block that cuts the axis into that many pieces.
            size = weight.shape[weight.axis]
            options["block_size"] = min(weight.group_size, size)
        node = self._ox.helper.make_node(
            "DequantizeLinear", inputs, [name], name=f"{name}_dequantize", **options
        )
        self._added.append(node)
        self.counts["DequantizeLinear"] += 1

    def _matmul(self, name: str, blocks: Blocks, uses: list[_Use]) -> None:
        stored = self._store(f"{name}_quantized", blocks.packed())
        scales = self._store(f"{name}_scale", blocks.scales)
        inputs = [stored, scales]
        if blocks.points is not None:
            inputs.append(self._store(f"{name}_zero_point", blocks.packed_points()))
        for use in uses:
            activation = use.node.input[0]
            del use.node.input[:]
            use.node.input.extend([activation, *inputs])
            use.node.op_type, use.node.domain = "MatMulNBits", _DOMAIN
            use.node.attribute.extend(
                self._ox.helper.make_attribute(key, value)
                for key, value in (
                    ("K", blocks.width),
                    ("N", len(blocks.integers)),
                    ("bits", blocks.bits),
                    ("block_size", blocks.size),
                    ("accuracy_level", self._accuracy),
                )
            )
            self.counts["MatMulNBits"] += 1

    def _gather(self, name: str, blocks: Blocks, uses: list[_Use]) -> None:
        stored = self._store(f"{name}_quantized", blocks.packed(whole_blocks=False))
        scales = self._store(f"{name}_scale", blocks.scales)
        points = blocks.packed_points() if blocks.points is not None else None
        inputs = [scales]
        if points is not None:
            inputs.append(self._store(f"{name}_zero_point", points))
        for use in uses:
            indices = use.node.input[1]
            del use.node.input[:], use.node.attribute[:]
            use.node.input.extend([stored, indices, *inputs])
            use.node.op_type, use.node.domain = "GatherBlockQuantized", _DOMAIN
            use.node.attribute.extend(
                self._ox.helper.make_attribute(key, value)
                for key, value in (
                    ("gather_axis", 0),
                    ("quantize_axis", 1),
                    ("block_size", blocks.size),
                    ("bits", blocks.bits),
                )
            )
            self.counts["GatherBlockQuantized"] += 1


def _runner(path: Path, outputs: tuple[str, ...]) -> check.Run:
    """Run the graph in ONNX Runtime, exactly as written (see ``_EXACT``)."""
    ort = require("onnxruntime", extra="cpu", why="check the exported graph")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for key, value in _EXACT.items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = session.run(list(outputs), {k: v for k, v in feeds.items() if k in names})
        return dict(zip(outputs, found, strict=True))

    return run


def _axis(node: Any) -> int:
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)


def _raise_opset(model: Any, ox: Any) -> None:
    entry = next(e for e in model.opset_import if e.domain in ("", "ai.onnx"))
    if entry.version < _OPSET:
        changed = _CHANGED & {node.op_type for node in model.graph.node}
        if changed or entry.version < 18:
            model.CopyFrom(ox.version_converter.convert_version(model, _OPSET))
        else:
            entry.version = _OPSET  # the operators in use only gained types
    model.ir_version = max(model.ir_version, _IR)


def _find(bundle: Bundle, path: Path) -> Path:
    inside = bundle.path / path
    return inside if not path.is_file() and inside.is_file() else path


def _portable(bundle: Bundle) -> Variant:
    for variant in bundle.manifest.variants.values():
        if (variant.format, variant.precision, variant.method) == ("onnx", "fp32", "export") and (
            not variant.fused
        ):
            return variant
    raise ExportError(
        f"{bundle.path} has no portable ONNX graph to put the integers into",
        fix=f"run: memopt export {bundle.path} --format onnx",
    )


def _precision(loader: WeightLoader) -> str:
    """The quantized type that most values have."""
    sizes: Counter[str] = Counter()
    for name in loader.names():
        info = loader.info(name)
        if info.quant_type in QUANT_BITS:
            sizes[str(info.quant_type)] += info.size
    if not sizes:
        raise ExportError(
            f"{loader.path} has no quantized weights", fix="give a file made by memopt quantize"
        )
    return sizes.most_common(1)[0][0]
