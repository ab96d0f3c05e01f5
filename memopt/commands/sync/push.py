"""``memopt sync push``: send what changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.console import echo
from memopt.commands.sync.options import (
    DEFAULT_KEYS,
    DEFAULT_STATE,
    AsJson,
    Codec,
    Deadline,
    Dictionary,
    Insecure,
    KeyFile,
    Keys,
    Node,
    Plain,
    Server,
    State,
)
from memopt.commands.sync.output import moving, print_report


def push(
    weights: Annotated[Path, typer.Argument(help="PEFT folder, .safetensors or .parquet.")],
    adapter: Annotated[str, typer.Option(help="The adapter's id on the server.")],
    node: Node,
    server: Server = "localhost:8815",
    keys: Keys = DEFAULT_KEYS,
    state: State = DEFAULT_STATE,
    codec: Codec = None,
    delta_threshold: Annotated[
        float | None, typer.Option(help="Relative mean change over which a tensor is sent.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative L2 error of each tensor's update; codec auto.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Payload bound; codec auto.")] = None,
    levels: Annotated[
        int | None,
        typer.Option(help="int8 steps on each side of zero, fewer are shorter [default: 15]."),
    ] = None,
    topk: Annotated[float | None, typer.Option(help="Share of values topk sends.")] = None,
    level: Annotated[int | None, typer.Option(help="zstd level.")] = None,
    dictionary: Dictionary = None,
    key_file: KeyFile = None,
    full: Annotated[bool, typer.Option("--full", help="Send everything.")] = False,
    deadline: Deadline = None,
    plain: Plain = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Send what changed since the last push, signed."""
    from memopt.federation.client.session import (
        connect,
        delta_settings,
        opened,
        read_dictionary,
        report_json,
        sends_all,
    )
    from memopt.federation.delta.adapters import read_weights

    session = connect(
        server, node=node, keys=keys, plain=plain, insecure=insecure, deadline=deadline
    )
    data = read_dictionary(dictionary)
    settings = delta_settings(
        session.config,
        codec=codec,
        delta_threshold=delta_threshold,
        max_error=max_error,
        max_bytes=max_bytes,
        levels=levels,
        topk=topk,
        level=level,
        dictionary=data or None,
    )
    # Before the state's folder is made: what cannot be read leaves nothing behind.
    new = read_weights(weights)
    with (
        opened(state, adapter, settings, key_file=key_file) as manager,
        moving("pushing") as progress,
    ):
        report = session.client.push(
            manager,
            new,
            key=session.files.signing_key(),
            node=node,
            full=full or sends_all(session.config),
            progress=progress,
        )
    if as_json:
        echo(json.dumps(report_json(report)))
        return
    print_report(
        f"pushed {adapter} version {report.sequence} ({report.kind})",
        [
            ("tensors sent / skipped", f"{report.sent} / {report.skipped}"),
            ("bytes", f"{report.payload_bytes:,} of {report.fp32_bytes:,} (full, fp32)"),
            ("saving against full fp32", f"{report.saving:.1%}"),
            ("error of the update", f"{report.error:.2e} (carried forward)"),
            ("time", f"{report.seconds:.2f} s in {report.attempts} attempt(s)"),
            ("resumed", f"{report.resumed_bytes:,} bytes were there already"),
        ],
    )
