"""Jobs over the source of conftest.py, and what they wrote."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from memopt.bundle import Bundle
from memopt.jobs.embed import JobReport, embed_job

ROWS = 300
# Of these two the text is null.
NONE = (7, 250)
KEPT = [i for i in range(ROWS) if i not in NONE]
# Two workers, or two runs, add alike with one thread each.
HOW = {"fragment_rows": 64, "device": "cpu", "variant": "onnx-fp32-fused", "threads": 1}


def run(source: Path, target: Path | str, bundle: Bundle, **options: Any) -> JobReport:
    """Run a job of five fragments of 64 rows, on one graph."""
    return embed_job(str(source), str(target), bundle.path, **{**HOW, **options})


def command(source: Path, target: Path | str, bundle: Bundle, *more: str) -> list[str]:
    """Return the command that does the same."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in HOW.items()]
    own = [sys.executable, "-m", "memopt", "job", "embed", str(source), "-o", str(target)]
    return [*own, "-b", str(bundle.path), *options, *more]


def worker() -> BaseProcess:
    """Return a worker of the job that runs; the system knows more children than workers."""
    children = multiprocessing.active_children()
    return next(child for child in children if child.name.startswith("memopt-job-"))


def parts(target: Path) -> dict[str, bytes]:
    """Return the bytes of every file with vectors."""
    files = [p for p in sorted(target.rglob("*")) if p.suffix in (".parquet", ".lance")]
    return {str(p.relative_to(target)): p.read_bytes() for p in files if p.is_file()}
