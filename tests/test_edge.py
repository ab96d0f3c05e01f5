"""The edge install: encoding needs numpy, tokenizers and a runtime; the rest says its name."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from memopt.bundle import Bundle
from memopt.extras import pip_command

pytestmark = pytest.mark.usefixtures("unmeasured")
ROOT = Path(__file__).parent.parent
# What `pip install memopt[cpu]` does not bring, made impossible to import.
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"pyarrow", "ml_dtypes", "torch", "pandas", "lancedb"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def edge(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has only what the edge install has."""
    command = [sys.executable, "-c", WITHOUT + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)


def memopt(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line there."""
    return edge("from memopt.cli import main; main()", *arguments)


@pytest.mark.parametrize("ending", [".npy", ".jsonl"])
def test_the_command_line_embeds_without_pyarrow(
    minilm: Bundle, tmp_path: Path, ending: str
) -> None:
    """A .txt becomes a .npy or .jsonl file of vectors."""
    source, out = tmp_path / "in.txt", tmp_path / f"out{ending}"
    source.write_text("a cat\na dog\n")
    done = memopt("embed", str(minilm.path), "-i", str(source), "-o", str(out), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    if ending == ".npy":
        assert np.load(out).shape == (2, 384)
    assert "2 vectors of 384" in done.stdout


def test_encoding_imports_nothing_heavy(minilm: Bundle) -> None:
    """One vector loads numpy, onnxruntime, tokenizers, protobuf and the standard library."""
    code = """
from memopt import ArrowEngine
with ArrowEngine(sys.argv[1], device="cpu") as engine:
    engine.encode(["a cat"])
tops = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(*sorted(t for t in tops if not t.startswith("_")))
"""
    done = edge(code, str(minilm.path))
    loaded = set(done.stdout.split())
    assert loaded, done.stderr
    # protobuf (google) only where the optimized graph is not cached yet.
    assert loaded <= {"google", "memopt", "numpy", "onnxruntime", "tokenizers"}


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["embed", "BUNDLE", "-i", "in.txt", "-o", "TMP/out.parquet"], "arrow"),
        (["embed", "BUNDLE", "-i", "TMP/in.parquet", "-o", "TMP/out.npy"], "arrow"),
        (["convert", "minilm", "-o", "TMP/new"], "arrow"),
        (["export", "BUNDLE"], "arrow"),
        (["memory", "search", "TMP/notes", "cat"], "memory"),
        (["sync", "keygen", "TMP/keys"], "federation"),
    ],
    ids=["parquet out", "parquet in", "convert", "export", "memory", "sync"],
)
def test_what_needs_more_says_so_in_one_line(
    minilm: Bundle, tmp_path: Path, arguments: list[str], extra: str
) -> None:
    """The line has what is missing, what for and the command that installs it; nothing is left."""
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    names = {"BUNDLE": str(minilm.path), "TMP": str(tmp_path)}
    given = [a.replace("BUNDLE", names["BUNDLE"]).replace("TMP", names["TMP"]) for a in arguments]
    done = memopt(*given)
    assert done.returncode == 1, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f"[{extra}]'")
    assert [p.name for p in tmp_path.iterdir()] == ["in.parquet"]


def test_arrow_output_says_so_too(minilm: Bundle) -> None:
    """`output="arrow"` names the extra."""
    code = """
from memopt import ArrowEngine
with ArrowEngine(sys.argv[1], device="cpu") as engine:
    engine.encode(["a cat"], output="arrow")
"""
    done = edge(code, str(minilm.path))
    assert "MissingExtra: pyarrow is needed to return Arrow arrays" in done.stderr


def test_every_extra_that_is_hinted_at_exists() -> None:
    """The names in the hints are those of pyproject.toml, and the command names where memopt is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    assert "pyarrow" not in str(project["dependencies"])
    for file in (ROOT / "memopt").rglob("*.py"):
        for name in re.findall(r'require\([^)]*extra="(\w+)"', file.read_text(encoding="utf-8")):
            assert name in extras, f"{file}: {name}"
    assert " install " in pip_command("cpu")


def test_the_wheel_carries_every_known_model_and_no_bundle() -> None:
    """What is shipped of models/ is its YAML files, all of them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shipped = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert set(shipped) == {f"models/{p.name}" for p in (ROOT / "models").glob("*.yaml")}
