"""memopt doctor tells what works here and what is in conflict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memopt.bundle import Bundle
from memopt.runtimes.cpu import cgroup_cpu_quota, cpu_features
from memopt.runtimes.providers import PROVIDERS


def doctor(path: Path | None = None, *arguments: str) -> subprocess.CompletedProcess[str]:
    extra = {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [sys.executable, "-m", "memopt", "doctor", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **extra},
        check=False,
    )


def installed(folder: Path, name: str, version: str) -> None:
    """Make pip's record of an installed wheel, which is what importlib.metadata reads."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_json_lists_every_provider_with_a_reason() -> None:
    """The CPU provider was really opened; the others say what is missing."""
    result = doctor(None, "--json")
    found = json.loads(result.stdout)
    providers = {status["name"]: status for status in found["providers"]}
    assert set(providers) == set(PROVIDERS)
    assert providers["cpu"]["usable"]
    assert all(status["detail"] for status in providers.values())
    assert found["features"] == sorted(cpu_features())
    assert 1 <= found["cores"] <= found["cores_of_machine"]
    assert found["memory_total_mb"] > 0
    assert result.returncode == (1 if found["conflicts"] else 0)


def test_both_onnxruntime_wheels_are_a_conflict_with_its_fix(tmp_path: Path) -> None:
    """Exit 1, and the commands that repair it are printed."""
    installed(tmp_path, "onnxruntime-gpu", "1.31.1")
    installed(tmp_path, "onnxruntime", "1.32.0")
    result = doctor(tmp_path)
    assert result.returncode == 1
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in result.stdout
    assert "pip install onnxruntime-gpu" in result.stdout


@pytest.mark.parametrize("code", ["", "raise ImportError('libonnxruntime.so: not found')"])
def test_what_is_left_of_an_uninstalled_wheel_is_told_and_survived(
    code: str, tmp_path: Path, minilm: Bundle
) -> None:
    """doctor names the damage and the repair; an engine says so and runs on OpenVINO."""
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text(code)
    result = doctor(tmp_path, "--json")
    assert result.returncode == 1
    found = json.loads(result.stdout)
    (conflict,) = found["conflicts"]
    assert "onnxruntime" in conflict["problem"]
    assert conflict["fix"] == "run: pip uninstall -y onnxruntime && pip install onnxruntime"
    usable = {status["name"] for status in found["providers"] if status["usable"]}
    assert "openvino" in usable
    assert "cpu" not in usable
    ask = (
        f"import memopt; e = memopt.ArrowEngine({str(minilm.path)!r}, 'cpu'); "
        "print(e.events[0].to, e.encode(['a cat']).shape)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", ask],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
    )
    assert answer.stdout == "openvino (1, 384)\n"


def test_a_cgroup_quota_limits_the_cores(tmp_path: Path) -> None:
    """Version 2 and version 1 files, with and without a limit."""
    assert cgroup_cpu_quota(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_cpu_quota(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    assert cgroup_cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup_cpu_quota(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cgroup_cpu_quota(tmp_path) == 0.5
