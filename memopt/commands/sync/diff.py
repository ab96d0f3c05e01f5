"""``memopt sync diff``: compare two sets of weights, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memopt.commands.sync.options import AsJson
from memopt.commands.sync.output import print_json, print_rows


def diff(
    old: Annotated[Path, typer.Argument(help="PEFT folder, .safetensors or .parquet.")],
    new: Annotated[Path, typer.Argument(help="The same, later.")],
    delta_threshold: Annotated[
        float, typer.Option(help="Relative mean change over which a tensor is sent.")
    ] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Compare two sets of weights: what would be sent, with each codec. No network."""
    from memopt.federation.delta.compare import compare

    result = compare(old, new, delta_threshold=delta_threshold)
    if as_json:
        print_json(result)
        return
    print_rows(
        ("tensor", "action", "relative mean change"),
        [
            (t["name"], t["action"], "new" if t["change"] is None else f"{t['change']:.3g}")
            for t in result["tensors"]
        ],
    )
    print_rows(
        ("codec", "sent as", "bytes", "saving against fp32", "error of the update"),
        [
            (c["codec"], c["kind"], f"{c['bytes']:,}", f"{c['saving']:.1%}", f"{c['error']:.2e}")
            for c in result["codecs"]
        ],
    )
