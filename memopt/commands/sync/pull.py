"""``memopt sync pull``: fetch the newest version."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.sync.options import AsJson, SyncAccess, SyncTransfer, grouped
from memopt.commands.sync.output import moving, print_report


@grouped
def pull(
    output: Annotated[Path, typer.Argument(help="PEFT folder, .safetensors or .parquet to write.")],
    adapter: Annotated[str, typer.Option(help="The adapter's id on the server.")],
    access: SyncAccess,
    transfer: SyncTransfer,
    as_json: AsJson = False,
) -> None:
    """Fetch the newest version, verify it and write it."""
    from memopt.commands.console import check_target
    from memopt.federation.client.session import read_dictionary, report_json
    from memopt.federation.delta.adapters import write_weights
    from memopt.federation.delta.settings import DeltaSettings

    check_target(output, folder=output.suffix not in (".safetensors", ".parquet"))
    session = access.connect(transfer.deadline)
    settings = DeltaSettings(dictionary=read_dictionary(transfer.dictionary))
    with transfer.manager(adapter, settings) as manager, moving("pulling") as progress:
        report = session.client.pull(manager, trust=session.files.trust(), progress=progress)
        write_weights(output, report.weights)
    print_report(
        f"{adapter} is at version {report.sequence} ({report.kind})",
        [
            ("versions applied", str(report.versions)),
            ("bytes", f"{report.payload_bytes:,}"),
            ("weights", f"sha256 {report.weights_hash}"),
            ("time", f"{report.seconds:.2f} s in {report.attempts} attempt(s)"),
            ("written", str(output)),
        ],
        report_json(report) if as_json else None,
    )
