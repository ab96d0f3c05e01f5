"""Put one ``com.microsoft.Attention`` in the place of each softmax attention that was found.

Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.Attention
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from memopt.exporters.fuse_match import Match, NoMatch, Projection, match, projection
from memopt.exporters.fuse_probe import MaskKind, Probe
from memopt.graphs.ir import (
    MICROSOFT,
    add_initializer,
    constant,
    dims,
    insert,
    replace,
    shared_parent,
)

# Where the dynamo exporter writes the modules that a node comes from, outermost first.
NAME_SCOPES = "pkg.torch.onnx.name_scopes"


class AttentionFusion:
    """Rewrites the attentions of one graph and remembers the masks they share."""

    def __init__(self, graph: Any, probe: Probe, mask_input: Any) -> None:
        self._graph = graph
        self._probe = probe
        self._mask_input = mask_input
        self._kinds: dict[str, MaskKind] = {}
        self._mask_int32: Any = None
        self.fused = 0
        self.problems: list[str] = []

    def run(self) -> None:
        """Fuse every attention that matches; the others keep their nodes and give a reason."""
        for node in list(self._graph):
            if node.op_type == "Softmax" and node.domain == "":
                try:
                    self._rewrite(match(node), node)
                except NoMatch as reason:
                    self.problems.append(f"attention {node.name}: {reason}")

    def _kind(self, bias: Any) -> MaskKind:
        if bias.name not in self._kinds:
            self._kinds[bias.name] = self._probe.mask(bias)
        return self._kinds[bias.name]

    def _rewrite(self, pattern: Match, softmax: Any) -> None:
        layers = [projection(h.source) for h in (pattern.query, pattern.key, pattern.value)]
        if len({layer.source for layer in layers}) != 1:
            raise NoMatch("query, key and value have different inputs")
        kept: list[Any] = []
        padding, causal, fill = False, False, float(np.finfo(np.float32).min)
        for bias in pattern.biases:
            kind = self._kind(bias)
            if kind.general:
                kept.append(bias)
            else:
                padding, causal, fill = padding or kind.padding, causal or kind.causal, kind.fill
        for bias in kept:
            shape = dims(bias)
            if shape is None or len(shape) != 4 or shape[0] == shape[2] == 1 or shape[2] == 1:
                raise NoMatch(f"the bias {bias.name} of shape {shape} is not (.., .., query, key)")
        if padding and self._mask_input is None:
            raise NoMatch("a padding mask without an attention_mask input")
        self._emit(pattern, layers, softmax, kept, padding, causal, fill)

    def _emit(
        self,
        pattern: Match,
        layers: list[Projection],
        softmax: Any,
        kept: list[Any],
        padding: bool,
        causal: bool,
        fill: float,
    ) -> None:
        graph = self._graph
        names = [weight_name(layer) for layer in layers]
        parent = shared_parent(names) or names[0].rsplit(".", 1)[0]
        before = pattern.output.producer()
        weights = [np.asarray(constant(layer.weight)) for layer in layers]
        biases = [
            np.zeros(w.shape[1], w.dtype)
            if layer.bias is None
            else np.asarray(constant(layer.bias))
            for layer, w in zip(layers, weights, strict=True)
        ]
        weight = add_initializer(graph, f"{parent}.qkv.weight", np.concatenate(weights, axis=1))
        bias = add_initializer(graph, f"{parent}.qkv.bias", np.concatenate(biases))
        heads, size = pattern.query.heads, pattern.query.size
        attributes: dict[str, Any] = {"num_heads": heads}
        if pattern.value.size != size or pattern.key.size != size:
            widths = [h.heads * h.size for h in (pattern.query, pattern.key, pattern.value)]
            attributes["qkv_hidden_sizes"] = widths
        if causal:
            attributes["unidirectional"] = 1
        if padding or causal:
            attributes["mask_filter_value"] = fill
        if not np.isclose(pattern.scale, size**-0.5, rtol=1e-6):
            attributes["scale"] = float(pattern.scale)
        inputs = [layers[0].source, weight, bias]
        extra = self._sum(kept, before, parent)
        if padding or extra is not None:
            inputs += [self._mask() if padding else None]
        if extra is not None:
            inputs += [None, extra]
        node = insert(
            graph,
            before,
            "Attention",
            inputs,
            domain=MICROSOFT,
            name=f"{parent}.attention",
            **attributes,
        )
        node.metadata_props["memopt.weights"] = ",".join(names)
        replace(pattern.output, node.outputs[0])
        self.fused += 1

    def _sum(self, biases: list[Any], before: Any, parent: str) -> Any:
        if not biases:
            return None
        total = biases[0]
        for i, bias in enumerate(biases[1:]):
            total = insert(
                self._graph, before, "Add", [total, bias], name=f"{parent}.attention_bias_{i}"
            ).outputs[0]
        return total

    def _mask(self) -> Any:
        """``attention_mask`` as int32 (batch, sequence), one Cast for the whole graph."""
        if self._mask_int32 is None:
            import onnx_ir as ir

            first = next(iter(self._graph))
            cast = insert(
                self._graph,
                first,
                "Cast",
                [self._mask_input],
                name="attention_mask_int32",
                to=int(ir.DataType.INT32),
            )
            self._mask_int32 = cast.outputs[0]
            self._mask_int32.shape = self._mask_input.shape
            self._mask_int32.type = ir.TensorType(ir.DataType.INT32)
        return self._mask_int32


def weight_name(layer: Projection) -> str:
    """The checkpoint name of a linear layer's weight.

    A transposed weight may have lost it (``val_61``); then the module that torch recorded for the
    product tells, or the bias, unless layers share it (equal initializers are merged by exporters).
    """
    name = str(layer.weight.name)
    if "." in name:
        return name
    scopes = re.findall(r"'([^']*)'", layer.product.metadata_props.get(NAME_SCOPES, ""))
    if len(scopes) > 1 and "." in scopes[-2]:
        return f"{scopes[-2]}.weight"
    bias = layer.bias
    if bias is not None and str(bias.name).endswith(".bias") and len(bias.uses()) == 1:
        return str(bias.name)[: -len("bias")] + "weight"
    return name
