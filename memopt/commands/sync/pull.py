"""``memopt sync pull``: fetch the newest version."""

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


def pull(
    output: Annotated[Path, typer.Argument(help="PEFT folder, .safetensors or .parquet to write.")],
    adapter: Annotated[str, typer.Option(help="The adapter's id on the server.")],
    node: Node,
    server: Server = "localhost:8815",
    keys: Keys = DEFAULT_KEYS,
    state: State = DEFAULT_STATE,
    dictionary: Dictionary = None,
    key_file: KeyFile = None,
    deadline: Deadline = None,
    plain: Plain = False,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Fetch the newest version, verify it and write it."""
    from memopt.commands.console import check_target
    from memopt.federation.client.session import connect, opened, read_dictionary, report_json
    from memopt.federation.delta.adapters import write_weights
    from memopt.federation.delta.settings import DeltaSettings

    check_target(output, folder=output.suffix not in (".safetensors", ".parquet"))
    session = connect(
        server, node=node, keys=keys, plain=plain, insecure=insecure, deadline=deadline
    )
    data = read_dictionary(dictionary)
    with (
        opened(state, adapter, DeltaSettings(), data, key_file=key_file) as manager,
        moving("pulling") as progress,
    ):
        report = session.client.pull(manager, trust=session.files.trust(), progress=progress)
        write_weights(output, report.weights)
    if as_json:
        echo(json.dumps(report_json(report)))
        return
    print_report(
        f"{adapter} is at version {report.sequence} ({report.kind})",
        [
            ("versions applied", str(report.versions)),
            ("bytes", f"{report.payload_bytes:,}"),
            ("weights", f"sha256 {report.weights_hash}"),
            ("time", f"{report.seconds:.2f} s in {report.attempts} attempt(s)"),
            ("written", str(output)),
        ],
    )
