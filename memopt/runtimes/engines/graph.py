"""GraphEngine: a graph of somebody else, run as it is: arrays in, every output out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from memopt import metrics
from memopt.errors import InputError
from memopt.registry import nearest
from memopt.runtimes.task_engine import Engine

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph.

    Attributes:
        name: as in the graph.
        dtype: numpy's name of it.
        shape: a number, or the name of an axis that may have any length; None where the graph
            does not say how many axes there are.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...] | None

    @property
    def fixed(self) -> bool:
        """Whether every axis has one length."""
        return self.shape is not None and all(isinstance(size, int) for size in self.shape)

    def __str__(self) -> str:
        sizes = "?" if self.shape is None else ", ".join(map(str, self.shape))
        return f"{self.name} {self.dtype} ({sizes})"

    def fit(self, value: Any) -> NDArray[Any]:
        """Return what an input is given, as an array of its dtype.

        Raises:
            InputError: it has another shape, or another kind of numbers.

        >>> Port("x", "float32", ("batch", 2)).fit([[1, 2]]).dtype
        dtype('float32')
        >>> Port("x", "float32", ("batch", 2)).fit([1, 2])
        Traceback (most recent call last):
        ...
        memopt.errors.InputError: input x has shape (2,), the graph takes (batch, 2)
        """
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise InputError(f"input {self.name} is no array: {error}") from error
        wanted = _dtype(self.dtype)
        # Python's integers are int64, what is written down for a float is often one too.
        if array.dtype != wanted:
            if not np.can_cast(array.dtype, wanted, "same_kind") and array.dtype.kind not in "iub":
                raise InputError(
                    f"input {self.name} is {array.dtype}, the graph takes {self.dtype}"
                )
            array = _cast(array, wanted, self.name)
        sizes = self.shape
        same = sizes is None or (
            len(sizes) == array.ndim
            and all(isinstance(a, str) or a == b for a, b in zip(sizes, array.shape, strict=True))
        )
        if not same:
            named = ", ".join(map(str, sizes or ()))
            raise InputError(
                f"input {self.name} has shape {array.shape}, the graph takes ({named})"
            )
        return np.ascontiguousarray(array).reshape(array.shape)


class GraphEngine(Engine):
    """Runs a graph of no known task: arrays by the graph's own names in, all its outputs out.

    What a graph remembers from one call to the next is among its inputs and outputs: give the
    state that came out of one call to the next. Arguments and errors are those of
    :class:`memopt.runtimes.task_engine.Engine`.

    >>> GraphEngine("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    tasks: ClassVar[tuple[str, ...]] = ("graph", "voice-activity")

    @property
    def inputs(self) -> tuple[Port, ...]:
        """What the graph takes, in its order."""
        return self._ports("inputs")

    @property
    def outputs(self) -> tuple[Port, ...]:
        """What the graph gives, in its order."""
        return self._ports("outputs")

    def run(self, feed: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Return every output of the graph for these inputs, each of its own dtype.

        Args:
            feed: an array, or what numpy makes one of, for each of :attr:`inputs`.

        Raises:
            InputError: an input is missing, unknown, or of another dtype or shape.
            DeviceError: the engine is closed, or no provider is left.
        """
        begin = time.perf_counter()
        ports = {port.name: port for port in self.inputs}
        if unknown := [name for name in feed if name not in ports]:
            raise InputError(
                f"the graph has no input {unknown[0]!r}", fix=nearest(str(unknown[0]), list(ports))
            )
        if missing := [str(port) for name, port in ports.items() if name not in feed]:
            raise InputError(f"the graph also takes {', '.join(missing)}", fix="give it too")
        arrays = {name: ports[name].fit(value) for name, value in feed.items()}
        with metrics.errors("inference"):
            results = self._chain.run_all(arrays)
        used = self._chain.candidate
        spent = time.perf_counter() - begin
        name = used.variant.name
        metrics.observe(spent, device=used.provider, variant=name, batch_size=1)
        return results

    def _ports(self, side: str) -> tuple[Port, ...]:
        record = (self._chain.candidate.variant.check or {}).get("graph") or {}
        return ports_of(record.get(side, ()))


def ports_of(records: Sequence[Mapping[str, Any]]) -> tuple[Port, ...]:
    """Return the ports that a manifest's record of a graph names."""
    return tuple(
        Port(r["name"], r["dtype"], None if r["shape"] is None else tuple(r["shape"]))
        for r in records
    )


def _dtype(name: str) -> np.dtype[Any]:
    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        import ml_dtypes

        narrow: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return narrow
    return np.dtype(object) if name == "str" else np.dtype(name)


def _cast(array: NDArray[Any], dtype: np.dtype[Any], name: str) -> NDArray[Any]:
    cast = array.astype(dtype)
    if array.dtype.kind in "iub" and dtype.kind in "iub" and not (cast == array).all():
        raise InputError(f"input {name} holds numbers that do not fit in {dtype}")
    return cast
