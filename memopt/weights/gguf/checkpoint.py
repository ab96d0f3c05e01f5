"""The weights of a GGUF file under transformers' names, with what llama.cpp changed undone.

Whatever only moves whole rows, or turns a matrix, is done to the integers themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from memopt.errors import WeightsError
from memopt.registry import nearest
from memopt.weights.gguf.blocks import integers, values
from memopt.weights.gguf.file import GgufFile, GgufTensor
from memopt.weights.gguf.kinds import FLOATS
from memopt.weights.gguf.names import (
    EXPERTS,
    FALCON_TWO_NORMS,
    FUSED_HEADS,
    HEADS,
    LESS_ONE,
    NAMES,
    ROTARY_TABLES,
    ROW,
    TURNED,
    Names,
)
from memopt.weights.quantized import QuantizedWeight

_LAYER = "blk."


@dataclass(frozen=True, slots=True)
class GgufWeight:
    """One weight of the model: where it comes from and what is done to it.

    Attributes:
        name: transformers'.
        tensor: of the file.
        part: of the tensor's first axis, for an expert; None for all of it.
        change: what llama.cpp's converter did, "" for nothing.
        order: of the rows, for a change that moves them.
    """

    name: str
    tensor: GgufTensor
    part: int | None = None
    change: str = ""
    order: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape in transformers."""
        shape = self.tensor.shape if self.part is None else self.tensor.shape[1:]
        if self.change == TURNED and len(shape) == 2:
            return shape[::-1]
        return (1, *shape) if self.change == ROW and len(shape) == 1 else shape

    @property
    def dtype(self) -> str:
        """The type that :meth:`load` returns: the file's own floats, float32 for the rest."""
        kind = FLOATS.get(self.tensor.kind.name, "float32")
        return "float32" if self.change == LESS_ONE else kind

    def load(self) -> np.ndarray:
        """Return the values, quantized ones as the float32 they stand for."""
        loaded = values(self.tensor, self.part)
        if self.change == LESS_ONE:
            # As llama.cpp added it: in float32.
            loaded = loaded.astype(np.float32) - np.float32(1)
        if self.order is not None:
            loaded = loaded[self.order]
        if self.change == TURNED and loaded.ndim == 2:
            loaded = loaded.T
        return np.ascontiguousarray(loaded.reshape(self.shape))

    def load_quantized(self) -> QuantizedWeight | None:
        """Return the file's own integers; None for floats, and where they cannot be kept.

        They cannot where a scale is not finite, or where the values are changed and not moved.
        """
        if not self.tensor.kind.quantized or self.change in (LESS_ONE, ROW):
            return None
        try:
            weight = integers(self.tensor, self.part).weight()
        except WeightsError:
            return None  # the float weight is written as it is, and convert says it is not finite
        if self.order is not None:
            weight = weight.rows(self.order)
        return weight.transposed() if self.change == TURNED and len(weight.shape) == 2 else weight


def gguf_weights(file: GgufFile, config: Mapping[str, Any]) -> tuple[GgufWeight, ...]:
    """Return the model's weights in the file's order.

    Args:
        file: opened.
        config: what :func:`memopt.weights.gguf.config.build_config` returned for it.

    Raises:
        WeightsError: a tensor that the architecture does not have, one that is missing, or one of
            another shape than the metadata says; the message names it.
    """
    table = NAMES[file.architecture]
    layers = int(config.get("num_hidden_layers") or config["n_layer"])
    _check_names(file, table, layers)
    _check_shapes(file, config)
    weights = tuple(w for t in file.tensors.values() for w in _weights(t, table, config))
    names = [weight.name for weight in weights]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise WeightsError(f"{file.path} has two tensors for {twice!r}", fix="convert it again")
    return weights


def _stem(name: str) -> tuple[int | None, str, str]:
    """Split a tensor's name into layer, stem and ending.

    >>> _stem("blk.3.attn_q.weight"), _stem("token_embd.weight")
    ((3, 'attn_q', '.weight'), (None, 'token_embd', '.weight'))
    """
    layer = None
    stem, dot, ending = name.rpartition(".")
    if name.startswith(_LAYER):
        number, _, stem = stem.removeprefix(_LAYER).partition(".")
        layer = int(number) if number.isascii() and number.isdigit() else -1
    return layer, stem, dot + ending


def _check_names(file: GgufFile, table: Names, layers: int) -> None:
    """Refuse tensors without a place in the model, and a model without all of its tensors."""
    if layers > len(file.tensors):
        raise WeightsError(
            f"{file.path} announces {layers:,} layers and has {len(file.tensors)} tensors",
            fix="the file is damaged; download it again",
        )
    endings: dict[int | None, set[str]] = {}
    for name in file.tensors:
        if name in ROTARY_TABLES:
            continue
        layer, stem, ending = _stem(name)
        known = table.top if layer is None else table.layer
        outside = layer is not None and not 0 <= layer < layers
        if outside or stem not in known or ending not in (".weight", ".bias"):
            why = f"{layers} layers" if outside else f"architecture {file.architecture!r}"
            raise WeightsError(
                f"{file.path} has tensor {name!r:.200}, for which {why} has no place",
                fix=nearest(stem, known) if not outside else "the file is damaged",
            )
        endings.setdefault(layer, set()).add(stem + ending)
    needed = [(None, stem) for stem in table.top] + [
        (layer, stem) for layer in range(layers) for stem in table.layer
    ]
    for layer, stem in needed:
        if stem not in table.optional and f"{stem}.weight" not in endings.get(layer, ()):
            place = "" if layer is None else f"{_LAYER}{layer}."
            raise WeightsError(
                f"{file.path} has no tensor '{place}{stem}.weight', which architecture "
                f"{file.architecture!r} needs",
                fix="give a whole model",
            )
    for layer in range(layers):
        if differing := sorted(endings[layer] ^ endings[0]):
            raise WeightsError(
                f"{file.path}: layers 0 and {layer} differ: only one has {differing[0]!r}",
                fix="convert the safetensors of the model",
            )


def _check_shapes(file: GgufFile, config: Mapping[str, Any]) -> None:
    """Refuse tensors of another shape than the metadata says."""
    width = config.get("hidden_size") or config["n_embd"]
    heads = config.get("num_attention_heads") or config["n_head"]
    size = config.get("head_dim") or width // heads
    key_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
    inner = config.get("ffn_hidden_size") or config.get("intermediate_size")
    inner = inner or config.get("n_inner") or 4 * width
    inner_in = 2 * inner if config["model_type"] == "phi3" else inner
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config["vocab_size"], width),
        "output.weight": (config["vocab_size"], width),
        "output_norm.weight": (width,),
        "attn_q.weight": (heads * size, width),
        "attn_k.weight": (key_heads * size, width),
        "attn_v.weight": (key_heads * size, width),
        "attn_qkv.weight": ((heads + 2 * key_heads) * size, width),
        "attn_output.weight": (width, heads * size),
        "ffn_gate.weight": (inner, width),
        "ffn_up.weight": (inner_in, width),
        "ffn_down.weight": (width, inner),
        **dict.fromkeys(("attn_norm.weight", "ffn_norm.weight"), (width,)),
        **dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (size,)),
    }
    shapes |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items()}
    if "num_experts" in config:
        experts, small = config["num_experts"], config["moe_intermediate_size"]
        shapes["ffn_gate_inp.weight"] = (experts, width)
        shapes["ffn_down_exps.weight"] = (experts, width, small)
        names = ("ffn_gate_exps.weight", "ffn_up_exps.weight")
        shapes |= dict.fromkeys(names, (experts, small, width))
    for name, tensor in file.tensors.items():
        _, stem, ending = _stem(name)
        expected = shapes.get(stem + ending, tensor.shape)
        if tensor.shape != expected:
            raise WeightsError(
                f"{file.path}: tensor {name!r} is {list(tensor.shape)}, by its metadata it is "
                f"{list(expected)}",
                fix="the file is damaged; download it again",
            )


def _weights(tensor: GgufTensor, table: Names, config: Mapping[str, Any]) -> Iterator[GgufWeight]:
    if tensor.name in ROTARY_TABLES:
        return
    layer, stem, ending = _stem(tensor.name)
    name, change = table.top.get(stem, stem), table.changes.get(stem, "")
    if layer is not None:
        name = table.layer[stem]
        if config.get("new_decoder_architecture"):
            name = FALCON_TWO_NORMS.get(stem, name)
        name = table.layers.format(layer) + name
    if change == EXPERTS:
        for expert in range(tensor.shape[0]):
            yield GgufWeight(name.format(expert) + ending, tensor, expert)
        return
    yield GgufWeight(name + ending, tensor, None, change, _order(stem, change, tensor, config))


def _order(
    stem: str, change: str, tensor: GgufTensor, config: Mapping[str, Any]
) -> np.ndarray | None:
    """Return the order of a tensor's rows that transformers has."""
    if change not in (HEADS, FUSED_HEADS):
        return None
    rows, heads = np.arange(tensor.shape[0]), config["num_attention_heads"]
    if change == FUSED_HEADS:
        return _interleaved(rows, heads, config["num_kv_heads"])
    if stem == "attn_k":
        heads = config["num_key_value_heads"]
    # llama.cpp turns neighbours, transformers the two halves of a head.
    return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _interleaved(rows: np.ndarray, heads: int, key_heads: int) -> np.ndarray:
    """Return the rows of queries, keys, values as groups of queries with their key and value."""
    size = len(rows) // (heads + 2 * key_heads)
    queries, keys, ends = np.split(rows, [heads * size, (heads + key_heads) * size])
    parts = [part.reshape(key_heads, -1) for part in (queries, keys, ends)]
    return np.concatenate(parts, axis=1).reshape(-1)
