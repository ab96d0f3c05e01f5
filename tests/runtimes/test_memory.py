"""What an engine on OpenVINO leaves resident, measured in a process of its own."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memopt.bundle import Bundle
from memopt.runtimes.heap import drop_pages
from memopt.runtimes.openvino import _PRIMITIVES_KEPT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
# What the process says: MB of the weights' file that are resident, and the bound of oneDNN's cache.
SCRIPT = """
import json, os, re, sys
from pathlib import Path
from memopt import ArrowEngine
def mapped():
    text = Path("/proc/self/smaps").read_text()
    parts = re.findall(r"openvino_model.bin\\n(?:.*\\n)*?Rss: +(\\d+)", text)
    assert parts, "the weights are not mapped"
    return sum(map(int, parts)) / 1024
with ArrowEngine(sys.argv[1], device="openvino", variant="openvino-fp32", threads=1) as engine:
    opened = mapped()
    engine.encode(["a cat", "a longer sentence about a dog"])
    primitives = os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    told = {"opened": opened, "after": mapped(), "kept": int(primitives)}
print(json.dumps(told))
"""


def run(bundle: Bundle, **environment: str) -> dict[str, object]:
    command = [sys.executable, "-c", SCRIPT, str(bundle.path)]
    variables = {**os.environ, **environment}
    if not environment:
        variables.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    told: dict[str, object] = json.loads(done.stdout)
    return told


def test_weights_that_were_packed_are_not_resident_twice(minilm: Bundle, unmeasured: None) -> None:
    """The first batch packs them; the mapped file they were read from is then given back."""
    told = run(minilm)
    size = minilm.file(minilm.variant("openvino-fp32")).with_suffix(".bin").stat().st_size / 2**20
    assert float(str(told["after"])) < size / 10
    # Else nothing was read, and this test tells nothing.
    assert float(str(told["opened"])) > size / 2
    assert told["kept"] == int(_PRIMITIVES_KEPT[1])


def test_a_cache_somebody_set_is_left_as_it_is(minilm: Bundle, unmeasured: None) -> None:
    """Who bounds oneDNN's kernels otherwise had a reason."""
    assert run(minilm, ONEDNN_PRIMITIVE_CACHE_CAPACITY="77")["kept"] == 77


def test_dropped_pages_hold_what_they_held(tmp_path: Path) -> None:
    """A file mapped for reading says the same afterwards; one mapped for writing is not touched."""
    path = tmp_path / "weights.bin"
    path.write_bytes(b"1" * (1 << 20))
    with path.open("r+b") as file:
        reading = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        private = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        private[:3] = b"own"  # in memory only: dropping this page would lose it
        drop_pages(path)
        assert reading[:3] == b"111"
        assert private[:3] == b"own"
        reading.close()
        private.close()
