"""Models that torch's inductor compiled ahead of time (format torch-aoti), on a GPU or the CPU.

A package is native code. One that was not compiled by this user on this machine is opened only when
its provider is asked for by name.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memopt.bundle import Bundle
from memopt.errors import DeviceError, MemoptError
from memopt.extras import require
from memopt.files import atomic_path, sha256_file
from memopt.jsontext import parse_json
from memopt.runtimes.base import TOKENS_ON_CPU, TOKENS_ON_GPU, Placement, Settings
from memopt.runtimes.cpu import usable_cpus
from memopt.runtimes.packing import at_least_two, pack

if TYPE_CHECKING:
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from memopt.runtimes.base import Feed, Rows

# One batch is copied and packed while the other is computed.
_GPU_STREAMS = 2
# A section of the one buffer that a batch's integers travel in begins at a multiple of so many:
# kernels read 16 bytes at a time.
_ALIGNED = 16
_MOST = 1000  # packages remembered


def pt2_device() -> str:
    """Return what packages are compiled for here: cuda where torch has one, else cpu."""
    torch = require("torch", extra="export", why="run compiled packages")
    return "cuda" if torch.cuda.is_available() else "cpu"


def compiled_for(device: str) -> dict[str, str]:
    """Return what a package compiled here says about where it runs."""
    torch = require("torch", extra="export", why="run compiled packages")
    made = {"device": device, "torch": str(torch.__version__).partition("+")[0]}
    if device == "cuda":
        made["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return made


def probe(name: str) -> str:
    """Say which device compiled packages run on.

    Raises:
        Exception: torch does not work here.
    """
    torch = require("torch", extra="export", why="run compiled packages")
    device = pt2_device()
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    torch.eye(2, device=device) @ torch.eye(2, device=device)
    return f"torch {torch.__version__}, {where}"


def trust(path: Path) -> None:
    """Remember that a package was compiled here, in the user's cache folder."""
    known = list(dict.fromkeys([*_trusted(), sha256_file(path)]))[-_MOST:]
    # Where nothing can be written the provider has to be asked for by name.
    with suppress(OSError, RuntimeError), atomic_path(_trust_file()) as file:
        file.chmod(0o600)
        file.write_text(json.dumps(known), encoding="utf-8")


def trusted(sha256: str) -> bool:
    """Say whether the package with this hash was compiled by this user on this machine.

    >>> trusted("0" * 64)
    False
    """
    return sha256 in _trusted()


def _trust_file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "memopt" / "compiled.json"


def _trusted() -> list[str]:
    try:
        known = parse_json(_trust_file().read_bytes(), "it")
    except (OSError, RuntimeError, MemoptError):
        return []
    return known if isinstance(known, list) else []


class Package:
    """A compiled model: padded feeds in, float32 rows out. Runs may come from several threads.

    Args:
        path: the .pt2 file.
        options: as recorded when it was compiled: device, torch, capability, layout.
        runners: runs at a time.

    Raises:
        DeviceError: it was compiled for another device or version of torch.
    """

    def __init__(self, path: Path, options: Mapping[str, str], runners: int) -> None:
        torch = require("torch", extra="export", why="run compiled packages")
        here = compiled_for(options.get("device", "cpu"))
        other = {n: v for n, v in options.items() if n in here and here[n] != v}
        if other:
            made = ", ".join(f"{name} {value}" for name, value in other.items())
            is_ = ", ".join(f"{name} {here[name]}" for name in other)
            raise DeviceError(
                f"{path.name} was compiled for {made}, and here is {is_}",
                fix="run: memopt export --format torch-aoti",
            )
        from torch._inductor.package import load_package

        self._torch = torch
        self.device = options.get("device", "cpu")
        self._packed = options.get("layout") == "packed"
        first = options.get("first_position")
        self._offset = int(first) if first is not None else None
        self._inputs = options["inputs"].split(",")
        self._run = load_package(str(path), num_runners=runners)
        self._streams = threading.local()

    def run(self, feed: Feed) -> Rows:
        """Run one batch and return its rows as float32, copied to the host."""
        if self.device == "cpu":
            return self._rows(feed)
        with self._torch.cuda.stream(self._stream()):
            return self._rows(feed)

    def _rows(self, feed: Feed) -> Rows:
        count = len(next(iter(feed.values())))
        rows: Rows = self.compute(self.place(feed))[:count].cpu().numpy()
        return rows

    def compute(self, inputs: list[Any]) -> Any:
        """Return the rows, and those that :meth:`place` added, where the package computes."""
        return self._run(*inputs)

    def place(self, feed: Feed) -> list[Any]:
        """Return a padded batch in the package's layout and order, where it computes."""
        enough = at_least_two(feed)
        packed = pack(enough, self._offset) if self._packed else enough
        arrays = [packed[name] for name in self._inputs]
        torch = self._torch
        if self.device == "cpu" or any(array.dtype.kind == "f" for array in arrays):
            return [torch.from_numpy(array).to(self.device) for array in arrays]
        # Integers go in one copy, out of pinned memory.
        sizes = [-(-array.size // _ALIGNED) * _ALIGNED for array in arrays]
        buffer = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
        whole, ends = buffer.numpy(), np.cumsum(sizes)
        for array, end, size in zip(arrays, ends, sizes, strict=True):
            whole[end - size : end - size + array.size] = array.reshape(-1)
        parts = buffer.to(self.device, non_blocking=True).split(sizes)
        return [p[: a.size].view(a.shape) for p, a in zip(parts, arrays, strict=True)]

    def _stream(self) -> Any:
        if not hasattr(self._streams, "own"):
            self._streams.own = self._torch.cuda.Stream()
        return self._streams.own


class AotiBackend:
    """A variant that was compiled ahead of time.

    Raises:
        DeviceError: it was compiled for another device or version of torch, or its file is missing.
        MissingExtra: torch is not installed.
    """

    def __init__(self, bundle: Bundle, candidate: Placement, settings: Settings) -> None:
        from concurrent.futures import ThreadPoolExecutor

        variant = candidate.variant
        path = bundle.file(variant)
        if not path.is_file():
            raise DeviceError(f"{path} is missing", fix=f"run: memopt export {bundle.path}")
        gpu = variant.options.get("device") == "cuda"
        self.streams = settings.streams or (_GPU_STREAMS if gpu else 1)
        self.tokens = TOKENS_ON_GPU if gpu else TOKENS_ON_CPU
        self.step, self.row = 1, 0
        self.inputs = variant.inputs
        self.dimension = bundle.manifest.dimension
        self._output = variant.output
        self._threads = settings.threads or usable_cpus()
        torch = require("torch", extra="export", why="run compiled packages")
        self._torch = torch
        if gpu and settings.memory_limit_mb:
            total = torch.cuda.get_device_properties(0).total_memory / 2**20
            torch.cuda.set_per_process_memory_fraction(min(1.0, settings.memory_limit_mb / total))
        if not gpu:
            torch.set_num_threads(self._threads)
        self._package: Package | None = Package(path, variant.options, self.streams)
        self._pool = ThreadPoolExecutor(self.streams, "memopt-aoti")

    def run(self, feed: Feed) -> Rows:
        """Run one batch."""
        package = self._package
        if package is None:
            raise DeviceError("the package on aoti is closed")
        try:
            return package.run({name: feed[name] for name in self.inputs})
        except RuntimeError as error:
            raise self._told(error) from error

    def _told(self, error: RuntimeError) -> Exception:
        """Return an error that says so where the GPU's memory is what was missing.

        Compiled code reports only which of its calls failed.
        """
        if "out of memory" in str(error) or self._package is None or self._package.device == "cpu":
            return error
        free, total = self._torch.cuda.mem_get_info()
        if free > total * 0.02 + (64 << 20):
            return error
        return MemoryError(f"CUDA out of memory ({free >> 20} MB free): {error}")

    def submit(self, feed: Feed) -> Future[Rows]:
        """Run one batch beside the caller."""
        return self._pool.submit(self.run, feed)

    def run_all(self, feed: Feed) -> dict[str, NDArray[Any]]:
        """Return the one output that was compiled, by name."""
        return {self._output: self.run(feed)}

    def free(self) -> None:
        """Give back what torch keeps of the GPU's memory."""
        if self._package is not None and self._package.device == "cuda":
            self._torch.cuda.empty_cache()

    def info(self) -> dict[str, Any]:
        """Return what runs where."""
        device = self._package.device if self._package is not None else "none"
        where = self._torch.cuda.get_device_name() if device == "cuda" else "CPU"
        return {
            "runtime": f"torch {self._torch.__version__} (compiled)",
            "threads": self._threads,
            "streams": self.streams,
            "nodes": {f"inductor-{device}": 1},
            "processor": where,
        }

    def close(self) -> None:
        """Drop the package; a run that another thread is in ends first."""
        self._pool.shutdown(wait=False)
        self._package = None
