"""``memopt quantize``: a smaller, faster variant of a bundle, with the proof that it is right."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from memopt.charts import altair
from memopt.commands.console import check_target, echo
from memopt.quantization.recipe import Recipe, Samples

if TYPE_CHECKING:
    from memopt.progress import Progress, Step
    from memopt.quantization.accuracy.result import Result


def quantize(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    calibration: Annotated[
        Path, typer.Option("--calibration", "-c", help=".txt .csv .tsv .jsonl .parquet, or folder.")
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML recipe; flags win over it [default: settings, models/*.yaml]."),
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="Gate: least cosine to float [default: 0.95, gptq 0.98].")
    ] = None,
    max_perplexity_increase: Annotated[
        float | None, typer.Option(help="Gate of language models [default: 0.05].")
    ] = None,
    gates: Annotated[
        list[str] | None,
        typer.Option("--gate", help="Bound of a task's measure, NAME=VALUE: agreement=0.99."),
    ] = None,
    keep_failing: Annotated[
        bool, typer.Option("--keep-failing", help="Write a variant that fails, marked.")
    ] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Keep the fewest layers in float that pass.")
    ] = False,
    budget: Annotated[
        str, typer.Option(help="Time with --search, calibration included: 90s, 10m, 1h.")
    ] = "10m",
    report: Annotated[Path | None, typer.Option(help="Write an HTML report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **given: Any,
) -> None:
    """Quantize a bundle, prove the result on held-out inputs, and record it.

    The default is full int8 on OpenVINO: every weighted product in integers.
    """
    from memopt.bundle import open_bundle
    from memopt.config import load_config
    from memopt.quantization import quantize as library
    from memopt.quantization.configured import choose_recipe, gate_of, seconds
    from memopt.tasks.quality import check_measured
    from memopt.weights.locked import unlocked

    settings = load_config().quantization
    opened = open_bundle(bundle)
    data = {item.name: given.pop(item.name) for item in fields(Samples) if item.name in given}
    samples = Samples(calibration=calibration, **data)
    chosen = choose_recipe(opened, settings, recipe, _flags(given))
    if report:
        check_target(report)
        altair()
    named = {"min_cosine": min_cosine, "max_perplexity_increase": max_perplexity_increase}
    check_measured([name for name, bound in named.items() if bound is not None], opened.task.name)
    with unlocked(opened) as plain, _progress() as (step, progress):
        result = library.quantize(
            plain,
            samples,
            chosen,
            gate=gate_of(settings, chosen, min_cosine, max_perplexity_increase, gates or ()),
            keep_failing=keep_failing,
            budget=seconds(budget) if search else None,
            step=step,
            progress=progress,
        )
    _show(result, report, as_json)


def _flags(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given; of a repeatable one that was not, typer says []."""
    return {name: value for name, value in given.items() if value is not None and value != []}


def _add_options() -> None:
    """Give the command an option for every field of Recipe and Samples, behind ``--recipe``."""
    hints = get_type_hints(quantize, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in inspect.signature(quantize).parameters.values()
        if parameter.name != "given"
    ]
    recipe, samples = get_type_hints(Recipe), get_type_hints(Samples)
    options = [_recipe_option(item, recipe[item.name]) for item in fields(Recipe)]
    options += [
        _parameter(item, samples[item.name], item.default, typer.Option(help=item.metadata["help"]))
        for item in fields(Samples)
        if item.metadata
    ]
    place = [parameter.name for parameter in own].index("recipe") + 1
    signature = inspect.Signature([*own[:place], *options, *own[place:]])
    quantize.__signature__ = signature  # type: ignore[attr-defined]


def _recipe_option(item: Field[Any], hint: Any) -> inspect.Parameter:
    """Return the option of one field of a recipe; None says that it was not given."""
    flag = item.name.replace("_", "-")
    default = item.metadata.get("default", item.default)
    declared = [f"--{flag}"]
    kind: Any = str
    if hint is bool:
        kind, default = bool, flag
        declared = [f"--{flag}/--{item.metadata.get('off', f'no-{flag}')}"]
    elif hint in (int, float):
        kind = hint
    elif isinstance(item.default, tuple):
        kind = list[str]
    option = typer.Option(*declared, help=f"{item.metadata['help']} [default: {default}].")
    return _parameter(item, kind | None, None, option)


def _parameter(item: Field[Any], hint: Any, default: Any, option: Any) -> inspect.Parameter:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(item.name, kind, default=default, annotation=Annotated[hint, option])


@contextmanager
def _progress() -> Iterator[tuple[Step, Progress]]:
    """Show a bar on a terminal's standard error; yield (say a step, say how many of how many)."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    from memopt.commands.console import progress, stderr, steps

    if stderr().is_terminal:
        text = TextColumn("{task.description}", markup=False)
        columns = (SpinnerColumn(), BarColumn(30), MofNCompleteColumn(), TimeElapsedColumn(), text)
        with progress(*columns, transient=True) as update:
            yield (
                lambda line: update(description=line),
                lambda done, whole: update(completed=done, total=whole),
            )
        return
    with steps("quantizing") as say:
        yield say, lambda done, whole: say(f"{done} of {whole} tries")


def _show(result: Result, report: Path | None, as_json: bool) -> None:
    if report:
        from memopt.quantization.accuracy.report import write_report

        write_report(result, report)
    if as_json:
        echo(json.dumps(result.to_dict(), indent=1))
        return
    _print(result)
    if report:
        echo(f"wrote {report}")


def _print(result: Result) -> None:
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


def _rows(result: Result) -> list[tuple[str, str, str]]:
    proof, share = result.validation, result.bytes / result.float_bytes
    rows = proof.rows(result.gate)
    rows.append(("size", f"{result.bytes / 1e6:.1f} MB, {share:.1%} of float", ""))
    if proof.speedup is not None:
        rows.append(("speed", f"{proof.speedup:.2f}x the float variant", ""))
    if (macs := result.int8_macs) is not None:
        rows.append(("work in int8", f"{macs:.1%} of multiply-adds", ""))
    return rows


_add_options()
