"""A quantized weight file (schema V2) into a runnable graph with exactly its integers.

The bundle's portable fp32 graph (of a language model the one for ONNX Runtime) keeps its nodes;
each float initializer that the file has quantized becomes the file's integers, scales, zero points
and minima. Nothing is quantized again. ONNX Runtime's
MatMulNBits and GatherBlockQuantized, which keep the weights packed while running, read them where
the layout fits; standard DequantizeLinear (blocked for groups, opset 21) elsewhere.

The result is compared with torch running the file's dequantized weights, as every export is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memopt.bundle import Bundle, Variant
from memopt.errors import ExportError
from memopt.exporters import check, onnx
from memopt.exporters.base import kind_of, reference_cases
from memopt.exporters.distances import projected_positions
from memopt.exporters.refusals import need_one_graph
from memopt.extras import require
from memopt.files import sha256_file, staged_directory
from memopt.graphs.block_product import block_product, block_rows
from memopt.graphs.blocks import Blocks, to_blocks
from memopt.graphs.ir import (
    MICROSOFT,
    constant,
    drop_unused,
    from_proto,
    new_node,
    replace_node,
    set_constant,
    store,
    to_proto,
    with_blocks,
)
from memopt.progress import Step, silent
from memopt.weights.layout import as_stored, is_transposed
from memopt.weights.quantized import QuantizedWeight
from memopt.weights.reader import WeightLoader
from memopt.weights.schema import QUANT_BITS


def export_v2(bundle: Bundle, weights_file: str | Path, *, on_step: Step = silent) -> Variant:
    """Write a graph with the integers of ``weights_file``, check it, and record it.

    Args:
        bundle: with its float weights and the portable fp32 graph.
        weights_file: a V2 file; a bare name is looked for in the bundle too.
        on_step: called with a line before each step.

    Returns:
        The new variant, ``onnx-int4-arrow`` or the like. It has passed its gate when `memopt
        quantize --method arrow` recorded that of this very file in the bundle; otherwise the engine
        opens it only when it is asked for by name.

    Raises:
        ExportError: no portable graph, a quantized weight the graph does not have under its name,
            or other answers than the dequantized weights give; nothing is written then.
        WeightsError: the file is damaged, not quantized, or not of this model.
    """
    need_one_graph(bundle, "a graph of quantized weights")
    path = _find(bundle, Path(weights_file))
    source = _source(bundle)
    on_step(f"put the integers of {path.name} into {source.file}")
    graph, counts = quantized_graph(bundle.file(source), bundle.weights, path)
    with WeightLoader(path) as loader:
        precision = _precision(loader)
        settings = json.loads(loader.metadata.get("memopt.quantizer", "{}"))
    name = f"onnx-{precision}-arrow" + ("-gptq" if settings.get("algorithm") == "gptq" else "")
    on_step("compute the torch reference from the dequantized weights")
    manifest, task = bundle.manifest, bundle.manifest.task
    kind, writes = kind_of(task), bundle.task.answer == "logits"
    loaded = kind.load_model(bundle, task, path)
    _project(graph, loaded.module)
    signature = kind.signature(loaded, manifest, task)
    cases = reference_cases(loaded, manifest, task, signature)
    with staged_directory(bundle.path) as folder:
        file = folder / f"model_{name.removeprefix('onnx-').replace('-', '_')}.onnx"
        on_step(f"write and check {file.name}")
        beside = onnx.save_onnx(graph, file)
        run, tolerance = onnx.runner(file, signature.outputs, exact=True), check.TOLERANCES["fp32"]
        record = kind.compare(run, loaded, cases, tolerance, name)
        variant = Variant(
            name=name,
            format="onnx",
            precision=precision,
            file=f"onnx/{file.name}",
            companions=tuple(f"onnx/{part}" for part in beside),
            target="cpu",
            fused=source.fused or not writes,
            method="arrow",
            inputs=source.inputs,
            output=source.output,
            check={**record, "reference": f"torch fp32 with the dequantized {path.name}"},
            recipe=settings or None,
            **_proof(bundle, path),
        )
        event = {"event": "export", "weights": path.name, "variants": [name], "nodes": dict(counts)}
        staged = {f"onnx/{part}": folder / part for part in (*beside, file.name)}
        bundle.add_variants(variant, event=event, staged=staged)
        return variant


def _project(graph: Any, module: Any) -> None:
    """Put what the export computed of float weights in anew, of the file's."""
    onnx = require("onnx", extra="export", why="build the quantized graph")
    positions = projected_positions(module)
    for tensor in graph.graph.initializer:
        if tensor.name in positions:
            tensor.CopyFrom(onnx.numpy_helper.from_array(positions[tensor.name], tensor.name))


def _proof(bundle: Bundle, path: Path) -> dict[str, Any]:
    """Return the verdict that quantizing recorded of this very file; without one it is a no."""
    known = bundle.manifest.files.get(path.name, {}).get("sha256")
    event: Mapping[str, Any] = {}
    if known is not None and known == sha256_file(path):
        of_file = (e for e in reversed(bundle.manifest.history) if e.get("file") == path.name)
        event = next(of_file, {})
    return {"passed": event.get("passed") is True, "validation": event.get("validation")}


def quantized_graph(
    graph: Path, float_weights: Path, weights_file: Path
) -> tuple[Any, Counter[str]]:
    """Return the graph as an ONNX model with the file's numbers, and how many of each node it got.

    Args:
        graph: the portable fp32 graph.
        float_weights: the V1 file the graph was made of; tells which initializers are transposed.
        weights_file: the V2 file.
    """
    onnx_package = require("onnx", extra="export", why="build the quantized graph")
    model = from_proto(with_blocks(onnx_package.load(str(graph))))
    editor = _Editor(model.graph)
    with WeightLoader(weights_file) as loader, WeightLoader(float_weights) as floats:
        missing = [n for n in loader.names() if n not in floats]
        if missing:
            raise ExportError(
                f"{weights_file} has weight {missing[0]!r}, which {float_weights} does not",
                fix="quantize this bundle's own weights",
            )
        for name in loader.names():
            value = model.graph.initializers.get(name)
            if value is None:
                continue  # a part of the checkpoint the graph does not run, such as a pooler
            stored = np.asarray(constant(value))
            turned = is_transposed(stored, floats.load(name), name=name)
            if loader.info(name).quant_type in QUANT_BITS:
                weight = loader.load_quantized(name)
                editor.replace(value, weight.transposed() if turned else weight)
            else:
                kept = loader.load(name).astype(stored.dtype)
                set_constant(value, as_stored(kept, stored, turned=turned))
    if not editor.counts:
        raise ExportError(
            f"no quantized weight of {weights_file} is in {graph}", fix="export the model again"
        )
    drop_unused(model)
    model.graph.sort()  # sums of a product's inputs may serve an earlier product too
    if editor.counts.keys() - {"DequantizeLinear"}:
        model.graph.opset_imports.setdefault(MICROSOFT, 1)
    return to_proto(model), editor.counts


class _Editor:
    """Replaces float initializers of one graph by quantized ones."""

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._first = graph[0]
        self.counts: Counter[str] = Counter()

    def replace(self, value: Any, weight: QuantizedWeight) -> None:
        """Serve every use of an initializer from ``weight``, given in its own layout."""
        readers = list(_readers(value))
        kinds, blocks = {kind for kind, _ in readers}, None
        if kinds == {"product"} and weight.integers.ndim == 2:
            blocks = to_blocks(weight.transposed())
        elif kinds <= {"rows", "turned"} and (weight.bits > 2 or "rows" not in kinds):
            blocks = to_blocks(weight, table="rows" in kinds)
        if blocks is None:
            self._dequantize(value, weight)
        else:
            # Rows first: where a product reads the same table, it takes their bytes.
            for kind, node in sorted(readers, key=lambda reader: reader[0] != "rows"):
                serve = self._gather if kind == "rows" else self._matmul
                serve(value.name, blocks, node)
        del self._graph.initializers[value.name]

    def _integers(self, name: str, values: np.ndarray, bits: int) -> Any:
        import ml_dtypes

        # ONNX has no 2-bit type before opset 25; int2 values are the same integers in INT4.
        kind = np.int8 if bits == 8 else ml_dtypes.int4
        return store(self._graph, name, np.asarray(values, np.int8).astype(kind))

    def _dequantize(self, value: Any, weight: QuantizedWeight) -> None:
        import onnx_ir as ir

        name = value.name
        inputs = [
            self._integers(f"{name}_quantized", weight.integers, weight.bits),
            store(self._graph, f"{name}_scale", weight.scales),
        ]
        if not weight.symmetric:
            points = self._integers(f"{name}_zero_point", weight.zero_points, weight.bits)
            inputs.append(points)
        options: dict[str, int] = {} if weight.axis == -1 else {"axis": weight.axis}
        if weight.group_size:
            # ONNX wants the smallest block that cuts the axis into that many pieces.
            options["block_size"] = min(weight.group_size, weight.shape[weight.axis])
        label = {"name": f"{name}_dequantize"}
        scaled = f"{name}_scaled" if weight.has_minima else name
        nodes = [new_node("DequantizeLinear", inputs, scaled, **label, **options)]
        nodes += self._raised(name, nodes[0].outputs[0], weight) if weight.has_minima else []
        for node in nodes:
            self._graph.insert_before(self._first, node)
        ir.convenience.replace_all_uses_with(value, nodes[-1].outputs[0])
        self.counts["DequantizeLinear"] += 1

    def _raised(self, name: str, scaled: Any, weight: QuantizedWeight) -> list[Any]:
        """Return the nodes that add each group's minimum: DequantizeLinear has no place for it."""
        shape, axis, minima = weight.shape, weight.axis, weight.minima
        size = weight.group_size
        if size and shape[axis] % size:
            raise ExportError(f"{name!r}: groups of {size} with minima do not cut {shape[axis]}")
        if not size:
            minima = weight.spread(minima)
            added = store(self._graph, f"{name}_minimum", np.ascontiguousarray(minima))
            return [new_node("Add", [scaled, added], name, name=f"{name}_raise")]
        groups = (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
        cut = store(self._graph, f"{name}_groups", np.array(groups, np.int64))
        whole = store(self._graph, f"{name}_shape", np.array(shape, np.int64))
        added = store(self._graph, f"{name}_minimum", np.expand_dims(minima, axis + 1))
        split = new_node("Reshape", [scaled, cut], f"{name}_grouped", name=f"{name}_cut")
        raised = [split.outputs[0], added]
        add = new_node("Add", raised, f"{name}_raised", name=f"{name}_raise")
        join = new_node("Reshape", [add.outputs[0], whole], name, name=f"{name}_join")
        return [split, add, join]

    def _matmul(self, name: str, blocks: Blocks, node: Any) -> None:
        nodes = block_product(self._graph, node.inputs[0], name, blocks, node.outputs[0].name)
        nodes[-1].name = node.name
        self._replace(node, nodes)
        self.counts["MatMulNBits"] += 1

    def _gather(self, name: str, blocks: Blocks, node: Any) -> None:
        rows = block_rows(self._graph, node.inputs[1], name, blocks, node.outputs[0].name)
        rows[-1].name = node.name
        self._replace(node, rows)
        self.counts["GatherBlockQuantized"] += 1

    def _replace(self, node: Any, nodes: list[Any]) -> None:
        if node is self._first:
            self._first = nodes[0]
        replace_node(self._graph, node, nodes)


def _readers(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the nodes that read a weight: its rows, a product, or one with the weight turned."""
    for use in value.uses():
        node, place = use.node, use.idx
        if (node.op_type, place) == ("Gather", 0) and _axis(node) == 0:
            yield "rows", node
        elif (node.op_type, place) == ("MatMul", 1):
            yield "product", node
        elif node.op_type == "Transpose" and len(value.shape) == 2:
            for kind, reader in _readers(node.outputs[0]):
                yield ("turned" if kind == "product" else "other"), reader
        else:
            yield "other", node


def _axis(node: Any) -> int:
    axis = node.attributes.get("axis")
    return 0 if axis is None else int(axis.as_int())


def _find(bundle: Bundle, path: Path) -> Path:
    inside = bundle.path / path
    return inside if not path.is_file() and inside.is_file() else path


def _source(bundle: Bundle) -> Variant:
    """Return the float graph to put integers into: with one buffer for keys and values if it is."""
    for name in ("onnx-fp32-fused",) * (bundle.task.answer == "logits") + ("onnx-fp32",):
        if name in bundle.manifest.variants:
            return bundle.manifest.variants[name]
    raise ExportError(
        f"{bundle.path} has no float ONNX graph to put the integers into",
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
