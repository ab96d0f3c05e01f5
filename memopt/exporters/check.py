"""Every export is checked: the graph's outputs against the torch reference on several shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from memopt.errors import ExportError
from memopt.exporters.boxes import ANSWER, in_order_of, matching_rows
from memopt.runtimes.vectors import row_cosines

Run = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """What a graph of one precision may differ from the float32 reference.

    ``max_abs_error`` is relative to the largest absolute reference value of the output, at least 1.
    """

    min_cosine: float
    max_abs_error: float


# fp32: only the order of sums differs. fp16 and bf16 keep 11 and 8 significant bits (IEEE 754,
# bfloat16), and a transformer of tens of layers multiplies the rounding by a small factor.
TOLERANCES = {
    "fp32": Tolerance(min_cosine=0.99999, max_abs_error=1e-3),
    "fp16": Tolerance(min_cosine=0.9995, max_abs_error=5e-2),
    "bf16": Tolerance(min_cosine=0.995, max_abs_error=2e-1),
}

# Narrower rows, the scores of a few labels, are near zero as often as not, where rounding turns
# them round: they are compared as one vector, and by size.
FEWEST_DIRECTIONS = 16


def compare(
    run: Run,
    cases: Sequence[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]],
    tolerance: Tolerance,
    *,
    name: str,
    alone: bool = True,
) -> dict[str, Any]:
    """Run a graph on every case and return the record that goes into the manifest.

    Args:
        run: feeds -> outputs by name.
        cases: (feeds, reference outputs) of at least four shapes; token outputs (batch, sequence,
            width) are compared where ``attention_mask`` is 1, as padding has no meaning.
        tolerance: past it the export is refused.
        name: the variant, for the message.
        alone: also refuse a graph whose rows depend on what is beside them; not where the
            reference is a graph that may do so itself.

    Raises:
        ExportError: an output is missing, has another shape, is not finite or differs too much.
    """
    shapes: list[dict[str, Any]] = []
    problems: list[str] = []
    for feeds, expected in cases:
        error, relative, cosine = _differences(run(feeds), feeds, expected, name)
        shapes.append({**_shape(feeds), "max_abs_error": error, "min_cosine": cosine})
        if cosine < tolerance.min_cosine or relative > tolerance.max_abs_error:
            problems.append(f"{_shape(feeds)}: cosine {cosine:.6f}, max abs error {error:.2e}")
    invariance = _batch_invariance(run, cases)
    changing = []
    if alone and invariance > tolerance.max_abs_error:
        changing.append(f"a row alone and in a batch differ by {invariance:.2e}")
    changing += _fully_padded(run, cases, tolerance) if alone else []
    if problems or changing:
        raise _refusal(name, tolerance, problems, changing)
    return {
        "reference": "torch fp32",
        "shapes": shapes,
        "max_abs_error": max((shape["max_abs_error"] for shape in shapes), default=0.0),
        "min_cosine": min((shape["min_cosine"] for shape in shapes), default=1.0),
        "batch_invariance": invariance,
        "tolerance": asdict(tolerance),
    }


def likeliest(logits: Any) -> tuple[int, float]:
    """Return the likeliest token of torch's logits (vocabulary,) and its lead over the next one.

    The lead is relative to the size of the logits, as tolerances are.
    """
    best = logits.topk(2)
    size = max(1.0, float(logits.abs().max()))
    return int(best.indices[0]), float(best.values[0] - best.values[1]) / size


def same_token(
    got: int, expected: tuple[int, float], tolerance: Tolerance, where: str, fix: str
) -> bool:
    """Say whether a graph's token is torch's; False where torch's two likeliest are as likely.

    Args:
        got: the graph's.
        expected: what :func:`likeliest` gave.
        where: names the graph and the place, for the error.

    Raises:
        ExportError: it is another one.
    """
    token, lead = expected
    if lead < tolerance.max_abs_error:
        return False
    if got != token:
        raise ExportError(f"{where} is {got}, and torch's is {token}", fix=fix)
    return True


def _differences(
    outputs: Mapping[str, Any], feeds: Mapping[str, Any], expected: Mapping[str, Any], name: str
) -> tuple[float, float, float]:
    """Return the largest error, absolute and relative, and the least cosine over all outputs."""
    error, relative, cosine = 0.0, 0.0, 1.0
    outputs = in_order_of(outputs, expected)
    for output, wanted in expected.items():
        if output not in outputs:
            raise ExportError(f"{name}: the graph has no output {output!r}")
        got = np.asarray(outputs[output], dtype=np.float32)
        if got.shape != wanted.shape:
            raise ExportError(
                f"{name}: output {output!r} has shape {got.shape}, not {wanted.shape}"
            )
        got, wanted = _kept(got, wanted, feeds.get("attention_mask"))
        if not np.isfinite(got).all():
            raise ExportError(
                f"{name}: output {output!r} is not finite on {_shape(feeds)}",
                fix="nothing was written; memopt convert names the weights that hold NaN",
            )
        difference = float(np.abs(got - wanted).max(initial=0.0))
        error = max(error, difference)
        relative = max(relative, difference / max(1.0, float(np.abs(wanted).max(initial=0.0))))
        cosine = min(cosine, _min_cosine(got, wanted))
    return error, relative, cosine


def _refusal(name: str, tolerance: Tolerance, problems: list[str], alone: list[str]) -> ExportError:
    more = [f"and {len(problems) - 2} more"] if len(problems) > 2 else []
    instead = "its vectors would depend on what they are computed beside"
    if problems:
        instead = "ArrowEngine(BUNDLE, device='torch') runs the bundle without a graph"
    return ExportError(
        f"{name}: the graph does not give the answers of torch (tolerance cosine "
        f"{tolerance.min_cosine}, relative error {tolerance.max_abs_error}): "
        + "; ".join([*problems[:2], *more, *alone]),
        fix=f"nothing was written; {instead}",
    )


def _batch_invariance(
    run: Run, cases: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> float:
    """Return how much a row of a batch changes when it is run alone without its padding.

    Every row of the largest batch that is padded on the right is tried; the result is the largest
    absolute difference relative to the output's largest value, at least 1.
    """
    feeds, expected = max(cases, key=lambda case: len(next(iter(case[0].values()))))
    output = list(expected)[-1]  # the answer
    together = np.asarray(run(feeds)[output], dtype=np.float32)
    mask = feeds.get("attention_mask")
    worst = 0.0
    for row in range(len(together)):
        kept = int(mask[row].sum()) if mask is not None else None
        if mask is not None and not mask[row, :kept].all():
            continue
        single = {
            name: value[row : row + 1, :kept] if mask is not None else value[row : row + 1]
            for name, value in feeds.items()
        }
        alone = np.asarray(run(single)[output], dtype=np.float32)[0]
        beside = together[row] if together.ndim == 2 else together[row, : len(alone)]
        if output == ANSWER:
            beside = beside[matching_rows(beside, alone)]
        scale = max(1.0, float(np.abs(alone).max(initial=0.0)))
        worst = max(worst, float(np.abs(beside - alone).max(initial=0.0)) / scale)
    return worst


def _fully_padded(
    run: Run,
    cases: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    tolerance: Tolerance,
) -> list[str]:
    """Check that a row of padding only is finite and leaves the row beside it as it was.

    Servers fill a batch up with such rows; a softmax over nothing would turn them into NaN.
    """
    batches = [
        feeds
        for feeds, _ in cases
        if "attention_mask" in feeds and not feeds["attention_mask"].all()
    ]
    if not batches:
        return []
    whole = {name: value[:2].copy() for name, value in batches[0].items()}
    empty = {name: value.copy() for name, value in whole.items()}
    empty["attention_mask"][1] = 0
    problems = []
    before, after = run(whole), run(empty)
    for output, values in after.items():
        got = np.asarray(values, dtype=np.float32)
        kept = np.asarray(before[output], dtype=np.float32)[0]
        scale = max(1.0, float(np.abs(kept).max(initial=0.0)))
        if not np.isfinite(got).all():
            problems.append(f"{output} is not finite for a row of padding only")
        elif float(np.abs(got[0] - kept).max()) > tolerance.max_abs_error * scale:
            problems.append(f"{output} of a row changes beside a row of padding only")
    return problems


def _kept(got: np.ndarray, wanted: np.ndarray, mask: np.ndarray | None) -> Any:
    if wanted.ndim == 3 and mask is not None and mask.shape == wanted.shape[:2]:
        keep = mask.astype(bool)
        return got[keep], wanted[keep]
    # Tokens and vectors have their width last; a map of features (batch, channels, height, width)
    # is one vector a picture.
    width = wanted.shape[-1] if wanted.ndim < 4 else int(np.prod(wanted.shape[1:]))
    return got.reshape(-1, width), wanted.reshape(-1, width)


def _min_cosine(got: np.ndarray, wanted: np.ndarray) -> float:
    if wanted.shape[-1] < FEWEST_DIRECTIONS:
        got, wanted = got.reshape(1, -1), wanted.reshape(1, -1)
    lengths = np.linalg.norm(wanted.astype(np.float64), axis=-1)
    cosines = row_cosines(got, wanted)
    # What a ReLU left of a dead row is rounding, which has no direction; its size is checked too.
    rounding = lengths <= np.finfo(np.float32).eps * lengths.max(initial=0.0)
    return float(np.where(rounding, 1.0, cosines).min(initial=1.0))


def _shape(feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    shape = next(iter(feeds.values())).shape
    record: dict[str, Any] = {"batch": shape[0], "size": list(shape[1:])}
    if "attention_mask" in feeds:
        hidden = feeds["attention_mask"] == 0
        record["padded"] = bool(hidden.any())
        if hidden.any():
            record["side"] = "left" if hidden[:, 0].any() else "right"
    return record
