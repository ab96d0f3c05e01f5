"""Turn a portable ONNX graph into the one ONNX Runtime runs fastest, with the same answers.

``fuse`` replaces patterns of standard operators by the ``com.microsoft`` operators that ONNX
Runtime implements in one kernel: Attention (query, key and value in one weight),
SkipLayerNormalization (residual and linear bias folded in), BiasGelu/FastGelu/QuickGelu,
EmbedLayerNormalization, and mean pooling as one product. A pattern that does not match stays as it
is and the report says why.

Names: a merged weight is named after what its parts share: ``layer.0.attention.self.query.weight``,
``...key.weight`` and ``...value.weight`` become ``layer.0.attention.self.qkv.weight`` (columns in
this order), the biases ``...qkv.bias``; the part names are kept, comma-separated, in the node's
metadata ``memopt.weights``. Every other weight keeps its name; one that the exporter left without
a name (``val_61``) is named after its bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memopt.errors import ExportError, first_line
from memopt.exporters.fuse_attention import AttentionFusion, weight_name
from memopt.exporters.fuse_embed import fuse_embeddings
from memopt.exporters.fuse_match import Projection
from memopt.exporters.fuse_norm import (
    fuse_gelu,
    fuse_mean_pooling,
    fuse_skip_layer_norm,
)
from memopt.exporters.fuse_probe import Probe
from memopt.exporters.onnx import EXTERNAL_DATA_BYTES, weight_bytes
from memopt.extras import require
from memopt.graphs.ir import (
    MICROSOFT,
    add_initializer,
    constant,
    is_constant,
    with_constant,
)
from memopt.positions import position_limit

if TYPE_CHECKING:
    import onnx

DEFAULT_POSITIONS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionReport:
    """How many of each fused operator a graph got, and what stayed as it was.

    Attributes:
        attention: com.microsoft.Attention nodes.
        skip_layer_norm: SkipLayerNormalization nodes.
        embed_layer_norm: EmbedLayerNormalization nodes.
        gelu: BiasGelu, Gelu, FastGelu and QuickGelu nodes together.
        mean_pooling: pooling sums written as a product.
        nodes_before: nodes of the portable graph.
        nodes_after: nodes of the fused graph.
        unfused: one line for each pattern that looked fusable and was not, with the reason.
    """

    attention: int = 0
    skip_layer_norm: int = 0
    embed_layer_norm: int = 0
    gelu: int = 0
    mean_pooling: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    unfused: tuple[str, ...] = ()

    @property
    def fused(self) -> int:
        """Fused operators in all; 0 means that the fused graph is the portable one."""
        return self.attention + self.skip_layer_norm + self.embed_layer_norm + self.gelu


def fuse(model: onnx.ModelProto, config: Mapping[str, Any]) -> tuple[onnx.ModelProto, FusionReport]:
    """Fuse ``model`` for ONNX Runtime.

    Args:
        model: a float32 graph of standard operators, as memopt's ONNX exporter writes it. It is
            not modified.
        config: the model's ``config.json``; ``max_position_embeddings`` and ``vocab_size`` bound
            the inputs on which mask subgraphs are tried out.

    Returns:
        the fused graph and the report. Inputs, outputs and their names are those of
        ``model``.

    Raises:
        ExportError: the graph is not valid ONNX.
        MissingExtra: onnx-ir (extra ``export``) or onnxruntime (extra ``cpu``) is not installed.

    >>> from onnx import TensorProto, helper
    >>> x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy")
    >>> graph = helper.make_graph([helper.make_node("Gelu", ["x"], ["y"])], "g", [x], [y])
    >>> portable = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    >>> fused, report = fuse(portable, {})
    >>> report.gelu, [n.domain for n in fused.graph.node]
    (1, ['com.microsoft'])
    """
    ir = require("onnx_ir", extra="export", why="fuse a graph")
    from onnx_ir.passes import common

    original = ir.from_proto(model)
    target = ir.from_proto(model)
    graph = target.graph
    before = graph.num_nodes()
    if any(v.shape is None for node in graph for v in node.outputs):
        common.ShapeInferencePass()(target)
    probe = Probe(
        original,
        positions=position_limit(config) or DEFAULT_POSITIONS,
        vocabulary=int(config.get("vocab_size") or 2),
        types=int(config.get("type_vocab_size") or 1),
    )
    counts = _apply(target, probe)
    graph.sort()
    graph.opset_imports[MICROSOFT] = 1
    common.RemoveUnusedOpsetsPass()(target)
    fused = ir.to_proto(target)
    _check(fused)
    report = FusionReport(nodes_before=before, nodes_after=len(fused.graph.node), **counts)
    return fused, report


def _apply(target: Any, probe: Probe) -> dict[str, Any]:
    """Fuse what matches; return what the report says of it."""
    from onnx_ir.passes import common

    graph = target.graph
    inputs = {value.name: value for value in graph.inputs}
    problems: list[str] = []
    name_weights(graph)
    attention = AttentionFusion(graph, probe, inputs.get("attention_mask"))
    attention.run()
    common.RemoveUnusedNodesPass()(target)
    gelu = fuse_gelu(graph)
    embed = fuse_embeddings(graph, probe, inputs, problems)
    common.RemoveUnusedNodesPass()(target)
    skip = fuse_skip_layer_norm(graph, problems)
    pooling = fuse_mean_pooling(graph)
    common.RemoveUnusedNodesPass()(target)
    return {
        "attention": attention.fused,
        "skip_layer_norm": skip,
        "embed_layer_norm": embed,
        "gelu": sum(gelu.values()),
        "mean_pooling": pooling,
        "unfused": (*attention.problems, *problems),
    }


def _check(fused: onnx.ModelProto) -> None:
    import onnx

    try:
        # protobuf hands no more than 2 GiB to the checker; a larger graph is checked once on disk.
        if weight_bytes(fused) <= EXTERNAL_DATA_BYTES:
            onnx.checker.check_model(fused)
    except onnx.checker.ValidationError as error:
        raise ExportError(
            f"the fused graph is not valid: {first_line(error)}",
            fix="use the portable graph and report the model's architecture",
        ) from error


def name_weights(graph: Any) -> int:
    """Give weights of linear layers that lost their checkpoint name the one their bias tells.

    Returns:
        how many were renamed.
    """
    import onnx_ir as ir

    renamed = 0
    for node in graph:
        if node.op_type != "MatMul" or not is_constant(node.inputs[1]):
            continue
        weight = node.inputs[1]
        reader = next((u.node for u in node.outputs[0].uses()), None)
        if "." in str(weight.name) or reader is None or reader.op_type != "Add":
            continue
        pair = with_constant(reader)
        if pair is None or not weight.is_initializer():
            continue
        name = weight_name(Projection(node, weight, pair[1]))
        if name != weight.name and name not in graph.initializers:
            # A new value: renaming the old one would rename the tensor in the caller's model too.
            array = constant(weight)
            assert array is not None
            ir.convenience.replace_all_uses_with(weight, add_initializer(graph, name, array))
            del graph.initializers[weight.name]
            renamed += 1
    return renamed
