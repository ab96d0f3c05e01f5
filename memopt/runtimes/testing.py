"""An engine in memory, so that tests of code that embeds need no model.

The vectors depend on nothing but the input: equal inputs give equal vectors, different ones point
elsewhere. Batching, order, threads, events and errors are those of the real engine.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.bundle import Bundle, Manifest, Variant
from memopt.runtimes.base import TOKENS_ON_CPU, Backend, Placement
from memopt.runtimes.batching import USUAL, Batch, Budget, FrontEnd, in_order
from memopt.runtimes.engine import ArrowEngine

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows

_DIGEST = 32
_CHUNK = 64


class FakeBackend:
    """Answers from memory; ``fail(n)`` may raise for the n-th run (counted from 1).

    A batch of more than ``room`` rows runs out of memory.
    """

    def __init__(
        self,
        dimension: int = 8,
        streams: int = 1,
        fail: Callable[[int], None] | None = None,
        room: int | None = None,
    ) -> None:
        self.inputs: tuple[str, ...] = ("digest",)
        self.dimension: int | None = dimension
        self.streams = streams
        self.tokens = TOKENS_ON_CPU
        self.step, self.row = 1, 0
        self.runs = 0
        self.freed = 0
        self._fail = fail
        self._room = room
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(streams, "memopt-fake")

    def run(self, feed: Feed) -> Rows:
        """Return one seeded normal vector per digest."""
        with self._lock:
            self.runs += 1
            run = self.runs
        if self._fail is not None:
            self._fail(run)
        if self._room is not None and len(feed["digest"]) > self._room:
            raise RuntimeError("CUDA failure 2: out of memory")
        assert self.dimension is not None
        seeds = [int.from_bytes(row.tobytes(), "little") for row in feed["digest"]]
        rows = [np.random.default_rng(seed).standard_normal(self.dimension) for seed in seeds]
        return np.asarray(rows, dtype=np.float32)

    def submit(self, feed: Feed) -> Future[Rows]:
        """Run beside the caller."""
        return self._pool.submit(self.run, feed)

    def run_all(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Return the vectors by the usual name."""
        return {"sentence_embedding": self.run(feed)}

    def free(self) -> None:
        """Count that it was asked for."""
        self.freed += 1

    def info(self) -> dict[str, Any]:
        """Return what runs where."""
        return {"runtime": "fake", "threads": 1, "streams": self.streams, "nodes": {}}

    def close(self) -> None:
        """Take no more work."""
        self._pool.shutdown(wait=False)


class FakeFrontEnd:
    """Takes anything hashable to bytes: text, bytes, paths, arrays, (samples, rate) pairs."""

    def __init__(self, modality: str, prompt: str = "") -> None:
        self._text = modality == "text"
        self._prompt = prompt

    def check(self, item: object) -> str | None:
        """Return why an item cannot be encoded, None when it can."""
        if self._text and not isinstance(item, str):
            return f"is {type(item).__name__}, not str"
        return None

    def with_prompt(self, prompt: str) -> FakeFrontEnd:
        """Return one that puts ``prompt`` before every text."""
        return FakeFrontEnd("text", prompt)

    def chunks(self, items: Sequence[Any]) -> list[NDArray[np.intp]]:
        """Return positions in chunks of 64."""
        return in_order(len(items), _CHUNK)

    def prepare(self, items: Sequence[Any], budget: Budget = USUAL) -> list[Batch]:
        """Hash every item."""
        if self._prompt:
            items = [self._prompt + item for item in items]
        digests = np.array(
            [np.frombuffer(hashlib.blake2b(_bytes(i), digest_size=_DIGEST).digest(), np.uint8)
             for i in items]
        )  # fmt: skip
        runs = in_order(len(items), budget.batch_size or len(items))
        return [Batch(rows, {"digest": digests[rows]}) for rows in runs]


class _FakeEngine(ArrowEngine):
    def __init__(self, bundle: Bundle, open_backend: Callable[[Placement], Backend]) -> None:
        self._fake_open = open_backend
        super().__init__(bundle, device="cpu")

    def _open(self, candidate: Placement, *, single: bool = False) -> Backend:
        return self._fake_open(candidate)

    def _make_front(self, inputs: Sequence[str]) -> FrontEnd:
        return FakeFrontEnd(self._bundle.manifest.modality)


def fake_engine(
    dimension: int = 384,
    modality: str = "text",
    open_backend: Callable[[Placement], Backend] | None = None,
) -> ArrowEngine:
    """Return an ArrowEngine that needs no model, no file and no runtime.

    Args:
        dimension: length of the vectors.
        modality: text, image or audio: what ``encode`` accepts.
        open_backend: opens a candidate instead of a :class:`FakeBackend`; may raise.

    >>> engine = fake_engine(dimension=4)
    >>> a, b = engine.encode(["one", "two"]), engine.encode(["two"])
    >>> bool((a[1] == b[0]).all()), engine.device_info()["runtime"]
    (True, 'fake')
    """
    task = "embedding" if modality == "text" else f"{modality}-embedding"
    manifest = Manifest(
        name="fake",
        task=task,
        modality=modality,
        architecture="Fake",
        model_type="fake",
        dimension=dimension,
        variants={
            "fake": Variant(name="fake", format="onnx", precision="fp32", file="fake"),
            "fake-spare": Variant(name="fake-spare", format="onnx", precision="fp32", file="fake"),
        },
    )
    return _FakeEngine(
        Bundle(Path("fake"), manifest), open_backend or (lambda candidate: FakeBackend(dimension))
    )


def _bytes(item: Any) -> bytes:
    if isinstance(item, bytes | bytearray):
        return bytes(item)
    if isinstance(item, tuple):
        return b"|".join(_bytes(part) for part in item)
    if isinstance(item, np.ndarray):
        return str((item.dtype, item.shape)).encode() + item.tobytes()
    return str(item).encode("utf-8", "surrogatepass")
