"""Which files were hashed before: a file of the same size, time and place is not read again.

What was found right is remembered for this process, and for large files in the user's cache folder
(``$XDG_CACHE_HOME/memopt``, or ``~/.cache/memopt``), not in the bundle: whoever can change a bundle
must not be able to say that it is unchanged.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from memopt.errors import MemoptError
from memopt.files import atomic_path, sha256_file
from memopt.jsontext import parse_json

_KNOWN: dict[str, list[Any]] = {}
# Smaller files are hashed anew in every process: that takes some 5 ms.
_REMEMBERED_BYTES = 8 << 20
_MOST = 1000  # files remembered


def has_hash(path: Path, sha256: str, *, again: bool = False) -> bool:
    """Whether a file has this SHA-256, read only when it is not known to.

    Args:
        again: read it whatever is known.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a"
    >>> _ = path.write_bytes(b"")
    >>> has_hash(path, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    True
    """
    path = path.absolute()
    stat = path.stat()
    stamp: list[Any] = [stat.st_size, stat.st_mtime_ns, stat.st_ino, sha256]
    large = stat.st_size >= _REMEMBERED_BYTES
    if not again:
        if _KNOWN.get(str(path)) == stamp:
            return True
        if large and _remembered().get(str(path)) == stamp:
            _KNOWN[str(path)] = stamp
            return True
    if sha256_file(path) != sha256:
        return False
    _KNOWN[str(path)] = stamp
    if large:
        _remember(str(path), stamp)
    return True


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "memopt" / "verified.json"


def _remembered() -> dict[str, Any]:
    try:
        known = parse_json(_cache().read_bytes(), "it")
    except (OSError, RuntimeError, MemoptError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(path: str, stamp: list[Any]) -> None:
    known = {**_remembered(), path: stamp}
    # Where nothing can be written every process hashes for itself.
    with contextlib.suppress(OSError, RuntimeError), atomic_path(_cache()) as file:
        file.chmod(0o600)
        file.write_text(json.dumps(dict(list(known.items())[-_MOST:])), encoding="utf-8")
