"""WindowedEngine: what engines share that see a text of any length through windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from memopt.errors import ConfigurationError, InputError
from memopt.runtimes.task_engine import Answers, Engine
from memopt.runtimes.vectors import progress, refusal
from memopt.runtimes.windows import WindowFrontEnd

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows
    from memopt.runtimes.windows import Windows

R = TypeVar("R")
# Inputs, and characters, that are tokenized before the first of their windows runs.
_GROUP = 512
_CHARACTERS = 1 << 20


class WindowedEngine(Engine):
    """Answers token by token, over windows of what is longer than the model.

    Arguments and errors are those of :class:`memopt.runtimes.task_engine.Engine`.

    >>> WindowedEngine("/nowhere")
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: no bundle at '/nowhere'; run: memopt convert SOURCE -o /nowhere
    """

    def _make_front(self, inputs: Sequence[str]) -> WindowFrontEnd:
        return WindowFrontEnd(self._bundle, inputs)

    def _windowed(
        self,
        items: Sequence[Any],
        cut: Callable[[Sequence[Any]], list[Windows]],
        wanted: Callable[[Windows], list[NDArray[np.intp]]],
        answer: Callable[[Windows, Answers], R],
        batch_size: int | None,
        show_progress: bool,
    ) -> list[R]:
        """Return ``answer(windows, rows)`` of each item.

        Args:
            items: texts or pairs.
            cut: makes windows of some of them.
            wanted: of each window the positions whose rows ``answer`` is given, one array a
                window; a window of which nothing is wanted is not run.
            answer: what is made of them.
            batch_size, show_progress: as of :meth:`answers`.

        Raises:
            InputError: an item that cannot be used, named by its position.
        """
        front = self._windows()
        if failures := {i: why for i, item in enumerate(items) if (why := front.check(item))}:
            raise unusable(failures)
        found: list[R] = []
        with progress(len(items), show_progress) as advance:
            for group in _groups(items):
                cuts = cut(group)
                positions = [wanted(windows) for windows in cuts]
                rows = self._rows(cuts, positions, len(found), batch_size)
                found += map(answer, cuts, rows)
                advance(len(group))
        return found

    def _rows(
        self,
        cuts: list[Windows],
        positions: list[list[NDArray[np.intp]]],
        first: int,
        batch_size: int | None,
    ) -> list[Answers]:
        """Run windows; return of each its rows of the graph's answer."""
        places = [
            (item, window)
            for item, windows in enumerate(cuts)
            for window in range(len(windows.encodings))
            if len(positions[item][window])
        ]
        empty = np.empty(0, np.float32)
        rows: list[Answers] = [[empty] * len(windows.encodings) for windows in cuts]

        def store(batch: NDArray[np.intp], feed: Feed, output: Rows) -> None:
            for line, number in enumerate(batch):
                item, window = places[number]
                # Fancy indexing copies: the batch is not kept for a few of its rows.
                rows[item][window] = output[line][positions[item][window]]

        failures: dict[int, str] = {}
        encodings = [cuts[item].encodings[window] for item, window in places]
        self._run(encodings, store, failures, batch_size, False, fail=False)
        if failures:
            raise unusable({first + places[i][0]: why for i, why in failures.items()})
        return rows

    def _windows(self) -> WindowFrontEnd:
        return cast(WindowFrontEnd, self._front_end())


def positive(name: str, value: Any) -> int:
    """Return a whole number of 1 or more.

    Raises:
        ConfigurationError: it is none.

    >>> positive("top", 3)
    3
    """
    if type(value) is not int or value < 1:
        raise ConfigurationError(f"{name} is {value!r}", fix="give 1 or more")
    return value


def unusable(failures: dict[int, str]) -> InputError:
    """Return the error for inputs that cannot be answered.

    >>> str(unusable({2: "is int, not str"}))
    'input 2 is int, not str; correct it, or leave it out'
    """
    return InputError(refusal(failures).problem, fix="correct it, or leave it out")


def _groups(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    begin = characters = 0
    for index, item in enumerate(items):
        characters += len(item) if isinstance(item, str) else sum(map(len, item))
        if index + 1 - begin == _GROUP or characters >= _CHARACTERS or index + 1 == len(items):
            yield items[begin : index + 1]
            begin, characters = index + 1, 0
