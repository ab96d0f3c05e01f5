"""Answers of a given form: JSON by a schema, a regular expression or a grammar, by llguidance.

Before a token is chosen all those are ruled out that could not go on to such an answer. llguidance
(MIT, https://github.com/guidance-ai/llguidance) parses and computes the mask; it needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from memopt.errors import BundleError, ConfigurationError, brief, first_line
from memopt.extras import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

Schema: TypeAlias = "Mapping[str, Any] | str"
T = TypeVar("T")
# A small model that may write a blank writes blanks for ever; JSON of six levels needs no more.
_BLANKS = {"whitespace_pattern": r"[ \n\t]{0,24}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What an answer must be; at most one of them.

    Attributes:
        schema: of JSON, as an object or its text; what llguidance does not know is refused.
        regex: of the whole answer, without look-around and backreferences.
        grammar: in Lark's or llama.cpp's (GBNF) notation.

    Raises:
        ConfigurationError: two are given, or the schema is no JSON.

    >>> Form(schema="{")
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: the schema is no JSON: Expecting property name enclosed in \
double quotes: line 1 column 2 (char 1)
    """

    schema: Schema | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__slots__ if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigurationError(f"{' and '.join(given)} are given", fix="give one of them")
        for name in ("regex", "grammar"):
            if not isinstance(getattr(self, name), str | None):
                kind = type(getattr(self, name)).__name__
                raise ConfigurationError(f"the {name} is {kind}", fix="give text")
        if self.schema is not None:
            object.__setattr__(self, "schema", _schema_text(self.schema))

    def __bool__(self) -> bool:
        return any(getattr(self, name) is not None for name in self.__slots__)


def forms(count: int, **given: Any) -> list[Form]:
    """Return the form of each of ``count`` answers; each value is one for all, or a list of theirs.

    Raises:
        ConfigurationError: a list has another length; see also :class:`Form`.

    >>> [form.regex for form in forms(2, regex=["a+", None])]
    ['a+', None]
    """
    spread = {name: _spread(name, value, count) for name, value in given.items()}
    return [Form(**{name: values[at] for name, values in spread.items()}) for at in range(count)]


def _spread(name: str, value: T | Sequence[T], count: int) -> Sequence[T]:
    if not isinstance(value, list | tuple):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise ConfigurationError(
            f"{name} has {len(value)} entries for {count} prompts", fix="give one for each"
        )
    return value


def _schema_text(schema: Schema) -> str:
    try:
        read = json.loads(schema) if isinstance(schema, str) else schema
        return json.dumps(read, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigurationError(f"the schema is no JSON: {first_line(error)}") from error


class Guide:
    """Follows one answer and says which tokens may come next."""

    def __init__(self, matcher: Any, tokenizer: Any) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer
        self._fresh = matcher.deep_copy()

    @property
    def complete(self) -> bool:
        """Whether what is there is an answer of the form."""
        return bool(self._matcher.is_accepting())

    @property
    def closed(self) -> bool:
        """Whether nothing can follow."""
        return self.complete and bool(self._matcher.is_stopped())

    def allowed(self, width: int) -> NDArray[np.bool_]:
        """Return which of ``width`` tokens may come next, what ends a text among them.

        Raises:
            ConfigurationError: the form is too much for llguidance.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.zeros(width, np.bool_)
        found = np.unpackbits(bits, bitorder="little")[:width]
        mask[: len(found)] = found
        return mask

    def take(self, token: int) -> None:
        """Go on by a token that was allowed.

        Raises:
            ConfigurationError: as of :meth:`allowed`.
        """
        self._matcher.consume_token(token)
        self._check()

    def holds(self, text: str) -> bool:
        """Say whether a text is an answer of the form."""
        matcher = self._fresh.deep_copy()
        tokens = self._tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and bool(matcher.is_accepting())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigurationError(
                f"the form of the answer cannot be kept: {brief(self._matcher.get_error())}",
                fix="make it simpler",
            )


class Structure:
    """A tokenizer as llguidance sees it, and the guides made for it.

    Args:
        tokenizer: of ``tokenizers``.
        ends: tokens that end a text.

    Raises:
        MissingExtra: llguidance is not installed.
        BundleError: a tokenizer that it does not know: only those of bytes (BPE with ByteLevel,
            or SentencePiece with byte fallback) can be guided.
    """

    def __init__(self, tokenizer: Any, ends: frozenset[int]) -> None:
        self._llg = require("llguidance", extra="structured", why="keep an answer to a form")
        size = tokenizer.get_vocab_size()
        # Without a token that ends texts one is made up, which no model can write.
        tokens = sorted(ends) or [size]
        try:
            self._tokenizer = self._llg.LLTokenizer(
                tokenizer.to_str(), n_vocab=max(size, *(t + 1 for t in tokens)), eos_token=tokens
            )
        except ValueError as error:
            raise BundleError(
                f"llguidance does not know this tokenizer: {first_line(error)}",
                fix="ask without schema, regex and grammar",
            ) from error

    def guide(self, form: Form) -> Guide | None:
        """Return what keeps an answer to a form; None where it is free.

        Raises:
            ConfigurationError: the form is wrong, or has what llguidance does not know.
        """
        if not form:
            return None
        matcher = self._llg.LLMatcher(self._tokenizer, self._compiled(form), log_level=0)
        told = matcher.get_error() or " ".join(matcher.get_grammar_warnings())
        if told:
            name = next(name for name in Form.__slots__ if getattr(form, name) is not None)
            raise ConfigurationError(f"the {name} cannot be used: {_reason(told)}")
        return Guide(matcher, self._tokenizer)

    def _compiled(self, form: Form) -> str:
        matcher = self._llg.LLMatcher
        try:
            if form.schema is not None:
                return str(matcher.grammar_from_json_schema(form.schema, defaults=_BLANKS))
            if form.regex is not None:
                return str(matcher.grammar_from_regex(form.regex))
            return str(self._llg.grammar_from("grammar", form.grammar))
        except ValueError as error:
            raise ConfigurationError(f"the form cannot be used: {first_line(error)}") from error


def _reason(told: str) -> str:
    """Return what a message of llguidance says, in a line: of a regex's the last part says it.

    >>> _reason("regex parse error:\\n    ((\\n     ^\\nerror: unclosed group")
    'unclosed group'
    """
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("error: ")), lines[0])
    return said.removeprefix("error: ")
