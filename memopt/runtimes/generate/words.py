"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memopt.bundle import read_json
from memopt.errors import BundleError


def end_tokens(folder: Path) -> frozenset[int]:
    """Return the tokens that end a text of a bundle: of generation_config.json, else config.json.

    >>> end_tokens(Path("/nowhere"))
    frozenset()
    """
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        stated = read_json(file).get("eos_token_id") if file.is_file() else None
        if stated is not None:
            ends = stated if isinstance(stated, list) else [stated]
            if not all(isinstance(end, int) for end in ends):
                raise BundleError(f"{file}: eos_token_id is {stated!r}", fix="give token ids")
            return frozenset(ends)
    return frozenset()


class Words:
    """The text of one growing list of tokens.

    Args:
        tokenizer: of ``tokenizers``.
        stop: texts that end it; none of them is in what is given out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Return what the token adds to the text for certain; "" while a character is half there.

        Once a stop string is complete ``stopped`` is set and the text ends before it.
        """
        piece = self._stream.step(self._tokenizer, token)
        if not piece or self.stopped:
            return ""
        self._held += piece
        found = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._give(min(found))
        return self._give(len(self._held) - self._begun())

    def finish(self) -> str:
        """Return what was held back because a stop string might have begun there."""
        return "" if self.stopped else self._give(len(self._held))

    def _begun(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0

    def _give(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        if self.stopped:
            self._held = ""
        self.text += piece
        return piece
