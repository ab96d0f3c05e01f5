"""Write sparse vectors, or a vector a token, of a file or folder of any size, chunk by chunk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from memopt.errors import ConfigurationError, InputError
from memopt.extras import require
from memopt.files import atomic_path
from memopt.runtimes.inputs import Item, read_items
from memopt.runtimes.vectors import progress

if TYPE_CHECKING:
    import pyarrow as pa

OUTPUTS = (".parquet", ".jsonl")
# Texts encoded and written together.
CHUNK = 512


class ChunkVectors(Protocol):
    """What an engine gives for a chunk: as Arrow, and row by row."""

    def to_arrow(self) -> pa.Array: ...

    def to_lists(self) -> list[Any]: ...


def embed_rows(
    encode: Callable[[Sequence[str]], ChunkVectors],
    source: str,
    output: str | Path,
    *,
    column: str | None = None,
    show_progress: bool = False,
) -> int:
    """Encode every text of ``source`` into ``output``; return how many there were.

    Args:
        encode: gives the vectors of a chunk of texts.
        source, column: as for :func:`memopt.runtimes.inputs.read_items`.
        output: ``.parquet`` or ``.jsonl`` with the columns ``index``, ``input`` and ``vector``;
            written whole or not at all.

    Raises:
        InputError: an input that cannot be used, named by its position, or none at all.
        ConfigurationError: an output ending that is not known, or the input's own file.
    """
    target = _target(Path(output), source)
    items, count = read_items(source, "text", column), 0
    with (
        progress(None, show_progress) as advance,
        atomic_path(target) as path,
        _writer(path, target.suffix) as write,
    ):
        while chunk := list(islice(items, CHUNK)):
            texts = _texts(chunk, count)
            write(count, texts, encode(texts))
            count += len(chunk)
            advance(len(chunk))
        if not count:
            raise InputError(f"{source} holds nothing to embed")
    return count


def _texts(chunk: Sequence[Item], first: int) -> list[str]:
    for number, item in enumerate(chunk, start=first):
        if item.problem:
            raise InputError(f"input {number} {item.problem}", fix="correct it, or take it out")
    return [item.value for item in chunk]


def _target(target: Path, source: str) -> Path:
    if target.suffix not in OUTPUTS:
        raise ConfigurationError(
            f"output {target.name!r} has the ending {target.suffix!r}",
            fix=f"choose one of {', '.join(OUTPUTS)}",
        )
    if target.suffix == ".parquet":  # before the work, not after it
        require("pyarrow", extra="arrow", why=f"write {target.name} (not to write .jsonl)")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise ConfigurationError(f"output {target} is the input", fix="give another file")
    return target


Write = Callable[[int, Sequence[str], ChunkVectors], None]


@contextmanager
def _writer(path: Path, suffix: str) -> Iterator[Write]:
    if suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            yield lambda first, texts, found: file.writelines(_lines(first, texts, found))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    opened: list[Any] = []

    def write(first: int, texts: Sequence[str], found: ChunkVectors) -> None:
        index = pa.array(range(first, first + len(texts)), pa.int64())
        columns = {"index": index, "input": pa.array(texts), "vector": found.to_arrow()}
        table = pa.table(columns)
        if not opened:
            opened.append(pq.ParquetWriter(path, table.schema))
        opened[0].write_table(table)

    try:
        yield write
    finally:
        for writer in opened:
            writer.close()


def _lines(first: int, texts: Sequence[str], found: ChunkVectors) -> Iterator[str]:
    for number, (text, vector) in enumerate(zip(texts, found.to_lists(), strict=True), first):
        row = {"index": number, "input": text, "vector": vector}
        yield json.dumps(row, ensure_ascii=False) + "\n"
