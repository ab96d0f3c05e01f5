"""The torch module that is compiled whole: the model with its head, padded rows or packed ones.

Packed rows lie end to end (:mod:`memopt.runtimes.packing`) and attention stays within each, as in
FlashAttention's variable-length form (Dao 2023, https://arxiv.org/abs/2307.08691): nothing is
computed for padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from memopt.positions import OFFSET_POSITIONS
from memopt.runtimes.heads import head_outputs
from memopt.runtimes.torch_model import LoadedModel

PADDED, PACKED = "padded", "packed"
ATTENTION = "memopt_packed"  # transformers' name for the attention below
# Arguments of an attention that the one below knows, or that say nothing about the scores.
_KNOWN = frozenset(
    {"scaling", "dropout", "is_causal", "sliding_window", "position_ids", "use_cache"}
    | {"deterministic", "output_attentions"}
)


class _Rows:
    """Where the rows are that are being traced; attention is called from within the model."""

    starts: Any = None
    longest: Any = None
    row: Any = None  # of each token, for processors


def position_offset(config: Any) -> int | None:
    """Return the position of a row's first token, None where positions are columns.

    >>> from types import SimpleNamespace as N
    >>> position_offset(N(model_type="roberta", pad_token_id=1))
    2
    """
    if config.model_type not in OFFSET_POSITIONS:
        return None
    return int(getattr(config, "pad_token_id", None) or 0) + 1


def set_attention(loaded: LoadedModel, name: str) -> None:
    """Let the model attend with transformers' implementation of that name, or with ours."""
    if name == ATTENTION:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, _attend)
    if hasattr(loaded.module, "set_attn_implementation"):
        loaded.module.set_attn_implementation(name)


def module(loaded: LoadedModel, layout: str, inputs: Sequence[str]) -> Any:
    """Return the module of a layout: inputs, in order -> the head's last output in float32."""
    return _module_class()(loaded, layout, tuple(inputs)).eval()


@cache
def _module_class() -> Any:
    """Return the class; made on first use because it needs torch."""
    import torch

    class Whole(torch.nn.Module):  # type: ignore[misc]
        """A model and its head; ``model`` may be of any precision, the head is float32."""

        def __init__(self, loaded: LoadedModel, layout: str, inputs: tuple[str, ...]) -> None:
            super().__init__()
            self.model = loaded.module
            self.method = loaded.method or "forward"
            self.takes_cache = hasattr(loaded.config, "use_cache")
            self.head = loaded.head
            self.chain = torch.nn.ParameterList(loaded.head.weights.values()).requires_grad_(False)
            self.layout = layout
            self.inputs = inputs

        def forward(self, *values: Any) -> Any:
            named = dict(zip(self.inputs, values, strict=True))
            mask, kept = named.get("attention_mask"), named.pop("pooling_mask", None)
            if self.layout == PACKED:
                result = self._packed(named)
            else:
                dtype = next(self.model.parameters()).dtype
                floats = {n: v.to(dtype) for n, v in named.items() if v.is_floating_point()}
                result = _wide(self.call(**{**named, **floats}))
            weights = dict(zip(self.head.weights, self.chain, strict=True))
            return head_outputs(replace(self.head, weights=weights), result, mask, kept)[-1]

        @property
        def call(self) -> Any:
            return getattr(self.model, self.method)

        def _packed(self, named: dict[str, Any]) -> Any:
            mask, places = named.pop("attention_mask"), named.pop("places")
            starts = named.pop("starts")
            rows, width = mask.shape
            _Rows.starts, _Rows.longest = starts.int(), width
            _Rows.row = torch.div(places, width, rounding_mode="floor")
            tokens = {name: value.unsqueeze(0) for name, value in named.items()}
            # Keys and values are for who writes on.
            cache = {"use_cache": False} if self.takes_cache else {}
            result = self.call(**tokens, **cache, attention_mask=None)

            def padded(value: Any) -> Any:
                flat = value.new_zeros(rows * width, value.shape[-1])
                return flat.index_copy(0, places, value[0]).view(rows, width, -1)

            return _wide(result, padded)

    return Whole


def _wide(result: Any, change: Any = None) -> Any:
    """Return a model's output in float32, its tokens put where ``change`` puts them."""
    import torch

    for name, value in list(result.items() if hasattr(result, "items") else ()):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            if change is not None and value.ndim == 3:
                value = change(value)
            result[name] = value.float()
    return result


def _attend(
    attention: Any,
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    scaling: float | None = None,
    **further: Any,
) -> tuple[Any, None]:
    """Attend within each packed row; queries, keys, values (1, heads, tokens, width).

    Raises:
        ValueError: the model asks for what this attention does not compute.
    """
    foreign = {n for n, v in further.items() if n not in _KNOWN and v is not None}
    if mask is not None or foreign or further.get("dropout"):
        raise ValueError(f"attention with {', '.join(sorted(foreign)) or 'a mask'}")
    causal = further.get("is_causal")
    causal = bool(getattr(attention, "is_causal", False) if causal is None else causal)
    window = further.get("sliding_window")
    compute = _flash if query.is_cuda else _blocks
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return compute(query, key, value, scaling, causal, window).unsqueeze(0), None


def _flash(
    query: Any, key: Any, value: Any, scale: float | None, causal: bool, window: int | None
) -> Any:
    import torch

    reach = None if window is None else window - 1
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        _Rows.starts,
        _Rows.starts,
        _Rows.longest,
        _Rows.longest,
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=reach,
        window_size_right=0 if causal and window is not None else reach,
    )[0]


def _blocks(
    query: Any, key: Any, value: Any, scale: float | None, causal: bool, window: int | None
) -> Any:
    """Compute the same where there is no such kernel, by a mask of all tokens against all."""
    import torch

    seen = _Rows.row[:, None] == _Rows.row[None, :]
    order = torch.arange(len(_Rows.row), device=query.device)
    distance = order[:, None] - order[None, :]
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance.abs() < window)
    heads = (tensor.transpose(0, 1) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        *heads, attn_mask=seen, scale=scale, enable_gqa=True
    ).transpose(0, 1)


def packable(named: Mapping[str, Any], parameters: Mapping[str, Any]) -> bool:
    """Say whether a model can be asked for packed rows at all: texts whose positions are given.

    Whether its answers are right then, a comparison says.
    """
    return {"input_ids", "attention_mask"} <= set(named) and "position_ids" in parameters
