"""What a GGUF file says of its tokenizer, checked: tokens, their kinds, merges, special ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from memopt.errors import WeightsError
from memopt.weights.gguf.file import GgufFile

# llama.cpp's enum llama_token_type.
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "sep": "seperator_token_id",  # as llama.cpp spells it
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
# Tokens that end a turn, where a chat model's end of text is another one.
_TURN_ENDS = ("eot_token_id", "eom_token_id")
_PREFIX = "tokenizer.ggml."


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokenizer's part of a file's metadata.

    Attributes:
        file: opened.
        model: ``gpt2`` (byte-level BPE), ``llama`` (SentencePiece) or ``bert`` (WordPiece).
        tokens: by id.
        kinds: llama.cpp's number of each token's kind; empty where the file has none.
        special: ``bos``, ``eos``, ... -> id.
    """

    file: GgufFile
    model: str
    tokens: list[str]
    kinds: np.ndarray
    special: Mapping[str, int]

    def get(self, name: str, default: Any = None) -> Any:
        """Return another value of ``tokenizer.ggml``."""
        return self.file.metadata.get(_PREFIX + name, default)

    def flag(self, name: str, default: bool) -> bool:
        """Return a value that is true or false."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.wrong(name, repr(value), "true or false")
        return value

    def strings(self, name: str) -> list[str] | None:
        """Return a list of strings, None where there is none."""
        value = self.get(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, f"{value!s:.60}", "a list of strings")
        return value

    def scores(self) -> list[float]:
        """Return each token's score, by which SentencePiece merges."""
        scores = self.get("scores")
        if not isinstance(scores, np.ndarray) or len(scores) != len(self.tokens):
            raise self.wrong("scores", f"{scores!s:.60}", f"{len(self.tokens)} numbers")
        return [float(score) for score in scores]

    def token(self, name: str) -> str | None:
        """Return a special token's text."""
        return self.tokens[self.special[name]] if name in self.special else None

    @property
    def control(self) -> list[str]:
        """Tokens that are no text."""
        return [self.tokens[index] for index in np.flatnonzero(self.kinds == _CONTROL)]

    @property
    def user_defined(self) -> list[str]:
        """Tokens that are found in a text before anything else is."""
        return [self.tokens[index] for index in np.flatnonzero(self.kinds == _USER_DEFINED)]

    @property
    def ends(self) -> list[int]:
        """Ids after which a generated text ends."""
        ids = [self.special.get("eos"), *(self.get(name) for name in _TURN_ENDS)]
        return list(dict.fromkeys(i for i in ids if isinstance(i, int) and i < len(self.tokens)))

    def wrong(self, name: str, value: str, wanted: str) -> WeightsError:
        """Return the error that says what a key should be."""
        return WeightsError(
            f"{self.file.path}: {_PREFIX}{name} is {value}, not {wanted}",
            fix="the file is damaged; convert it again with llama.cpp",
        )


def read_vocabulary(file: GgufFile, rows: int) -> Vocabulary:
    """Return a file's tokenizer metadata.

    Args:
        file: opened.
        rows: of the model's table of tokens.

    Raises:
        WeightsError: there is none, it has more tokens than the model, a token twice, or a special
            id past the tokens.
    """
    get = file.metadata.get
    model, tokens = get(f"{_PREFIX}model"), get(f"{_PREFIX}tokens")
    if not isinstance(model, str) or not isinstance(tokens, list):
        raise WeightsError(
            f"{file.path} has no tokenizer (tokenizer.ggml.model is {model!r})",
            fix="convert the model again with llama.cpp, with its vocabulary",
        )
    if len(tokens) > rows:
        raise WeightsError(f"{file.path} has {len(tokens)} tokens, its model has {rows}")
    if len(set(tokens)) != len(tokens):
        places: dict[str, int] = {}
        twice = next(t for i, t in enumerate(tokens) if places.setdefault(t, i) != i)
        raise WeightsError(f"{file.path} has token {twice!r} twice", fix="convert the model again")
    kinds = get(f"{_PREFIX}token_type", np.zeros(0, np.int32))
    if not isinstance(kinds, np.ndarray) or kinds.size not in (0, len(tokens)):
        raise WeightsError(
            f"{file.path}: tokenizer.ggml.token_type has not one kind for each of {len(tokens)} "
            "tokens"
        )
    special = {}
    for name, key in _SPECIAL.items():
        number = get(_PREFIX + key)
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            raise WeightsError(
                f"{file.path}: {_PREFIX}{key} is {number!r}, there are {len(tokens)} tokens",
                fix="the file is damaged; convert it again with llama.cpp",
            )
        special[name] = number
    return Vocabulary(file, model, tokens, kinds, special)
