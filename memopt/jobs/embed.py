"""Embed a data set: fragment by fragment, each committed once, in as many workers as there are."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memopt.bundle import open_bundle
from memopt.checkpoints import Checkpoints, stored_state
from memopt.errors import ConfigurationError, InputError
from memopt.extras import require
from memopt.files import atomic_path, lock_plain
from memopt.jobs.crew import Crew, Workers
from memopt.jobs.destinations import PARTS, Destination, open_destination
from memopt.jobs.places import is_url
from memopt.jobs.source import INDEX, VECTOR, JobSource, kept_schema, plan
from memopt.jobs.worker import EmbedTask
from memopt.progress import Progress, silent

ENGINES = ("local", "ray")
MANIFEST, FAILURES = "manifest.json", "failures.jsonl"
_NOTES, _SPOOL, _LOCK = "fragments", "spool", "lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """What :func:`embed_job` did, or, of a dry run, would do."""

    destination: str
    job: str  # the folder with the manifest and what failed
    rows: int
    fragments: int
    vectors: int = 0
    failures: int = 0
    resumed: int = 0  # fragments that an earlier run had committed
    ignored: int = 0  # files of a folder that are of no kind that is read
    seconds: float = 0.0
    opening: float = 0.0  # of these seconds, until the first worker was ready
    rows_per_second: float = 0.0  # of the rows of this run
    device: dict[str, Any] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)
    stored: dict[str, int] | None = None  # of a memory store: added, already


def embed_job(
    source: str,
    destination: str,
    bundle: str | Path,
    *,
    to: str = "auto",
    column: str | None = None,
    keep: Sequence[str] | None = None,
    engine: str = "local",
    workers: int = 1,
    threads: int | None = None,
    address: str | None = None,
    fragment_rows: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
    on_progress: Progress = silent,
    **options: Any,
) -> JobReport:
    """Encode every row of ``source`` into ``destination``.

    Beside the destination, of an URL in the folder of now, a folder ``NAME.job`` says what is
    done; it stays, with the manifest of all parts and the rows that could not be encoded.

    Args:
        source: a file, a folder or an URL: Parquet, CSV, JSON lines, text, Lance, media.
        destination: a folder that is not there yet, or an URL with nothing below (``s3://...``);
            a memory store may be there.
        bundle: what encodes.
        to: parquet (a folder of files), lance, memory, or auto: lance for a name that ends so.
        column: what is encoded; None takes a usual name.
        keep: the columns that go along; None takes all.
        engine: ``local``, processes of this machine, or ``ray``, actors of a cluster.
        workers: how many; the threads of all of them share the machine.
        threads: of one worker; None gives one worker all cores, several an equal part each.
        address: of a Ray cluster; None makes one of this machine.
        fragment_rows: rows of one unit of work: what a kill may cost each worker, twice.
        resume: go on with what a killed run left; also where it left nothing.
        dry_run: count only; nothing is written.
        on_progress: told how many rows are done, of how many.
        options: device, variant, strict, batch_size, normalize, prompt, prompt_name, dimension,
            as of :func:`memopt.runtimes.embed.embed`.

    Raises:
        InputError: a source that cannot be read, that differs from the one to resume, or of which
            no row could be encoded.
        ConfigurationError: settings that do not go together; a job at work on the destination.
        MissingExtra: what a source, a destination or an engine needs is not installed.
    """
    begin = time.perf_counter()
    opened = open_bundle(bundle)
    modality = opened.manifest.modality
    require("pyarrow", extra="arrow", why="run a job")
    target = open_destination(destination, to)
    home = target.home
    _check(engine, address, workers, target.kind, modality)
    cut: dict[str, Any] = {"column": column, "keep": keep, "rows": fragment_rows}
    if dry_run:
        planned = plan(source, modality, **cut)
        return _report(target, planned, seconds=time.perf_counter() - begin)
    _refuse_begun(target, resume)
    home.mkdir(parents=True, exist_ok=True)
    lock = lock_plain(home / _LOCK)
    if lock is None:
        raise ConfigurationError(
            f"another process is at work on {target.place}", fix="wait for it, or end it"
        )
    with lock:
        planned = plan(source, modality, spool=home / _SPOOL, **cut)
        task = EmbedTask(
            source=planned,
            bundle=str(opened.path.absolute()),
            parts=target.parts,
            kind=target.kind,
            threads=threads if threads or workers == 1 else _share(workers),
            **options,
        )
        job = _Job(target, planned, task, on_progress)
        return job.run(lambda: _workers(engine, task, workers, address), begin)


def _check(engine: str, address: str | None, workers: int, kind: str, modality: str) -> None:
    if engine not in ENGINES:
        raise ConfigurationError(f"engine {engine!r}", fix=f"choose {' or '.join(ENGINES)}")
    if engine == "ray":
        require("ray", extra="ray", why="run a job on a cluster")
    elif address:
        raise ConfigurationError(f"address {address!r} is of a cluster", fix="add --engine ray")
    if workers < 1:
        raise ConfigurationError(f"{workers} workers", fix="give 1 or more")
    if kind == "memory" and modality != "text":
        raise ConfigurationError(
            f"a job of {modality}s writes no memory store", fix="use: memopt memory add"
        )


def _share(workers: int) -> int:
    from memopt.runtimes.cpu import usable_cpus

    return max(1, usable_cpus() // workers)


def _refuse_begun(target: Destination, resume: bool) -> None:
    begun = (target.home / _NOTES).exists()
    if begun and not resume:
        raise ConfigurationError(
            f"{target.home} is of a job that was begun", fix="go on with --resume, or delete it"
        )
    if not begun and target.exists():
        raise ConfigurationError(f"{target.place} is there already", fix="give another path")


def _workers(engine: str, task: EmbedTask, count: int, address: str | None) -> Workers:
    if engine == "ray":
        from memopt.jobs.cluster import Actors

        return Actors(task, count, address)
    from memopt.jobs.local import Processes

    return Processes(task, count)


class _Job:
    """One run over the fragments that are not committed yet."""

    def __init__(
        self,
        target: Destination,
        source: JobSource,
        task: EmbedTask,
        on_progress: Progress,
    ) -> None:
        self._target, self._home = target, target.home
        self._source, self._task, self._tell = source, task, on_progress
        self._notes: Checkpoints | None = None
        self._done: dict[int, dict[str, Any]] = {}
        self._device: dict[str, Any] = {}
        self._state: dict[str, Any] = {}
        self._ready_at: float | None = None
        if not source.rows:
            raise InputError(f"{source.place} holds nothing to embed")

    def run(self, workers: Callable[[], Workers], begin: float) -> JobReport:
        if state := stored_state(self._home / _NOTES):
            # The model is opened later, and not to find that nothing is left to do.
            self._open_notes(state.get("made_by", {}))
        resumed = len(self._done)
        restarts: list[str] = []
        left = [f for f in self._source.fragments if f.number not in self._done]
        if left:
            restarts = self._work(workers(), left)
        stored = None if self._finished() else self._finish()
        notes = list(self._done.values())
        seconds = time.perf_counter() - begin
        fresh = sum(fragment.rows for fragment in left)
        return _report(
            self._target,
            self._source,
            vectors=sum(note["vectors"] for note in notes),
            failures=sum(len(note["failures"]) for note in notes),
            resumed=resumed,
            seconds=seconds,
            opening=(self._ready_at or begin) - begin,
            rows_per_second=fresh / seconds,
            device=self._device,
            events=sorted({event for note in notes for event in note["events"]}),
            restarts=restarts,
            stored=stored,
        )

    def _work(self, workers: Workers, left: Sequence[Any]) -> list[str]:
        crew = Crew(workers, self._greet)
        rows = self._source.rows - sum(fragment.rows for fragment in left)
        try:
            for fragment, note in crew.run(left):
                assert self._notes is not None
                self._notes.write(fragment.number, note)
                self._done[fragment.number] = note
                rows += fragment.rows
                self._tell(rows, self._source.rows)
        finally:
            workers.close()
        return crew.restarts

    def _greet(self, info: dict[str, Any]) -> None:
        """Take a worker, unless its vectors would be others than those that are there."""
        self._open_notes(info["identity"])
        self._device = info["device"]
        self._ready_at = self._ready_at or time.perf_counter()

    def _open_notes(self, made_by: dict[str, Any]) -> None:
        self._state = state = {
            "source": self._source.fingerprint,
            "column": self._source.column,
            "keep": list(self._source.keep),
            "fragments": [len(self._source.fragments), self._source.fragments[0].rows],
            "to": self._target.kind,
            "options": self._options(),
            "made_by": made_by,
        }
        if is_url(self._target.place):
            # Its job's folder is not beside it: another of the same name would share it.
            state["destination"] = self._target.place
        self._notes = Checkpoints(
            self._home / _NOTES,
            state,
            what=self._target.place,
            anew=f"delete {self._home} to begin anew",
        )
        if not self._done:
            self._done = dict(self._notes)
            self._target.check(self._done, self._finished())

    def _options(self) -> dict[str, Any]:
        """Return what was asked for and decides about the vectors."""
        names = ("variant", "batch_size", "normalize", "prompt", "prompt_name", "dimension")
        return {name: getattr(self._task, name) for name in names}

    def _finished(self) -> bool:
        return (self._home / MANIFEST).is_file()

    def _finish(self) -> dict[str, int] | None:
        """Make the parts a whole; whatever was done of it before a kill is done once."""
        notes = {number: self._done[number] for number in sorted(self._done)}
        failures = [failure for note in notes.values() for failure in note["failures"]]
        with atomic_path(self._home / FAILURES) as path, path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(f, ensure_ascii=False) + "\n" for f in failures)
        if len(failures) == self._source.rows:
            first = failures[0]
            raise InputError(
                f"no row of {self._source.place} could be encoded; the first "
                f"({first['where']}) {first['reason']}",
                fix=f"see {self._home / FAILURES}; another --column?",
            )
        stored = self._target.finish(self._task, self._schema(), notes)
        self._write_manifest(list(notes.values()), len(failures))
        for folder in (_SPOOL, PARTS):
            shutil.rmtree(self._home / folder, ignore_errors=True)
        return asdict(stored) if stored else None

    def _schema(self) -> Any:
        import pyarrow as pa

        vector = pa.list_(pa.float32(), self._state["made_by"]["dimension"])
        index = pa.field(INDEX, pa.int64())
        return pa.schema([*kept_schema(self._source), index, pa.field(VECTOR, vector)])

    def _write_manifest(self, notes: Sequence[dict[str, Any]], failures: int) -> None:
        files = [{n: note[n] for n in ("file", "first", "rows", "vectors", "bytes", "sha256")}
                 for note in notes]  # fmt: skip
        whole = {
            **self._state,
            "rows": self._source.rows,
            "vectors": self._source.rows - failures,
            "failures": failures,
            "parts": files,
        }
        with atomic_path(self._home / MANIFEST) as path:
            path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _report(target: Destination, source: JobSource, **values: Any) -> JobReport:
    return JobReport(
        destination=target.place,
        job=str(target.home),
        rows=source.rows,
        fragments=len(source.fragments),
        ignored=source.ignored,
        **values,
    )
