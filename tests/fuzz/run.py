"""Fuzz one target or all: ``python tests/fuzz/run.py [TARGET...] -s SECONDS``.

Inputs are kept that reach lines of memopt which none before them reached, and changed further. What
fails is written to ``--findings``, one file for each place, and the run goes on; a crash of the
process (each target runs in its own) and an input that takes over a minute are findings too.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

from mutate import mutate  # noqa: E402
from targets import TARGETS, Target, scratch  # noqa: E402

from memopt.errors import MemoptError  # noqa: E402

CORPUS = Path(__file__).parent / "corpus"
_SLOWEST = 60  # seconds one input may take
_MEMORY = 6 << 30  # bytes of address space beyond what the imports took


class Reached:
    """Which lines of memopt were run."""

    def __init__(self) -> None:
        self.lines: set[tuple[CodeType, int]] = set()
        self._inside = f"{ROOT}/memopt/"

    def __enter__(self) -> Reached:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: object, event: str, argument: object) -> object:
        code = frame.f_code  # type: ignore[attr-defined]
        return self._line if code.co_filename.startswith(self._inside) else None

    def _line(self, frame: object, event: str, argument: object) -> object:
        if event == "line":
            self.lines.add((frame.f_code, frame.f_lineno))  # type: ignore[attr-defined]
        return self._line


def corpus(target: Target) -> list[bytes]:
    """The seeds, and what was kept of earlier runs."""
    kept = sorted((CORPUS / target.name).glob("*")) if (CORPUS / target.name).is_dir() else []
    return [*target.seeds(), *(path.read_bytes() for path in kept)]


def attempt(target: Target, data: bytes) -> BaseException | None:
    """Return what the target raised that is none of our errors."""
    try:
        target.run(data)
    except MemoptError:
        return None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - what it may not raise; Rust panics with this
        return error
    return None


def place(error: BaseException) -> str:
    """Name where an error was raised, so that one fault is one finding."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/memopt/" in frame.filename] or list(frames)
    last = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__} at {last}"


def fuzz(target: Target, seconds: float, findings: Path, seed: int) -> int:
    """Run one target in this process; return the number of places that failed."""
    rng, pool, seen = random.Random(seed), corpus(target), set[str]()
    current = findings / f"{target.name}.current"
    ends, tried = time.monotonic() + seconds, 0
    signal.signal(signal.SIGALRM, _too_long)
    with Reached() as reached:
        for data in pool:
            attempt(target, data)
    limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, limit))
    while time.monotonic() < ends:
        data = mutate(rng.choice(pool), pool, rng)
        current.write_bytes(data)
        before = len(reached.lines)
        signal.alarm(_SLOWEST)
        with reached:
            error = attempt(target, data)
        signal.alarm(0)
        tried += 1
        if error is not None and place(error) not in seen:
            seen.add(place(error))
            report(target, data, place(error), error, findings)
        if len(reached.lines) > before and len(data) < 1 << 16:
            pool.append(data)
            if findings != CORPUS:
                keep(target, data, findings)
    current.unlink(missing_ok=True)
    shutil.rmtree(scratch())
    print(f"{target.name}: {tried} inputs, {len(pool)} kept, {len(seen)} findings", flush=True)
    return len(seen)


def keep(target: Target, data: bytes, findings: Path) -> None:
    """Write an input that reached something new, for the corpus."""
    folder = findings / "corpus" / target.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def report(
    target: Target, data: bytes, where: str, error: BaseException | None, findings: Path
) -> None:
    """Write a finding: the input, and how it failed."""
    name = findings / f"{target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
    name.write_bytes(data)
    print(f"FOUND {target.name}: {where}: {str(error)[:200]} ({name})", flush=True)
    if error is not None:
        name.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"an input took over {_SLOWEST} s")


def supervised(target: Target, seconds: float, findings: Path, seed: int) -> int:
    """Run a target in a child; when the child dies that is a finding, and another goes on."""
    ends, found = time.monotonic() + seconds, 0
    while (left := ends - time.monotonic()) > 0:
        child = os.fork()
        if child == 0:
            faulthandler.enable()
            try:
                os._exit(min(fuzz(target, left, findings, seed), 100))
            except BaseException:  # noqa: BLE001 - told by the exit status
                traceback.print_exc()
                os._exit(101)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if 0 <= status <= 100:
            return found + status
        found, seed = found + 1, seed + 1
        current = findings / f"{target.name}.current"
        if not current.is_file():
            raise SystemExit(f"{target.name} cannot be run at all")
        report(target, current.read_bytes(), f"the process ended with {status}", None, findings)
    return found


def main() -> int:
    """Fuzz the targets named, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("-s", "--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--findings", type=Path, default=ROOT / ".cache" / "fuzz")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    arguments.findings.mkdir(parents=True, exist_ok=True)
    chosen = [TARGETS[name] for name in arguments.targets or TARGETS]
    found = [supervised(t, arguments.seconds, arguments.findings, arguments.seed) for t in chosen]
    return 1 if any(found) else 0


if __name__ == "__main__":
    sys.exit(main())
