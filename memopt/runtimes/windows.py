"""Texts longer than a model, seen through overlapping windows: no character is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.bundle import Bundle, read_json
from memopt.errors import BundleError, ConfigurationError
from memopt.runtimes.batching import USUAL, Batch, Budget, UnusableItems
from memopt.runtimes.text import TextFrontEnd

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tokens that a window shares with the one before, where they are long enough: as many as
# transformers takes for questions.
STRIDE = 128
# What masks are called where tokenizer_config.json does not say.
_MASKS = ("[MASK]", "<mask>")


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """A text's own tokens, and the windows that the model sees them through.

    Args:
        text: what was tokenized.
        ids: int (tokens,), without special tokens.
        offsets: int (tokens, 2), the characters of each; those of one may lie in several tokens.
        words: int (tokens,), which word each is of, -1 for none.
        encodings: of the windows, with special tokens and what else the model is given.
        starts: the first token of each window.
        inside: where in each encoding those tokens begin.
        lengths: how many of them each window holds.
    """

    text: str
    ids: NDArray[np.intp]
    offsets: NDArray[np.intp]
    words: NDArray[np.intp]
    encodings: list[Any]
    starts: list[int]
    inside: list[int]
    lengths: list[int]

    def shares(self) -> list[range]:
        """Return the tokens that each window answers for: it has them farthest from an edge.

        The ends of the text are no edges.

        >>> none = np.zeros(0, np.intp)
        >>> Windows("", none, none, none, [], [0, 6], [1, 1], [10, 9]).shares()
        [range(0, 8), range(8, 15)]
        """
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        middles = [(a + b - 1) // 2 + 1 for a, b in zip(self.starts[1:], ends[:-1], strict=True)]
        edges = [0, *middles, ends[-1]]
        return [range(a, b) for a, b in pairwise(edges)]

    def positions(self, window: int, tokens: range | NDArray[np.intp]) -> NDArray[np.intp]:
        """Return where tokens of the text lie in the encoding of a window."""
        return np.asarray(tokens, np.intp) - self.starts[window] + self.inside[window]


class WindowFrontEnd(TextFrontEnd):
    """Cuts texts, and the contexts of questions, into windows, and makes batches of these.

    An item is a text or a pair, of which the model is given the first window, or the encoding of a
    window. Nothing of a tokenizer is changed after it was opened: threads share it.

    Args:
        bundle, inputs: as of :class:`TextFrontEnd`.
    """

    def __init__(self, bundle: Bundle, inputs: Sequence[str]) -> None:
        super().__init__(bundle, inputs)
        self._tokenizer.no_truncation()
        self._path = bundle.path
        path = bundle.path / "tokenizer_config.json"
        self._stated = read_json(path) if path.is_file() else {}
        model = self._tokenizer.model
        self._prefix = bool(getattr(model, "continuing_subword_prefix", None))
        self._unknown = self._id(self._named("unk_token") or getattr(model, "unk_token", None))
        # XLNet's kind is given the context before the question.
        self._context = 0 if self._stated.get("padding_side") == "left" else 1

    @property
    def null(self) -> int | None:
        """The id of the token that stands for no answer, None where there is none."""
        return self._id(self._named("cls_token"))

    def mask(self) -> tuple[str, int]:
        """Return what a gap is written as, and its id.

        Raises:
            BundleError: the tokenizer has no such token.
        """
        for token in (self._named("mask_token"), *_MASKS):
            found = self._id(token)
            if token and found is not None:
                return token, found
        raise BundleError(
            f"the tokenizer of {self._path} has no mask token",
            fix='name it in tokenizer_config.json ("mask_token")',
        )

    def name(self, token: int) -> str:
        """Return a token as a text has it."""
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def check(self, item: Any) -> str | None:
        """Return why ``item`` cannot be encoded, None when it can."""
        return None if _is_encoding(item) else super().check(item)

    def chunks(self, items: Sequence[Any]) -> list[NDArray[np.intp]]:
        """Return the positions of ``items`` in chunks, longest first; of encodings in one."""
        if len(items) and _is_encoding(items[0]):
            return [np.arange(len(items))]
        return super().chunks(items)

    def prepare(self, items: Sequence[Any], budget: Budget = USUAL) -> list[Batch]:
        """Cut a chunk into batches of similar length.

        Raises:
            UnusableItems: with a token that the model has no embedding of.
        """
        if all(isinstance(item, str) for item in items):
            return self.batches([w.encodings[0] for w in self.windows(items)], budget)
        found, broken = [], {}
        for index, item in enumerate(items):
            try:
                found.append(item if _is_encoding(item) else self._first(*item))
            except UnusableItems as unusable:
                broken[index] = unusable.reasons[0]
        if broken:
            raise UnusableItems(broken)
        return self.batches(found, budget)

    def windows(self, texts: Sequence[str], stride: int | None = None) -> list[Windows]:
        """Cut texts into windows of the model's length that share ``stride`` tokens.

        Raises:
            ConfigurationError: a stride that leaves no way on.
        """
        room = np.iinfo(np.int32).max
        if self.max_length is not None:
            special = self._tokenizer.num_special_tokens_to_add(False)
            room = max(self.max_length - special, 1)
        stride = _stride(stride, room, min(STRIDE, room // 4))
        whole = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        rows = zip(texts, whole, strict=True)
        return [
            _cut(text, encoding, room, stride, self._tokenizer.post_process, 0)
            for text, encoding in rows
        ]

    def paired(
        self, question: str, context: str, length: int, stride: int | None, least: int
    ) -> Windows:
        """Cut a context into windows of ``length`` tokens, each with the whole question.

        Args:
            question, context: texts.
            length: of a window, with the question and special tokens.
            stride: tokens of the context that two windows share.
            least: tokens of a long context that a window must have room for.

        Raises:
            ConfigurationError: a stride that leaves no way on.
            UnusableItems: the question leaves too little room, as item 0.
        """
        asked, whole = self._tokenizer.encode_batch([question, context], add_special_tokens=False)
        room = length - len(asked) - self._tokenizer.num_special_tokens_to_add(True)
        if room < max(min(least, len(whole)), 1):
            why = (
                f"has a question of {len(asked)} tokens: of {length} that a window has, "
                f"{max(room, 0)} are left for its context"
            )
            raise UnusableItems({0: why})
        usual = min(STRIDE, length // 2)
        stride = _stride(stride, room, usual if usual < room else room // 2)

        def join(part: Any) -> Any:
            both = (asked, part) if self._context else (part, asked)
            return self._tokenizer.post_process(*both)

        return _cut(context, whole, room, stride, join, self._context)

    def continues(self, windows: Windows) -> NDArray[np.bool_]:
        """Return which tokens go on with the word of the one before, as transformers tells them.

        Where the tokenizer marks parts of words, by their length: a marked one is longer than what
        it stands for. Else a word ends at a space.
        """
        text, unknown = windows.text, self._unknown
        found = np.zeros(len(windows.ids), bool)
        for i, (token, (start, end)) in enumerate(
            zip(windows.ids.tolist(), windows.offsets.tolist(), strict=True)
        ):
            if token == unknown:
                continue
            if self._prefix:
                found[i] = len(self._tokenizer.id_to_token(token) or "") != len(text[start:end])
            else:
                found[i] = start > 0 and " " not in text[start - 1 : start + 1]
        return found

    def _first(self, question: str, context: str) -> Any:
        limit = self.max_length or np.iinfo(np.int32).max
        return self.paired(question, context, limit, None, 1).encodings[0]

    def _named(self, key: str) -> str | None:
        value = self._stated.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def _id(self, token: str | None) -> int | None:
        found = self._tokenizer.token_to_id(token) if token else None
        return found if isinstance(found, int) else None


def _is_encoding(item: Any) -> bool:
    return hasattr(item, "special_tokens_mask")


def _stride(stride: int | None, room: int, usual: int) -> int:
    if stride is None:
        return usual
    if type(stride) is not int or not 0 <= stride < room:
        raise ConfigurationError(
            f"stride is {stride!r}, and a window holds {room} tokens of the text",
            fix="give 0 or more, less than that",
        )
    return stride


def _cut(text: str, whole: Any, room: int, stride: int, complete: Any, sequence: int) -> Windows:
    """Cut what was tokenized without special tokens; ``complete`` adds them to a window."""
    offsets = np.asarray(whole.offsets, np.intp).reshape(-1, 2)
    words = np.asarray([-1 if word is None else word for word in whole.word_ids], np.intp)
    ids = np.asarray(whole.ids, np.intp)
    if len(ids) > room:
        whole.truncate(room, stride=stride)
    parts = [whole, *whole.overflowing]
    encodings = [complete(part) for part in parts]
    return Windows(
        text,
        ids,
        offsets,
        words,
        encodings,
        [index * (room - stride) for index in range(len(parts))],
        [_index(encoding.sequence_ids, sequence) for encoding in encodings],
        [len(part) for part in parts],
    )


def _index(sequences: list[int | None], sequence: int) -> int:
    return sequences.index(sequence) if sequence in sequences else 0
