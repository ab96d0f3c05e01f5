"""LanguageValidator: a quantized language model beside its float graph, token by token.

Logits are a vocabulary a token: both graphs run batch by batch and of each token four numbers are
kept. Kullback-Leibler divergence to the float model is what ``perplexity --kl-divergence`` of
llama.cpp tells: it sees what a text's own perplexity hides, where errors for and against it cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from memopt.bundle import Bundle, Variant, read_json
from memopt.errors import QuantizationError
from memopt.graphs.session import feeds, open_whole
from memopt.positions import position_limit
from memopt.quantization.accuracy.gate import Validation
from memopt.quantization.accuracy.validate import PrecisionValidator, Replay, speedup
from memopt.quantization.method import writes
from memopt.runtimes.generate.words import end_tokens
from memopt.runtimes.keys_values import held, padded, places

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memopt.quantization.accuracy.calibration import CalibrationSet

    Feed = Mapping[str, NDArray[Any]]
    Steps = Callable[[Feed], Mapping[str, NDArray[Any]]]

# Prompts that both models go on from, how long each is at most, and how many tokens they write.
PROMPTS, PROMPT, NEW = 16, 32, 32
# Prompts that are read at once, and texts that are shown side by side.
TOGETHER, SHOWN = 4, 4
# Tokens whose logits are compared at once: 64 of a large vocabulary are 50 MB in float64.
SLICE = 64


class Validator(Protocol):
    """Compares graphs with the float one of a bundle."""

    output: str

    def open(self, graph: Path, format: str, options: Mapping[str, str]) -> Any:
        """Open a graph for :meth:`validate`."""

    def validate(self, run: Any, *, limit: int | None = None, timed: bool = True) -> Validation:
        """Compare it with the float one, on the first ``limit`` inputs or on all."""


def validator_of(
    bundle: Bundle, reference: Variant, data: CalibrationSet, max_length: int | None = None
) -> Validator:
    """Return what compares graphs of a bundle's task with the float variant ``reference``.

    Raises:
        QuantizationError: the float graph gives NaN.
    """
    kind = LanguageValidator if writes(bundle) else PrecisionValidator
    return kind(bundle, reference, data, max_length=max_length)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of every token that is told from those before it: what two models say of it.

    Attributes:
        kl: divergence of the second model's distribution from the first's, in nats.
        same: whether both have the same likeliest token.
        exact, got: negative log likelihood of the token that stands there.
    """

    kl: NDArray[np.float64]
    same: NDArray[np.bool_]
    exact: NDArray[np.float64]
    got: NDArray[np.float64]


def compare_tokens(
    exact: NDArray[np.float32], got: NDArray[np.float32], ids: NDArray[np.int64]
) -> Tokens:
    """Compare two models' logits (tokens, vocabulary) of what follows each token of ``ids``.

    The last row tells of a token that is not there, and is left out.

    >>> logits = np.log(np.float32([[0.5, 0.25, 0.25], [1, 1, 1]]))
    >>> other = np.log(np.float32([[0.25, 0.5, 0.25], [1, 1, 1]]))
    >>> found = compare_tokens(logits, other, np.array([0, 1]))
    >>> found.kl.round(4).tolist(), found.same.tolist(), np.exp(-found.got).round(2).tolist()
    ([0.1733], [False], [0.5])
    """
    parts = [
        _compared(exact[at:end], got[at:end], ids[at + 1 : end + 1])
        for at in range(0, len(ids) - 1, SLICE)
        for end in [min(at + SLICE, len(ids) - 1)]
    ]
    if not parts:
        none = np.zeros(0)
        return Tokens(none, np.zeros(0, bool), none, none)
    names = ("kl", "same", "exact", "got")
    return Tokens(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def _compared(
    exact: NDArray[np.float32], got: NDArray[np.float32], following: NDArray[np.int64]
) -> Tokens:
    a, b = (rows - rows.max(axis=-1, keepdims=True) for rows in (exact, got))
    shares = np.exp(a)
    total, other = shares.sum(axis=-1, dtype=np.float64), np.exp(b).sum(axis=-1, dtype=np.float64)
    mean = (shares * (a - b)).sum(axis=-1, dtype=np.float64) / total
    rows = np.arange(len(following))
    return Tokens(
        # Rounding may leave a little less than nothing.
        kl=np.maximum(mean - np.log(total) + np.log(other), 0.0),
        same=a.argmax(axis=-1) == b.argmax(axis=-1),
        exact=np.log(total) - a[rows, following],
        got=np.log(other) - b[rows, following],
    )


@dataclass(frozen=True, slots=True)
class _Prompt:
    """Where both models begin, and what the float one writes behind it."""

    ids: list[int]
    text: list[int]


class LanguageValidator:
    """Runs float and quantized graph side by side over texts that neither was calibrated with.

    Args:
        bundle: for its tokenizer and config.
        reference: the float variant of the runtime the quantized graph is for.
        data: texts that were not used for calibration.
        max_length: tokens at most, None for the bundle's own limit.

    Raises:
        QuantizationError: the float graph itself gives NaN.
    """

    def __init__(
        self,
        bundle: Bundle,
        reference: Variant,
        data: CalibrationSet,
        *,
        max_length: int | None = None,
    ) -> None:
        self._bundle, self._data = bundle, data
        self.output = reference.output
        self._batches = Replay(
            lambda: feeds(bundle, data.items, reference.inputs, max_length=max_length)
        )
        self._float = self.open(bundle.file(reference), reference.format, reference.options)
        self._ends = end_tokens(bundle.path)
        self._prompts = self._begun()

    def open(self, graph: Path, format: str, options: Mapping[str, str]) -> Steps:
        """Open a graph for :meth:`validate`."""
        return open_whole(graph, format, options)

    @property
    def float_perplexity(self) -> float:
        """Perplexity of the float model on the validation texts."""
        whole = _joined(self._tokens(self._float, None))
        return float(np.exp(whole.exact.mean()))

    def validate(self, run: Steps, *, limit: int | None = None, timed: bool = True) -> Validation:
        """Compare one graph with the float one; its texts are only written where it is timed too.

        Raises:
            QuantizationError: the graph gives NaN or infinity, or logits of another width.
        """
        found = self._tokens(run, limit)
        whole = _joined(found)
        if not len(whole.kl):
            raise QuantizationError(
                "no validation text has two tokens", fix="give longer texts, or --max-length"
            )
        before, after = (float(np.exp(part.mean())) for part in (whole.exact, whole.got))
        measures = {
            "kl_mean": float(whole.kl.mean()),
            "kl_p99": float(np.percentile(whole.kl, 99)),
            "top1_agreement": float(whole.same.mean()),
        }
        texts: tuple[tuple[str, str, str], ...] = ()
        if self._prompts:
            equal = self._equal(run)
            measures["greedy_prefix"] = float(np.mean(equal))
            texts = self._side_by_side(run, equal) if timed and limit is None else ()
        each = {p: float(t.kl.mean()) for p, t in found.items() if len(t.kl)}
        worst = sorted(each.items(), key=lambda pair: -pair[1])[:10]
        return Validation(
            samples=len(found),
            perplexity=after,
            perplexity_float=before,
            perplexity_increase=after / before - 1,
            measures=measures,
            speedup=speedup(self._float, run, self._batches) if timed else None,
            set_sha256=self._data.digest,
            worst=tuple((str(self._data.items[p]), value) for p, value in worst),
            texts=texts,
        )

    def _tokens(self, run: Steps, limit: int | None) -> dict[int, Tokens]:
        """Return what both graphs say of the tokens of each text, by its position."""
        found: dict[int, Tokens] = {}
        for positions, feed in self._batches:
            rows = [(n, p) for n, p in enumerate(positions) if limit is None or p < limit]
            if not rows:
                continue
            exact = self._logits(self._float, feed, "the float model")
            same = run is self._float
            got = exact if same else self._logits(run, feed, "the quantized graph")
            if got.shape != exact.shape:
                raise QuantizationError(f"logits {got.shape} beside float logits {exact.shape}")
            for number, position in rows:
                kept = _mask(feed)[number].astype(bool)
                ids = feed["input_ids"][number][kept]
                found[position] = compare_tokens(exact[number][kept], got[number][kept], ids)
        return dict(sorted(found.items()))

    def _logits(self, run: Steps, feed: Feed, name: str) -> NDArray[np.float32]:
        logits = np.asarray(run(feed)[self.output], np.float32)
        # What is said behind padding is never read.
        if not np.isfinite(logits[_mask(feed).astype(bool)]).all():
            raise QuantizationError(f"{name} gives NaN or infinity on validation data")
        return logits

    def _begun(self) -> list[_Prompt]:
        """Let the float model go on from the first half of the first texts."""
        config = self._bundle.path / "config.json"
        stated = position_limit(read_json(config)) if config.is_file() else None
        room = PROMPT if stated is None else min(PROMPT, stated - NEW)
        halves: dict[int, list[int]] = {}
        for positions, feed in self._batches:
            for number, position in enumerate(positions):
                if position < PROMPTS and room > 0:
                    ids = feed["input_ids"][number][_mask(feed)[number].astype(bool)].tolist()
                    halves[position] = ids[: max(1, min(len(ids) // 2, room))]
        prompts = [halves[position] for position in sorted(halves)]
        texts = written(self._float, self.output, prompts, NEW) if prompts else []
        return [_Prompt(a, b) for a, b in zip(prompts, texts, strict=True)]

    def _equal(self, run: Steps) -> list[int]:
        """Return how many tokens a graph writes of each prompt before another one than the float.

        It is given the float's own text: up to the first other token that is its own as well.
        """
        counts: list[int] = []
        for at in range(0, len(self._prompts), TOGETHER):
            part = self._prompts[at : at + TOGETHER]
            feed = padded([p.ids + p.text[:-1] for p in part])
            best = self._logits(run, feed, "the quantized graph")[:, -NEW:].argmax(axis=-1)
            for row, prompt in zip(best.tolist(), part, strict=True):
                pairs = zip(row, prompt.text, strict=True)
                first = next((n for n, (a, b) in enumerate(pairs) if a != b), NEW)
                ended = any(token in self._ends for token in prompt.text[:first])
                counts.append(NEW if ended else first)
        return counts

    def _side_by_side(self, run: Steps, equal: Sequence[int]) -> tuple[tuple[str, str, str], ...]:
        """Return (prompt, the float's text, the quantized one's) where they part the earliest."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self._bundle.path / "tokenizer.json"))
        worst = [self._prompts[n] for n in np.argsort(equal, kind="stable")[:SHOWN]]
        texts = written(run, self.output, [p.ids for p in worst], NEW)
        return tuple(
            (
                tokenizer.decode(prompt.ids),
                tokenizer.decode(self._ended(prompt.text)),
                tokenizer.decode(self._ended(text)),
            )
            for prompt, text in zip(worst, texts, strict=True)
        )

    def _ended(self, text: list[int]) -> list[int]:
        return text[: next((n for n, token in enumerate(text) if token in self._ends), None)]


def written(
    run: Steps, output: str, prompts: Sequence[Sequence[int]], count: int
) -> list[list[int]]:
    """Let a graph write ``count`` tokens greedily behind each prompt, all in one batch.

    A graph with a cache reads each token once; one without reads the whole text anew each time.
    """
    feed = padded(prompts)
    ids, mask = feed["input_ids"], feed["attention_mask"]
    texts: list[list[int]] = [[] for _ in prompts]
    for _ in range(count):
        made = run(feed)
        tokens = np.asarray(made[output])[:, -1].argmax(axis=-1).astype(np.int64)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        ids = np.concatenate([ids, tokens[:, None]], axis=1)
        mask = np.concatenate([mask, np.ones((len(mask), 1), np.int64)], axis=1)
        past = held(made)
        new = ids[:, -1:] if past else ids
        at = places(mask, new.shape[1])
        feed = {"input_ids": new, "attention_mask": mask, "position_ids": at, **past}
    return texts


def _mask(feed: Feed) -> NDArray[Any]:
    mask = feed.get("attention_mask")
    return np.ones_like(feed["input_ids"]) if mask is None else mask


def _joined(found: Mapping[int, Tokens]) -> Tokens:
    parts = list(found.values())
    names = ("kl", "same", "exact", "got")
    return Tokens(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))
