"""The numerical check sees what it is there to see."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from memopt.errors import ExportError
from memopt.exporters.check import TOLERANCES, compare

Feeds = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]


def right(feeds: Feeds) -> Outputs:
    """A graph that embeds each kept token and averages."""
    table = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    hidden = table[feeds["input_ids"]]
    keep = feeds["attention_mask"][..., None].astype(np.float32)
    pooled = (hidden * keep).sum(1) / np.maximum(keep.sum(1), 1e-9)
    return {"last_hidden_state": hidden, "sentence_embedding": pooled}


def cases() -> list[tuple[Feeds, Outputs]]:
    generator = np.random.default_rng(1)
    made: list[tuple[Feeds, Outputs]] = []
    for batch, length in ((1, 1), (1, 4), (2, 5), (4, 9)):
        mask = np.ones((batch, length), dtype=np.int64)
        for row in range(1, batch):
            mask[row, length - row :] = 0
        feeds = {"input_ids": generator.integers(0, 50, (batch, length)), "attention_mask": mask}
        made.append((feeds, right(feeds)))
    return made


def run(graph: Callable[[Feeds], Outputs]) -> dict[str, object]:
    return compare(graph, cases(), TOLERANCES["fp32"], name="x")


def test_a_right_graph_passes_with_a_record_of_every_shape() -> None:
    """The record holds each shape, the worst of them, and the tolerance."""
    record = run(right)
    shapes = record["shapes"]
    assert isinstance(shapes, list)
    assert [(s["batch"], s["size"], s["padded"]) for s in shapes] == [
        (1, [1], False),
        (1, [4], False),
        (2, [5], True),
        (4, [9], True),
    ]
    assert record["max_abs_error"] == 0.0
    assert record["min_cosine"] == pytest.approx(1.0)
    assert record["batch_invariance"] == pytest.approx(0.0, abs=1e-6)


def test_padding_that_leaks_into_the_embedding_is_seen() -> None:
    """Averaging over padding too changes only padded batches, and is refused."""

    def leaking(feeds: Feeds) -> Outputs:
        hidden = right(feeds)["last_hidden_state"]
        return {"last_hidden_state": hidden, "sentence_embedding": hidden.mean(1)}

    with pytest.raises(ExportError, match="'padded': True"):
        run(leaking)


def test_what_stands_at_padding_is_not_compared() -> None:
    """Hidden states of padding have no meaning and may differ."""

    def noisy(feeds: Feeds) -> Outputs:
        out = right(feeds)
        hidden = out["last_hidden_state"] + (feeds["attention_mask"] == 0)[..., None] * 7.0
        return {**out, "last_hidden_state": hidden}

    run(noisy)


def test_a_row_that_depends_on_its_neighbours_is_seen() -> None:
    """A graph that is right on the checked batches but not on a row alone is refused."""
    known = {feeds["input_ids"].tobytes() for feeds, _ in cases()}

    def dependent(feeds: Feeds) -> Outputs:
        out = right(feeds)
        if feeds["input_ids"].tobytes() not in known:
            out["sentence_embedding"] = out["sentence_embedding"] + 0.5
        return out

    with pytest.raises(ExportError, match="a row alone and in a batch differ"):
        run(dependent)


def test_nan_for_a_row_of_padding_only_is_seen() -> None:
    """Dividing by a count of zero is refused even though no reference covers it."""

    def dividing(feeds: Feeds) -> Outputs:
        out = right(feeds)
        with np.errstate(invalid="ignore"):
            empty = feeds["attention_mask"].sum(1) == 0
            out["sentence_embedding"] = np.where(empty[:, None], np.nan, out["sentence_embedding"])
        return out

    with pytest.raises(ExportError, match="not finite for a row of padding only"):
        run(dividing)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: {"sentence_embedding": out["sentence_embedding"]}, "no output"),
        (lambda out: {k: v[:, :-1] for k, v in out.items()}, "has shape"),
        (lambda out: {k: v * np.float32("nan") for k, v in out.items()}, "is not finite"),
        (lambda out: {k: v * 1.01 for k, v in out.items()}, "answers of torch"),
        (lambda out: {k: v[..., ::-1] for k, v in out.items()}, "answers of torch"),
    ],
)
def test_wrong_outputs_are_refused(change: Callable[[Outputs], Outputs], message: str) -> None:
    """Missing, misshapen, NaN, scaled (cosine alone would not see it) and permuted outputs."""
    with pytest.raises(ExportError, match=message):
        run(lambda feeds: change(right(feeds)))


def test_a_dead_row_of_a_feature_map_has_no_direction() -> None:
    """A ReLU leaves whole rows of zeros: two of them are equal, and the map is compared whole."""
    generator = np.random.default_rng(2)

    def features(feeds: Feeds) -> Outputs:
        hidden = np.maximum(feeds["pixel_values"], 0)
        hidden[:, :, 1] = 0
        return {"last_hidden_state": hidden, "sentence_embedding": hidden.mean((2, 3)) * [1, 0]}

    pictures = [{"pixel_values": generator.normal(size=(n, 2, 3, 3))} for n in (1, 2, 3, 4)]
    cases = [(feeds, features(feeds)) for feeds in pictures]
    record = compare(features, cases, TOLERANCES["fp32"], name="x")
    assert record["min_cosine"] == pytest.approx(1.0)

    def other(feeds: Feeds) -> Outputs:
        out = features(feeds)
        return {**out, "last_hidden_state": np.roll(out["last_hidden_state"], 1, axis=2)}

    with pytest.raises(ExportError, match="does not give the answers of torch"):
        compare(other, cases, TOLERANCES["fp32"], name="x")
