"""``memopt embed``: encode a file or a folder into a file of vectors."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from memopt.commands.console import echo, say
from memopt.errors import ConfigurationError

if TYPE_CHECKING:
    from memopt.runtimes.embed import Embedded

# The options of `memopt job embed` too.
Device = Annotated[str | None, typer.Option(help="auto, cuda, openvino, cpu, ... [default: auto]")]
VariantName = Annotated[str, typer.Option(help="Variant of the bundle.")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="Inputs per batch [default: by token budget].")
]
Normalize = Annotated[bool, typer.Option(help="Make the vectors unit length.")]
Prompt = Annotated[
    str | None, typer.Option(help="Put before every text [default: the model's own].")
]
PromptName = Annotated[
    str | None, typer.Option(help="The model's prompt of that name: query, document, ...")
]
Dimension = Annotated[
    int | None, typer.Option(min=1, help="Keep this many leading values of each vector.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Fail instead of falling back to another provider.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a killed run stopped.")]


def embed(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    source: Annotated[
        str,
        typer.Option(
            "--input", "-i", help=".txt, .jsonl, .csv, .parquet, a folder of media, - for stdin."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help=".parquet, .npy or .jsonl.")],
    column: Annotated[
        str | None,
        typer.Option(help="Column to read; a number in a CSV without header, from 0."),
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
    on_error: Annotated[
        Literal["fail", "skip"], typer.Option(help="What to do with an unreadable input.")
    ] = "fail",
    sparse: Annotated[
        bool, typer.Option("--sparse", help="A weight a word (SPLADE), .parquet or .jsonl.")
    ] = False,
    late: Annotated[
        bool, typer.Option("--late", help="A vector a token (ColBERT), .parquet or .jsonl.")
    ] = False,
    query: Annotated[bool, typer.Option("--query", help="The texts are queries (--late).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON summary.")] = False,
) -> None:
    """Encode texts, images or sounds into vectors; memory stays flat, a kill loses little."""
    if query and not late:
        raise ConfigurationError("--query is of --late", fix="give both; else --prompt-name query")
    if sparse or late:
        if not normalize:
            raise ConfigurationError(
                "--no-normalize is of dense vectors", fix="leave it out: these have their lengths"
            )
        if sparse and late:
            raise ConfigurationError("--sparse and --late are two kinds", fix="give one of them")
        if resume or on_error != "fail":
            raise ConfigurationError(
                "--resume and --on-error are of dense vectors", fix="leave them out"
            )
        if (prompt, prompt_name, dimension) != (None, None, None):
            raise ConfigurationError(
                "--prompt, --prompt-name and --dimension are of dense vectors", fix="leave them out"
            )
        kind: Any = "sparse:SparseEncoder" if sparse else "late:LateEncoder"
        with _engine(kind, bundle, device, variant, strict) as engine:
            asked = {"query": query} if late else {}
            encode = partial(engine.encode, batch_size=batch_size, **asked)
            _rows(engine, encode, source, output, column, as_json)
        return
    from memopt.runtimes.configured import open_engine
    from memopt.runtimes.embed import embed as embed_file

    begin = time.perf_counter()
    with open_engine(bundle, device, variant, strict) as engine:
        try:
            done = embed_file(
                engine,
                source,
                output,
                column=column,
                batch_size=batch_size,
                normalize=normalize,
                resume=resume,
                on_error=on_error,
                show_progress=True,
                prompt=prompt,
                prompt_name=prompt_name,
                dimension=dimension,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("what is done is kept; go on with --resume") from None
        info = engine.device_info()
        events = [str(event) for event in engine.events]
    seconds = time.perf_counter() - begin
    if as_json:
        summary = {**asdict(done), "seconds": seconds, "device": info, "events": events}
        echo(json.dumps(summary, indent=1))
    else:
        _print(done, seconds, info)


def _engine(kind: str, *arguments: Any) -> Any:
    from memopt.registry import Entry
    from memopt.runtimes.configured import open_configured

    entry = Entry(name=kind, target=f"memopt.runtimes.engines.{kind}", summary="")
    # One variant for every part of the file: the last may be one row.
    return open_configured(partial(entry.load(), one_variant=True), *arguments)


def _rows(
    engine: Any, encode: Any, source: str, output: Path, column: str | None, as_json: bool
) -> None:
    from memopt.runtimes.embed_rows import embed_rows

    begin = time.perf_counter()
    count = embed_rows(encode, source, output, column=column, show_progress=True)
    seconds, info = time.perf_counter() - begin, engine.device_info()
    if as_json:
        summary = {"output": str(output), "inputs": count, "dimension": engine.dimension}
        echo(json.dumps({**summary, "seconds": seconds, "device": info}, indent=1))
        return
    echo(
        f"{count} texts in {seconds:.1f} s on {info['device']} ({info['variant']}), dimension "
        f"{engine.dimension}: {output}"
    )


def _print(done: Embedded, seconds: float, info: Mapping[str, Any]) -> None:
    for entry in done.skipped:
        say(f"skipped input {entry['index']} {entry['reason']}")
    again = f" ({done.resumed} of them before)" if done.resumed else ""
    echo(
        f"{done.vectors} vectors of {done.dimension} from {done.inputs} inputs{again} in "
        f"{seconds:.1f} s on {info['device']} ({info['variant']}): {done.output}"
    )
