"""ArrowEngine: a bundle's variant opened on a provider, with its pre-processing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from memopt.bundle import Bundle, open_bundle
from memopt.errors import BundleError, ConfigurationError, InputError
from memopt.runtimes.base import Backend, Candidate, Settings
from memopt.runtimes.batching import Batch, FrontEnd, UnusableItems, ahead, in_flight
from memopt.runtimes.fallback import BackendChain, FallbackEvent
from memopt.runtimes.providers import opener
from memopt.runtimes.selection import candidates

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed

# Below this length a vector is numerically zero and stays as it is.
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Encoded:
    """Vectors, and the inputs that have none.

    ``vectors`` is float32 (n, dimension); the row of an input that could not be used is NaN and
    ``failures`` maps its position to the reason.
    """

    vectors: NDArray[np.float32]
    failures: dict[int, str] = field(default_factory=dict)


class ArrowEngine:
    """Encodes texts, images or waveforms with one variant of a bundle on one provider.

    Opening tries providers until a session really opens; a provider that fails later hands the
    same request to the next. Each hand-over is in :attr:`events`, in the log and in the metric
    ``memopt_fallback_events_total``. All methods may be called from several threads.

    Args:
        path_or_bundle: a bundle folder, the name of a built bundle under ``models/``, or a Bundle.
        device: auto, cuda, rocm, vulkan, webgpu, mps, coreml, openvino, cpu, arm or torch. ``auto``
            takes what ``memopt optimize`` measured as best on this machine, else the first of
            cuda, rocm, coreml, openvino, cpu that works and has a variant.
        variant: the variant's name, or auto.
        strict: raise DeviceError instead of falling back.
        threads: threads of the CPU backends; None takes every core this process may use.

    Raises:
        BundleError: no bundle there, no such variant, or nothing exported yet.
        DeviceError: an unknown device, or no provider could open any variant.

    >>> from memopt.runtimes.testing import fake_engine
    >>> with fake_engine(dimension=8) as engine:
    ...     engine.encode(["a cat", "a dog"]).shape
    (2, 8)
    """

    def __init__(
        self,
        path_or_bundle: str | Path | Bundle,
        device: str = "auto",
        variant: str = "auto",
        strict: bool = False,
        *,
        threads: int | None = None,
    ) -> None:
        bundle = (
            path_or_bundle if isinstance(path_or_bundle, Bundle) else open_bundle(path_or_bundle)
        )
        if bundle.manifest.task == "text-generation":
            raise BundleError(
                f"{bundle.path} is a language model (task text-generation), not an encoder",
                fix="encode() needs a bundle of an embedding task",
            )
        if threads is not None and threads < 1:
            raise ConfigurationError(f"threads is {threads}", fix="give 1 or more, or leave it out")
        self._bundle = bundle
        self._settings = Settings(threads=threads)
        self._events: list[FallbackEvent] = []
        self._lock = threading.Lock()
        self._front: FrontEnd | None = None
        self._chain = BackendChain(
            candidates(bundle, device, variant),
            self._open,
            strict=strict,
            events=self._events,
        )

    # What a fake engine replaces.
    def _open(self, candidate: Candidate) -> Backend:
        return opener(candidate.provider)(self._bundle, candidate, self._settings)

    def _make_front(self) -> FrontEnd:
        return make_front_end(self._bundle, self._chain.backend.inputs)

    def __enter__(self) -> ArrowEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ArrowEngine({str(self._bundle.path)!r} on {self._chain.candidate})"

    @property
    def bundle(self) -> Bundle:
        """The bundle that was opened."""
        return self._bundle

    @property
    def dimension(self) -> int:
        """Length of one vector."""
        known = self._bundle.manifest.dimension or self._chain.backend.dimension
        if known is None:
            raise BundleError(f"{self._bundle.path} does not say its dimension", fix="export again")
        return known

    @property
    def events(self) -> tuple[FallbackEvent, ...]:
        """Every fallback so far, oldest first."""
        return tuple(self._events)

    def device_info(self) -> dict[str, Any]:
        """Return what runs where: device, variant, precision, runtime, threads, nodes."""
        candidate = self._chain.candidate
        return {
            "device": candidate.provider,
            "variant": candidate.variant.name,
            "precision": candidate.variant.precision,
            **self._chain.backend.info(),
        }

    def close(self) -> None:
        """Free the session. Closing twice is fine; encoding afterwards raises DeviceError."""
        self._chain.close()

    @overload
    def encode(
        self,
        inputs: Any,
        normalize: bool = ...,
        batch_size: int | None = ...,
        show_progress: bool = ...,
        output: Literal["numpy"] = ...,
        on_error: Literal["fail", "skip"] = ...,
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
    ) -> pa.FixedSizeListArray: ...

    def encode(
        self,
        inputs: Any,
        normalize: bool = True,
        batch_size: int | None = None,
        show_progress: bool = False,
        output: Literal["numpy", "arrow"] = "numpy",
        on_error: Literal["fail", "skip"] = "fail",
    ) -> Any:
        """Return one vector per input, in the order of the inputs.

        Args:
            inputs: a sequence; for text of str, for images of paths, encoded bytes, PIL images or
                arrays (height, width[, channels]), for audio of paths, encoded bytes,
                (samples, rate) pairs or mono samples at the model's rate. One bare item counts
                as a sequence of one.
            normalize: make every vector unit length, whatever the bundle's head does. False gives
                the head's output as it is.
            batch_size: inputs per batch; None lets a token budget decide, which is faster.
            show_progress: a progress bar on stderr, when that is a terminal.
            output: ``numpy``, or ``arrow`` for a FixedSizeListArray over the same memory.
            on_error: ``fail`` raises on an input that cannot be used, ``skip`` gives it a NaN row.

        Returns:
            float32 (n, dimension); (0, dimension) for no inputs.

        Raises:
            InputError: an input that cannot be used, named by its position.
            DeviceError: the engine is closed, or no provider is left.
        """
        if output not in ("numpy", "arrow"):
            raise ConfigurationError(f"output is {output!r}", fix="choose numpy or arrow")
        if on_error not in ("fail", "skip"):
            raise ConfigurationError(f"on_error is {on_error!r}", fix="choose fail or skip")
        encoded = self.encode_each(
            inputs, normalize=normalize, batch_size=batch_size, show_progress=show_progress,
            fail=on_error == "fail",
        )  # fmt: skip
        return to_arrow(encoded.vectors) if output == "arrow" else encoded.vectors

    def encode_each(
        self,
        inputs: Any,
        *,
        normalize: bool = True,
        batch_size: int | None = None,
        show_progress: bool = False,
        fail: bool = False,
    ) -> Encoded:
        """Like :meth:`encode`, but tell which inputs could not be used and why.

        Raises:
            InputError: an unusable input, only with ``fail``.
        """
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ConfigurationError(f"batch_size is {batch_size!r}", fix="give 1 or more, or None")
        front = self._front_end()
        items = as_items(inputs, self._bundle.manifest.modality)
        failures = {i: why for i, item in enumerate(items) if (why := front.check(item))}
        if failures and fail:
            raise _refusal(failures)
        vectors = np.empty((len(items), self.dimension), np.float32)
        self._fill(front, items, vectors, failures, batch_size, show_progress, fail)
        if failures:
            vectors[list(failures)] = np.nan
        if normalize:
            unit_length(vectors)
        return Encoded(vectors, failures)

    def _fill(
        self,
        front: FrontEnd,
        items: Sequence[Any],
        vectors: NDArray[np.float32],
        failures: dict[int, str],
        batch_size: int | None,
        show_progress: bool,
        fail: bool,
    ) -> None:
        if len(items) == 1 and not failures:
            # The shortest way for the commonest request: no sorting, no threads.
            for batch in _prepare(front, items, None, batch_size, failures, fail):
                vectors[:] = self._chain.run(batch.feed)
            return
        if failures:
            good = np.array([i for i in range(len(items)) if i not in failures], np.intp)
            chunks = [good[chunk] for chunk in front.chunks([items[i] for i in good])]
        else:
            chunks = front.chunks(items)
        if not chunks:
            return
        batches = _batches(front, items, chunks, batch_size, failures, fail)
        with progress(len(items), show_progress) as advance:
            for rows, values in self._results(batches):
                vectors[rows] = values
                advance(len(rows))

    def _results(
        self, batches: Iterator[tuple[NDArray[np.intp], Feed]]
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
        # One more than can run: the next is ready the moment a stream is free.
        depth = self._chain.backend.streams + 1
        for rows, feed, (backend, future) in in_flight(batches, self._chain.submit, depth):
            yield rows, self._chain.result(backend, future, feed)

    def _front_end(self) -> FrontEnd:
        front = self._front
        if front is None:
            with self._lock:
                front = self._front = self._front or self._make_front()
        return front


def make_front_end(bundle: Bundle, inputs: Sequence[str]) -> FrontEnd:
    """Return what turns this bundle's kind of input into its graph's ``inputs``."""
    modality = bundle.manifest.modality
    if modality == "text":
        from memopt.runtimes.text import TextFrontEnd

        return TextFrontEnd(bundle, inputs)
    if modality == "image":
        from memopt.runtimes.image import ImageFrontEnd

        return ImageFrontEnd(bundle)
    from memopt.runtimes.audio import AudioFrontEnd

    return AudioFrontEnd(bundle, inputs)


def as_items(inputs: Any, modality: str) -> Sequence[Any]:
    """Return the inputs as a sequence; one bare item becomes a sequence of one.

    >>> as_items("a cat", "text"), as_items(iter(["a", "b"]), "text")
    (['a cat'], ['a', 'b'])
    """
    if isinstance(inputs, str | bytes | bytearray | Path):
        return [inputs]
    if isinstance(inputs, np.ndarray):
        single = modality == "image" and (
            inputs.ndim == 2 or (inputs.ndim == 3 and inputs.shape[-1] in (1, 3, 4))
        )
        if single or (modality == "audio" and inputs.ndim == 1 and inputs.dtype != object):
            return [inputs]
        return inputs.tolist() if modality == "text" else list(inputs)
    if isinstance(inputs, tuple) and len(inputs) == 2 and modality == "audio":
        samples, rate = inputs
        if isinstance(samples, np.ndarray) and isinstance(rate, int | float):
            return [inputs]
    if isinstance(inputs, list | tuple):
        return inputs
    try:
        return list(inputs)
    except TypeError as error:
        if modality == "image" and hasattr(inputs, "convert"):
            return [inputs]
        raise InputError(
            f"inputs is {type(inputs).__name__}, not a sequence", fix="pass a list"
        ) from error


def unit_length(vectors: NDArray[np.float32]) -> None:
    """Scale every row of ``vectors`` (n, dim) to length 1 in place; zero rows stay zero."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    np.maximum(lengths, _TINY, out=lengths)
    vectors /= lengths[:, None]


def to_arrow(vectors: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """Return rows as a FixedSizeListArray over the same memory.

    >>> to_arrow(np.zeros((2, 3), np.float32)).type
    FixedSizeListType(fixed_size_list<item: float>[3])
    """
    import pyarrow as pa

    count, width = vectors.shape
    values = pa.Array.from_buffers(
        pa.float32(), count * width, [None, pa.py_buffer(vectors.reshape(-1))]
    )
    return pa.FixedSizeListArray.from_arrays(values, width)


def _batches(
    front: FrontEnd,
    items: Sequence[Any],
    chunks: list[NDArray[np.intp]],
    batch_size: int | None,
    failures: dict[int, str],
    fail: bool,
) -> Iterator[tuple[NDArray[np.intp], Feed]]:
    """Yield each batch's rows in ``items`` and its model inputs, chunks prepared ahead."""

    def job(chunk: NDArray[np.intp]) -> Callable[[], list[tuple[NDArray[np.intp], Feed]]]:
        def work() -> list[tuple[NDArray[np.intp], Feed]]:
            taken = [items[i] for i in chunk]
            done = _prepare(front, taken, chunk, batch_size, failures, fail)
            return [(chunk[batch.rows], batch.feed) for batch in done]

        return work

    for prepared in ahead([job(chunk) for chunk in chunks]):
        yield from prepared


def _prepare(
    front: FrontEnd,
    taken: Sequence[Any],
    positions: NDArray[np.intp] | None,
    batch_size: int | None,
    failures: dict[int, str],
    fail: bool,
) -> list[Batch]:
    try:
        return front.prepare(taken, batch_size)
    except UnusableItems as found:
        reasons = {
            (int(positions[i]) if positions is not None else i): why
            for i, why in found.reasons.items()
        }
        if fail:
            raise _refusal(reasons) from found
        failures.update(reasons)
        keep = np.array([i for i in range(len(taken)) if i not in found.reasons], np.intp)
        if not len(keep):
            return []
        return [
            Batch(keep[batch.rows], batch.feed)
            for batch in front.prepare([taken[i] for i in keep], batch_size)
        ]


def _refusal(failures: dict[int, str]) -> InputError:
    index = min(failures)
    more = f" ({len(failures) - 1} more like it)" if len(failures) > 1 else ""
    return InputError(
        f"input {index} {failures[index]}{more}", fix="leave it out, or pass on_error='skip'"
    )


@contextmanager
def progress(total: int | None, wanted: bool) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(n)`` of a bar on stderr, shown when wanted and stderr is a terminal."""
    if not wanted:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("encode", total=total)
        yield lambda count: bar.advance(task, count)
