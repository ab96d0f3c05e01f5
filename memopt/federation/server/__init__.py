"""The end that keeps the versions."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "SyncServer":
        from memopt.federation.server import server

        return getattr(server, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
