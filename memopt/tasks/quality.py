"""How near the answers of two graphs are: the measures of each task, and what a variant must reach.

The right answers are the float graph's. A task's first measure is the one that a search raises.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.errors import ConfigurationError
from memopt.registry import check_keys
from memopt.tasks.boxes import box_agreement, detector_kind, find_boxes
from memopt.tasks.classes import label_names, label_scores, softmax
from memopt.tasks.extraction import best_spans
from memopt.tasks.ranking import kendall_tau, ndcg
from memopt.tasks.rows import likeliest_rows, trimmed_rows, whole_rows
from memopt.tasks.spans import Span, TokenScores, span_f1, spans_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = Sequence[NDArray[Any]]

# Words of the vocabulary, or neighbours, that are compared of a sparse vector.
TOP_TERMS = 32
# Of a set of texts, the first so many are queries and the others documents, for MaxSim.
QUERIES = 32


@dataclass(frozen=True, slots=True)
class Measure:
    """A number that tells how near two graphs are.

    ``bound`` is what a variant must reach by default, None where it is only told; ``rising`` says
    that more is better.
    """

    label: str
    bound: float | None = None
    rising: bool = True

    def misses(self, value: float, bound: float) -> bool:
        """Say whether a value is on the wrong side of its bound; NaN is."""
        return not (value >= bound if self.rising else value <= bound)


MEASURES: Mapping[str, Measure] = {
    "agreement": Measure("same first answer, share", 0.98),
    "max_shift": Measure("largest change of a probability", 0.25, rising=False),
    "kendall": Measure("Kendall's tau of the order", 0.95),
    "ndcg_at_10": Measure("NDCG@10 against the float order", 0.98),
    "term_cosine": Measure("cosine, least", 0.95),
    "term_overlap": Measure(f"overlap of the {TOP_TERMS} heaviest words", 0.9),
    "span_f1": Measure("F1 of the spans", 0.97),
    "exact_match": Measure("same answer to the letter, share"),
    "box_iou": Measure("overlap of the boxes (IoU), mean", 0.9),
    "class_agreement": Measure("same class of a box, share", 0.95),
    # Of language models. What int4 leaves at a divergence of .05 nats a reader does not notice.
    "perplexity_increase": Measure("perplexity increase, share", 0.05, rising=False),
    "kl_mean": Measure("KL to the float model, nats a token, mean", 0.05, rising=False),
    "kl_p99": Measure("KL to the float model, 99th percentile", rising=False),
    "top1_agreement": Measure("same likeliest token, share"),
    "greedy_prefix": Measure("greedy tokens before the first other one, of 32, mean"),
}
_WRITTEN = ("perplexity_increase", "kl_mean", "kl_p99", "top1_agreement", "greedy_prefix")


@dataclass(frozen=True, slots=True)
class About:
    """What a comparison may need to know beside the answers."""

    config: Mapping[str, Any] = field(default_factory=dict)
    items: Sequence[Any] = ()


@dataclass(frozen=True, slots=True)
class Quality:
    """How the answers of one task are kept and compared.

    ``rows`` makes of a batch's output what is kept of each input; ``compare`` tells the measures of
    (these, the right ones), whose names are ``measures``.
    """

    rows: Callable[[NDArray[np.float32], Mapping[str, NDArray[Any]]], list[NDArray[Any]]]
    compare: Callable[[Rows, Rows, About], dict[str, float]]
    measures: tuple[str, ...]


def quality_of(task: str) -> Quality:
    """Return how answers of a task are compared.

    >>> right = [np.array([0.0, 4.0]), np.array([4.0, 0.0])]
    >>> found = quality_of("image-classification").compare(right, right, About())
    >>> found["agreement"], found["max_shift"]
    (1.0, 0.0)
    """
    return _QUALITIES[task]


def misses(found: Mapping[str, float], bounds: Mapping[str, float]) -> list[str]:
    """Return one line per measure that misses its bound; those not named have their default.

    >>> misses({"agreement": 0.9}, {})
    ['same first answer, share 0.9000 misses 0.98']
    """
    lines = []
    for name, value in found.items():
        bound = bounds.get(name, MEASURES[name].bound)
        if bound is not None and MEASURES[name].misses(value, bound):
            lines.append(f"{MEASURES[name].label} {value:.4f} misses {bound:g}")
    return lines


def words(name: str, bounds: Mapping[str, float]) -> str:
    """Return a measure's bound in words, "" where it has none.

    >>> words("kendall", {"kendall": 0.9})
    'at least 0.9'
    """
    bound = bounds.get(name, MEASURES[name].bound)
    side = "at least" if MEASURES[name].rising else "at most"
    return "" if bound is None else f"{side} {bound:g}"


def check_bounds(bounds: Mapping[str, float]) -> None:
    """Refuse a bound of no measure.

    Raises:
        ConfigurationError: naming the nearest that is one.
    """
    check_keys("the gate", bounds, MEASURES)


def measures_of(task: str) -> tuple[str, ...]:
    """Return the names of the bounds that hold something of a task's answers.

    >>> measures_of("embedding"), measures_of("reranking")
    (('min_cosine',), ('kendall', 'ndcg_at_10'))
    """
    if task == "text-generation":
        return (*_WRITTEN, "max_perplexity_increase")
    return _QUALITIES[task].measures if task in _QUALITIES else ("min_cosine",)


def check_measured(bounds: Iterable[str], task: str) -> None:
    """Refuse a bound of what is not measured of a task's answers: it would hold nothing.

    Raises:
        ConfigurationError: naming those that hold something.
    """
    known = measures_of(task)
    if idle := [name for name in bounds if name not in known]:
        ways = [f"--gate {n}=VALUE" if n in MEASURES else f"--{n.replace('_', '-')}" for n in known]
        raise ConfigurationError(
            f"a gate of {', '.join(idle)} would hold nothing: it is not measured of {task}",
            fix="give " + " or ".join(ways),
        )


def _classes(got: Rows, right: Rows, about: About) -> dict[str, float]:
    ours, theirs = (label_scores(np.stack(rows), about.config) for rows in (got, right))
    if about.config.get("problem_type") == "multi_label_classification":
        same = float(((ours > 0.5) == (theirs > 0.5)).mean())
    else:
        same = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    return {"agreement": same, "max_shift": float(np.abs(ours - theirs).max(initial=0.0))}


def _order(got: Rows, right: Rows, about: About) -> dict[str, float]:
    """Of the documents of each query; of all pairs together where no query comes twice."""
    ours, theirs = (np.stack(rows)[:, 0].astype(np.float64) for rows in (got, right))
    queries: dict[Any, list[int]] = defaultdict(list)
    for position, (query, _) in enumerate(about.items):
        queries[query].append(position)
    groups = [rows for rows in queries.values() if len(rows) > 1]
    # Kendall's tau of one order of all scores: a query's documents are a part of it.
    groups = groups if len(groups) > 1 else [list(range(len(ours)))]
    gains = 1 / (1 + np.exp(-theirs))
    return {
        "kendall": kendall_tau(ours, theirs),
        "ndcg_at_10": float(np.mean([ndcg(ours[rows], gains[rows]) for rows in groups])),
    }


def _tags(got: Rows, right: Rows, about: About) -> dict[str, float]:
    """Of spans of tokens, a character each here: where the text begins and ends is not asked."""
    labels = label_names(about.config, right[0].shape[-1])

    def spans(row: NDArray[Any]) -> list[Span]:
        places = np.arange(len(row))
        tokens = TokenScores(
            text="x" * len(row),
            scores=softmax(row),
            offsets=np.stack([places, places + 1], axis=1),
            continues=np.zeros(len(row), bool),
        )
        return spans_of(tokens, labels)

    same = [
        ours.argmax(axis=-1) == theirs.argmax(axis=-1)
        for ours, theirs in zip(got, right, strict=True)
    ]
    return {
        "span_f1": span_f1([spans(row) for row in got], [spans(row) for row in right]),
        "agreement": float(np.concatenate(same).mean()),
    }


def _answers(got: Rows, right: Rows, about: About) -> dict[str, float]:
    """Of the best span of each input, the first token standing for no answer."""
    shared, same = [], []
    for ours, theirs in zip(got, right, strict=True):
        context = np.arange(len(theirs)) > 0
        spans = []
        for row in (ours, theirs):
            best = best_spans(row, context, 0)
            found = len(best.first) and best.scores[0] > best.null
            spans.append(set(range(best.first[0], best.last[0] + 1)) if found else set())
        a, b = spans
        shared.append(2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0)
        same.append(a == b)
    return {"span_f1": float(np.mean(shared)), "exact_match": float(np.mean(same))}


def _words(got: Rows, right: Rows, about: About) -> dict[str, float]:
    return {"agreement": float((np.concatenate(got) == np.concatenate(right)).mean())}


def _terms(got: Rows, right: Rows, about: About) -> dict[str, float]:
    cosines, overlaps = [], []
    for ours, theirs in zip(got, right, strict=True):
        lengths = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
        cosines.append(float(ours @ theirs) / lengths if lengths else float(not theirs.any()))
        count = min(TOP_TERMS, int((theirs > 0).sum()))
        if count:
            best = (set(np.argpartition(-row, count - 1)[:count]) for row in (ours, theirs))
            overlaps.append(len(set.intersection(*best)) / count)
    overlap = float(np.mean(overlaps)) if overlaps else 1.0
    return {"term_cosine": min(cosines), "term_overlap": overlap}


def _late(got: Rows, right: Rows, about: About) -> dict[str, float]:
    cut = min(QUERIES, len(right) // 2)
    taus, gains = [], []
    for number in range(cut):
        ours, theirs = (
            np.array([(rows[number] @ document.T).max(axis=1).sum() for document in rows[cut:]])
            for rows in (got, right)
        )
        taus.append(kendall_tau(ours, theirs))
        spread = theirs - theirs.min(initial=0.0)
        gains.append(ndcg(ours, spread))
    return {
        "kendall": float(np.mean(taus)) if taus else 1.0,
        "ndcg_at_10": float(np.mean(gains)) if gains else 1.0,
    }


def _boxes(got: Rows, right: Rows, about: About) -> dict[str, float]:
    """Boxes past a score of .5, relative to the picture; past half the best, where none is."""
    kind = detector_kind(str(about.config.get("model_type")))
    everything = [find_boxes(row, (1, 1), kind, 0.0).scores.max(initial=0.0) for row in right]
    least = min(0.5, max(everything, default=0.0) / 2)
    ours, theirs = ([find_boxes(row, (1, 1), kind, least) for row in rows] for rows in (got, right))
    overlap, alike = box_agreement(theirs, ours)
    return {"box_iou": overlap, "class_agreement": alike}


_RANKED = ("kendall", "ndcg_at_10")
_QUALITIES: Mapping[str, Quality] = {
    "text-classification": Quality(whole_rows, _classes, ("agreement", "max_shift")),
    "image-classification": Quality(whole_rows, _classes, ("agreement", "max_shift")),
    "audio-classification": Quality(whole_rows, _classes, ("agreement", "max_shift")),
    "reranking": Quality(whole_rows, _order, _RANKED),
    "token-classification": Quality(trimmed_rows, _tags, ("span_f1", "agreement")),
    "question-answering": Quality(trimmed_rows, _answers, ("span_f1", "exact_match")),
    "fill-mask": Quality(likeliest_rows, _words, ("agreement",)),
    "sparse-embedding": Quality(whole_rows, _terms, ("term_cosine", "term_overlap")),
    "late-interaction": Quality(trimmed_rows, _late, _RANKED),
    "object-detection": Quality(whole_rows, _boxes, ("box_iou", "class_agreement")),
}
