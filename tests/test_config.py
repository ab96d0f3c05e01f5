"""Settings: precedence, and errors that name file, key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from memopt.config import (
    OptimizationConfig,
    as_yaml,
    load_config,
    parse_assignment,
    template,
)
from memopt.errors import ConfigurationError


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMOPT_CONFIG", raising=False)


def write(text: str) -> Path:
    path = Path("memopt.yaml")
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_those_of_the_documentation() -> None:
    """Without file, environment or arguments the documented defaults are in force."""
    config = load_config()
    assert config.device.vram_threshold == 0.9
    assert config.quantization.cosine_threshold == 0.95
    assert config.quantization.ppl_threshold == 0.05
    assert config.consolidation.time_based_schedule == "0 2 * * *"
    assert config.consolidation.llm_model == "llama3.2:3b"
    assert config.federation.delta_threshold == 0.01
    assert config.federation.timeout_seconds == 30


def test_arguments_win_over_environment_and_environment_over_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """YAML < environment < arguments, field by field within one section."""
    write("device: {target: openvino, vram_threshold: 0.5, fallback_enabled: false}")
    assert load_config().device.target == "openvino"
    monkeypatch.setenv("MEMOPT_DEVICE__TARGET", "cpu")
    monkeypatch.setenv("MEMOPT_DEVICE__VRAM_THRESHOLD", "0.6")
    config = load_config(None, {"device": {"target": "cuda"}})
    assert config.device.target == "cuda"
    assert config.device.vram_threshold == 0.6
    assert config.device.fallback_enabled is False


def test_a_file_does_not_leak_into_the_next_call() -> None:
    """The values of one load are gone in the next."""
    path = write("cpu: {use_compile: true}")
    assert load_config(path).cpu.use_compile
    path.unlink()
    assert not load_config().cpu.use_compile
    assert not OptimizationConfig().cpu.use_compile


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("device: {targt: cpu}", ["memopt.yaml", "device.targt", "'cpu'", "target"]),
        ("device: {target: npu}", ["memopt.yaml", "device.target", "'npu'", "openvino"]),
        ("gpu: {vram_threshold: 1.5}", ["gpu.vram_threshold is 1.5", "above 0 and at most 1"]),
        ("gpu: {vram_threshold: .nan}", ["gpu.vram_threshold is nan", "above 0 and at most 1"]),
        ("federation: {timeout_seconds: .inf}", ["timeout_seconds is inf", "a number, above 0"]),
        ("cpu: {use_compile: maybe}", ["cpu.use_compile", "'maybe'", "true or false"]),
        ("consolidation: {batch_size: 0}", ["consolidation.batch_size is 0", "at least 2"]),
        ("consolidation: {batch_size: yes}", ["batch_size is True", "a whole number"]),
        ("consolidation: {llm_model: 3}", ["consolidation.llm_model is 3", "text"]),
        ("quantization: {mixed_precision_layers: a}", ["'a'", "a list of text"]),
        ("consolidation: {time_based_schedule: daily}", ["time_based_schedule", "'daily'", "cron"]),
        ("consolidation: {time_based_schedule: '99 2 * * *'}", ["'99 2 * * *'", "cron"]),
        ("nonsense: {a: 1}", ["unknown key 'nonsense'", "consolidation"]),
        ("device: cpu", ["device is 'cpu'", "a section with the keys target, fallback_enabled"]),
        ("device: {target: cpu}\ndevice: {}", ["memopt.yaml", "'device' is there twice", "line 2"]),
        ("1: {target: cpu}", ["memopt.yaml", "the key 1 is not text"]),
        ("- a\n- b", ["memopt.yaml", "list", "sections"]),
        ("a: [", ["memopt.yaml", "not valid YAML"]),
    ],
)
def test_a_wrong_file_is_named_with_key_value_and_what_is_allowed(
    text: str, parts: list[str]
) -> None:
    """Every kind of mistake in a file gives one error that names all there is to know."""
    write(text)
    with pytest.raises(ConfigurationError) as caught:
        load_config()
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "part"),
    [
        ("MEMOPT_DEVICE__TARGET", "npu", "device.target is 'npu'"),
        ("MEMOPT_DEVICES__TARGET", "cpu", "did you mean 'device'"),
        ("MEMOPT_FEDERATION__MAX_RETRIES", "-1", "federation.max_retries is '-1'"),
        ("memopt_device__targt", "cpu", "did you mean 'target'"),
        ("MEMOPT_DEVICE_TARGET", "cpu", "write MEMOPT_DEVICE__TARGET"),
        ("MEMOPT_DEVICE__TARGET__X", "cpu", "device.target is {'x': 'cpu'}"),
        ("MEMOPT_DEVICE", "cpu", "is not a JSON object; write MEMOPT_DEVICE__KEY=value"),
        ("MEMOPT_DEVICE", '{"target": "npu"}', "device.target is 'npu'"),
        ("MEMOPT_QUANTIZATION__MIXED_PRECISION_LAYERS", "a", "is not a JSON list"),
    ],
)
def test_a_wrong_environment_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, part: str
) -> None:
    """A bad value, or a section that does not exist, is blamed on its variable."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError, match=variable) as caught:
        load_config()
    assert part in str(caught.value)


def test_a_missing_file_is_refused() -> None:
    """A file that was named must exist."""
    with pytest.raises(ConfigurationError, match=r"no configuration file at 'gone\.yaml'"):
        load_config("gone.yaml")


def test_yaml_round_trips() -> None:
    """What `config init` writes reads back to the same settings."""
    config = load_config(None, {"quantization": {"mixed_precision_layers": ["encoder.*"]}})
    assert load_config(write(as_yaml(config))) == config
    assert yaml.safe_load(as_yaml(config))["quantization"]["mixed_precision_layers"] == [
        "encoder.*"
    ]


def test_the_template_changes_nothing_until_it_is_edited() -> None:
    """`config init` writes every setting commented out; without the # each line is its default."""
    path = write(template())
    assert load_config(path) == OptimizationConfig()
    assert not load_config(path).quantization.model_fields_set
    edited = template().replace("\n  # ", "\n  ")
    assert as_yaml(load_config(write(edited))) == as_yaml(OptimizationConfig())
    assert load_config(path).quantization.model_fields_set


def test_assignments_have_their_types() -> None:
    """--set reads its value as YAML and refuses what is not section.key=value."""
    assert parse_assignment("consolidation.batch_size=5") == {"consolidation": {"batch_size": 5}}
    for bad in ("device", "device=cpu", ".target=cpu", "device.=1"):
        with pytest.raises(ConfigurationError, match=r"section\.key=value"):
            parse_assignment(bad)
