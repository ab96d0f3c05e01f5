"""``memopt sync push``: send what changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.sync.options import AsJson, Coding, SyncAccess, SyncTransfer, grouped
from memopt.commands.sync.output import moving, print_report


@grouped
def push(
    weights: Annotated[Path, typer.Argument(help="PEFT folder, .safetensors or .parquet.")],
    adapter: Annotated[str, typer.Option(help="The adapter's id on the server.")],
    access: SyncAccess,
    coding: Coding,
    transfer: SyncTransfer,
    full: Annotated[bool, typer.Option("--full", help="Send everything.")] = False,
    as_json: AsJson = False,
) -> None:
    """Send what changed since the last push, signed."""
    from dataclasses import asdict

    from memopt.federation.client.session import delta_settings, read_dictionary, report_json
    from memopt.federation.delta.adapters import read_weights

    session = access.connect(transfer.deadline)
    dictionary = read_dictionary(transfer.dictionary)
    settings = delta_settings(session.config, dictionary=dictionary or None, **asdict(coding))
    # Before the state's folder is made: what cannot be read leaves nothing behind.
    new = read_weights(weights)
    with transfer.manager(adapter, settings) as manager, moving("pushing") as progress:
        report = session.push(manager, new, full=full, progress=progress)
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
        report_json(report) if as_json else None,
    )
