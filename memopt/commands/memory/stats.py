"""``memopt memory stats``: what a store holds."""

from __future__ import annotations

import json
from dataclasses import asdict

from memopt.commands.console import echo, stdout
from memopt.commands.memory.options import AsJson, Key, Store
from memopt.commands.memory.shared import open_store
from memopt.visible import json_text


def stats(store: Store, key: Key = None, as_json: AsJson = False) -> None:
    """Show tiers, sizes, savings, index recall and the last consolidation."""
    from rich.table import Table

    from memopt.memory.lifecycle.schedule import SAVED

    with open_store(store, embed=False, key=key) as here:
        found = here.store.stats()
        state = here.store.index.state
        condensed = sum(
            batch["source_count"].to_numpy().sum()
            for batch in here.store.scan(columns=["source_count"], batch_size=65536)
        )
        runs = [json.loads(event.detail) for event in here.store.events(SAVED)]
    document = {
        **asdict(found),
        "saved_bytes": sum(run["before"] - run["after"] for run in runs),
        "condensed": int(condensed),
        "index_recall": state.recall if state and state.cells else None,
        "index_rows": state.rows if state and state.cells else 0,
    }
    for name in ("oldest", "newest", "last_consolidation"):
        document[name] = document[name].isoformat() if document[name] else None
    if as_json:
        echo(json_text(document))
        return
    table = Table("what", "value")
    for name, value in document.items():
        if isinstance(value, dict):
            text = ", ".join(f"{k or '(none)'} {v:,}" for k, v in list(value.items())[:12])
        elif isinstance(value, int) and not isinstance(value, bool):
            text = f"{value:,}"
        else:
            if name == "duplicate_rate" and value is not None:
                value = f"{value:.0%} of the memories at hand have a near duplicate"
            exact = name == "index_recall"
            text = ("exact search" if exact else "-") if value is None else str(value)
        table.add_row(name.replace("_", " "), text)
    stdout(140).print(table)
