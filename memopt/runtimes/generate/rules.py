"""What a checkpoint asks of every text it writes: tokens forced, forbidden or not repeated.

The rules are those of ``generation_config.json``, in the order in which transformers applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from memopt.bundle import read_json
from memopt.errors import BundleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# (scores (vocabulary,), the tokens so far) -> scores, those of forbidden tokens at minus infinity.
Rule: TypeAlias = "Callable[[NDArray[Any], Sequence[int]], NDArray[Any]]"
# Settings that would change a text and are not there, with the value that asks for nothing.
_LEFT_OUT: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "do_sample": False,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "guidance_scale": 1.0,
    "penalty_alpha": 0.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What is asked of one text.

    Attributes:
        ends: tokens that end it.
        forced_first: the token after the very first; None forces none.
        forced_last: the token that a text has at its last place, if it gets there.
        last: how many tokens the text may have, its beginning included.
        begin: how many its beginning has.
        min_length: no end before so many tokens, the beginning included.
        min_new: no end before so many tokens behind the beginning.
        no_repeat: no run of so many tokens twice; 0 allows it.
        bad: runs of tokens that never occur.
        suppressed: tokens that never occur.
        begin_suppressed: tokens that do not come first.
    """

    ends: frozenset[int] = frozenset()
    forced_first: int | None = None
    forced_last: int | None = None
    last: int = 1 << 30
    begin: int = 1
    min_length: int = 0
    min_new: int = 0
    no_repeat: int = 0
    bad: tuple[tuple[int, ...], ...] = ()
    suppressed: tuple[int, ...] = ()
    begin_suppressed: tuple[int, ...] = ()

    def __call__(self, scores: NDArray[Any], seen: Sequence[int]) -> NDArray[Any]:
        """Return scores (vocabulary,) with those of forbidden tokens at minus infinity.

        >>> Rules(forced_first=1)(np.zeros(3), [0]).tolist()
        [-inf, 0.0, -inf]
        """
        made, count = np.array(scores), len(seen)
        hidden = [*self._repeating(seen), *self._bad(seen)]
        if count < self.min_length or count - self.begin < self.min_new:
            hidden += self.ends
        made[[token for token in hidden if token < len(made)]] = -np.inf
        if self.forced_first is not None and count == 1:
            made = _only(made, self.forced_first)
        if self.forced_last is not None and count == self.last - 1:
            made = _only(made, self.forced_last)
        made[[token for token in self.suppressed if token < len(made)]] = -np.inf
        late = self.begin == 1 and self.forced_first is not None
        if count == self.begin + late:
            made[[token for token in self.begin_suppressed if token < len(made)]] = -np.inf
        return made

    def _repeating(self, seen: Sequence[int]) -> list[int]:
        size = self.no_repeat
        if not size or len(seen) + 1 < size:
            return []
        tail = list(seen[len(seen) - size + 1 :])
        runs = (seen[place : place + size] for place in range(len(seen) - size + 1))
        return [run[-1] for run in runs if list(run[:-1]) == tail]

    def _bad(self, seen: Sequence[int]) -> list[int]:
        ended = [
            run[-1]
            for run in self.bad
            if len(run) == 1 or list(run[:-1]) == list(seen[len(seen) - len(run) + 1 :])
        ]
        return [token for token in ended if token not in self.ends]


def _only(scores: NDArray[Any], token: int) -> NDArray[Any]:
    made = np.full_like(scores, -np.inf)
    made[token] = 0
    return made


@dataclass(frozen=True, slots=True)
class Asked:
    """What ``generation_config.json`` says, or ``config.json`` where there is none.

    ``left_out`` has a line for each setting that changes what transformers writes and is not
    followed here.
    """

    start: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def rules(self, ends: frozenset[int], *, begin: int, most: int) -> Rules:
        """Return the rules of a text that begins with ``begin`` tokens and gets ``most`` more."""
        stated = self.settings
        forced_last = stated.get("forced_eos_token_id")
        if isinstance(forced_last, list):
            forced_last = forced_last[0]
        return Rules(
            ends=ends,
            forced_first=stated.get("forced_bos_token_id"),
            forced_last=forced_last,
            last=begin + most,
            begin=begin,
            min_length=stated.get("min_length") or 0,
            min_new=stated.get("min_new_tokens") or 0,
            no_repeat=stated.get("no_repeat_ngram_size") or 0,
            bad=tuple(map(tuple, stated.get("bad_words_ids") or ())),
            suppressed=tuple(stated.get("suppress_tokens") or ()),
            begin_suppressed=tuple(stated.get("begin_suppress_tokens") or ()),
        )


def read_asked(folder: Path) -> Asked:
    """Read what a bundle asks of its texts.

    Raises:
        BundleError: neither file says which token a text begins with.

    >>> read_asked(Path("/nowhere"))
    Traceback (most recent call last):
    ...
    memopt.errors.BundleError: /nowhere/config.json is missing
    """
    config, file = read_json(folder / "config.json"), folder / "generation_config.json"
    settings = read_json(file) if file.is_file() else config
    start = settings.get("decoder_start_token_id")
    for place, name in ((config, "decoder_start_token_id"), (settings, "bos_token_id")):
        start = place.get(name) if start is None else start
    if not isinstance(start, int):
        raise BundleError(
            f"{folder} does not say which token a text begins with",
            fix="add decoder_start_token_id to its generation_config.json",
        )
    told = [
        f"{name} {settings[name]}"
        for name, usual in _LEFT_OUT.items()
        if settings.get(name) not in (None, usual)
    ]
    return Asked(start, settings, tuple(told))
