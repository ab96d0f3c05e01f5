"""ArrowEngine: a bundle's variant opened on a provider, with its pre-processing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from memopt.bundle import MANIFEST
from memopt.errors import BundleError, ConfigurationError
from memopt.registry import nearest
from memopt.runtimes.task_engine import Engine
from memopt.runtimes.vectors import (
    Encoded,
    as_items,
    is_bare,
    refusal,
    to_arrow,
    unit_length,
)
from memopt.weights.sentence import named_prompts

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows
    from memopt.runtimes.batcher import Batcher
    from memopt.runtimes.batching import FrontEnd

__all__ = ["ArrowEngine"]
# Inputs of callers at the same time that are encoded together.
_TOGETHER = 1024


class ArrowEngine(Engine):
    """Encodes texts, images or waveforms with one variant of a bundle on one provider.

    Arguments and errors are those of :class:`memopt.runtimes.task_engine.Engine`.

    >>> from memopt.runtimes.testing import fake_engine
    >>> with fake_engine(dimension=8) as engine:
    ...     engine.encode(["a cat", "a dog"]).shape, engine.encode("a cat").shape
    ((2, 8), (8,))
    """

    tasks = ("embedding", "image-embedding", "audio-embedding")

    def after_fork(self) -> None:
        """In a child of fork(): nor is the queue of requests."""
        super().after_fork()
        self._batcher: Batcher | None = None

    def close(self) -> None:
        """Free the session. Closing twice is fine; encoding afterwards raises DeviceError."""
        if self._batcher is not None:
            self._batcher.close()
        super().close()

    @property
    def dimension(self) -> int:
        """Length of one vector, as the graph gives it.

        Raises:
            BundleError: the manifest says another one, or neither says it.
        """
        stated, known = self._bundle.manifest.dimension, self._chain.backend.dimension
        if stated and known and stated != known:
            raise BundleError(
                f"{self._bundle.file(self._chain.candidate.variant)} gives vectors of {known} "
                f"numbers, and {MANIFEST} says dimension {stated}",
                fix=f"run: memopt export {self._bundle.path}",
            )
        if not (known or stated):
            raise BundleError(f"{self._bundle.path} does not say its dimension", fix="export again")
        return known or stated or 0

    @overload
    def encode(
        self,
        inputs: Any,
        normalize: bool = ...,
        batch_size: int | None = ...,
        show_progress: bool = ...,
        output: Literal["numpy"] = ...,
        on_error: Literal["fail", "skip"] = ...,
        *,
        prompt: str | None = ...,
        prompt_name: str | None = ...,
        dimension: int | None = ...,
    ) -> NDArray[np.float32]: ...

    @overload
    def encode(
        self,
        inputs: Any,
        normalize: bool = ...,
        batch_size: int | None = ...,
        show_progress: bool = ...,
        *,
        output: Literal["arrow"],
        on_error: Literal["fail", "skip"] = ...,
        prompt: str | None = ...,
        prompt_name: str | None = ...,
        dimension: int | None = ...,
    ) -> pa.FixedSizeListArray: ...

    def encode(
        self,
        inputs: Any,
        normalize: bool = True,
        batch_size: int | None = None,
        show_progress: bool = False,
        output: Literal["numpy", "arrow"] = "numpy",
        on_error: Literal["fail", "skip"] = "fail",
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimension: int | None = None,
    ) -> Any:
        """Return one vector per input, in the order of the inputs; of one bare input its vector.

        One input alone is answered by the variant that is fastest for that, where device and
        variant are ``auto`` and ``memopt optimize`` found another than for batches: its vector then
        differs from the same input's in a batch, within the gate that both passed. See
        ``one_variant`` of :class:`memopt.runtimes.task_engine.Engine`.

        Args:
            inputs: a sequence; for text of str, for images of paths, encoded bytes, PIL images or
                arrays (height, width[, channels]), for audio of paths, encoded bytes,
                (samples, rate) pairs or mono samples at the model's rate; or one of these alone.
            normalize: make every vector unit length, whatever the bundle's head does. False gives
                the head's output as it is.
            batch_size: inputs per batch; None lets a token budget decide, which is faster.
            show_progress: a progress bar on stderr, when that is a terminal.
            output: ``numpy``, or ``arrow`` for a FixedSizeListArray over the same memory.
            on_error: ``fail`` raises on an input that cannot be used, ``skip`` gives it a NaN row.
            prompt: what is put before every text, in place of the model's default; "" is nothing.
            prompt_name: ``query``, ``document`` or another name that the model has a prompt for.
            dimension: leading values of each vector to keep, before it is made unit length; for
                models that were trained for it (Kusupati et al. 2022, arXiv 2205.13147).

        Returns:
            float32 (n, dimension); (0, dimension) for no inputs, (dimension,) for one that is in
            no sequence, as sentence-transformers does (as Arrow an array of length 1).

        Raises:
            InputError: an input that cannot be used, named by its position.
            ConfigurationError: a prompt that the model does not have, or no such dimension.
            DeviceError: the engine is closed, or no provider is left.
        """
        if output not in ("numpy", "arrow"):
            raise ConfigurationError(f"output is {output!r}", fix="choose numpy or arrow")
        if on_error not in ("fail", "skip"):
            raise ConfigurationError(f"on_error is {on_error!r}", fix="choose fail or skip")
        encoded = self.encode_each(
            inputs,
            normalize=normalize,
            batch_size=batch_size,
            show_progress=show_progress,
            fail=on_error == "fail",
            prompt=prompt,
            prompt_name=prompt_name,
            dimension=dimension,
        )
        if output == "arrow":
            return to_arrow(encoded.vectors)
        bare = is_bare(inputs, self._bundle.manifest.modality)
        return encoded.vectors[0] if bare else encoded.vectors

    def encode_each(
        self,
        inputs: Any,
        *,
        normalize: bool = True,
        batch_size: int | None = None,
        show_progress: bool = False,
        fail: bool = False,
        prompt: str | None = None,
        prompt_name: str | None = None,
        dimension: int | None = None,
        part: bool = False,
    ) -> Encoded:
        """Like :meth:`encode`, but tell which inputs could not be used and why.

        Args:
            inputs, normalize, batch_size, show_progress, prompt, prompt_name, dimension: as there.
            fail: raise on an input that cannot be used, instead of a NaN row.
            part: these are a part of more, all of which one variant shall answer: that of batches,
                however few these are.

        Raises:
            InputError: an unusable input, only with ``fail``.
            ConfigurationError: a prompt that the model does not have, or no such dimension.
        """
        width = self.shortened(dimension)
        front = self._prompted(self.prompt(prompt, prompt_name))
        items = as_items(inputs, self._bundle.manifest.modality)
        vectors = np.empty((len(items), width), np.float32)
        failures: dict[int, str] = {}
        tokens = np.zeros(len(items), np.intp)

        def store(rows: NDArray[np.intp], feed: Feed, output: Rows) -> None:
            vectors[rows] = output[:, :width]
            if "attention_mask" in feed:
                tokens[rows] = np.count_nonzero(feed["attention_mask"], axis=1)

        self._run(items, store, failures, batch_size, show_progress, fail, front, part)
        if failures:
            vectors[list(failures)] = np.nan
        if normalize:
            unit_length(vectors)
        return Encoded(vectors, failures, tokens)

    def comparable(self, inputs: Any) -> NDArray[np.float32]:
        """Return the vectors, as :meth:`encode`."""
        return self.encode(inputs)

    def shortened(self, dimension: int | None) -> int:
        """Return the length of vectors cut to ``dimension`` values, None for all.

        Raises:
            ConfigurationError: the model gives no vectors of that length.
        """
        whole = self.dimension
        if dimension is None:
            return whole
        if type(dimension) is not int or not 1 <= dimension <= whole:
            raise ConfigurationError(
                f"dimension is {dimension!r}, and {self._bundle.path} gives vectors of {whole}",
                fix=f"give 1 to {whole}",
            )
        return dimension

    def prompt(self, prompt: str | None = None, prompt_name: str | None = None) -> str | None:
        """Return what is put before every text, None for the model's default.

        Args:
            prompt: the words themselves.
            prompt_name: the name of the model's own prompt; not beside ``prompt``.

        Raises:
            ConfigurationError: both, a name that the model does not have, or no model of texts.
        """
        if prompt is None and prompt_name is None:
            return None
        if self._bundle.manifest.modality != "text" or (prompt is not None and prompt_name):
            why = "both a prompt and the name of one" if prompt_name else "a prompt"
            what = f"got {why} for a model of {self._bundle.manifest.modality}s"
            raise ConfigurationError(what, fix="give one, and only for texts")
        if prompt is not None:
            return prompt
        known = named_prompts(self._bundle.path)
        if prompt_name not in known:
            raise ConfigurationError(
                f"prompt_name {prompt_name!r} is not known", fix=nearest(str(prompt_name), known)
            )
        return known[prompt_name]

    def _prompted(self, prompt: str | None) -> Callable[[FrontEnd, Sequence[str]], FrontEnd]:
        def prompted(front: Any, _: Sequence[str]) -> FrontEnd:
            made: FrontEnd = front if prompt is None else front.with_prompt(prompt)
            return made

        return prompted

    async def aencode(self, inputs: Any, normalize: bool = True) -> NDArray[np.float32]:
        """Like :meth:`encode`, for event loops: callers at the same time share one batch.

        A request waits up to ``max_delay_ms`` for others; an input that cannot be used fails its
        own caller only.

        Raises:
            InputError, DeviceError: as :meth:`encode`.

        >>> import asyncio
        >>> from memopt.runtimes.testing import fake_engine
        >>> engine = fake_engine(dimension=8)
        >>> asyncio.run(engine.aencode(["a cat"])).shape
        (1, 8)
        """
        import asyncio

        modality = self._bundle.manifest.modality
        items = as_items(inputs, modality)
        if not len(items):
            return np.empty((0, self.dimension), np.float32)
        # An input costs 1, whatever its length: that of the batch is the front end's to choose.
        costs = [1] * len(items)
        queue = self._shared()
        waiting = queue.submit("encode", self._rows_of, items, costs, seconds=math.inf)
        rows = (await asyncio.wrap_future(waiting)).answers
        failures = {index: row for index, row in enumerate(rows) if isinstance(row, str)}
        if failures:
            raise refusal(failures)
        vectors: NDArray[np.float32] = np.stack(rows)
        if normalize:
            unit_length(vectors)
        return vectors[0] if is_bare(inputs, modality) else vectors

    def _rows_of(self, items: Sequence[Any]) -> list[Any]:
        """Return the vector of each input, or why it has none."""
        encoded = self.encode_each(items, normalize=False)
        return [encoded.failures.get(index, row) for index, row in enumerate(encoded.vectors)]

    def _shared(self) -> Batcher:
        with self._lock:
            if self._batcher is None:
                from memopt.runtimes.batcher import Batcher

                delay = self._arguments["max_delay_ms"] / 1000
                self._batcher = Batcher(batch_tokens=_TOGETHER, delay=delay)
            return self._batcher
