"""DeBERTa's attention in a graph: to the distances that a text has, not to all there could be.

He et al. 2021, https://arxiv.org/abs/2006.03654: a score is content to content, content to position
and position to content. transformers multiplies every token with all 512 positions, repeated for
every text, and picks from that; a text of T tokens has 2 T - 1 distances. Here their positions are
picked first, and each row of products is moved to where its token stands, as in Dai et al. 2019,
https://arxiv.org/abs/1901.02860, appendix B. The positions themselves depend on no text: they are
projected once, here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

# The modules of transformers with this attention; the first has another layout, and no buckets.
_KINDS = ("deberta", "deberta_v2", "sew_d")
# Part of a score -> what projects its positions: a layer for them, or, where it is shared, for all.
_PROJECTIONS = {
    "c2p": ("pos_proj", "pos_key_proj", "key_proj"),
    "p2c": ("pos_q_proj", "pos_query_proj", "query_proj"),
}


@contextmanager
def by_distance(model: Any) -> Iterator[None]:
    """Let the attentions of a torch model that are DeBERTa's compute so while the block runs."""
    with ExitStack() as undo:
        for found in _attentions(model):
            _change(*found, undo)
        yield


def projected_positions(model: Any) -> dict[str, Any]:
    """Return name -> float32 array (heads, positions, dimension) that such a graph holds.

    They are no weights but made of some: a graph with other weights has other ones.
    """
    with by_distance(model):
        return {
            name: buffer.detach().float().numpy().copy()
            for name, buffer in model.named_buffers()
            if name.rpartition(".")[2] in (f"{which}_positions" for which in _PROJECTIONS)
        }


def _attentions(model: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield each such attention, the embeddings of its positions, and the rows of distances."""
    kind = str(getattr(getattr(model, "config", None), "model_type", "")).replace("-", "_")
    if kind not in _KINDS:
        return
    library = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    for encoder in model.modules():
        if not getattr(encoder, "relative_attention", False):
            continue
        if not hasattr(encoder, "get_rel_embedding"):
            continue
        embeddings = encoder.get_rel_embedding()
        for attention in encoder.modules():
            if isinstance(attention, library.DisentangledSelfAttention):
                bucketed = getattr(library, "make_log_bucket_position", None)
                rows = _rows_of_distances(attention, bucketed)
                if rows is not None:
                    yield attention, embeddings, rows


def _span(attention: Any) -> int:
    """Return half of how many positions there are."""
    return int(getattr(attention, "pos_ebd_size", attention.max_relative_positions))


def _rows_of_distances(attention: Any, bucketed: Any) -> Any:
    """Return the row of positions of each distance from -N to N, None where farther ones differ."""
    import torch

    span, most = _span(attention), attention.max_relative_positions
    far = 2 * max(span, most)
    distances = torch.arange(-2 * far, 2 * far + 1)
    buckets = getattr(attention, "position_buckets", -1)
    if buckets > 0 and most > 0:
        distances = bucketed(distances, buckets, most).long()
    rows = (distances + span).clamp(0, 2 * span - 1)
    same = bool((rows[: far + 1] == rows[0]).all() and (rows[-far - 1 :] == rows[-1]).all())
    return rows[far : 3 * far + 1].clone() if same else None


def _change(attention: Any, embeddings: Any, rows: Any, undo: ExitStack) -> None:
    """Give an attention its positions as buffers; ``undo`` takes them away."""
    import torch

    def add(name: str, value: Any) -> None:
        attention.register_buffer(name, value, persistent=False)
        undo.callback(delattr, attention, name)

    add("distance_rows", rows.to(embeddings.device))
    for which, names in _PROJECTIONS.items():
        if which in attention.pos_att_type:
            project = getattr(attention, next(n for n in names if hasattr(attention, n)))
            with torch.no_grad():
                projected = project(embeddings[: 2 * _span(attention)])
                by_head = projected.unflatten(-1, (attention.num_attention_heads, -1))
            placed = by_head.transpose(0, 1).contiguous()
            add(f"{which}_positions", placed)
    method = "disentangled_attention_bias"
    if not hasattr(attention, method):
        method = "disentangled_att_bias"
    setattr(attention, method, MethodType(_bias, attention))
    undo.callback(delattr, attention, method)


def _bias(
    self: Any,
    query_layer: Any,
    key_layer: Any,
    relative_pos: Any,
    rel_embeddings: Any,
    scale_factor: int,
) -> Any:
    """Return what positions add to the scores, (batch x heads, tokens, tokens).

    The arguments are transformers': layers are (batch x heads, tokens, dimension); of the first
    DeBERTa batch and heads are two axes, here and in what is returned, and queries scaled already.
    """
    import torch

    del relative_pos, rel_embeddings  # of the module itself, here as buffers
    first = query_layer.dim() == 4
    tokens, dimension = query_layer.size(-2), query_layer.size(-1)
    distances = (tokens - 1) - torch.arange(2 * tokens, device=query_layer.device)
    far = self.distance_rows.numel() // 2
    near = distances.clamp(-far, far) + far
    scale = (dimension * scale_factor) ** 0.5

    def scores(layer: Any, positions: Any, divisor: float) -> Any:
        """Return (..., tokens, tokens): of each token of ``layer`` at each distance."""
        split = layer if first else layer.unflatten(0, (-1, self.num_attention_heads))
        placed = _in_place(split @ (positions / divisor).transpose(-1, -2), tokens)
        return placed if first else placed.flatten(0, 1)

    bias: Any = 0
    if "c2p" in self.pos_att_type:
        positions = self.c2p_positions.index_select(1, self.distance_rows[near])
        bias = bias + scores(query_layer, positions, 1.0 if first else scale)
    if "p2c" in self.pos_att_type:
        positions = self.p2c_positions.index_select(1, self.distance_rows.flip(0)[near])
        bias = bias + scores(key_layer, positions, scale).transpose(-1, -2)
    return bias


def _in_place(rows: Any, tokens: Any) -> Any:
    """Return (..., tokens, tokens) out of (..., tokens, 2 tokens).

    Value j of row i belongs at i + j - (tokens - 1): read as rows of one value less, each begins a
    place further on.
    """
    flat = rows.flatten(-2)[..., tokens - 1 : -1]
    return flat.unflatten(-1, (tokens, 2 * tokens - 1))[..., :tokens]
