"""What of long work is done: numbered notes in a folder, each one whole or not there.

A note is written beside and renamed into place after it is on the disk, so that work which was
killed at any moment goes on with what the notes say.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memopt.errors import InputError
from memopt.files import atomic_path
from memopt.jsontext import parse_json

_STATE = "state.json"


def stored_state(folder: Path) -> dict[str, Any] | None:
    """Return the state that notes were begun with, None where there are none.

    Raises:
        InputError: it is damaged.

    >>> stored_state(Path("/nowhere")) is None
    True
    """
    file = folder / _STATE
    return _read(file, f"delete {folder}") if file.is_file() else None


class Checkpoints:
    """The notes of one piece of work.

    Args:
        folder: of the notes alone; made when absent.
        state: what makes the work the same work: inputs, model, settings.
        what: what the work is, for messages.
        anew: how to begin anew, to end a message with.

    Raises:
        InputError: the folder has notes of work with another state, naming what differs.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "notes"
    >>> notes = Checkpoints(folder, {"model": "a"}, what="out.npy", anew="delete it")
    >>> notes.write(3, {"rows": 2})
    >>> dict(Checkpoints(folder, {"model": "a"}, what="out.npy", anew="delete it"))
    {3: {'rows': 2}}
    >>> Checkpoints(folder, {"model": "b"}, what="out.npy", anew="delete it")
    Traceback (most recent call last):
    ...
    memopt.errors.InputError: the unfinished out.npy was made with another model; delete it
    """

    def __init__(self, folder: Path, state: Mapping[str, Any], *, what: str, anew: str) -> None:
        self.folder, self._anew = folder, anew
        file = folder / _STATE
        if not file.is_file():
            with atomic_path(file) as path:
                path.write_text(json.dumps(state), encoding="utf-8")
            return
        old = _read(file, anew)
        if old != state:
            names = [*state, *(name for name in old if name not in state)]
            differs = ", ".join(n for n in names if old.get(n) != state.get(n))
            raise InputError(f"the unfinished {what} was made with another {differs}", fix=anew)

    def path(self, number: int, suffix: str = ".json") -> Path:
        """Return where the note of a number lies, or a file that goes with it."""
        return self.folder / f"{number:08d}{suffix}"

    def read(self, number: int) -> dict[str, Any] | None:
        """Return the note of a number, None where there is none."""
        file = self.path(number)
        return _read(file, self._anew) if file.is_file() else None

    def write(self, number: int, note: Mapping[str, Any]) -> None:
        """Write a note; once this returns it outlives a crash."""
        with atomic_path(self.path(number)) as path:
            path.write_text(json.dumps(note), encoding="utf-8")

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, note) in the order of the numbers."""
        for file in sorted(self.folder.glob("[0-9]*.json")):
            yield int(file.stem), _read(file, self._anew)

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(file: Path, anew: str) -> dict[str, Any]:
    note = parse_json(file.read_bytes(), str(file), fix=anew)
    if not isinstance(note, dict):
        raise InputError(f"{file} is not a JSON object", fix=anew)
    return note
