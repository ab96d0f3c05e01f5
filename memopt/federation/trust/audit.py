"""The audit log: one JSON line per decision, each holding the hash of the line before it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from pathlib import Path

from memopt.federation.limits import canonical_json
from memopt.files import open_plain

_START = "0" * 64
# An entry holds a few names and hashes and at most 2,000 characters of a problem.
_LONGEST_LINE = 64 * 1024


class AuditLog:
    """Appends to a file; a line cut short by a crash is kept and the chain goes on after it."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._file = os.fdopen(open_plain(self._path, flags), "a+b")
        self._last = _START
        # Only the end is read: the log of years is not loaded to go on with it.
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - _LONGEST_LINE))
        data = self._file.read()
        if data and not data.endswith(b"\n"):
            self._file.write(b"\n")
            self._file.flush()
        lines = data.splitlines()
        if lines:
            self._last = hashlib.sha256(lines[-1]).hexdigest()

    def write(self, event: str, **details: object) -> None:
        """Append one event; it is on disk when this returns. A full disk is not an error here:
        the decision stands, and standard error tells of the gap."""
        with self._lock:
            entry = {"at": round(time.time(), 3), "event": event, **details, "before": self._last}
            line = canonical_json({k: v for k, v in entry.items() if v is not None})
            try:
                self._file.write(line + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError as error:
                import sys

                print(f"audit log: {error.strerror}: {line.decode()}", file=sys.stderr)
                return
            self._last = hashlib.sha256(line).hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def check_audit(path: str | Path) -> list[str]:
    """Return one line for each place where the log was changed, cut or reordered."""
    problems = []
    before = _START
    with Path(path).open("rb") as file:
        for number, line in enumerate((each.rstrip(b"\r\n") for each in file), 1):
            try:
                claimed = json.loads(line)["before"]
            except (ValueError, KeyError, TypeError):
                problems.append(f"line {number} is not an entry")
                claimed = before
            if claimed != before:
                problems.append(f"line {number} does not follow line {number - 1}")
            before = hashlib.sha256(line).hexdigest()
    return problems
