"""``memopt bench``: measure a bundle's variants, beside peers when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memopt.commands.console import echo

if TYPE_CHECKING:
    from memopt.benchmark.record import BenchmarkMetrics
    from memopt.runtimes.profile import Profile

_PEERS = "sentence-transformers,fastembed,optimum: in the same run (builds 2 GB in .peers)."


def bench(
    bundle: Annotated[
        Path | None, typer.Argument(help="Bundle folder, or a name under models/.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", help="Variant to measure; repeatable [default: auto]."),
    ] = None,
    all_variants: Annotated[bool, typer.Option("--all", help="Measure every variant.")] = False,
    device: Annotated[str, typer.Option(help="Device every variant is opened on.")] = "auto",
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", "-i", help="File of texts, folder of images or sounds."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many inputs.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Timed passes per contender.")] = 5,
    singles: Annotated[int, typer.Option(min=1, help="Inputs timed one by one.")] = 200,
    peers: Annotated[str, typer.Option(help=_PEERS)] = "",
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two records: measure both anew in turn, print the ratio."),
    ] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(help="Other interpreter that a compared record may run; repeatable."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Where one input's time goes, down to the kernels.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page with charts.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the records.")] = Path(
        "benchmark_results"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """Measure load time, latency, throughput, memory and cosine of a bundle's variants.

    Of a language model: prefill and decode in tokens per second, time to first token, memory.
    """
    from memopt.benchmark import bench as measure
    from memopt.charts import altair
    from memopt.commands.console import check_target, steps
    from memopt.errors import ConfigurationError

    if compare and (bundle or variant or all_variants or peers or inputs or profile):
        raise ConfigurationError(
            "--compare measures what its two records name",
            fix="leave BUNDLE, --variant, --all, --inputs, --peers and --profile out",
        )
    if bundle is not None and _writes(bundle):
        if report or peers or profile:
            raise ConfigurationError(
                "a language model's speed has no HTML page, no peers and no profile here",
                fix="leave --report, --peers and --profile out; --json has every number",
            )
        names = variant or (None if all_variants else ["auto"])
        _bench_writing(bundle, names, device, inputs, rounds, as_json)
        return
    check_target(output, folder=True)
    if report:
        check_target(report)
        altair()
    names, profiles = variant or (None if all_variants else ["auto"]), []
    with steps("measuring") as say:
        if compare:
            records = measure.compare(
                *compare, rounds=rounds, singles=singles, pythons=python or (), on_step=say
            )
        elif bundle is None:
            raise ConfigurationError("no bundle given", fix="memopt bench BUNDLE")
        else:
            if profile:  # of seconds, and refused where a runtime has no profiler
                profiles = measure.profiles(
                    bundle, names, device=device, inputs=inputs, count=count, on_step=say
                )
            records = measure.bench(
                bundle,
                variants=names,
                device=device,
                inputs=inputs,
                count=count,
                rounds=rounds,
                singles=singles,
                peers=[name.strip() for name in peers.split(",") if name.strip()],
                on_step=say,
            )
    _write(records, profiles, output, report, compared=compare is not None, as_json=as_json)


def _writes(bundle: Path) -> bool:
    from memopt.bundle import open_bundle

    return open_bundle(bundle).task.answer == "logits"


def _bench_writing(
    bundle: Path,
    variants: list[str] | None,
    device: str,
    text: Path | None,
    rounds: int,
    as_json: bool,
) -> None:
    from dataclasses import asdict

    from memopt.benchmark.writing import bench_writing, speed_table
    from memopt.commands.console import stdout, steps

    with steps("measuring") as say:
        records = bench_writing(
            bundle, variants=variants, device=device, text=text, rounds=rounds, on_step=say
        )
    if as_json:
        echo(json.dumps({"records": [asdict(record) for record in records]}, indent=1))
        return
    stdout(150).print(speed_table(records))
    echo(
        f"medians of {rounds} rounds; a prompt of {records[0].prompt_tokens} tokens, "
        f"{records[0].new_tokens} written behind it"
    )


def _write(
    records: list[BenchmarkMetrics],
    profiles: list[Profile],
    output: Path,
    report: Path | None,
    *,
    compared: bool,
    as_json: bool,
) -> None:
    from memopt.benchmark.report import write_html

    written = [record.save(output) for record in records]
    if report:
        write_html(records, report, profiles)
        written.append(report)
    _print(records, profiles, compared=compared, as_json=as_json)
    if not as_json:
        for path in written:
            echo(f"wrote {path}")


def _print(
    records: list[BenchmarkMetrics], profiles: list[Profile], *, compared: bool, as_json: bool
) -> None:
    from dataclasses import asdict

    from memopt.benchmark import profile, report
    from memopt.benchmark.bench import below_gate
    from memopt.benchmark.record import ratio
    from memopt.commands.console import stdout

    result = ratio(records[1], records[0]) if compared else None
    if as_json:
        document: dict[str, object] = {"records": [asdict(record) for record in records]}
        if profiles:
            document["profiles"] = [asdict(told) for told in profiles]
        if result:
            document["ratio"] = asdict(result)
        echo(json.dumps(document, indent=1))
        return
    stdout(170).print(report.table(records))
    if profiles:
        stdout(120).print(profile.table(profiles))
    for line in report.answering(records):
        echo(line)
    for line in below_gate(records):
        echo(line, err=True)
    if result:
        echo(
            f"{records[1].label} is {result.median:.3f}x as fast as {records[0].label} "
            f"(95 % interval {result.low:.3f} to {result.high:.3f}, {result.rounds} paired rounds)"
        )
