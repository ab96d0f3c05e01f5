"""What a backend is: one variant opened on one provider."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from memopt.bundle import Bundle, Variant
from memopt.errors import ConfigurationError
from memopt.moved import old_names

__getattr__ = old_names(__name__)

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray

    Feed = Mapping[str, NDArray[Any]]
    Rows = NDArray[np.float32]


# Tokens per batch. On 2 cores MiniLM is fastest from 256 to 1024 and 20 % slower at 4096, where
# activations leave the L2 cache. A GPU needs thousands of rows of work to be busy.
TOKENS_ON_CPU = 512
TOKENS_ON_GPU = 16_384


def usual_streams(threads: int) -> int:
    """Return how many batches run at once on a CPU, sharing its cores, where nothing was measured.

    Two streams of half the cores each beat one of all by half in int8 and cost nothing in float32:
    short operators wait for each other less.

    >>> usual_streams(1), usual_streams(8)
    (1, 2)
    """
    return min(2, threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a backend is opened.

    ``threads`` and ``streams`` of None mean: all usable cores, in the way measured as best on
    this machine (``manifest.chosen``) or the backend's default.
    """

    threads: int | None = None
    streams: int | None = None
    shares_cores: bool = False  # fewer streams than usual are not taken, however measured
    memory_limit_mb: float | None = None
    vram_threshold: float = 0.9
    use_compile: bool = False  # this and the two below: the torch backend's
    compile_mode: str = "default"
    use_ipex: bool = False
    openvino_options: Mapping[str, str] | None = None  # over the variant's own; None: not measured

    def __post_init__(self) -> None:
        for name in ("threads", "streams", "memory_limit_mb"):
            value = getattr(self, name)
            if value is not None and not value >= (1 if name != "memory_limit_mb" else 0):
                raise ConfigurationError(f"{name} is {value}", fix="give 1 or more, or None")
        if not 0 < self.vram_threshold <= 1:
            raise ConfigurationError(
                f"vram_threshold is {self.vram_threshold}", fix="give a share above 0, up to 1"
            )


def one_by_one(run: Callable[[Feed], Sequence[NDArray[Any]]], feed: Feed) -> list[NDArray[Any]]:
    """Return the outputs of a graph that takes one row at a time, the rows put together again.

    >>> import numpy as np
    >>> one_by_one(lambda feed: [feed["x"] + 1], {"x": np.arange(3)})
    [array([1, 2, 3])]
    """
    import numpy as np

    count = len(next(iter(feed.values())))
    rows = [run({name: v[i : i + 1] for name, v in feed.items()}) for i in range(count)]
    return [np.concatenate(parts) for parts in zip(*rows, strict=True)]


@dataclass(frozen=True, slots=True)
class Placement:
    """A variant of a bundle and the provider to open it on."""

    provider: str
    variant: Variant

    def __str__(self) -> str:
        return f"{self.provider}:{self.variant.name}"


class Backend(Protocol):
    """A variant opened on a provider. ``run`` and ``submit`` may be called from any thread.

    ``run`` takes the inputs by name and returns the variant's output as float32
    (batch, dimension); ``submit`` does the same beside the caller, up to ``streams`` at once.
    ``run_all`` returns every output of the graph by name, each of its own dtype.
    """

    inputs: tuple[str, ...]
    dimension: int | None
    streams: int
    tokens: int  # per batch: what keeps this backend busy at the best speed
    step: int  # the width of a single short text is rounded up to a multiple of this
    row: int  # tokens of a row that short texts share inside the backend, 0 where none does

    def run(self, feed: Feed) -> Rows: ...

    def submit(self, feed: Feed) -> Future[Rows]: ...

    def run_all(self, feed: Feed) -> dict[str, NDArray[Any]]: ...

    def free(self) -> None:
        """Give back what is kept for later runs; called when a run found too little memory."""

    def info(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


# What a provider's registry entry points at.
Opener: TypeAlias = Callable[[Bundle, Placement, Settings], Backend]
