"""Settings from YAML, environment and arguments, in that precedence from low to high.

The file is ``--config FILE``, else ``MEMOPT_CONFIG``, else ``./memopt.yaml`` when there is one.
Environment variables are ``MEMOPT_<SECTION>__<FIELD>``, for example ``MEMOPT_DEVICE__TARGET=cpu``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from memopt.errors import ConfigurationError
from memopt.registry import nearest

ENV_PREFIX = "MEMOPT_"
DEFAULT_FILE = "memopt.yaml"
# pydantic-settings builds its sources itself: this is how the file's values reach ours.
_file_values: ContextVar[Mapping[str, Any]] = ContextVar(
    "_file_values", default=MappingProxyType({})
)
Device = Literal[
    "auto", "cuda", "rocm", "vulkan", "mps", "coreml", "openvino", "cpu", "arm", "torch"
]


def _cron(value: str) -> str:
    # Five or six fields is all that can be said without croniter, which only extra `memory` brings.
    if len(value.split()) not in (5, 6):
        raise ValueError("a cron expression has 5 or 6 fields, like '0 2 * * *'")
    try:
        from croniter import croniter
    except ImportError:
        return value
    if not croniter.is_valid(value):
        raise ValueError("not a valid cron expression, like '0 2 * * *'")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DeviceSection(_Section):
    """Where to run, and whether another provider may take over."""

    target: Device = "auto"
    fallback_enabled: bool = True
    vram_threshold: float = Field(0.9, gt=0, le=1)


class CpuSection(_Section):
    """The torch reference backend on a CPU."""

    use_compile: bool = False
    use_ipex: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"


class GpuSection(_Section):
    """Providers with their own memory."""

    use_amp: bool = False
    vram_threshold: float = Field(0.9, gt=0, le=1)
    fallback_to_cpu: bool = True


class QuantizationSection(_Section):
    """Defaults of ``memopt quantize`` and its gate."""

    enabled: bool = True
    quant_type: Literal["int8", "int4", "int2", "fp16"] = "int8"
    calibration_method: Literal["minmax", "entropy", "percentile", "mse"] = "minmax"
    per_channel: bool = True
    symmetric: bool = True
    mixed_precision_layers: tuple[str, ...] = ()
    cosine_threshold: float = Field(0.95, ge=-1, le=1)
    ppl_threshold: float = Field(0.15, ge=0)


class ConsolidationSection(_Section):
    """When and how the memory store condenses itself."""

    time_based_enabled: bool = True
    time_based_schedule: Annotated[str, AfterValidator(_cron)] = "0 2 * * *"
    pressure_based_enabled: bool = True
    pressure_threshold_mb: float = Field(1000, gt=0)
    hot_memory_threshold: int = Field(10, ge=1)
    cold_memory_age_days: float = Field(30, gt=0)
    batch_size: int = Field(50, ge=1)
    llm_provider: Literal["ollama", "anthropic", "openai", "extractive"] = "ollama"
    llm_model: str = "llama3.2:3b"
    llm_endpoint: str = "http://localhost:11434"
    summary_max_length: int = Field(500, ge=1)
    keep_original: bool = True


class FederationSection(_Section):
    """The weight-sync client."""

    enable_delta_sync: bool = True
    delta_threshold: float = Field(0.01, ge=0)
    compression_enabled: bool = True
    max_retries: int = Field(3, ge=0)
    timeout_seconds: float = Field(30, gt=0)


class OptimizationConfig(BaseSettings):
    """Every setting of memopt; immutable. Build it with :func:`load_config`.

    >>> load_config(None, {"device": {"target": "cpu"}}).device.target
    'cpu'
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    device: DeviceSection = DeviceSection()
    cpu: CpuSection = CpuSection()
    gpu: GpuSection = GpuSection()
    quantization: QuantizationSection = QuantizationSection()
    consolidation: ConsolidationSection = ConsolidationSection()
    federation: FederationSection = FederationSection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments over environment over the YAML file of :func:`load_config`."""
        return (init_settings, env_settings, _FileSource(settings_cls))


class _FileSource(PydanticBaseSettingsSource):
    """Values of the YAML file that :func:`load_config` is reading."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return _file_values.get().get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return dict(_file_values.get())


def load_config(
    path: str | Path | None = None, arguments: Mapping[str, Any] | None = None
) -> OptimizationConfig:
    """Read the settings.

    Args:
        path: YAML file; None takes ``MEMOPT_CONFIG``, then ``./memopt.yaml`` if it exists.
        arguments: nested values that win over everything, ``{"device": {"target": "cpu"}}``.

    Raises:
        ConfigurationError: a missing file, an unknown key, a wrong type or a value out of range;
            the message names the file (or variable), the key, the value and what is allowed.
    """
    file = _config_file(path)
    values = _read_yaml(file) if file else {}
    _check_environment()
    token = _file_values.set(values)
    try:
        return OptimizationConfig(**(arguments or {}))
    except ValidationError as error:
        raise _explain(error, file, values, arguments or {}) from error
    finally:
        _file_values.reset(token)


def parse_assignment(text: str) -> dict[str, Any]:
    """Turn ``device.target=cpu`` into ``{"device": {"target": "cpu"}}``.

    The value is read as YAML, so that ``true``, ``10`` and ``[a, b]`` have their types.

    Raises:
        ConfigurationError: there is no ``section.key=value`` in the text.

    >>> parse_assignment("cpu.use_compile=true")
    {'cpu': {'use_compile': True}}
    """
    name, separator, value = text.partition("=")
    section, dot, key = name.partition(".")
    if not (separator and dot and section and key):
        raise ConfigurationError(
            f"{text!r} is not an assignment", fix="write section.key=value, like device.target=cpu"
        )
    try:
        return {section: {key: yaml.safe_load(value)}}
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{text!r} has a value that is not YAML") from error


def as_yaml(config: OptimizationConfig) -> str:
    """Return the settings as YAML that :func:`load_config` reads back to the same settings."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def _config_file(path: str | Path | None) -> Path | None:
    named = path or os.environ.get("MEMOPT_CONFIG")
    if named:
        if not Path(named).is_file():
            raise ConfigurationError(
                f"no configuration file at {str(named)!r}", fix="make one: memopt config init"
            )
        return Path(named)
    return Path(DEFAULT_FILE) if Path(DEFAULT_FILE).is_file() else None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigurationError(
            f"{path} holds a {type(raw).__name__}, not sections",
            fix="start from: memopt config init",
        )
    return raw


def _check_environment() -> None:
    # pydantic-settings looks up known names only: a typo in the section would be ignored.
    sections = OptimizationConfig.model_fields
    for variable in sorted(os.environ):
        section, nested, _ = variable.removeprefix(ENV_PREFIX).partition("__")
        if variable.startswith(ENV_PREFIX) and nested and section.lower() not in sections:
            raise ConfigurationError(
                f"environment variable {variable}={os.environ[variable]!r}: "
                f"unknown section {section.lower()!r}",
                fix=nearest(section.lower(), sections),
            )


def _explain(
    error: ValidationError,
    file: Path | None,
    values: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> ConfigurationError:
    lines, fixes = [], []
    for item in error.errors():
        location = [str(part) for part in item["loc"]]
        key = ".".join(location)
        where = _origin(location, file, values, arguments)
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key {key!r} (value {item['input']!r})")
            fixes.append(nearest(location[-1], _known(location[:-1])))
        else:
            lines.append(f"{where}: {key} is {item['input']!r}")
            allowed = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            fixes.append(f"allowed: {allowed}")
    fix = "; ".join(dict.fromkeys(fixes))
    return ConfigurationError("; ".join(lines), fix=fix)


def _known(section: list[str]) -> list[str]:
    fields = OptimizationConfig.model_fields
    if not section or section[0] not in fields:
        return list(fields)
    annotation = fields[section[0]].annotation
    return list(getattr(annotation, "model_fields", {}))


def _origin(
    location: list[str],
    file: Path | None,
    values: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> str:
    variable = ENV_PREFIX + "__".join(location[:2]).upper()
    if _holds(arguments, location):
        return "argument"
    present = {name.upper(): name for name in os.environ}
    if variable in present:
        return f"environment variable {present[variable]}"
    if file is not None and _holds(values, location[:1]):
        return str(file)
    return "configuration"


def _holds(values: Mapping[str, Any], location: list[str]) -> bool:
    current: Any = values
    for part in location:
        if not isinstance(current, Mapping) or part not in current:
            return False
        current = current[part]
    return True
