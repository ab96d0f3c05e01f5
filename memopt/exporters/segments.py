"""Several short texts in one row of an OpenVINO graph, told apart by the numbers of the mask.

A mask of 0 and 1 means what it always does. Where it counts 1, 2, 3, ... each number is a text of
its own: tokens see those of the same number, positions begin anew, and there is one vector a text,
row after row. So a runtime that pays for every new shape gets few shapes without padding (packing,
as for training in Krell et al. 2021, https://arxiv.org/abs/2107.02027).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from memopt.errors import brief
from memopt.exporters.check import TOLERANCES, Run, Tolerance, compare
from memopt.exporters.interface import Signature, headed_class
from memopt.exporters.masks import FOUR_D_MASK
from memopt.exporters.packed import position_offset
from memopt.runtimes.chain import MASK_BIAS, run_chain
from memopt.runtimes.segments import from_the_left, together
from memopt.runtimes.torch_model import LoadedModel
from memopt.weights.chain import VECTOR, PoolStep

_log = logging.getLogger(__name__)
Cases = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
_POOLED = frozenset({"mean", "cls", "lasttoken"})


def segmented(loaded: LoadedModel, task: str, signature: Signature, cases: Cases) -> Any | None:
    """Return the module of a model and its head that takes several texts a row; None if it cannot.

    Args:
        loaded: in float32.
        task: which answer is wanted.
        signature: names of the graph's inputs and outputs.
        cases: feeds and torch's own answers, which the module is compared with: each row alone, and
            the texts of each case in as few rows as hold them.
    """
    modes = {
        mode for step in loaded.head.steps if isinstance(step, PoolStep) for mode in step.modes
    }
    takes = {"input_ids", "attention_mask"} <= set(signature.inputs)
    decoder = getattr(loaded.config, "is_decoder", False)
    known = loaded.config.model_type in FOUR_D_MASK and not decoder
    if task != "embedding" or not (takes and known) or "pooling_mask" in signature.inputs:
        return None
    if not modes or not modes <= _POOLED:
        return None
    width, dimension = (cases[0][1][name].shape[-1] for name in signature.outputs)
    module = _module_class()(loaded, signature.inputs, width, dimension).eval()
    try:
        run, kind = _runner(module, signature), loaded.config.model_type
        compare(run, cases, TOLERANCES["fp32"], name=kind)
        compare_shared(run, cases, TOLERANCES["fp32"], kind)
    except Exception as error:  # noqa: BLE001 - of any kind: models nobody has seen
        _log.info("%s takes one text a row: %s", loaded.config.model_type, brief(error))
        return None
    return module


def compare_shared(run: Run, cases: Cases, tolerance: Tolerance, name: str) -> None:
    """Compare a graph's vectors of texts that share rows with torch's of each alone.

    Args:
        run: feeds -> outputs by name.
        cases: feeds and torch's answers; batches padded on the right, which is how texts come.

    Raises:
        ExportError: they differ.
    """

    def shared(feeds: Mapping[str, Any]) -> dict[str, Any]:
        mask, answer = feeds["attention_mask"], list(cases[0][1])[-1]
        if not from_the_left(mask):
            return {answer: run(feeds)[answer]}
        packed, order = together(feeds, 2 * mask.shape[1])
        vectors = np.asarray(run(packed)[answer])
        rows = np.empty_like(vectors)
        rows[order] = vectors
        return {answer: rows}

    last = [(feeds, dict([list(expected.items())[-1]])) for feeds, expected in cases]
    compare(shared, last, tolerance, name=f"{name}, texts that share rows")


def _runner(module: Any, signature: Signature) -> Run:
    import torch

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            outputs = module(*(torch.from_numpy(feeds[name]) for name in signature.inputs))
        return dict(zip(signature.outputs, (value.numpy() for value in outputs), strict=True))

    return run


@cache
def _module_class() -> Any:
    """Return the class; made on first use because it needs torch."""
    import torch

    class Segmented(headed_class()):  # type: ignore[misc]
        """The model, called with positional graph inputs, plus its head, a vector a text."""

        def __init__(
            self, loaded: LoadedModel, inputs: tuple[str, ...], width: int, dimension: int
        ) -> None:
            super().__init__(loaded, inputs)
            self.width, self.dimension = width, dimension
            self.offset = position_offset(loaded.config)
            self.positions = "position_ids" in inspect.signature(loaded.call).parameters

        def forward(self, *values: Any) -> Any:
            named = dict(zip(self.inputs, values, strict=True))
            segments = named.pop("attention_mask")
            same = segments[:, :, None] == segments[:, None, :]
            columns = torch.arange(segments.shape[1], device=segments.device)
            # Of each token the first one of its text: the earliest column of the same number.
            first = torch.where(same, columns, segments.shape[1]).amin(-1)
            if self.positions:
                named["position_ids"] = self._positions(columns[None, :], segments, first)
            hidden = torch.where(same[:, None], 0.0, MASK_BIAS)
            result = getattr(self.model, self.method)(**named, attention_mask=hidden)
            pool = _Pool(segments, columns == first, self.width)
            weights = dict(zip(self.head.weights, self.chain, strict=True))
            steps = self.head.steps
            pooled = run_chain(steps, result, segments, None, weights, pool=pool)[VECTOR]
            # By numbers again: of how many texts there are the graph knows nothing.
            return result.last_hidden_state, pooled[:, : self.dimension].reshape(-1, self.dimension)

        def _positions(self, columns: Any, segments: Any, first: Any) -> Any:
            """Return positions as the model counts them in rows of one text."""
            if self.offset is not None:
                counted = columns - first + self.offset
                return torch.where(segments > 0, counted, self.offset - 1)
            counted = columns - torch.where(segments > 1, first, 0)
            # A row may be wider than any text, and padding is at its end.
            return torch.where(segments > 0, counted, 0)

    return Segmented


class _Pool:
    """Pools each text of each row: what :func:`memopt.runtimes.chain.run_chain` calls.

    Args:
        segments: (rows, tokens), 0 for padding.
        starts: (rows, tokens), whether a text, or a row's padding, begins there.
        hidden: numbers of a token's state; as a number the exported graph knows it.
    """

    def __init__(self, segments: Any, starts: Any, hidden: int) -> None:
        import torch

        self._width = hidden
        rows, width = segments.shape
        empty = segments.amax(1, keepdim=True) == 0  # a row of padding has a vector too
        self._starts = (starts & ((segments > 0) | empty)).flatten().nonzero().squeeze(1)
        # A number for each text of each row.
        row = torch.arange(rows, device=segments.device)[:, None]
        texts = (row * (width + 1) + segments).flatten()
        self._mine = texts[None, :] == texts[self._starts][:, None]  # (texts, all tokens)

    def __call__(self, result: Any, hidden: Any, mask: Any, kept: Any, mode: str) -> Any:
        """Return one row a text: the mean of its tokens, the first or the last of them."""
        del result, mask, kept
        flat = hidden.reshape(-1, self._width)
        if mode == "cls":
            return flat[self._starts]
        count = self._mine.sum(1)
        if mode == "lasttoken":
            return flat[self._starts + (count - 1).clamp(min=0)]
        sums = self._mine.to(hidden.dtype) @ flat
        return sums / count.clamp(min=1)[:, None].to(hidden.dtype)
