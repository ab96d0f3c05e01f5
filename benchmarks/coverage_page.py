"""Rows of ``coverage.py`` as a table on the terminal and as docs/coverage.md."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

STATUSES = ("right", "one format", "refused", "unclear", "traceback", "wrong", "timeout", "unbuilt")
_HEADER = """# Which models run

Written by `python benchmarks/coverage.py --docs`; do not edit.

Every model type of transformers {version}, with a tiny config of its real shape and **random
weights**, for every task that fits: converted, exported to ONNX and to OpenVINO, and compared with
what transformers answers to each of three inputs alone (cosine >= 0.9999, norms too). Random
weights prove that a graph gives torch's answers; they say nothing of quality. *fused*: ONNX
Runtime's fused operators were found. *int8*: the method that made an int8 variant, and its least
cosine to float on random weights, which are harder to round than trained ones.

{both} model types are right on both formats for a task at least, {cells} of {tried} pairs of type
and task in all; {refused} are refused in one line. Nothing ends in a traceback, and nothing was
written with a wrong answer, unless a row below says so. {old} rows, marked \*, are of an earlier
sweep over embeddings and were not measured again since; what was not tried has no row.
"""


def counted(rows: Sequence[dict[str, Any]]) -> Table:
    """Return how many rows of each task came out how."""
    tasks = sorted({row["task"] for row in rows})
    made = Table("task", *STATUSES, "all", title="model types of transformers")
    for task in tasks:
        counts = collections.Counter(r["status"] for r in rows if r["task"] == task)
        made.add_row(task, *(str(counts[s]) for s in STATUSES), str(sum(counts.values())))
    made.add_row("types right", str(len(right_types(rows))))
    return made


def right_types(rows: Iterable[dict[str, Any]]) -> set[str]:
    """Return the types that are right on both formats for a task at least."""
    return {row["type"] for row in rows if row["status"] == "right"}


def write_page(rows: Sequence[dict[str, Any]], whole: int, path: Path) -> None:
    """Write the page: what runs, then what is refused and why, of ``whole`` pairs to try."""
    import transformers

    counts = collections.Counter(row["status"] for row in rows)
    text = _HEADER.format(
        version=transformers.__version__,
        old=sum(bool(row.get("earlier")) for row in rows),
        both=len(right_types(rows)),
        cells=counts["right"],
        tried=len(rows),
        refused=counts["refused"],
    )
    if len(rows) < whole:
        text += f"\n**Not the whole sweep yet: {len(rows)} of {whole} pairs were tried.**\n"
    ordered = sorted(rows, key=lambda row: (row["type"], row["task"]))
    runs = [row for row in ordered if row["status"] in ("right", "one format")]
    text += "\n## What runs\n\n| model type | task | ONNX | OpenVINO | fused | int8 | why not |\n"
    text += "|---|---|---|---|---|---|---|\n"
    text += "".join(_running(row) for row in runs)
    text += (
        "\n## What does not, and why\n\n| model type | task | what memopt says |\n|---|---|---|\n"
    )
    others = [row for row in ordered if row not in runs]
    text += "".join(
        f"| {row['type']}{_mark(row)} | {row['task']} | {_why(row)} |\n" for row in others
    )
    path.write_text(text, encoding="utf-8")


def _running(row: dict[str, Any]) -> str:
    formats = ["yes" if any(n.startswith(f) for n in row) else "no" for f in ("onnx-", "openvino-")]
    fused = "yes" if any(name.endswith("-fused") for name in row) else "no"
    int8 = row.get("int8", "")
    line = "" if row["status"] == "right" else _why(row)
    if int8.startswith("no"):
        line = line or f"int8: {_cell(int8[4:])}"
        int8 = "no"
    cells = (row["type"] + _mark(row), row["task"], *formats, fused, int8 or "no", line)
    return f"| {' | '.join(cells)} |\n"


def _mark(row: dict[str, Any]) -> str:
    return " \\*" if row.get("earlier") else ""


def _why(row: dict[str, Any]) -> str:
    line = _cell(row["line"].partition(";")[0])
    return line if row["status"] in ("refused", "one format") else f"**{row['status']}**: {line}"


def _cell(line: str) -> str:
    return " ".join(line.replace("|", "/").split())[:220]
