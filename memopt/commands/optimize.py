"""``memopt optimize``: one command to the fastest right variant on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memopt.commands.console import echo

if TYPE_CHECKING:
    from memopt.optimize.plan import Optimized, Plan


def optimize(
    source: Annotated[
        str | None, typer.Argument(help="Bundle, known name, or any SOURCE of convert.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option("--calibration", help="Inputs: .csv .txt .jsonl .parquet, folder."),
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(help="Worst cosine to float32 a variant may have. [0.98]")
    ] = None,
    gates: Annotated[
        list[str] | None,
        typer.Option("--gate", help="Bound of a task's measure, NAME=VALUE: agreement=0.99."),
    ] = None,
    targets: Annotated[
        str, typer.Option(help="cpu,openvino,cuda,rocm,coreml,vulkan [default: all usable here].")
    ] = "",
    budget: Annotated[str, typer.Option(help="Time for all: 90s, 15m, 1h.")] = "15m",
    samples: Annotated[int | None, typer.Option(help="Calibration inputs. [300]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the split. [0]")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed passes per candidate.")] = 5,
    prefer: Annotated[
        str | None,
        typer.Option(
            help="Speed that counts: throughput, latency or both [both]; of a language model "
            "decode, prefill or mix [decode]."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Replay the candidates of an earlier plan.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcomes as JSON.")] = False,
) -> None:
    """Convert, export, quantize, prove and measure every sensible candidate; keep the best.

    Interrupted, it goes on where it stopped when called again.
    """
    from memopt.commands.console import stderr, steps
    from memopt.optimize.plan import Plan, check_targets
    from memopt.optimize.report import told
    from memopt.optimize.run import optimize as run
    from memopt.quantization.configured import parse_bounds, seconds

    replayed = Plan.load(plan) if plan else None
    source, calibration = _from(replayed, source, calibration)

    def pick(given: float | None, name: str, default: float) -> float:
        planned = getattr(replayed, name) if replayed else None
        return next(v for v in (given, planned, default) if v is not None)

    errors = stderr()
    with steps("optimize") as say:
        result = run(
            source,
            calibration,
            min_cosine=min_cosine,
            targets=check_targets(targets) if targets else None,
            budget=seconds(budget),
            samples=int(pick(samples, "samples", 300)),
            seed=int(pick(seed, "seed", 0)),
            rounds=rounds,
            bounds=parse_bounds(gates) if gates else (replayed.gate if replayed else None),
            prefer=prefer or (replayed.prefer if replayed else "") or None,
            plan=replayed,
            step=say,
            on_outcome=lambda *outcome: errors.print(told(*outcome)),
        )
    if as_json:
        echo(json.dumps(result.to_dict(), indent=1))
    else:
        _print(result)
    if result.plan.chosen is None:
        raise typer.Exit(1)


def _from(plan: Plan | None, source: str | None, calibration: Path | None) -> tuple[str, Path]:
    from memopt.errors import ConfigurationError

    source = source or (plan.source if plan else None)
    if calibration is None and plan and plan.calibration:
        calibration = Path(plan.calibration)
    if source is None or calibration is None:
        missing = "SOURCE" if source is None else "--calibration"
        raise ConfigurationError(
            f"{missing} is missing", fix="memopt optimize SOURCE --calibration FILE"
        )
    return source, calibration


def _print(result: Optimized) -> None:
    from memopt.commands.console import stdout
    from memopt.optimize.report import summary, table
    from memopt.optimize.run import PLAN_FILE, REPORT_FILE

    console = stdout(190)
    console.print(table(result))
    for line in (summary(result), *result.notes):
        console.print(line)
    files = " and ".join(str(result.bundle / name) for name in (REPORT_FILE, PLAN_FILE))
    wrote = f"wrote {files}" if result.reference is not None else "nothing was measured"
    console.print(f"{result.seconds:.0f} s; {wrote}")
