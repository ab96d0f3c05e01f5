"""The quantization report: one self-contained HTML file, pictures first."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memopt import charts, pages
from memopt.files import atomic_path
from memopt.tasks.quality import MEASURES

if TYPE_CHECKING:
    from memopt.quantization.accuracy.result import Result

# Bars of the layer chart: the worst ones; the table below it has every layer.
BARS = 40


def write_report(result: Result, target: Path) -> None:
    """Write the report of one quantization, whole or not at all.

    Raises:
        MissingExtra: Altair is not installed.
    """
    with atomic_path(target) as path:
        path.write_text(render(result), encoding="utf-8")


def render(result: Result) -> str:
    """Return the report as HTML that asks for nothing."""
    proof = result.validation
    sections: list[tuple[str, list[Any]]] = [("Verdict", [_verdict(result)])]
    if proof.cosines:
        label, gate = "cosine to the float model, per validation input", result.gate.min_cosine
        drawn = charts.histogram(proof.cosines, label, gate=gate)
        sections.append(("How close the answers are", [drawn]))
    sections += _errors(result)
    if proof.worst:
        unit = "KL, nats a token" if proof.perplexity is not None else "cosine"
        rows = [[value, text] for text, value in proof.worst]
        sections.append(("Worst inputs", [pages.table([unit, "input"], rows)]))
    if proof.texts:
        lead = "<p>Greedy texts of the prompts where both part the earliest.</p>"
        columns = ["prompt", "float", "quantized"]
        sections.append(("What they write", [lead, pages.table(columns, proof.texts)]))
    sections += _search(result)
    sections.append(("Size and speed", _size_and_speed(result)))
    sections.append(("Layers", [_layers(result)]))
    for title, values in (("Recipe", result.recipe), ("Data", result.data)):
        shown = [[key, _words(value)] for key, value in values.items()]
        sections.append((title, [pages.table(["field", "value"], shown)]))
    facts = {
        "model": result.model,
        "date": result.at,
        "command": pages.command(),
        "calibration": result.data["calibration"],
    }
    return pages.page(f"memopt quantize: {result.name}", facts, sections)


def _errors(result: Result) -> list[tuple[str, list[Any]]]:
    errors = {layer.name: layer.error for layer in result.layers if layer.error is not None}
    if not errors:
        return []
    method, gptq = result.recipe["method"], result.recipe["algorithm"] == "gptq"
    if method in ("dynamic", "nncf", "nncf-weights"):
        of = "the layer's output beside the float graph's, with what the layers before it added"
    elif method == "static" or gptq:
        of = "the layer's output, on calibration inputs; of a table's values"
    else:
        of = "the layer's weight"
    lead = (
        f"<p>Squared error over power of {of}. The {min(BARS, len(errors))} largest. The scale "
        "says what one means: the cosine between exact and quantized that goes with it.</p>"
    )
    return [("Error by layer", [lead, charts.bars(_worst(errors), shares=True)])]


def _worst(numbers: Mapping[str, float]) -> list[charts.Bar]:
    """Return the largest numbers of layers, largest first."""
    items = sorted(numbers.items(), key=lambda item: -item[1])[:BARS]
    return [charts.Bar(label=name, value=value) for name, value in items]


def _search(result: Result) -> list[tuple[str, list[Any]]]:
    trail = result.trail
    if trail is None:
        return []
    lead = f"<p>{len(trail.tried)} choices of layers tried in {trail.seconds:.0f} s. "
    if not trail.complete:
        lead += "The budget ended the search: fewer layers in float might do. "
    kept = result.recipe["keep_float"]
    lead += f"Kept in float: {escape(', '.join(kept) or 'none')}.</p>"
    rows = [
        [len(p.kept), f"{p.float_macs:.1%}", p.quality, "yes" if p.passed else "no"]
        for p in trail.tried
    ]
    parts = [lead, pages.table(["layers in float", "work in float", "quality", "passes"], rows)]
    if trail.sensitivity:
        gate = result.gate
        worded = result.validation.perplexity is not None
        kl = gate.bounds.get("kl_mean", MEASURES["kl_mean"].bound)
        most = kl if worded else 1 - gate.min_cosine
        parts.append(
            "<p>Quality lost when this layer alone is quantized, and what the gate lets:</p>"
        )
        parts.append(charts.bars(_worst(trail.sensitivity), gate=most))
    return [("Search", parts)]


def _words(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _verdict(result: Result) -> str:
    proof = result.validation
    verdict = "passed its gate" if result.passed else "FAILED: " + "; ".join(result.failures)
    lead = f"<p><b>{escape(verdict)}</b>, compared with the float model on {proof.samples} inputs"
    lead += " that it was not calibrated with.</p>"
    return lead + pages.table(["measure", "value", "gate"], proof.rows(result.gate))


def _size_and_speed(result: Result) -> list[Any]:
    def pair(exact: float, quantized: float, unit: str) -> Any:
        bars = [charts.Bar(label="float", value=exact)]
        return charts.bars(
            [*bars, charts.Bar(label=result.name, value=quantized, style="good")], unit
        )

    share = result.bytes / result.float_bytes
    parts = [f"<p>{share:.1%} of the float model's bytes:</p>"]
    parts.append(pair(result.float_bytes / 1e6, result.bytes / 1e6, "MB"))
    if result.validation.speedup is not None:
        parts.append("<p>Speed beside the float model in the same runtime:</p>")
        parts.append(pair(1.0, result.validation.speedup, "x"))
    if result.int8_macs is not None:
        kernels = ", ".join(f"{count} {name}" for name, count in result.kernels.items())
        parts.append(
            f"<p>{result.int8_macs:.1%} of the multiply-adds run in int8 ({escape(kernels)}).</p>"
        )
    return parts


def _layers(result: Result) -> str:
    rows = [
        [
            layer.name,
            layer.kind,
            "" if layer.error is None else layer.error,
            "" if layer.alpha is None or layer.alpha < 0 else layer.alpha,
            layer.macs,
        ]
        for layer in result.layers
    ]
    return pages.table(["layer", "kept as", "error", "alpha", "weights"], rows)
