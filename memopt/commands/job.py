"""``memopt job``: work over a data set of any size, on this machine or a cluster."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from memopt.commands.console import echo, progress, say
from memopt.commands.embed import (
    BatchSize,
    Device,
    Dimension,
    Normalize,
    Prompt,
    PromptName,
    Resume,
    Strict,
    VariantName,
)

if TYPE_CHECKING:
    from memopt.jobs.embed import JobReport

app = typer.Typer(help="Work over a data set of any size; a kill loses little.")


@app.callback()
def _job() -> None:
    """Work over a data set of any size; a kill loses little."""


@app.command()
def embed(
    source: Annotated[
        str,
        typer.Argument(
            help=".parquet, .csv, .tsv, .jsonl, .txt (also .gz), a folder of these, "
            "of images or sounds, a Lance data set; a path or an URL."
        ),
    ],
    destination: Annotated[
        str,
        typer.Option("--output", "-o", help="Folder or URL to be made, or a memory store."),
    ],
    bundle: Annotated[
        Path, typer.Option("--bundle", "-b", help="Bundle folder, or a name under models/.")
    ],
    to: Annotated[
        Literal["auto", "parquet", "lance", "memory"],
        typer.Option(help="What to write; auto: lance for a name that ends so, else parquet."),
    ] = "auto",
    column: Annotated[str | None, typer.Option(help="Column to encode.")] = None,
    keep: Annotated[
        str | None, typer.Option(help="Columns to keep, comma-separated [default: all].")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Processes here, or actors of a cluster.")
    ] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Processes or actors.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of one worker [default: the cores, shared].")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, or auto [default: one made here].")
    ] = None,
    fragment_rows: Annotated[
        int | None,
        typer.Option(min=1, help="Rows of one unit of work [8192 texts, 256 images, 64 sounds]."),
    ] = None,
    device: Device = None,
    variant: VariantName = "auto",
    batch_size: BatchSize = None,
    normalize: Normalize = True,
    prompt: Prompt = None,
    prompt_name: PromptName = None,
    dimension: Dimension = None,
    strict: Strict = False,
    resume: Resume = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say how many rows and fragments; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON report.")] = False,
) -> None:
    """Encode every row; what cannot be encoded is set aside in DESTINATION.job/failures.jsonl.

    The job's folder of an URL is in the folder of now.

    Exit codes: 0 done (also with rows set aside, which are counted), 1 failed, 2 wrong usage.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    from memopt.jobs.embed import embed_job

    bar = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with progress("embed", *bar) as step:
            report = embed_job(
                source,
                destination,
                bundle,
                to=to,
                column=column,
                keep=[name for name in keep.split(",") if name] if keep is not None else None,
                engine=engine,
                workers=workers,
                threads=threads,
                address=address,
                fragment_rows=fragment_rows,
                resume=resume,
                dry_run=dry_run,
                on_progress=lambda done, of: step(completed=done, total=of),
                device=device,
                variant=variant,
                strict=strict,
                batch_size=batch_size,
                normalize=normalize,
                prompt=prompt,
                prompt_name=prompt_name,
                dimension=dimension,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what is done is kept; go on with --resume") from None
    if as_json:
        echo(json.dumps(asdict(report), indent=1))
        return
    _print(report, dry_run)


def _print(report: JobReport, dry_run: bool) -> None:
    if report.ignored:
        say(f"{report.ignored} files are of no kind that is read and were passed over")
    if dry_run:
        echo(f"{report.rows} rows in {report.fragments} fragments; nothing was written")
        return
    for line in (*report.events, *report.restarts):
        say(line)
    if report.failures:
        say(f"{report.failures} rows were set aside, with reasons: {report.job}/failures.jsonl")
    again = f", {report.resumed} of them before" if report.resumed else ""
    stored = f" ({report.stored['added']} added)" if report.stored else ""
    echo(
        f"{report.vectors} vectors of {report.rows} rows in {report.fragments} fragments{again}, "
        f"{report.seconds:.1f} s, {report.rows_per_second:.0f} rows/s: "
        f"{report.destination}{stored}"
    )
