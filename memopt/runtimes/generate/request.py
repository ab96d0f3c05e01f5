"""What is asked of a language model beside the prompts: how much, of which form, chosen how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from memopt.errors import ConfigurationError
from memopt.runtimes.generate.sampling import Sampling
from memopt.runtimes.generate.structure import Schema

CONTEXTS = ("refuse", "slide")
# Options of transformers' beam search, which are refused by name.
BEAMS = ("num_beams", "num_beam_groups", "length_penalty", "early_stopping")


class Options(TypedDict, total=False):
    """The options of ``Generator.generate`` by name; see :class:`Request` and ``Sampling``."""

    max_new_tokens: int
    stop: str | Sequence[str]
    max_context: int | None
    context: str
    keep: int
    speculate: int
    exact: bool
    schema: Schema | Sequence[Schema | None] | None
    regex: str | Sequence[str | None] | None
    grammar: str | Sequence[str | None] | None
    repetition_penalty: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How answers are to be written.

    Attributes:
        max_new_tokens: at most so many.
        stop: texts that end an answer; they are not part of it.
        max_context: tokens of prompt and answer together; None is what the model was made for.
        context: what happens to a text that is longer: ``refuse`` the prompt (an answer that gets
            there ends, with ``length``), or ``slide``: the first ``keep`` tokens stay, the oldest
            behind them go, and what is left is read anew, at its new places.
        keep: tokens at the beginning that never slide out. Without a few, models break down (Xiao
            et al. 2023, https://arxiv.org/abs/2309.17453).
        speculate: tokens proposed at once by looking up what followed before; 0 is none.
        exact: the text is what it would be without shortcuts. A variant that computes several
            tokens otherwise than one (weight-only in ONNX Runtime does) then reads every prompt
            anew, and does not speculate; False gives as good a text of the model, but another.
        schema, regex, grammar: the form of an answer, one for all or a list of one a prompt; see
            :class:`memopt.runtimes.generate.structure.Form`.
        sampling: how tokens are chosen.

    Raises:
        ConfigurationError: a value out of its range.

    >>> Request.of({"max_new_tokens": 0})
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: max_new_tokens is 0; give 1 or more
    """

    max_new_tokens: int = 128
    stop: str | Sequence[str] = ()
    max_context: int | None = None
    context: str = "refuse"
    keep: int = 4
    speculate: int = 0
    exact: bool = True
    schema: Any = None
    regex: Any = None
    grammar: Any = None
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Request:
        """Return a request of options by name, those of :class:`Sampling` among them.

        Raises:
            ConfigurationError: an unknown name, or a value out of its range.
        """
        drawn = {field.name for field in fields(Sampling)}
        own = {field.name for field in fields(cls)} - {"sampling"}
        if beams := [name for name in options if name in BEAMS]:
            raise ConfigurationError(
                f"{beams[0]} is of beam search, which memopt has not", fix="leave it out"
            )
        if unknown := [name for name in options if name not in drawn | own]:
            raise ConfigurationError(
                f"unknown option {unknown[0]!r}", fix=f"use {', '.join(sorted(drawn | own))}"
            )
        sampling = Sampling(**{n: v for n, v in options.items() if n in drawn})
        return cls(**{n: v for n, v in options.items() if n in own}, sampling=sampling)

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("keep", 0), ("speculate", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigurationError(f"{name} is {value!r}", fix=f"give {least} or more")
        if self.context not in CONTEXTS:
            raise ConfigurationError(
                f"context is {self.context!r}", fix=f"give {' or '.join(CONTEXTS)}"
            )
        if not isinstance(self.exact, bool):
            raise ConfigurationError(f"exact is {self.exact!r}", fix="give True or False")
        if not isinstance(self.stop, Sequence) or not all(isinstance(s, str) for s in self.stop):
            raise ConfigurationError(
                f"stop is {self.stop!r}", fix="give a text, or a list of texts"
            )
        if not all(self.stops):
            raise ConfigurationError("a stop string is empty", fix="leave it out")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def form(self) -> dict[str, Any]:
        """What is said of the form of the answers."""
        return {name: getattr(self, name) for name in ("schema", "regex", "grammar")}

    def limit(self, stated: int) -> int:
        """Return how many tokens the model may read, where it was made for ``stated``.

        Raises:
            ConfigurationError: more than those are asked for, or fewer than there is use for.
        """
        context = self.max_context
        if context is not None and (not isinstance(context, int) or not 1 < context <= stated):
            raise ConfigurationError(
                f"max_context is {context!r}", fix=f"give 2 to {stated}, the model's own"
            )
        limit = stated if context is None else context
        if self.context == "slide" and self.keep > limit // 2:
            raise ConfigurationError(
                f"keep is {self.keep}, of a context of {limit}", fix=f"give {limit // 2} or fewer"
            )
        return limit

    def window(self, limit: int, written: int) -> int:
        """Return how many tokens stay when a text slides, so that it need not soon do so again.

        >>> Request(max_new_tokens=10).window(100, written=4)
        94
        """
        room = min(self.max_new_tokens - written, (limit - self.keep) // 2)
        return limit - max(1, room)
