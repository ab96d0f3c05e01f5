"""``memopt run``: a graph of no known task, arrays in and arrays out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from memopt.commands.console import echo


def run(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder, or a name under models/.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", help="FILE.npy of the one input, NAME=FILE.npy, or FILE.npz."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .npz file for all outputs.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cuda, openvino, cpu, ...")] = None,
    variant: Annotated[str, typer.Option(help="Variant of the bundle.")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the outputs' values as JSON.")
    ] = False,
) -> None:
    """Run a graph once; without inputs say what it takes and gives."""
    from memopt.errors import ConfigurationError
    from memopt.runtimes.configured import open_configured
    from memopt.runtimes.engines.graph import GraphEngine

    if output is not None and output.suffix != ".npz":
        raise ConfigurationError(
            f"output {output.name!r} has the ending {output.suffix!r}", fix="give a .npz file"
        )
    with open_configured(GraphEngine, bundle, device, variant) as engine:
        if not inputs:
            _describe(engine, as_json)
            return
        results = engine.run(_feed(inputs, [port.name for port in engine.inputs]))
    if output is not None:
        _save(output, results)
    if as_json:
        echo(json.dumps({name: value.tolist() for name, value in results.items()}))
        return
    for name, value in results.items():
        shape = ", ".join(map(str, value.shape))
        flat = value.reshape(-1)
        shown = (
            " ".join(f"{number:.6g}" for number in flat[:6].tolist()) if _is_number(value) else ""
        )
        echo(f"{name} {value.dtype} ({shape})  {shown}{' ...' if flat.size > 6 else ''}")


def _describe(engine: Any, as_json: bool) -> None:
    sides = {"inputs": engine.inputs, "outputs": engine.outputs}
    if as_json:
        told = {
            side: [{"name": p.name, "dtype": p.dtype, "shape": p.shape} for p in ports]
            for side, ports in sides.items()
        }
        echo(json.dumps(told))
        return
    for side, ports in sides.items():
        for port in ports:
            echo(f"{side[:-1]} {port}")


def _feed(values: list[str], names: list[str]) -> dict[str, Any]:
    """Return the arrays of ``--input``.

    Raises:
        ConfigurationError: an array that says no name, of a graph of several inputs.
    """
    from memopt.errors import ConfigurationError

    feed: dict[str, Any] = {}
    for value in values:
        name, _, file = value.rpartition("=")
        array = _read(Path(file))
        if isinstance(array, Mapping):
            feed |= array
            continue
        if not name and len(names) != 1:
            raise ConfigurationError(
                f"--input {value} says no name, and the graph takes {', '.join(names)}",
                fix=f"write --input {names[0] if names else 'NAME'}={value}",
            )
        feed[name or names[0]] = array
    return feed


def _read(path: Path) -> Any:
    import numpy as np

    from memopt.errors import InputError

    try:
        # Never with pickle, which can run any code.
        found = np.load(path, allow_pickle=False)
        return dict(found) if isinstance(found, Mapping) else found
    except FileNotFoundError as error:
        raise InputError(f"there is no file {str(path)!r}", fix="check the path") from error
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{path} is no .npy or .npz file of plain numbers", fix="write it with numpy.save"
        ) from error


def _save(output: Path, results: Mapping[str, Any]) -> None:
    import numpy as np

    from memopt.files import atomic_path

    with atomic_path(output) as path, path.open("wb") as file:
        np.savez(file, **results)


def _is_number(value: Any) -> bool:
    return bool(value.dtype.kind in "fiub")
