"""Embed a file or folder of any size into a file, in parts that survive a kill.

Each part is written beside the output and renamed into place; the output itself appears at the
end, whole. A run that was killed goes on after its last whole part.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from memopt.checkpoints import Checkpoints
from memopt.errors import ConfigurationError, InputError, MemoptError
from memopt.extras import require
from memopt.files import atomic_path
from memopt.runtimes.engine import ArrowEngine
from memopt.runtimes.inputs import Item, read_items
from memopt.runtimes.vectors import progress, to_arrow

if TYPE_CHECKING:
    from numpy.typing import NDArray

OUTPUTS = (".parquet", ".npy", ".jsonl")
# Inputs per part: a few seconds of work on a small CPU is what a kill may cost.
PART = {"text": 1024, "image": 128, "audio": 32}
_PARTS = 2  # how parts are written; 1 was Parquet


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What :func:`embed` did."""

    output: str
    inputs: int
    vectors: int
    dimension: int
    resumed: int  # inputs that an earlier, killed run had done
    skipped: list[dict[str, Any]] = field(default_factory=list)


def embed(
    engine: ArrowEngine,
    source: str,
    output: str | Path,
    *,
    column: str | None = None,
    batch_size: int | None = None,
    normalize: bool = True,
    resume: bool = False,
    on_error: Literal["fail", "skip"] = "fail",
    show_progress: bool = False,
    prompt: str | None = None,
    prompt_name: str | None = None,
    dimension: int | None = None,
) -> Embedded:
    """Encode every input of ``source`` into ``output``; memory does not grow with either.

    Args:
        engine: what encodes.
        source, column: as for :func:`memopt.runtimes.inputs.read_items`.
        output: ``.parquet`` or ``.jsonl`` with the columns ``index`` (position in the source),
            ``input`` (text or path, null for bytes) and ``vector``; or ``.npy``, float32
            (inputs, dimension).
        resume: go on with what a killed run left, after checking that it had the same inputs
            and the same variant.
        on_error: ``skip`` leaves out inputs that cannot be read and reports them (in ``.npy``
            their rows are NaN, so that rows still count inputs).
        prompt, prompt_name, dimension: as of :meth:`memopt.ArrowEngine.encode`.

    Raises:
        InputError: an input that cannot be used, or what is there to resume differs.
        ConfigurationError: an output ending that is not known, or the input's own file.
    """
    target = _target(output, source, on_error)
    modality = engine.bundle.manifest.modality
    items = read_items(source, modality, column)
    how: dict[str, Any] = {"normalize": normalize, "prompt": engine.prompt(prompt, prompt_name)}
    width = engine.shortened(dimension)
    parts = _Parts(target, engine, {**how, "dimension": width}, resume)

    def encode(chunk: list[Item], first: int) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
        encoded = engine.encode_each(
            [item.value for item in chunk],
            batch_size=batch_size,
            dimension=width,
            part=True,  # the last chunk may be one row
            **how,
        )
        failures = {i: chunk[i].problem or why for i, why in sorted(encoded.failures.items())}
        if failures and on_error == "fail":
            raise _refusal(failures, first)
        return encoded.vectors, [
            {"index": first + i, "input": chunk[i].label, "reason": why}
            for i, why in failures.items()
        ]

    count = resumed = 0
    skipped: list[dict[str, Any]] = []
    try:
        with progress(None, show_progress) as advance:
            for number, chunk in enumerate(_chunks(items, PART[modality])):
                done = parts.done(number, chunk)
                if done is None:
                    vectors, done = encode(chunk, count)
                    parts.write(number, chunk, count, vectors, done)
                else:
                    resumed += len(chunk)
                skipped += done
                count += len(chunk)
                advance(len(chunk))
        if not count:
            raise InputError(f"{source} holds nothing to embed")
        parts.assemble(count)
    except MemoptError:
        # What failed will fail again: leave nothing, unless parts are what was asked for.
        if not resume:
            parts.remove()
        raise
    parts.remove()
    return Embedded(
        output=str(target),
        inputs=count,
        vectors=count - len(skipped),
        dimension=width,
        resumed=resumed,
        skipped=skipped,
    )


def _target(output: str | Path, source: str, on_error: str) -> Path:
    target = Path(output)
    if target.suffix not in OUTPUTS:
        raise ConfigurationError(
            f"output {target.name!r} has the ending {target.suffix!r}",
            fix=f"choose one of {', '.join(OUTPUTS)}",
        )
    if target.suffix == ".parquet":  # before the work, not after it
        require("pyarrow", extra="arrow", why=f"write {target.name} (not to write .npy or .jsonl)")
    if on_error not in ("fail", "skip"):
        raise ConfigurationError(f"on_error is {on_error!r}", fix="choose fail or skip")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise ConfigurationError(f"output {output} is the input", fix="give another file")
    return target


def identity(engine: ArrowEngine, how: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides about the vectors: the variant, its file's hash and the settings.

    >>> from memopt.runtimes.testing import fake_engine
    >>> identity(fake_engine(), {"normalize": True, "prompt": None})
    {'variant': 'fake', 'sha256': None, 'normalize': True}
    """
    manifest, name = engine.bundle.manifest, engine.device_info()["variant"]
    file = manifest.variants[name].file if name in manifest.variants else "weights.parquet"
    return {
        "variant": name,
        "sha256": manifest.files.get(file, {}).get("sha256"),
        # As before there were prompts, so that what was begun then goes on.
        **{key: value for key, value in how.items() if value is not None},
    }


class _Parts:
    """The finished parts of one output, in a hidden folder beside it."""

    def __init__(
        self, target: Path, engine: ArrowEngine, how: dict[str, Any], resume: bool
    ) -> None:
        self._target = target
        self._dimension: int = how["dimension"]
        folder = target.parent / f".{target.name}.parts"
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        state = {**identity(engine, how), "parts": _PARTS}
        anew = "run without --resume to start anew"
        self._notes = Checkpoints(folder, state, what=str(target), anew=anew)

    def done(self, number: int, chunk: Sequence[Item]) -> list[dict[str, Any]] | None:
        """Return what part ``number`` skipped, None when it is still to be made."""
        record = self._notes.read(number)
        if record is None:
            return None
        if record.get("inputs") != _digest(chunk):
            raise InputError(
                f"the inputs of the unfinished {self._target} have changed",
                fix="run without --resume to start anew",
            )
        skipped: list[dict[str, Any]] = record["skipped"]
        return skipped

    def write(
        self,
        number: int,
        chunk: Sequence[Item],
        first: int,
        vectors: NDArray[np.float32],
        skipped: list[dict[str, Any]],
    ) -> None:
        """Write one part; its note comes last and makes it count."""
        with atomic_path(self._notes.path(number, ".npy")) as path, path.open("wb") as file:
            np.save(file, vectors)
        record: dict[str, Any] = {"inputs": _digest(chunk), "first": first, "skipped": skipped}
        if self._target.suffix != ".npy":
            record["labels"] = [item.label for item in chunk]
        self._notes.write(number, record)

    def assemble(self, count: int) -> None:
        """Write the output from the parts."""
        write = {".parquet": self._parquet, ".npy": self._npy, ".jsonl": self._jsonl}
        with atomic_path(self._target) as path:
            write[self._target.suffix](path, count)

    def remove(self) -> None:
        """Remove the parts."""
        self._notes.remove()

    def _whole(self) -> Iterator[tuple[dict[str, Any], NDArray[np.float32], NDArray[np.intp]]]:
        """Yield each part's note, its vectors and the rows of it that were not skipped."""
        for number, record in self._notes:
            vectors = np.load(self._notes.path(number, ".npy"), mmap_mode="r")
            keep = np.ones(len(vectors), bool)
            keep[[entry["index"] - record["first"] for entry in record["skipped"]]] = False
            yield record, vectors, np.flatnonzero(keep)

    def _parquet(self, path: Path, count: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        writer = None
        for record, vectors, rows in self._whole():
            table = pa.table(
                {
                    "index": pa.array(rows + record["first"], pa.int64()),
                    "input": pa.array([record["labels"][row] for row in rows], pa.string()),
                    "vector": to_arrow(vectors[rows]),
                }
            )
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()

    def _npy(self, path: Path, count: int) -> None:
        with path.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, self._dimension)}
            np.lib.format.write_array_header_1_0(file, header)
            for _, vectors, _ in self._whole():
                file.write(vectors.astype("<f4", copy=False).tobytes())

    def _jsonl(self, path: Path, count: int) -> None:
        with path.open("w", encoding="utf-8") as file:
            for record, vectors, rows in self._whole():
                for row in rows:
                    line = {"index": record["first"] + int(row), "input": record["labels"][row]}
                    # A float32 prints exactly with 9 digits; float64's 17 would double the file.
                    numbers = ", ".join(f"{value:.9g}" for value in vectors[row])
                    text = json.dumps(line, ensure_ascii=False)
                    file.write(f'{text[:-1]}, "vector": [{numbers}]}}\n')


def _chunks(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while chunk := list(islice(items, size)):
        yield chunk


def _digest(chunk: Sequence[Item]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for item in chunk:
        value = item.value
        if isinstance(value, Path):
            value = f"{value} {value.stat().st_size if value.is_file() else None}"
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _refusal(failures: dict[int, str], first: int) -> InputError:
    index = min(failures)
    return InputError(
        f"input {first + index} {failures[index]}", fix="leave it out, or use --on-error skip"
    )
