"""Which token comes next: greedy, or drawn from what temperature and cuts leave of the logits."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import ConfigurationError
from memopt.runtimes.generate.rules import Rule

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Logits nearer than this are one to a run that rounds otherwise (several tokens, another batch).
TIE = 1e-3
_KINDS = (
    ("repetition_penalty", numbers.Real, "a number above 0"),
    ("temperature", numbers.Real, "0 or more"),
    ("top_k", numbers.Integral, "a whole number, 0 or more"),
    ("top_p", numbers.Real, "a share above 0, up to 1"),
    ("min_p", numbers.Real, "a share from 0 to below 1"),
    ("seed", numbers.Integral, "a whole number, 0 or more, or leave it out"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen; in the order in which transformers applies them.

    Attributes:
        repetition_penalty: a token that is there already has its logit divided by this, or
            multiplied where it is negative (Keskar et al. 2019, https://arxiv.org/abs/1909.05858).
        temperature: of the softmax; 0 takes the likeliest token.
        top_k: only so many of the likeliest; 0 is all.
        top_p: only the likeliest whose probabilities reach this sum (Holtzman et al. 2019,
            https://arxiv.org/abs/1904.09751).
        min_p: only those at least this likely, as a share of the likeliest (Nguyen et al. 2024,
            https://arxiv.org/abs/2407.01082).
        seed: of the draws; None is another one each time.

    Raises:
        ConfigurationError: a number out of its range.

    >>> Sampling(temperature=-1)
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: temperature is -1; give 0 or more
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind, wanted in _KINDS:
            value = getattr(self, name)
            if (value is not None or name != "seed") and (
                not isinstance(value, kind) or isinstance(value, bool)
            ):
                raise ConfigurationError(f"{name} is {value!r}", fix=f"give {wanted}")
        ranges = (
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "a number above 0"),
            ("temperature", 0 <= self.temperature < np.inf, "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more, or leave it out"),
            ("top_p", 0 < self.top_p <= 1, "a share above 0, up to 1"),
            ("min_p", 0 <= self.min_p < 1, "a share from 0 to below 1"),
        )
        for name, right, wanted in ranges:
            if not right:
                raise ConfigurationError(f"{name} is {getattr(self, name)}", fix=f"give {wanted}")


class Sampler:
    """Chooses the tokens of one text; a seed gives the same ones whatever is beside it.

    Args:
        sampling: how.
        row: of the batch, for a seed of its own.
        rules: what a checkpoint forbids or forces.
    """

    def __init__(self, sampling: Sampling, row: int = 0, rules: Rule | None = None) -> None:
        self._how, self._rules = sampling, rules
        seed = None if sampling.seed is None else (sampling.seed, row)
        self._random = np.random.default_rng(seed)

    def pick(
        self,
        logits: NDArray[np.float32],
        seen: Sequence[int],
        allowed: NDArray[np.bool_] | None = None,
    ) -> tuple[int, float]:
        """Return a token and its log-probability in the model's own distribution.

        Args:
            logits: (vocabulary,).
            seen: the tokens so far, the prompt's too.
            allowed: (vocabulary,), the tokens to choose among; None is all.

        >>> import numpy as np
        >>> token, log = Sampler(Sampling()).pick(np.log(np.float32([0.1, 0.7, 0.2])), [])
        >>> token, round(float(np.exp(log)), 3)
        (1, 0.7)
        """
        own = logits.astype(np.float64)
        scores = self._scores(own, seen, allowed)
        if self._how.temperature == 0:
            token = int(scores.argmax())
        else:
            with np.errstate(over="ignore"):  # as cold as can be, the likeliest alone is left
                token = self._draw((scores - scores.max()) / self._how.temperature)
        return token, float(own[token] - _log_sum(logits))

    def undecided(
        self,
        logits: NDArray[np.float32],
        seen: Sequence[int],
        allowed: NDArray[np.bool_] | None = None,
    ) -> bool:
        """Say whether rounding may decide which token is the likeliest; arguments as of `pick`.

        >>> Sampler(Sampling()).undecided(np.float32([1, 3, 3 + 1e-6]), [])
        True
        """
        if self._how.temperature:
            return False
        scores = self._scores(logits.astype(np.float64), seen, allowed)
        second, first = np.partition(scores, -2)[-2:]
        return bool(first - second < TIE)

    def _scores(
        self, own: NDArray[np.float64], seen: Sequence[int], allowed: NDArray[np.bool_] | None
    ) -> NDArray[np.float64]:
        scores = own
        if self._how.repetition_penalty != 1.0 and len(seen):
            scores = own.copy()
            there = np.unique(np.asarray(seen, np.int64))
            old, by = scores[there], self._how.repetition_penalty
            scores[there] = np.where(old < 0, old * by, old / by)
        if self._rules is not None:
            scores = self._rules(scores, seen)
        return scores if allowed is None else np.where(allowed, scores, -np.inf)

    def _draw(self, scores: NDArray[np.float64]) -> int:
        how = self._how
        order = np.argsort(-scores, kind="stable")
        order = order[np.isfinite(scores[order])]  # what is not allowed is never drawn
        if how.top_k:
            order = order[: how.top_k]
        shares = np.exp(scores[order] - _log_sum(scores[order]))
        if how.top_p < 1:
            # The token that reaches the sum is in.
            kept = max(1, int(np.searchsorted(shares.cumsum(), how.top_p) + 1))
            order, shares = order[:kept], shares[:kept]
        if how.min_p:
            likely = shares >= how.min_p * shares[0]
            order, shares = order[likely], shares[likely]
        place = np.searchsorted(shares.cumsum(), self._random.random() * shares.sum(), "right")
        return int(order[min(int(place), len(order) - 1)])


def _log_sum(values: NDArray[Any]) -> float:
    # float32 powers are several times faster, and exact to six digits: more than logits are.
    top = values.max()
    return float(top) + float(np.log(np.exp(values - top).sum(dtype=np.float64)))
