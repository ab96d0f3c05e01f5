"""``memopt sync``: adapter weights as signed deltas between machines."""

from __future__ import annotations

import typer

from memopt.commands.sync.aggregate import aggregate
from memopt.commands.sync.diff import diff
from memopt.commands.sync.keys import init_ca, issue, keygen
from memopt.commands.sync.look import history, rollback, status
from memopt.commands.sync.pull import pull
from memopt.commands.sync.push import push
from memopt.commands.sync.serve import serve

app = typer.Typer(
    help="Keep adapter weights in step between machines: signed deltas over Arrow Flight.",
    no_args_is_help=True,
)

for _command in (
    *(serve, push, pull, status, history, rollback, aggregate, diff),
    *(keygen, init_ca, issue),
):
    app.command(_command.__name__.replace("_", "-"))(_command)
