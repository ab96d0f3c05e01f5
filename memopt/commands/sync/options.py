"""Options that several ``memopt sync`` commands take, and what they open."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from memopt.federation.client.manager import DeltaSyncManager
    from memopt.federation.client.session import NodeSession
    from memopt.federation.delta.settings import DeltaSettings

Node = Annotated[str, typer.Option(help="This node's name.")]
Keys = Annotated[Path, typer.Option(help="Folder of certificates, keys and trust.json.")]
Plain = Annotated[bool, typer.Option("--plain", help="No TLS: loopback only.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow --plain off loopback.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dictionary = Annotated[Path | None, typer.Option(help="zstd dictionary, the same on both ends.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(help="Seal weights at rest under this key [default: $MEMOPT_WEIGHTS_KEY]."),
]
DEFAULT_KEYS = Path("keys")


@dataclass(frozen=True, kw_only=True)
class SyncAccess:
    """Which server, and as who."""

    node: Node
    server: Annotated[str, typer.Option("--server", help="host:port of memopt sync serve.")] = (
        "localhost:8815"
    )
    keys: Keys = DEFAULT_KEYS
    plain: Plain = False
    insecure: Insecure = False

    def connect(self, deadline: float | None = None) -> NodeSession:
        """Return the client, the node's files and the settings in force."""
        from memopt.federation.client.session import connect

        return connect(**asdict(self), deadline=deadline)


@dataclass(frozen=True, kw_only=True)
class SyncTransfer:
    """What a push and a pull take besides."""

    state: Annotated[Path, typer.Option(help="Folder of this node's sync state.")] = Path(
        ".memopt-sync"
    )
    dictionary: Dictionary = None
    key_file: KeyFile = None
    deadline: Annotated[
        float | None, typer.Option(help="Seconds that all of it may take, retries included.")
    ] = None

    def manager(self, adapter: str, settings: DeltaSettings) -> DeltaSyncManager:
        """Open this node's state of an adapter."""
        from memopt.federation.client.session import open_state

        return open_state(self.state, adapter, settings, key_file=self.key_file)


@dataclass(frozen=True, kw_only=True)
class Coding:
    """How a push's delta is made; what is not given is the configuration's."""

    codec: Annotated[
        str | None, typer.Option(help="lossless, fp16, int8, int4, topk or auto [default: int8].")
    ] = None
    delta_threshold: Annotated[
        float | None, typer.Option(help="Relative mean change over which a tensor is sent.")
    ] = None
    max_error: Annotated[
        float | None, typer.Option(help="Relative L2 error of each tensor's update; codec auto.")
    ] = None
    max_bytes: Annotated[int | None, typer.Option(help="Payload bound; codec auto.")] = None
    levels: Annotated[
        int | None,
        typer.Option(help="int8 steps on each side of zero, fewer are shorter [default: 15]."),
    ] = None
    topk: Annotated[float | None, typer.Option(help="Share of values topk sends.")] = None
    level: Annotated[int | None, typer.Option(help="zstd level.")] = None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Put the options of its dataclasses in the place of a command's parameters of such a type."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @wraps(command)
    def expanded(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    parameters = []
    for name, own in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append((name, own.default, hints[name]))
            continue
        types = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            default = own.empty if field.default is MISSING else field.default
            parameters.append((field.name, default, types[field.name]))
    expanded.__annotations__ = {name: hint for name, _, hint in parameters}
    expanded.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=hint)
            for name, value, hint in parameters
        ]
    )
    return expanded
