"""``memopt sync aggregate``: have the server average adapters."""

from __future__ import annotations

from typing import Annotated

import typer

from memopt.commands.sync.options import AsJson, SyncAccess, grouped
from memopt.commands.sync.output import print_report


@grouped
def aggregate(
    adapter: Annotated[str, typer.Argument(help="The adapter that the average is a version of.")],
    inputs: Annotated[list[str], typer.Option("--input", help="One to average; repeatable.")],
    access: SyncAccess,
    weight: Annotated[
        list[float] | None, typer.Option(help="Sample count of each input, in their order.")
    ] = None,
    method: Annotated[str, typer.Option(help="product, freeze-a or naive.")] = "product",
    robust: Annotated[str, typer.Option(help="mean, median or trimmed.")] = "mean",
    max_norm: Annotated[
        float | None, typer.Option(help="Bound on the norm of each input's update.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the result [default: the inputs' largest].")
    ] = None,
    codec: Annotated[str, typer.Option(help="How the result travels to those who pull.")] = "int8",
    as_json: AsJson = False,
) -> None:
    """Have the server average adapters into one, LoRA's factors taken together (role admin)."""
    session = access.connect()
    done = session.client.aggregate(
        adapter,
        inputs,
        key=session.files.signing_key(),
        node=session.files.node,
        weights=weight or None,
        settings={"method": method, "robust": robust, "max_norm": max_norm, "rank": rank},
        codec=codec,
    )
    print_report(
        f"{adapter} version {done['sequence']} is the average of {', '.join(inputs)}",
        [
            ("error of the low rank", f"{done['error']:.2%}"),
            ("left out (not finite)", _names(inputs, done["left_out"])),
            ("scaled down to the bound", _names(inputs, done["clipped"])),
        ],
        {"adapter": adapter, **done} if as_json else None,
    )


def _names(inputs: list[str], numbers: list[int]) -> str:
    return ", ".join(inputs[n] for n in numbers) or "none"
