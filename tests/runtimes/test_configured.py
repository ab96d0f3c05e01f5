"""The settings decide how an engine is opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from memopt.bundle import Bundle
from memopt.config import load_config
from memopt.errors import ConfigurationError, DeviceError
from memopt.runtimes.configured import open_engine


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_file_environment_and_arguments_decide_the_device(
    minilm: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """memopt.yaml says cpu, the environment overrules it, the argument overrules both."""
    Path("memopt.yaml").write_text("device: {target: cpu}")
    with open_engine(minilm) as engine:
        assert engine.device_info()["device"] == "cpu"
    monkeypatch.setenv("MEMOPT_DEVICE__TARGET", "openvino")
    with open_engine(minilm) as engine:
        assert engine.device_info()["device"] == "openvino"
    with open_engine(minilm, "cpu") as engine:
        assert engine.device_info()["device"] == "cpu"
    monkeypatch.setenv("MEMOPT_DEVICE__TARGET", "npu")
    with pytest.raises(ConfigurationError, match="MEMOPT_DEVICE__TARGET"):
        open_engine(minilm)


@pytest.mark.parametrize(
    "settings", [{"device": {"fallback_enabled": False}}, {"gpu": {"fallback_to_cpu": False}}]
)
def test_a_gpu_that_is_not_there_is_an_error_where_falling_back_is_off(
    minilm: Bundle, settings: dict[str, dict[str, bool]]
) -> None:
    """Either switch turns the hand-over to the CPU into a DeviceError that names cuda."""
    with open_engine(minilm, "cuda", "onnx-fp32") as engine:
        if not engine.events:
            pytest.skip("this machine has CUDA")
    with pytest.raises(DeviceError, match="cuda"):
        open_engine(minilm, "cuda", "onnx-fp32", config=load_config(None, settings))


def test_the_torch_backend_is_compiled_in_the_mode_of_the_settings(tiny: Bundle) -> None:
    """device_info tells the mode; Intel's extension, where it is missing, is named."""
    config = load_config(None, {"cpu": {"use_compile": True, "compile_mode": "max-autotune"}})
    with open_engine(tiny, "torch", config=config) as engine:
        assert engine.device_info()["compiled"] == "max-autotune"
    with open_engine(tiny, "torch", config=load_config()) as engine:
        assert engine.device_info()["compiled"] is None
    with pytest.raises(DeviceError, match="intel_extension_for_pytorch"):
        open_engine(tiny, "torch", config=load_config(None, {"cpu": {"use_ipex": True}}))
