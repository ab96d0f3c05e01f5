"""Engine: a bundle's variant opened on a provider, with its front end and its fallbacks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

import numpy as np

from memopt import metrics
from memopt.bundle import Bundle, open_bundle
from memopt.errors import BundleError, ConfigurationError
from memopt.extras import require
from memopt.runtimes import limits
from memopt.runtimes.base import Backend, Opener, Placement, Settings
from memopt.runtimes.batching import FrontEnd, run_items
from memopt.runtimes.fallback import BackendChain, FallbackEvent
from memopt.runtimes.frontend import make_front_end
from memopt.runtimes.processes import watch
from memopt.runtimes.providers import opener
from memopt.runtimes.selection import candidates, tuned_elsewhere, tuned_settings
from memopt.runtimes.single import SinglePath, single_path
from memopt.runtimes.towers import tower
from memopt.runtimes.vectors import as_items, refusal
from memopt.tasks.quality import quality_of
from memopt.tasks.rows import trimmed_rows, whole_rows
from memopt.tasks.table import Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows
    from memopt.weights.locked import Unlocked

Answers: TypeAlias = "list[NDArray[np.float32]]"


class Engine:
    """Answers inputs with one variant of a bundle on one provider; a subclass a kind of task.

    Opening tries providers until a session really opens; a provider that fails later hands the
    same request to the next. Each hand-over is in :attr:`events`, in the log and in the metric
    ``memopt_fallback_events_total``. All methods may be called from several threads, and in a child
    of fork(), which opens a session of its own when it first needs one.

    With device and variant ``auto`` a request of one input goes to the variant measured as fastest
    for those, opened when the first comes. Its answers differ from a batch's by what the gate of
    both allows; ``one_variant`` or a named ``variant`` gives one graph for everything.

    Args:
        path_or_bundle: a bundle folder, the name of a built bundle under ``models/``, or a Bundle.
        device: auto, cuda, rocm, vulkan, webgpu, mps, coreml, openvino, cpu, arm, aoti or torch.
            ``auto`` takes what ``memopt optimize`` measured as best on this machine, else the
            first of cuda, aoti, rocm, coreml, openvino, cpu that works and has a variant.
        variant: the variant's name, or auto.
        strict: raise DeviceError instead of falling back.
        threads: threads of the CPU backends; None takes every core this process may use.
        streams: batches that run at once, sharing the threads; None takes what
            :func:`memopt.runtimes.tune.tune_streams` measured here, else the backend's default.
        shares_cores: other work runs on the cores meanwhile (a server's clients, a job's reader):
            not fewer streams than are usual then, though fewer were measured as fast on idle cores,
            since the threads of one batch wait for the one that does not run.
        memory_limit_mb: resident memory this process may reach (on a GPU: of its memory); a
            variant that would pass it is not opened and the next smaller one takes over.
        vram_threshold: share of the GPU's memory that may be in use.
        use_compile, compile_mode: run the torch backend through torch.compile, in that mode.
        use_ipex: run the torch backend with Intel's extension.
        use_amp: on a GPU, take a float16 variant before a float32 one.
        fallback_to_cpu: let the CPU take over from a GPU that fails.
        one_variant: answer single inputs with the variant of batches too.
        openvino_options: properties an OpenVINO graph is opened with, over the variant's own;
            None takes those measured as best on this machine.
        max_delay_ms: how long ``ArrowEngine.aencode`` waits for others to share a batch with.
        verify: how files are compared with their recorded hashes before they are opened: ``open``
            (graph and weights under 1 GB, remembered by size and time), ``always`` (every file of
            the bundle, read each time) or ``never``.
        task: of a bundle of two towers (CLIP), which one: ``auto`` is the bundle's own, embedding
            the one of texts.

    Raises:
        BundleError: no bundle there, no such variant, or nothing exported yet.
        DeviceError: an unknown device, or no provider could open any variant.

    >>> Engine("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    # Tasks that it serves; empty is every one that a graph can be run for.
    tasks: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        path_or_bundle: str | Path | Bundle,
        device: str = "auto",
        variant: str = "auto",
        strict: bool = False,
        *,
        threads: int | None = None,
        streams: int | None = None,
        shares_cores: bool = False,
        memory_limit_mb: float | None = None,
        vram_threshold: float = 0.9,
        use_compile: bool = False,
        compile_mode: str = "default",
        use_ipex: bool = False,
        use_amp: bool = True,
        fallback_to_cpu: bool = True,
        one_variant: bool = False,
        openvino_options: Mapping[str, str] | None = None,
        max_delay_ms: float = 2.0,
        verify: str = "open",
        task: str = "auto",
    ) -> None:
        given = self._accept(path_or_bundle, task)
        self._unlocked = _unlocked(given)
        self._bundle = bundle = self._unlocked.bundle if self._unlocked else given
        self._settings = Settings(
            threads=threads,
            streams=streams,
            shares_cores=shares_cores,
            memory_limit_mb=memory_limit_mb,
            vram_threshold=vram_threshold,
            use_compile=use_compile,
            compile_mode=compile_mode,
            use_ipex=use_ipex,
            openvino_options=None if openvino_options is None else dict(openvino_options),
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
            "one_variant": one_variant,
            "max_delay_ms": max_delay_ms,
            "verify": verify,
            "task": task,
        }
        self._events: list[FallbackEvent] = []
        self._single: SinglePath | None = None
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
        if device == variant == "auto" and not one_variant:
            self._single = single_path(self._bundle, self._chain, self._settings, self._open)
        watch(self)
        used = self._chain.candidate
        limits.show_memory(gpu=used.provider == "cuda" or used.variant.target == "gpu")

    def after_fork(self) -> None:
        """In a child of fork(): tokenizer and locks of the parent are not used again."""
        self._lock = threading.Lock()
        self._front: FrontEnd | None = None

    # What a fake engine replaces.
    def _open(self, candidate: Placement, *, single: bool = False) -> Backend:
        open_backend = self._opener(candidate.provider)
        variant = candidate.variant
        if self._unlocked is not None:
            self._unlocked.need(variant.file, *variant.companions)
        # Small files are often edited by hand, to good purpose; "always" takes them at their hash.
        verify = self._arguments["verify"]
        if variant.format == "torch-aoti":
            verify = "always"  # native code
        more = self._bundle.manifest.files if verify == "always" else ()
        self._bundle.check(variant.file, *variant.companions, *more, mode=verify)
        settings = limits.check(self._bundle, candidate, self._settings)
        settings = tuned_settings(self._bundle, candidate, settings, single=single)
        return open_backend(self._bundle, candidate, settings)

    def _opener(self, provider: str) -> Opener:
        return opener(provider)

    def _make_front(self, inputs: Sequence[str]) -> FrontEnd:
        return make_front_end(self._bundle, inputs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        # To a worker that was spawned an engine goes as its arguments.
        return partial(type(self), **self._arguments), ()

    def __repr__(self) -> str:
        path = str(self._arguments["path_or_bundle"])
        return f"{type(self).__name__}({path!r} on {self._chain.candidate})"

    @property
    def bundle(self) -> Bundle:
        """The bundle that was opened."""
        return self._bundle

    @property
    def events(self) -> tuple[FallbackEvent, ...]:
        """Every fallback so far, oldest first."""
        return tuple(self._events)

    def device_info(self) -> dict[str, Any]:
        """Return what runs where: device, variant, precision, runtime, threads, nodes.

        ``single`` says the same of what answers single inputs, None where that is no other;
        ``measured_on`` names the machine of a choice that was not measured on this one.
        """
        candidate = self._chain.candidate
        return {
            "device": candidate.provider,
            "variant": candidate.variant.name,
            "precision": candidate.variant.precision,
            **self._chain.backend.info(),
            "single": self._single.info() if self._single else None,
            "measured_on": tuned_elsewhere(self._bundle),
        }

    def close(self) -> None:
        """Free the session. Closing twice is fine; using it afterwards raises DeviceError."""
        if self._single is not None:
            self._single.close()
        self._chain.close()
        if self._unlocked is not None:
            self._unlocked.close()

    def halve_batches(self) -> None:
        """Make the batches to come half as large, where no ``batch_size`` says how large.

        For a caller that found too little memory beside the session; the session itself does so.
        """
        self._chain.halve(self._chain.backend)

    def answers(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        show_progress: bool = False,
        rows: Callable[[Rows, Feed], Answers] | None = None,
    ) -> Answers:
        """Return the graph's own answer to each input, before anything is made of it.

        Args:
            inputs: as of the engine's verb.
            batch_size: inputs per batch; None lets a token budget decide, which is faster.
            show_progress: a progress bar on stderr, when that is a terminal.
            rows: makes of a batch's output and inputs what is kept of each input; by default
                its row of the output, without padding.

        Returns:
            float32 arrays, one an input: (labels,) of a classifier, (tokens, labels) of what
            answers token by token, (boxes, labels + 4) of a detector.

        Raises:
            InputError: an input that cannot be used, named by its position.
            DeviceError: the engine is closed, or no provider is left.
        """
        items = as_items(inputs, self._bundle.manifest.modality)
        found: Answers = [np.empty(0, np.float32)] * len(items)
        keep = rows or (trimmed_rows if self._bundle.task.answer == "tokens" else whole_rows)

        def store(places: NDArray[np.intp], feed: Feed, output: Rows) -> None:
            for place, row in zip(places, keep(output, feed), strict=True):
                # A copy: the batch it is of is not kept for it.
                found[place] = np.array(row)

        self._run(items, store, {}, batch_size, show_progress, fail=True)
        return found

    def comparable(self, inputs: Any) -> Answers | NDArray[np.float32]:
        """Return what is compared of each input's answer, where two graphs are measured.

        Raises:
            InputError, DeviceError: as :meth:`answers`.
        """
        return self.answers(inputs, rows=quality_of(self._bundle.task.name).rows)

    def _run(
        self,
        items: Sequence[Any],
        store: Callable[[NDArray[np.intp], Feed, Rows], None],
        failures: dict[int, str],
        batch_size: int | None,
        show_progress: bool,
        fail: bool,
        front: Callable[[FrontEnd, Sequence[str]], FrontEnd] | None = None,
        part: bool = False,
    ) -> None:
        """Hand the answers of each batch to ``store``; add what cannot be used to ``failures``.

        Args:
            front: returns what prepares a graph's inputs in place of the engine's own, given that
                one and their names.
            part: of more than this request: the variant of batches answers, however few these are.

        Raises:
            InputError: an unusable input, only with ``fail``.
        """
        begin = time.perf_counter()
        if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
            raise ConfigurationError(f"batch_size is {batch_size!r}", fix="give 1 or more, or None")
        own = self._front_end()
        used_front = front(own, self._chain.backend.inputs) if front else own
        failures |= {i: why for i, item in enumerate(items) if (why := used_front.check(item))}
        if failures and fail:
            raise refusal(failures)
        rest = (items, store, failures, batch_size, show_progress, fail)
        with metrics.errors("inference"):
            chain = self._chain
            path = self._single if len(items) == 1 and not part else None
            alone = path.run(own, self._make_front, front, rest) if path else None
            if alone is not None:
                chain = alone
            else:
                run_items(chain, used_front, *rest)
        if len(items):
            used = chain.candidate
            metrics.observe(
                time.perf_counter() - begin,
                device=used.provider,
                variant=used.variant.name,
                batch_size=len(items),
            )

    def _front_end(self) -> FrontEnd:
        front = self._front
        if front is None:
            with self._lock:
                front = self._front = self._front or self._make_front(self._chain.backend.inputs)
        return front

    def _accept(self, path_or_bundle: str | Path | Bundle, task: str = "auto") -> Bundle:
        """Open a bundle of a task it serves; later its files come from the folder of now.

        Raises:
            BundleError: it is of another task, whose engine is named.
        """
        given = path_or_bundle
        bundle = tower(given if isinstance(given, Bundle) else open_bundle(given), task)
        row = bundle.task
        if row.name not in self.tasks:
            raise BundleError(
                f"{bundle.path} has task {row.name}: it gives {row.summary}", fix=_instead(row)
            )
        return replace(bundle, path=bundle.path.absolute())


def open_task(path_or_bundle: str | Path | Bundle, **options: Any) -> Any:
    """Open a bundle with the engine of its task.

    Args:
        path_or_bundle: as of :class:`Engine`.
        options: the engine's other arguments.

    Raises:
        BundleError: no bundle, or one of a task that no engine serves.

    >>> open_task("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """
    given = path_or_bundle
    bundle = given if isinstance(given, Bundle) else open_bundle(given)
    if not bundle.task.engine:
        raise BundleError(
            f"{bundle.path} has task {bundle.manifest.task}: {bundle.task.summary}",
            fix=_instead(bundle.task),
        )
    return bundle.task.serves.load()(bundle, **options)


# What no engine serves, and what does.
_OTHERS = {
    "joint-embedding": "open it with memopt.joint.layer.JointEmbeddingLayer",
}


def _instead(row: Task) -> str:
    if row.name in _OTHERS:
        return _OTHERS[row.name]
    command = f", or run: memopt {row.command}" if row.command else ""
    return f"open it with {row.engine.replace(':', '.')}{command}"


def _unlocked(bundle: Bundle) -> Unlocked | None:
    if not bundle.encrypted:
        return None
    require("pyarrow", extra="arrow", why="open an encrypted bundle")
    from memopt.weights.locked import Unlocked

    return Unlocked(bundle)
