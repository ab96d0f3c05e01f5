"""``memopt bench --profile``: one input's time as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from memopt import charts
from memopt.bundle import Bundle
from memopt.errors import DeviceError
from memopt.runtimes.profile import Profile, profile_one
from memopt.runtimes.task_engine import open_task

HEADER = ("variant", "part", "nodes", "ms", "share")
# Kinds of kernels that are told by name; the others are put together.
NAMED = 8


def profile(bundle: Bundle, variant: str, device: str, inputs: Sequence[Any]) -> Profile:
    """Profile a variant with the input of middling length.

    Raises:
        DeviceError: it did not open, and another would have been measured in its place.
        ConfigurationError: its runtime has no profiler here.
    """
    if bundle.manifest.modality == "text":
        inputs = sorted(inputs, key=lambda item: len(str(item)))
    with open_task(bundle, device=device, variant=variant) as engine:
        if engine.events and variant != "auto":
            raise DeviceError(f"{variant} cannot be profiled: {engine.events[0]}")
        return profile_one(engine, inputs[len(inputs) // 2])


def parts(told: Profile) -> list[tuple[str, str, int | None, float]]:
    """Return (stage, name, nodes, milliseconds) of all that makes up one input's time.

    The session is told by its kernels: their shares, in the time that it takes unprofiled.
    """
    found: list[tuple[str, str, int | None, float]] = [
        (name, name, None, ms) for name, ms in told.stages.items() if name != "session"
    ]
    shares = told.shares()
    for kernel, ms in shares[:NAMED]:
        name = f"{kernel.kind} ({kernel.implementation})" if kernel.implementation else kernel.kind
        found.append(("session", name, kernel.count, ms))
    if rest := shares[NAMED:]:
        count = sum(kernel.count for kernel, _ in rest)
        found.append(("session", "other kernels", count, sum(ms for _, ms in rest)))
    return found


def rows(profiles: Sequence[Profile]) -> list[list[str]]:
    """Return formatted cells, the parts of one variant after those of another."""
    lines = []
    for told in profiles:
        whole = sum(told.stages.values()) or 1.0
        lines.append([told.variant, f"one input on {told.device}", "", f"{told.total_ms:.3f}", ""])
        session = told.stages["session"]
        places = parts(told)
        for place, (stage, name, nodes, ms) in enumerate(places):
            inside = stage == "session"
            if inside and places[place - 1][0] != "session":
                share = f"{session / whole:.0%}"
                lines.append(["", "session", "", f"{session:.3f}", share])
            label = f"  {name}" if inside else name
            count = "" if nodes is None else str(nodes)
            lines.append(["", label, count, f"{ms:.3f}", f"{ms / whole:.0%}"])
    return lines


def table(profiles: Sequence[Profile]) -> Any:
    """Return a rich table."""
    from rich.table import Table

    runs = profiles[0].runs
    made = Table(title=f"Where one input's time goes, medians of {runs} runs")
    for name in HEADER:
        numeric = name in ("nodes", "ms", "share")
        made.add_column(name, justify="right" if numeric else "left")
    for line in rows(profiles):
        made.add_row(*line)
    return made


def chart(profiles: Sequence[Profile]) -> Any:
    """Return a bar for each variant, cut into its parts.

    Raises:
        MissingExtra: Altair is not installed.
    """
    cut = [
        charts.Part(row=f"{told.variant} on {told.device}", name=name, value=ms)
        for told in profiles
        for _, name, _, ms in parts(told)
    ]
    return charts.parts(cut, "ms")
