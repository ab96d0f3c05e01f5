"""ArrowEngine: a bundle's variant opened on a provider, with its pre-processing."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from memopt import metrics
from memopt.bundle import MANIFEST, Bundle, open_bundle
from memopt.errors import BundleError, ConfigurationError
from memopt.extras import require
from memopt.runtimes import limits
from memopt.runtimes.base import Backend, Placement, Settings
from memopt.runtimes.batching import FrontEnd, encode_items
from memopt.runtimes.fallback import BackendChain, FallbackEvent
from memopt.runtimes.frontend import make_front_end
from memopt.runtimes.processes import watch
from memopt.runtimes.providers import opener
from memopt.runtimes.selection import candidates, tuned_streams
from memopt.runtimes.vectors import Encoded, as_items, is_bare, refusal, to_arrow, unit_length

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from memopt.runtimes.coalesce import Coalescer
    from memopt.weights.locked import Unlocked


# What is no encoder, and what opens it.
_OTHERS = {
    "text-generation": (
        "is a language model (task text-generation), not an encoder",
        "encode() needs a bundle of an embedding task",
    ),
    "joint-embedding": (
        "is a joint layer: it takes vectors, not text, images or sound",
        "open it with memopt.joint.layer.JointEmbeddingLayer",
    ),
}


class ArrowEngine:
    """Encodes texts, images or waveforms with one variant of a bundle on one provider.

    Opening tries providers until a session really opens; a provider that fails later hands the
    same request to the next. Each hand-over is in :attr:`events`, in the log and in the metric
    ``memopt_fallback_events_total``. All methods may be called from several threads, and in a child
    of fork(), which opens a session of its own when it first needs one.

    Args:
        path_or_bundle: a bundle folder, the name of a built bundle under ``models/``, or a Bundle.
        device: auto, cuda, rocm, vulkan, webgpu, mps, coreml, openvino, cpu, arm or torch. ``auto``
            takes what ``memopt optimize`` measured as best on this machine, else the first of
            cuda, rocm, coreml, openvino, cpu that works and has a variant.
        variant: the variant's name, or auto.
        strict: raise DeviceError instead of falling back.
        threads: threads of the CPU backends; None takes every core this process may use.
        streams: batches that run at once, sharing the threads; None takes what
            :func:`memopt.runtimes.tune.tune_streams` measured here, else the backend's default.
        memory_limit_mb: resident memory this process may reach (on a GPU: of its memory); a
            variant that would pass it is not opened and the next smaller one takes over.
        vram_threshold: share of the GPU's memory that may be in use.
        use_compile, compile_mode: run the torch backend through torch.compile, in that mode.
        use_ipex: run the torch backend with Intel's extension.
        use_amp: on a GPU, take a float16 variant before a float32 one.
        fallback_to_cpu: let the CPU take over from a GPU that fails.
        max_delay_ms: how long :meth:`aencode` waits for others to share a batch with.
        verify: how files are compared with their recorded hashes before they are opened: ``open``
            (graph and weights under 1 GB, remembered by size and time), ``always`` (every file of
            the bundle, read each time) or ``never``.

    Raises:
        BundleError: no bundle there, no such variant, or nothing exported yet.
        DeviceError: an unknown device, or no provider could open any variant.

    >>> from memopt.runtimes.testing import fake_engine
    >>> with fake_engine(dimension=8) as engine:
    ...     engine.encode(["a cat", "a dog"]).shape, engine.encode("a cat").shape
    ((2, 8), (8,))
    """

    def __init__(
        self,
        path_or_bundle: str | Path | Bundle,
        device: str = "auto",
        variant: str = "auto",
        strict: bool = False,
        *,
        threads: int | None = None,
        streams: int | None = None,
        memory_limit_mb: float | None = None,
        vram_threshold: float = 0.9,
        use_compile: bool = False,
        compile_mode: str = "default",
        use_ipex: bool = False,
        use_amp: bool = True,
        fallback_to_cpu: bool = True,
        max_delay_ms: float = 2.0,
        verify: str = "open",
    ) -> None:
        given = _encoder(path_or_bundle)
        self._unlocked = _unlocked(given)
        self._bundle = bundle = self._unlocked.bundle if self._unlocked else given
        self._settings = Settings(
            threads=threads,
            streams=streams,
            memory_limit_mb=memory_limit_mb,
            vram_threshold=vram_threshold,
            use_compile=use_compile,
            compile_mode=compile_mode,
            use_ipex=use_ipex,
        )
        bundle.check(mode=verify)  # the mode itself
        # What opens it anew in another process.
        self._arguments = asdict(self._settings) | {
            "path_or_bundle": given.path,
            "device": device,
            "variant": variant,
            "strict": strict,
            "use_amp": use_amp,
            "fallback_to_cpu": fallback_to_cpu,
            "max_delay_ms": max_delay_ms,
            "verify": verify,
        }
        self._events: list[FallbackEvent] = []
        self.after_fork()
        try:
            self._chain = BackendChain(
                candidates(bundle, device, variant, half=use_amp, cpu_fallback=fallback_to_cpu),
                self._open,
                strict=strict,
                events=self._events,
            )
        except BaseException:
            if self._unlocked is not None:
                self._unlocked.close()
            raise
        watch(self)
        limits.show_memory(gpu=self._chain.candidate.provider == "cuda")

    def after_fork(self) -> None:
        """In a child of fork(): tokenizer, queue and locks of the parent are not used again."""
        self._lock = threading.Lock()
        self._front: FrontEnd | None = None
        self._coalescer: Coalescer | None = None

    # What a fake engine replaces.
    def _open(self, candidate: Placement) -> Backend:
        open_backend = opener(candidate.provider)
        variant = candidate.variant
        if self._unlocked is not None:
            self._unlocked.need(variant.file, *variant.companions)
        # Small files are often edited by hand, to good purpose; "always" takes them at their hash.
        verify = self._arguments["verify"]
        more = self._bundle.manifest.files if verify == "always" else ()
        self._bundle.check(variant.file, *variant.companions, *more, mode=verify)
        settings = limits.check(self._bundle, candidate, self._settings)
        if settings.streams is None:
            settings = replace(settings, streams=tuned_streams(self._bundle, candidate))
        return open_backend(self._bundle, candidate, settings)

    def _make_front(self) -> FrontEnd:
        return make_front_end(self._bundle, self._chain.backend.inputs)

    def __enter__(self) -> ArrowEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        # To a worker that was spawned an engine goes as its arguments.
        return partial(type(self), **self._arguments), ()

    def __repr__(self) -> str:
        path = str(self._arguments["path_or_bundle"])
        return f"ArrowEngine({path!r} on {self._chain.candidate})"

    @property
    def bundle(self) -> Bundle:
        """The bundle that was opened."""
        return self._bundle

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
        if self._coalescer is not None:
            self._coalescer.close()
        self._chain.close()
        if self._unlocked is not None:
            self._unlocked.close()

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
        """Return one vector per input, in the order of the inputs; of one bare input its vector.

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

        Returns:
            float32 (n, dimension); (0, dimension) for no inputs, (dimension,) for one that is in
            no sequence, as sentence-transformers does (as Arrow an array of length 1).

        Raises:
            InputError: an input that cannot be used, named by its position.
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
    ) -> Encoded:
        """Like :meth:`encode`, but tell which inputs could not be used and why.

        Raises:
            InputError: an unusable input, only with ``fail``.
        """
        begin = time.perf_counter()
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ConfigurationError(f"batch_size is {batch_size!r}", fix="give 1 or more, or None")
        front = self._front_end()
        items = as_items(inputs, self._bundle.manifest.modality)
        failures = {i: why for i, item in enumerate(items) if (why := front.check(item))}
        if failures and fail:
            raise refusal(failures)
        vectors = np.empty((len(items), self.dimension), np.float32)
        with metrics.errors("inference"):
            encode_items(
                self._chain, front, items, vectors, failures, batch_size, show_progress, fail
            )
        if failures:
            vectors[list(failures)] = np.nan
        if normalize:
            unit_length(vectors)
        if len(items):
            used = self._chain.candidate
            metrics.observe(
                time.perf_counter() - begin,
                device=used.provider,
                variant=used.variant.name,
                batch_size=len(items),
            )
        return Encoded(vectors, failures)

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
        vectors = await asyncio.wrap_future(self._shared().submit(items, normalize))
        return vectors[0] if is_bare(inputs, modality) else vectors

    def _shared(self) -> Coalescer:
        with self._lock:
            if self._coalescer is None:
                from memopt.runtimes.coalesce import Coalescer

                delay = self._arguments["max_delay_ms"]
                self._coalescer = Coalescer(partial(self.encode_each, normalize=False), delay)
            return self._coalescer

    def _front_end(self) -> FrontEnd:
        front = self._front
        if front is None:
            with self._lock:
                front = self._front = self._front or self._make_front()
        return front


def _encoder(path_or_bundle: str | Path | Bundle) -> Bundle:
    """Open an encoder's bundle; what is opened later comes from the folder that it has now."""
    bundle = path_or_bundle if isinstance(path_or_bundle, Bundle) else open_bundle(path_or_bundle)
    if bundle.manifest.task in _OTHERS:
        what, fix = _OTHERS[bundle.manifest.task]
        raise BundleError(f"{bundle.path} {what}", fix=fix)
    return replace(bundle, path=bundle.path.absolute())


def _unlocked(bundle: Bundle) -> Unlocked | None:
    if not bundle.encrypted:
        return None
    require("pyarrow", extra="arrow", why="open an encrypted bundle")
    from memopt.weights.locked import Unlocked

    return Unlocked(bundle)
