"""``memopt export``: a bundle or source to a checked graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memopt.commands.console import echo

if TYPE_CHECKING:
    from memopt.bundle import Variant


def export(
    source: Annotated[str, typer.Argument(help="Bundle folder, known name, or any SOURCE.")],
    format: Annotated[str, typer.Option(help="onnx, openvino or torch-aoti.")] = "onnx",
    task: Annotated[
        str,
        typer.Option(help="auto: the bundle's own and a second tower's; or its name."),
    ] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 20,
    weights: Annotated[
        Path | None, typer.Option(help="Quantized V2 weights to run with exactly those integers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the variants as JSON.")] = False,
) -> None:
    """Export weights to ONNX or OpenVINO and check the result against torch."""
    from dataclasses import asdict

    from memopt.commands.console import stderr, steps
    from memopt.exporters.base import export as run
    from memopt.weights.convert import resolve
    from memopt.weights.locked import unlocked

    errors = stderr()
    with steps("resolve") as say:
        bundle = resolve(
            source,
            on_step=lambda name, done, total: say(f"convert {done * 100 // (total or 1)} %"),
            on_warning=lambda line: errors.print(f"warning: {line}"),
        )
        with unlocked(bundle) as plain:
            if weights is not None:
                from memopt.exporters.from_v2 import export_v2

                variants: tuple[Variant, ...] = (export_v2(plain, weights),)
            else:
                variants = run(
                    plain,
                    format=format,
                    task=task,
                    precision=precision,
                    opset=opset,
                    on_step=say,
                )
    if as_json:
        echo(json.dumps([asdict(variant) for variant in variants], indent=1))
    else:
        _print(bundle.path, variants)


def _print(folder: Path, variants: tuple[Variant, ...]) -> None:
    from rich.table import Table

    from memopt.commands.console import stdout

    console = stdout(120)
    for variant in variants:
        record = variant.check or {}
        table = Table("batch", "size", "padded", "max abs error", "min cosine", title=variant.name)
        for shape in record.get("shapes", []):
            table.add_row(
                str(shape["batch"]),
                str(shape["size"]),
                "yes" if shape.get("padded") else "no",
                f"{shape['max_abs_error']:.1e}",
                f"{shape['min_cosine']:.7f}",
            )
        console.print(table)
        fusion = record.get("fusion")
        if fusion:
            counts = {k: v for k, v in fusion.items() if isinstance(v, int) and v}
            console.print("fused: " + ", ".join(f"{k} {v}" for k, v in counts.items()))
        console.print(f"wrote {folder / variant.file}")
        if not variant.passed:
            console.print(
                f"{variant.name} has passed no quality gate: it is used only when asked for by name"
            )
