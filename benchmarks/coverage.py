"""Sweep every model type of the installed transformers: the right answer, or one clear line?

    python benchmarks/coverage.py [-o DIR] [-j 1] [TYPE ...]

Each type and each task that fits it gets a tiny config, seeded random weights and a folder as its
users have it. A process of its own converts it, exports ONNX and OpenVINO, quantizes it to int8 and
answers three inputs; the measure is what transformers computes for each input alone. DIR/rows.jsonl
gets one row a type and task and is continued by the next run; --again does those of one status
anew; --docs writes docs/coverage.md. All of them take some hours on one core.

Random weights prove that a graph gives the answers of torch. They say nothing of quality.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tiny_models as tiny
from command_line import positive_int, run_main
from coverage_page import STATUSES, counted, write_page
from rich.console import Console

from memopt.registry import check_names

SECONDS = 240  # of processor time, which others on the machine do not stretch
PATIENCE = 6  # times that on the clock
BYTES = 8 << 30
COSINE = 0.9999  # float32 on two runtimes: reassociated sums, nothing else
# Tasks with heads, and the mapping of transformers that says which types have them.
HEADS = {
    "object-detection": "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "audio-classification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "fill-mask": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}
# Rows of a sweep before this one are shown, marked, until they are measured again.
OLD: dict[str, Any] = {"earlier": True}
Cell = tuple[str, str]  # model type, task; the task of a type's trunk is "embedding"
# Words that are torch's, onnxruntime's or OpenVINO's own, or advice that nobody can follow.
_UNCLEAR = re.compile(
    r"--opset|report the arch|torch\.|aten|<class|0x[0-9a-f]{6}|FakeTensor|L\['|\n|object at"
    r"|in a way that memopt|Traceback|got an unexpected keyword|NoneType|src/|\.cpp"
    r"|GraphModule|list index"
)


def cells() -> list[Cell]:
    """Return every type and task: trunks first, then heads, the task by task."""
    from transformers.models.auto import modeling_auto

    found = [(kind, "embedding") for kind in modeling_auto.MODEL_MAPPING_NAMES]
    for task, mapping in HEADS.items():
        found += [(kind, task) for kind in getattr(modeling_auto, mapping)]
    return found


def class_of(kind: str, task: str) -> str:
    """Return the name of the class that transformers gives this type for this task."""
    from transformers.models.auto import modeling_auto

    mapping = HEADS.get(task, "MODEL_MAPPING_NAMES")
    name = getattr(modeling_auto, mapping)[kind]
    return name if isinstance(name, str) else str(name[0])


def judge(kind: str, task: str, folder: Path) -> dict[str, Any]:
    """Do all a user would do with one model type and task; return its row."""
    import transformers
    from safetensors.numpy import save_file

    from memopt.errors import MemoptError
    from memopt.weights.convert import convert

    name = class_of(kind, task)
    row: dict[str, Any] = {"type": kind, "asked": task, "task": task, "class": name}
    row["modality"] = "other"
    source, bundle = folder / "source", folder / "bundle"
    try:
        cls = getattr(transformers, name)
        row["modality"] = tiny.modality(cls)
    except ImportError as error:
        return {**row, "status": "unbuilt", "line": " ".join(str(error).split())[:200]}
    if task == "embedding" and row["modality"] in ("image", "audio"):
        row["task"] = task = f"{row['modality']}-embedding"
    try:
        # Refused by name? Then there is no need of a model.
        source.mkdir(parents=True)
        config = transformers.AutoConfig.for_model(kind, **tiny.SPECIAL.get(kind, {}))
        config.architectures = [name]
        config.save_pretrained(source)
        save_file({"weight": np.zeros(1, np.float32)}, source / "model.safetensors")
        convert(source, bundle, on_warning=lambda line: None)
    except MemoptError as error:
        return {**row, **_refusal("convert", error, folder)}
    except Exception:  # noqa: BLE001 - the real model below will tell
        traceback.print_exc()
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.rmtree(source)
    why = tiny.build(kind, cls, task, source)
    if why:
        row["unbuilt"] = why
        if not (source / "model.safetensors").is_file():
            return {**row, "status": "unbuilt", "line": why}
    return {**row, **_through(row, source, bundle, verified=not why)}


def _through(row: dict[str, Any], source: Path, target: Path, verified: bool) -> dict[str, Any]:
    from memopt.bundle import open_bundle
    from memopt.errors import MemoptError
    from memopt.exporters.base import export
    from memopt.weights.convert import convert

    stage, folder = "convert", source.parent
    found: dict[str, Any] = {}
    refused: dict[str, Any] | None = None
    wanted: list[np.ndarray] = []
    try:
        manifest = convert(source, target, on_warning=lambda line: None).manifest
        found = {"task": manifest.task, "pooling": manifest.pooling}
        what, task = row["modality"], manifest.task
        for format in ("onnx", "openvino"):
            stage = f"export {format}"
            try:
                variants = export(open_bundle(target), format=format)
            except MemoptError as error:
                refused = refused or _refusal(stage, error, folder)
                continue
            if not verified:
                continue
            stage = f"answer {format}"
            items = tiny.inputs(what, task)
            try:
                wanted = wanted or tiny.reference(
                    row["type"], source, what, task, manifest.pooling, items
                )
            except Exception as error:  # noqa: BLE001 - the measure's own
                return {**found, "status": "unbuilt", "line": f"no measure: {error!r}"[:300]}
            for variant in variants:
                got = answers(target, format, variant.name, items)
                unit = [w / np.linalg.norm(w) for w in wanted] if manifest.normalize else wanted
                found[variant.name] = worst = _cosine(got, unit)
                if not worst >= COSINE:
                    return {**found, "status": "wrong", "stage": stage, "line": f"{worst:.5f}"}
    except MemoptError as error:
        refused = _refusal(stage, error, folder)
    except Exception as error:  # noqa: BLE001 - what the sweep looks for
        where = traceback.extract_tb(error.__traceback__)
        own = [f"{Path(f.filename).name}:{f.lineno}" for f in where if "/memopt/" in f.filename]
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({own[-1:]})"
        traceback.print_exc()
        return {**found, "status": "traceback", "stage": stage, "line": line}
    right = {name.partition("-")[0] for name in found if "fp32" in name}
    if right:
        found["int8"] = int8(row, target)
    if refused:
        one = right and refused["status"] == "refused"
        return {**found, **refused, **({"status": "one format"} if one else {})}
    if not verified:
        line = "exported, and transformers itself does not run it: no measure"
        return {**found, "status": "unclear", "stage": "export", "line": line}
    return {**found, "status": "right", "line": ""}


def answers(target: Path, format: str, variant: str, items: Sequence[Any]) -> Sequence[np.ndarray]:
    """Return what an engine answers: vectors as they are, else what the graph gives an input."""
    from memopt import ArrowEngine
    from memopt.bundle import open_bundle
    from memopt.runtimes.task_engine import Engine
    from memopt.tasks.table import TASKS

    device = "cpu" if format == "onnx" else "openvino"
    if open_bundle(target).task.embeds:
        with ArrowEngine(target, device, variant, strict=True, threads=1) as engine:
            vectors: Sequence[np.ndarray] = engine.encode(items, normalize=False)
            return vectors
    kind = type("AnyEngine", (Engine,), {"tasks": TASKS})
    with kind(target, device, variant, strict=True, threads=1) as engine:
        return list(engine.answers(items))


def int8(row: dict[str, Any], target: Path) -> str:
    """Quantize to int8; return "dynamic" or "static" with the cosine to float, or why not."""
    from memopt.errors import MemoptError
    from memopt.quantization.quantize import Samples, quantize
    from memopt.quantization.recipe import Recipe

    why = ""
    data = tiny.calibration(row["modality"], target.parent / "calibration")
    samples = Samples(calibration=data, samples=8, validation_samples=8)
    for method in ("dynamic", "static"):
        try:
            made = quantize(target, samples, Recipe(method=method), keep_failing=True)
            return f"{method} {made.validation.quality:.3f}"
        except MemoptError as error:
            why = why or str(error)[:200]
        except Exception as error:  # noqa: BLE001 - told, not hidden
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}"[:200]
    return f"no: {why}"


def _refusal(stage: str, error: Exception, folder: Path) -> dict[str, Any]:
    line = str(error).replace(f"{folder}/source/", "").replace(f"{folder}/", "")
    status = "unclear" if _UNCLEAR.search(line) or len(line) > 420 else "refused"
    return {"status": status, "stage": stage, "line": line}


def _cosine(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    worst = 1.0
    for a, b in zip(got, wanted, strict=True):
        if a.shape != b.shape or not np.isfinite(b).all():
            return float("nan")
        a, b = a.reshape(-1).astype(np.float64), b.reshape(-1).astype(np.float64)
        norms = float(np.linalg.norm(a) * np.linalg.norm(b))
        worst = min(worst, float(a @ b) / max(norms, 1e-30))
        ratio = float(np.linalg.norm(a) / max(float(np.linalg.norm(b)), 1e-30))
        worst = min(worst, 1.0 - abs(ratio - 1.0))
    return worst


def child(cell: Cell, folder: str, core: int) -> None:
    """Judge one type, with everything it prints in a file, and leave the row in another."""
    path = Path(folder)
    with (path / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        warnings.simplefilter("ignore")
        # Threads of several runtimes that wait for each other would take most of the time.
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})
        import torch

        torch.set_num_threads(1)
        begin = time.perf_counter()
        try:
            row = judge(*cell, path)
        except Exception as error:  # noqa: BLE001 - of the sweep itself, or of an odd config
            traceback.print_exc()
            row = _dead(cell, "unbuilt", repr(error)[:300])
        row["seconds"] = round(time.perf_counter() - begin, 1)
    (path / "row.json").write_text(json.dumps(row))
    os._exit(0)


def _dead(cell: Cell, status: str, line: str) -> dict[str, Any]:
    row = {"type": cell[0], "asked": cell[1], "task": cell[1], "modality": "other"}
    return {**row, "status": status, "line": line, "stage": "process"}


def run(waiting: Sequence[Cell], folder: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield the row of each cell; ``jobs`` processes at once, each for SECONDS at most."""
    context = multiprocessing.get_context("forkserver")
    # Loaded once and forked: importing torch and transformers takes as long as a small export.
    context.set_forkserver_preload(
        [
            *("torch", "transformers", "openvino", "onnxruntime", "onnxscript", "__main__"),
            *("transformers.modeling_utils", "transformers.models.auto.modeling_auto"),
            *("memopt.exporters.base", "memopt.quantization.quantize"),
        ]
    )
    queue, running, free = collections.deque(waiting), {}, list(range(jobs))
    while queue or running:
        while queue and len(running) < jobs:
            cell = queue.popleft()
            place = folder / "work" / f"{cell[0]}.{cell[1]}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            core = free.pop()
            process = context.Process(target=child, args=(cell, str(place), core))
            process.start()
            running[cell] = (process, place, time.monotonic(), core)
        time.sleep(0.05)
        for cell, (process, place, begin, core) in list(running.items()):
            late = time.monotonic() - begin > SECONDS * PATIENCE or _used(process.pid) > SECONDS
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            del running[cell]
            free.append(core)
            path = place / "row.json"
            if path.is_file():
                yield json.loads(path.read_text())
            else:
                status = "timeout" if late else "traceback"
                yield _dead(cell, status, f"exit {process.exitcode}")
            for part in ("source", "bundle", "calibration"):
                shutil.rmtree(place / part, ignore_errors=True)


def _used(pid: int | None) -> float:
    with contextlib.suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


def main() -> None:
    """Sweep, print the table; exit 1 for a traceback, a wrong answer or an unclear line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="TYPE", help="[default: all]")
    parser.add_argument("-o", "--output", type=Path, default=Path(".cache/coverage"))
    parser.add_argument("-j", "--jobs", type=positive_int, default=1)
    parser.add_argument("--task", action="append", default=[], choices=["embedding", *HEADS])
    parser.add_argument("--again", action="append", default=[], choices=STATUSES)
    parser.add_argument("--docs", action="store_true", help="write docs/coverage.md of the rows")
    parser.add_argument("--table", action="store_true", help="only print what there is")
    given = parser.parse_args()
    if given.kinds:
        check_names("type", given.kinds, {kind for kind, _ in cells()})
    given.output.mkdir(parents=True, exist_ok=True)
    file = given.output / "rows.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    rows = {(row["type"], row["asked"]): row for row in map(json.loads, lines)}
    if not given.table and not given.docs:
        waiting = [
            cell
            for cell in cells()
            if (
                (not given.task or cell[1] in given.task)
                and (cell[0] in given.kinds if given.kinds else rows.get(cell, OLD).get("earlier"))
            )
            or (cell in rows and rows[cell]["status"] in given.again)
        ]
        waiting.sort(key=lambda cell: cell in rows)  # what has no row yet comes first
        with contextlib.closing(run(waiting, given.output, given.jobs)) as results:
            for row in results:
                rows[row["type"], row["asked"]] = row
                with file.open("a") as out:
                    out.write(json.dumps(row) + "\n")
                print(f"{row['status']:10} {row['type']:28} {row['task']:22} {row['line'][:130]}")
                sys.stdout.flush()
    if given.docs:
        write_page(
            list(rows.values()),
            len(list(cells())),
            Path(__file__).parents[1] / "docs" / "coverage.md",
        )
    console = Console(width=200, markup=False, highlight=False)
    console.print(counted(list(rows.values())))
    bad = {"unclear", "traceback", "wrong"}
    for row in sorted(rows.values(), key=lambda r: (r["status"], r["type"])):
        if row["status"] in bad | {"timeout"}:
            console.print(f"{row['status']}: {row['type']} {row['task']}: {row['line'][:200]}")
    sys.exit(any(row["status"] in bad for row in rows.values()))


if __name__ == "__main__":
    run_main(main)
