"""The quantization report: one self-contained HTML file, pictures first."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from memopt import charts
from memopt.files import atomic_path

if TYPE_CHECKING:
    from memopt.quantization.quantize import Result

# Bars of the layer chart: the worst ones; the table below it has every layer.
BARS = 40


def write_report(result: Result, target: Path) -> None:
    """Write the report of one quantization, whole or not at all."""
    with atomic_path(target) as path:
        path.write_text(render(result), encoding="utf-8")


def render(result: Result) -> str:
    """Return the report as HTML: no script, no request, inline SVG only."""
    proof = result.validation
    sections = [("Verdict", _verdict(result))]
    if proof.cosines:
        label = "cosine to the float model, per validation input"
        sections.append(("How close the answers are", charts.histogram(proof.cosines, label)))
    errors = sorted(
        ((layer.name, layer.error) for layer in result.layers if layer.error is not None),
        key=lambda item: -item[1],
    )
    if errors:
        chart = charts.bars([(name, error) for name, error in errors[:BARS]], "")
        lead = "<p>Squared error of each layer's output over its power, on calibration inputs.</p>"
        sections.append(("Error by layer", lead + chart))
    if proof.worst:
        unit = "nats a token lost" if proof.perplexity is not None else "cosine"
        rows = [[value, text] for text, value in proof.worst]
        sections.append(("Worst inputs", charts.table([unit, "input"], rows)))
    if result.tradeoff:
        rows = [
            [len(p.kept), f"{p.float_macs:.1%}", p.quality, "yes" if p.passed else "no"]
            for p in result.tradeoff
        ]
        head = ["layers in float", "work in float", "quality", "passes"]
        sections.append(("Search", charts.table(head, rows)))
    sections.append(("Size and speed", _size_and_speed(result)))
    sections.append(("Layers", _layers(result)))
    recipe = [[key, str(value)] for key, value in (result.variant.recipe or {}).items()]
    sections.append(("Recipe", charts.table(["field", "value"], recipe)))
    return charts.page(f"memopt quantize: {result.variant.name}", sections)


def _verdict(result: Result) -> str:
    rows: list[list[object]] = [
        ["gate", "passed" if result.variant.passed else "failed: " + "; ".join(result.failures)]
    ]
    names = {
        "samples": "validation inputs",
        "cosine_min": "cosine, least",
        "cosine_p1": "cosine, 1st percentile",
        "cosine_mean": "cosine, mean",
        "overlap_at_10": "overlap of the ten nearest neighbours",
        "spearman": "Spearman against people's scores",
        "spearman_float": "Spearman of the float model",
        "perplexity": "perplexity",
        "perplexity_float": "perplexity of the float model",
        "perplexity_increase": "perplexity increase",
    }
    values = asdict(result.validation)
    rows += [[text, values[key]] for key, text in names.items() if values[key] is not None]
    rows += [[f"gate: {key}", value] for key, value in asdict(result.gate).items()]
    return charts.table(["what", "value"], rows)


def _size_and_speed(result: Result) -> str:
    megabytes = [("float", result.float_bytes / 1e6), (result.variant.name, result.bytes / 1e6)]
    parts = [charts.bars(megabytes, "MB", highlight=result.variant.name)]
    if result.validation.speedup is not None:
        speeds = [("float", 1.0), (result.variant.name, result.validation.speedup)]
        parts.append(charts.bars(speeds, "x", highlight=result.variant.name))
    if result.int8_macs is not None:
        kernels = ", ".join(f"{count} {name}" for name, count in (result.kernels or {}).items())
        parts.append(f"<p>{result.int8_macs:.1%} of the multiply-adds run in int8 ({kernels}).</p>")
    return "".join(parts)


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
    return charts.table(["layer", "kept as", "error", "alpha", "weights"], rows)
