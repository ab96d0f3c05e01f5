"""One database of memories: its tables, lock and cells, reads, writes and upkeep."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "MemoryStore":
        import memopt.memory

        return memopt.memory.MemoryStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
