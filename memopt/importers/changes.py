"""What has to be added to a graph so that memopt's front ends can feed it; what cannot be."""

from __future__ import annotations

from dataclasses import dataclass

from memopt.errors import ExportError
from memopt.importers.graph_file import GraphFile
from memopt.importers.roles import OURS, AddedHead, Roles
from memopt.runtimes.engines.graph import Port


@dataclass(frozen=True, slots=True, kw_only=True)
class InputChange:
    """One input of the graph as memopt feeds it.

    Attributes:
        port: as the graph has it.
        name, dtype: as the front end gives it.
        length: tokens that the graph has fixed, None where any number goes.
    """

    port: Port
    name: str
    dtype: str
    length: int | None = None

    @property
    def differs(self) -> bool:
        """Whether anything has to be done."""
        same = (self.port.name, self.port.dtype) == (self.name, self.dtype)
        return not same or self.length is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """All that is added to one graph.

    Attributes:
        inputs: in the graph's order.
        head: what is added behind its outputs, None for nothing.
        told: what the user should know, a line each.
    """

    inputs: tuple[InputChange, ...]
    head: AddedHead | None
    told: tuple[str, ...] = ()

    @property
    def needed(self) -> bool:
        """Whether the graph as it is cannot be used."""
        return self.head is not None or any(change.differs for change in self.inputs)

    @property
    def length(self) -> int | None:
        """How many tokens the graph has fixed."""
        return next((change.length for change in self.inputs if change.length), None)


def changes_of(graph: GraphFile, roles: Roles) -> Changes:
    """Return what has to be added to a graph.

    Raises:
        ExportError: it was made for batches of one size that is not 1, or for inputs of a type
            that cannot be made.
    """
    if roles.task in ("graph", "voice-activity"):
        return Changes(inputs=(), head=None)
    inputs, told = [], []
    for port in graph.inputs:
        name = roles.rename.get(port.name, port.name)
        kind, dtype = OURS[name]
        if port.dtype not in _TYPES[dtype]:
            raise ExportError(
                f"{graph.path}: its input {port} is none that {name} can be made of",
                fix="name it with --rename THEIRS=OURS, or use --task graph",
            )
        batch = port.shape[0] if port.shape else "batch"
        if isinstance(batch, int) and batch != 1:
            raise ExportError(
                f"{graph.path} was made for batches of exactly {batch} (its input {port})",
                fix="export it with a dynamic batch, or one of 1; or use --task graph",
            )
        fixed = port.shape[1] if port.shape and len(port.shape) > 1 else None
        tokens = kind == "text" or (name == "attention_mask" and graph.rows is not None)
        length = fixed if tokens and isinstance(fixed, int) else None
        inputs.append(InputChange(port=port, name=name, dtype=dtype, length=length))
    changes = Changes(inputs=tuple(inputs), head=roles.head)
    if any(c.port.shape and c.port.shape[0] == 1 for c in inputs):
        told.append("it takes one input at a time: a batch is run row by row")
    if changes.length:
        told.append(
            f"it takes exactly {changes.length} tokens: shorter texts are padded to that, and "
            "longer ones cut"
        )
    return Changes(inputs=changes.inputs, head=changes.head, told=tuple(told))


# The type that a front end gives -> the types of a graph that it can be turned into.
_TYPES = {
    "int64": ("int64", "int32", "int16", "uint32", "uint64", "bool"),
    "float32": ("float32", "float16", "bfloat16", "float64"),
}
