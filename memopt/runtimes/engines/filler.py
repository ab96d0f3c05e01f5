"""MaskFiller: the tokens that fit in the gaps of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import InputError
from memopt.runtimes.engines.windowed import WindowedEngine, positive
from memopt.runtimes.vectors import as_items, refusal
from memopt.tasks.filling import Filling, filling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from memopt.runtimes.task_engine import Answers
    from memopt.runtimes.windows import Windows

# Bytes of one batch's logits: of a vocabulary of 250,002 a batch of 512 tokens has 512 MB.
_BATCH_BYTES = 128 << 20


class MaskFiller(WindowedEngine):
    """Says which tokens fit in each mask of texts of any length.

    Arguments and errors are those of :class:`memopt.runtimes.task_engine.Engine`.

    >>> MaskFiller("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks = ("fill-mask",)

    @property
    def mask(self) -> str:
        """What a gap is written as, [MASK] or <mask>."""
        return self._windows().mask()[0]

    def fill(
        self,
        inputs: Any,
        top: int = 5,
        *,
        stride: int | None = None,
        batch_size: int | None = None,
        show_progress: bool = False,
    ) -> list[list[Filling]]:
        """Return what fits in each mask of each text, in the text's order.

        Every mask is filled by itself, with the others left open. A text longer than the model is
        cut into windows that overlap; a mask is filled by the one where it is farthest from an
        edge.

        Args:
            inputs: texts that hold :attr:`mask` once or more.
            top: tokens a mask, at most.
            stride: tokens that two windows share; None takes 128, of short windows a quarter.
            batch_size, show_progress: as of :meth:`answers`.

        Raises:
            InputError: a text that cannot be used, or without a mask; named by its position.
            BundleError: the tokenizer has no mask token.
            ConfigurationError: ``top`` is no number, or a stride that leaves no way on.
            DeviceError: the engine is closed, or no provider is left.
        """
        positive("top", top)
        front = self._windows()
        mask, token = front.mask()
        texts = as_items(inputs, "text")
        done = 0

        def cut(group: Sequence[Any]) -> list[Windows]:
            nonlocal done
            cuts = front.windows(group, stride)
            without = {done + i: "holds no mask" for i, c in enumerate(cuts) if token not in c.ids}
            if without:
                raise InputError(refusal(without).problem, fix=f"write {mask} where a word is left")
            done += len(cuts)
            return cuts

        def masks(windows: Windows) -> list[NDArray[np.intp]]:
            places = np.flatnonzero(windows.ids == token)
            return [
                windows.positions(window, places[(places >= share.start) & (places < share.stop)])
                for window, share in enumerate(windows.shares())
            ]

        def fillings(windows: Windows, rows: Answers) -> list[Filling]:
            logits = [row for some in rows for row in some]
            places = windows.offsets[windows.ids == token].tolist()
            return [
                filling(row, (start, end), front.name, top)
                for row, (start, end) in zip(logits, places, strict=True)
            ]

        size = batch_size or self._batch_size(front.max_length)
        return self._windowed(texts, cut, masks, fillings, size, show_progress)

    def _batch_size(self, longest: int | None) -> int | None:
        """Return how many windows run together where their logits are large."""
        rows = self._bundle.config().get("vocab_size")
        if not isinstance(rows, int) or rows * self._chain.backend.tokens * 4 <= _BATCH_BYTES:
            return None
        return max(1, _BATCH_BYTES // (rows * 4 * (longest or self._chain.backend.tokens)))
