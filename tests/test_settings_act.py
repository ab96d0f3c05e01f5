"""Every setting changes what memopt does; one that changes nothing cannot be added unnoticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memopt.config import OptimizationConfig, in_force, load_config
from memopt.federation.client import session
from memopt.federation.delta.compute import compute_delta
from memopt.memory.lifecycle import from_settings as configured
from memopt.quantization.configured import gate_of, recipe_fields
from memopt.quantization.recipe import Recipe
from memopt.runtimes import configured as engines

Values = dict[str, dict[str, Any]]
# section.key -> a value that is not the default.
OTHER: dict[str, Any] = {
    "device.target": "openvino",
    "device.fallback_enabled": False,
    "device.vram_threshold": 0.5,
    "cpu.use_compile": True,
    "cpu.use_ipex": True,
    "cpu.compile_mode": "max-autotune",
    "gpu.use_amp": False,
    "gpu.vram_threshold": 0.4,
    "gpu.fallback_to_cpu": False,
    "quantization.enabled": False,
    "quantization.quant_type": "int4",
    "quantization.calibration_method": "gptq",
    "quantization.per_channel": False,
    "quantization.symmetric": False,
    "quantization.mixed_precision_layers": ["*pooler*"],
    "quantization.cosine_threshold": 0.5,
    "quantization.ppl_threshold": 0.5,
    "consolidation.time_based_enabled": False,
    "consolidation.time_based_schedule": "5 4 * * *",
    "consolidation.pressure_based_enabled": False,
    "consolidation.pressure_threshold_mb": 5,
    "consolidation.hot_memory_threshold": 3,
    "consolidation.cold_memory_age_days": 3,
    "consolidation.batch_size": 3,
    "consolidation.llm_provider": "openai",
    "consolidation.llm_model": "qwen3",
    "consolidation.llm_endpoint": "http://127.0.0.1:9/v1",
    "consolidation.summary_max_length": 80,
    "consolidation.keep_original": False,
    "federation.enable_delta_sync": False,
    "federation.delta_threshold": 0.5,
    "federation.compression_enabled": False,
    "federation.max_retries": 9,
    "federation.timeout_seconds": 9,
}
# What must be chosen besides for the setting to matter.
BESIDES: dict[str, Values] = {
    "quantization.symmetric": {"quantization": {"quant_type": "int4"}},
    "consolidation.llm_model": {"consolidation": {"llm_provider": "ollama"}},
    "consolidation.llm_endpoint": {"consolidation": {"llm_provider": "ollama"}},
}


def merged(*parts: Values) -> Values:
    found: Values = {}
    for part in parts:
        for section, keys in part.items():
            found.setdefault(section, {}).update(keys)
    return found


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMOPT_CONFIG", raising=False)


def engine(config: OptimizationConfig) -> object:
    """How the engine is opened; test_configured.py and test_fallback.py show what each does."""
    opened: dict[str, Any] = {}

    class Recorder:
        def __init__(self, *positional: object, **named: object) -> None:
            opened.update(named, positional=positional)

    before = engines.ArrowEngine
    engines.ArrowEngine = Recorder  # type: ignore[assignment,misc]
    try:
        engines.open_engine("b", config=config)
    finally:
        engines.ArrowEngine = before  # type: ignore[misc]
    return opened


def quantization(config: OptimizationConfig) -> object:
    """The recipe and the gate of memopt quantize."""
    settings = config.quantization
    try:
        recipe = Recipe.from_dict(recipe_fields(settings))
    except ValueError as error:
        return str(error)
    return recipe, gate_of(settings, recipe)


def consolidation(config: OptimizationConfig) -> object:
    """What is condensed, when, and by whom."""
    settings = config.consolidation
    return (
        configured.recipe(settings),
        configured.triggers(settings),
        settings.language_model(),
    )


def federation(config: OptimizationConfig) -> object:
    """The client's settings, and the bytes of a delta."""
    settings = config.federation
    rng = np.random.default_rng(0)
    old = {name: rng.normal(size=4096).astype("float32") for name in "ab"}
    new = {"a": old["a"] * 1.2, "b": old["b"]}
    client = session.client_of("localhost:1", settings, tls=None)
    delta = compute_delta(old, new, session.delta_settings(settings))
    return (
        session.sends_all(settings),
        len(delta.payload),
        delta.kind,
        client._retries.most,
        client._link.timeout,
    )


ACT: dict[str, Callable[[OptimizationConfig], object]] = {
    "device": engine,
    "cpu": engine,
    "gpu": engine,
    "quantization": quantization,
    "consolidation": consolidation,
    "federation": federation,
}


def test_the_walk_knows_every_setting() -> None:
    """A setting that is added must be added here, with what it changes."""
    known = {
        f"{section}.{key}"
        for section, field in OptimizationConfig.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    }
    assert set(OTHER) == known


@pytest.mark.parametrize("name", sorted(OTHER))
def test_a_setting_changes_what_is_done(name: str) -> None:
    """With another value, and nothing else changed, something else happens."""
    section, key = name.split(".")
    besides = BESIDES.get(name, {})
    plain = load_config(None, besides)
    other = load_config(None, merged(besides, {section: {key: OTHER[name]}}))
    assert ACT[section](plain) != ACT[section](other)


@pytest.mark.parametrize("name", sorted(OTHER))
def test_what_is_shown_is_what_is_in_force(name: str, tmp_path: Path) -> None:
    """`config show` shows a chosen value, and read back it changes nothing that is done."""
    section, key = name.split(".")
    config = load_config(None, merged(BESIDES.get(name, {}), {section: {key: OTHER[name]}}))
    path = tmp_path / "shown.yaml"
    path.write_text(in_force(config))
    again = load_config(path)
    assert getattr(getattr(again, section), key) == getattr(getattr(config, section), key)
    assert ACT[section](again) == ACT[section](config)


def test_show_says_where_a_value_is_from_and_what_is_not_in_force(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its file, its variable, its flag; what nothing reads is a comment, with --json null."""
    Path("memopt.yaml").write_text("cpu: {use_compile: true}\ndevice: {target: cpu}\n")
    environment = os.environ | {"MEMOPT_DEVICE": '{"vram_threshold": 0.5}'}
    command = [sys.executable, "-m", "memopt", "config", "show", "--set", "gpu.use_amp=false"]

    def run(*more: str) -> str:
        return subprocess.run(
            [*command, *more], env=environment, check=True, capture_output=True, text=True
        ).stdout

    shown = run().splitlines()
    for line in (
        "  use_compile: true  # memopt.yaml",
        "  target: cpu  # memopt.yaml",
        "  vram_threshold: 0.5  # environment variable MEMOPT_DEVICE",
        "  fallback_enabled: true",
        "  use_amp: false  # argument",
        "  # cosine_threshold: 0.95  # not set: the recipe's own",
        "  ppl_threshold: 0.05",
        "  # llm_model: 'llama3.2:3b'  # no language model is asked",
    ):
        assert line in shown
    document = json.loads(run("--json"))
    assert document["quantization"]["quant_type"] is None
    assert document["quantization"]["enabled"] is True


def test_the_names_of_the_founding_design_are_taken() -> None:
    """ptq is minmax, claude is anthropic, with neither ollama's model nor its endpoint."""
    config = load_config(
        None,
        {
            "quantization": {"calibration_method": "ptq"},
            "consolidation": {
                "llm_provider": "claude",
                "llm_model": "llama3.2:3b",
                "llm_endpoint": "http://localhost:11434",
            },
        },
    )
    assert config.quantization.calibration_method == "minmax"
    assert config.consolidation.language_model() == "anthropic"


def test_without_compression_the_bodies_are_sent_as_they_are() -> None:
    """compression_enabled: false sends at least the bytes of the tensors, and is read as ever."""
    from memopt.federation.delta.compute import apply_delta

    config = load_config(None, {"federation": {"compression_enabled": False}})
    settings = session.delta_settings(config.federation)
    old = {"w": np.zeros(1 << 16, "float32"), "v": np.ones(1 << 18, "float32")}
    new = {"w": np.ones(1 << 16, "float32"), "v": old["v"]}
    delta = compute_delta(old, new, settings)
    assert (delta.kind, len(delta.payload) > old["w"].nbytes) == ("delta", True)
    assert len(compute_delta(old, new).payload) < 1000
    assert np.array_equal(apply_delta(old, delta.payload)["w"], new["w"])
