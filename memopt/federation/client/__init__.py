"""The end that trains or uses the weights: its state, its connection, push and pull."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "SyncClient":
        from memopt.federation.client import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
