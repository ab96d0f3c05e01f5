"""What happened together, means the same or is recalled together; retrieval that follows it."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("AssociationGraph", "GraphRecipe"):
        from memopt.memory.graph import association

        return getattr(association, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
