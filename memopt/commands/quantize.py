"""``memopt quantize``: a smaller, faster variant of a bundle, with the proof that it is right."""

from __future__ import annotations

import json
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memopt.commands.console import echo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memopt.quantization.recipe import Recipe
    from memopt.quantization.result import Proven
    from memopt.quantization.validate import Gate
    from memopt.settings import QuantizationSection

_RECIPE = "Recipe"
_DATA = "Data"
_PROOF = "Proof"


def quantize(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    calibration: Annotated[
        Path, typer.Option("--calibration", "-c", help=".txt .csv .tsv .jsonl .parquet, or folder.")
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML recipe; flags win over it [default: settings, models/*.yaml].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="static, dynamic, weight-only, nncf, nncf-weights or arrow [default: static].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="auto, cpu (ONNX Runtime), openvino or gpu [default: auto].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    weight_type: Annotated[
        str | None,
        typer.Option(help="int8, int4, int2 or nf4 [default: int8].", rich_help_panel=_RECIPE),
    ] = None,
    activation_type: Annotated[
        str | None,
        typer.Option(help="uint8, or int8 with nncf [default: uint8].", rich_help_panel=_RECIPE),
    ] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            help="What shares a scale: auto, per-channel, per-tensor, per-group [default: auto].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights per scale in per-group [default: 64 for int8, else 32].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Weights without a zero point [default: symmetric].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="rtn, gptq, awq, scale-estimation, awq+scale-estimation [default: rtn].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    ranges: Annotated[
        str | None,
        typer.Option(
            help="Activation ranges: minmax, entropy, percentile, mse [default: minmax].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    percentile: Annotated[
        float | None,
        typer.Option(help="With --ranges percentile [default: 99.99].", rich_help_panel=_RECIPE),
    ] = None,
    smooth: Annotated[
        str | None,
        typer.Option(
            help="SmoothQuant alpha 0..1, auto (per layer) or none [default: auto].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    range_margin: Annotated[
        float | None,
        typer.Option(
            help="Factor on seen ranges, for unseen inputs [default: 1.1].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    range_probes: Annotated[
        bool | None,
        typer.Option(
            "--range-probes/--no-range-probes",
            help="Widen ranges with random tokens [default: range-probes].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    bias_correction: Annotated[
        bool | None,
        typer.Option(
            "--bias-correction/--no-bias-correction",
            help="Move the mean error into the bias [default: bias-correction].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    embeddings: Annotated[
        bool | None,
        typer.Option(
            "--embeddings/--no-embeddings",
            help="Quantize embedding tables too [default: embeddings].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers kept in float, a shell pattern; repeatable [default: none].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Accuracy-aware nncf: largest drop of mean cosine [default: 0, off].",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Inputs to calibrate.", rich_help_panel=_DATA)] = 300,
    validation_samples: Annotated[
        int, typer.Option(help="Inputs to validate on.", rich_help_panel=_DATA)
    ] = 512,
    validation: Annotated[
        Path | None,
        typer.Option(
            help="Other data to validate on [default: split --calibration].", rich_help_panel=_DATA
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.", rich_help_panel=_DATA)] = 0,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens at most [default: the model's].", rich_help_panel=_DATA),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Text column [default: every text column].", rich_help_panel=_DATA),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(
            help="Gate: least cosine to float [default: 0.95, gptq 0.98].", rich_help_panel=_PROOF
        ),
    ] = None,
    max_perplexity_increase: Annotated[
        float | None,
        typer.Option(help="Gate of language models [default: 0.15].", rich_help_panel=_PROOF),
    ] = None,
    keep_failing: Annotated[
        bool,
        typer.Option(
            "--keep-failing", help="Write a variant that fails, marked.", rich_help_panel=_PROOF
        ),
    ] = False,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Keep the fewest layers in float that pass.", rich_help_panel=_PROOF
        ),
    ] = False,
    budget: Annotated[
        str,
        typer.Option(
            help="Time with --search, calibration included: 90s, 10m, 1h.", rich_help_panel=_PROOF
        ),
    ] = "10m",
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML report.", rich_help_panel=_PROOF)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Quantize a bundle, prove the result on held-out inputs, and record it.

    The default is full int8 on OpenVINO: every weighted product in integers.
    """
    from memopt.bundle import open_bundle
    from memopt.config import load_config
    from memopt.quantization import quantize as library
    from memopt.quantization.arrow_method import quantize_arrow
    from memopt.quantization.recipe import Recipe, known_recipe, load_recipe
    from memopt.weights.locked import unlocked

    given: dict[str, Any] = {
        "method": method,
        "target": target,
        "weight_type": weight_type,
        "activation_type": activation_type,
        "granularity": granularity,
        "group_size": group_size,
        "symmetric": symmetric,
        "algorithm": algorithm,
        "ranges": ranges,
        "percentile": percentile,
        "smooth": _alpha(smooth),
        "range_margin": range_margin,
        "range_probes": range_probes,
        "bias_correction": bias_correction,
        "embeddings": embeddings,
        "keep_float": keep_float or None,
        "max_drop": max_drop,
    }
    settings = load_config().quantization
    opened = open_bundle(bundle)
    base = (
        load_recipe(recipe)
        if recipe
        else Recipe.from_dict({**known_recipe(opened), **recipe_fields(settings)})
    )
    changed = {key: value for key, value in given.items() if value is not None}
    chosen = Recipe.from_dict({**base.to_dict(), **changed})
    data = library.Samples(
        calibration=calibration,
        validation=validation,
        samples=samples,
        validation_samples=validation_samples,
        seed=seed,
        max_length=max_length,
        column=column,
    )
    gate = gate_of(settings, chosen, min_cosine, max_perplexity_increase)
    if report:
        # Minutes of work must not end at a path that cannot be written.
        report.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=report.parent):
            pass
    make = quantize_arrow if chosen.method == "arrow" else library.quantize
    with unlocked(opened) as plain, _progress() as (step, progress):
        result: Proven = make(
            plain,
            data,
            chosen,
            gate=gate,
            keep_failing=keep_failing,
            budget=library.seconds(budget) if search else None,
            step=step,
            progress=progress,
        )
    if report:
        from memopt.quantization.report import write_report

        write_report(result, report)
    if as_json:
        echo(json.dumps(result.to_dict(), indent=1))
        return
    _print(result)
    if report:
        echo(f"wrote {report}")


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """Show a bar on a terminal's standard error; yield (say a step, say how many of how many)."""
    from rich import progress as bars

    from memopt.commands.console import stderr, steps

    console = stderr()
    if not console.is_terminal:
        with steps("quantizing") as say:
            yield say, lambda done, whole: say(f"{done} of {whole} tries")
        return
    columns = (
        bars.SpinnerColumn(),
        bars.BarColumn(30),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
        bars.TextColumn("{task.description}", markup=False),
    )
    with bars.Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("quantizing", total=None)
        yield (
            lambda line: shown.update(task, description=line),
            lambda done, whole: shown.update(task, completed=done, total=whole),
        )


def gate_of(
    settings: QuantizationSection,
    recipe: Recipe,
    min_cosine: float | None = None,
    max_perplexity_increase: float | None = None,
) -> Gate:
    """Return the bounds: those of the flags, of the settings that are set, of the method."""
    from memopt.quantization.quantize import least_cosine
    from memopt.quantization.validate import Gate

    if min_cosine is None and "cosine_threshold" in settings.model_fields_set:
        min_cosine = settings.cosine_threshold
    return Gate(
        min_cosine=least_cosine(recipe) if min_cosine is None else min_cosine,
        max_perplexity_increase=(
            settings.ppl_threshold if max_perplexity_increase is None else max_perplexity_increase
        ),
    )


def recipe_fields(settings: QuantizationSection) -> dict[str, Any]:
    """Return what the settings say of a recipe; what they leave out stays the recipe's own."""
    from memopt.errors import ConfigurationError

    given = settings.model_fields_set
    if not settings.enabled:
        raise ConfigurationError(
            "quantization.enabled is false", fix="set it to true, or give --recipe"
        )
    fields: dict[str, Any] = {}
    if "quant_type" in given:
        if settings.quant_type == "fp16":
            raise ConfigurationError(
                "quantization.quant_type fp16 is a float: there is nothing to quantize",
                fix="run: memopt export BUNDLE --precision fp16",
            )
        fields["weight_type"] = settings.quant_type
    if "calibration_method" in given:
        gptq = settings.calibration_method == "gptq"
        fields |= {"algorithm": "gptq"} if gptq else {"ranges": settings.calibration_method}
    if fields.get("weight_type", "int8") != "int8" or "algorithm" in fields:
        # Neither fewer than eight bits nor GPTQ exist where activations are quantized too.
        fields["method"] = "weight-only"
    if "per_channel" in given:
        # Auto is per channel, or finer where the method has nothing coarser than groups.
        fields["granularity"] = "auto" if settings.per_channel else "per-tensor"
    if "symmetric" in given:
        fields["symmetric"] = settings.symmetric
    if "mixed_precision_layers" in given:
        fields["keep_float"] = list(settings.mixed_precision_layers)
    return fields


def _alpha(text: str | None) -> str | float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return text


def _print(result: Proven) -> None:
    from rich.table import Table

    from memopt.commands.console import stdout

    console = stdout(120)
    table = Table("measure", result.name, "gate")
    for row in _rows(result):
        table.add_row(*row)
    console.print(table)
    if trail := result.trail:
        trade = Table("layers in float", "work in float", "quality", "passes")
        for point in trail.tried:
            trade.add_row(
                str(len(point.kept)),
                f"{point.float_macs:.1%}",
                f"{point.quality:.4f}",
                "yes" if point.passed else "no",
            )
        console.print(trade)
        echo("kept in float: " + (", ".join(result.recipe["keep_float"]) or "none"))
        if not trail.complete:
            echo(f"the budget ended the search after {trail.seconds:.0f} s; fewer might do")
    verdict = "passed" if result.passed else "FAILED"
    echo(f"{result.name} ({result.file}) {verdict} its gate")


def _rows(result: Proven) -> list[tuple[str, str, str]]:
    proof, gate = result.validation, result.gate
    rows: list[tuple[str, str, str]] = []
    if proof.cosine_min is not None:
        rows += [
            ("cosine min", f"{proof.cosine_min:.4f}", f">= {gate.min_cosine}"),
            ("on other inputs", f"{proof.cosine_low:.4f}", f">= {gate.min_cosine}"),
            ("cosine 1 %", f"{proof.cosine_p1:.4f}", ""),
            ("cosine mean", f"{proof.cosine_mean:.4f}", ""),
        ]
    if proof.overlap_at_10 is not None:
        rows.append(("overlap@10", f"{proof.overlap_at_10:.3f}", ""))
    if proof.spearman is not None:
        rows.append(("Spearman", f"{proof.spearman:.4f} (float {proof.spearman_float:.4f})", ""))
    if proof.perplexity is not None:
        most = f"<= {gate.max_perplexity_increase:.0%}"
        rows += [
            ("perplexity", f"{proof.perplexity:.3f} (float {proof.perplexity_float:.3f})", ""),
            ("increase", f"{proof.perplexity_increase:+.2%}", most),
        ]
    share = result.bytes / result.float_bytes
    rows.append(("size", f"{result.bytes / 1e6:.1f} MB, {share:.1%} of float", ""))
    if proof.speedup is not None:
        rows.append(("speed", f"{proof.speedup:.2f}x the float variant", ""))
    if (macs := result.work.get("int8_macs")) is not None:
        rows.append(("work in int8", f"{macs:.1%} of multiply-adds", ""))
    return rows
