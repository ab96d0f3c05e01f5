"""The sections of the settings: every field, its default and what it allows.

``memopt/config.py`` reads them from files, the environment and arguments.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Device = Literal[
    "auto", "cuda", "rocm", "vulkan", "webgpu", "mps", "coreml", "openvino", "cpu", "arm", "torch"
]


def _cron(value: str) -> str:
    # Five or six fields is all that can be said without croniter, which only extra `memory` brings.
    if len(value.split()) not in (5, 6):
        raise ValueError
    try:
        from croniter import croniter
    except ImportError:
        return value
    if not croniter.is_valid(value):
        raise ValueError
    return value


def _number(value: Any) -> Any:
    # `batch_size: yes` is True in YAML, which pydantic would take for 1.
    if isinstance(value, bool):
        raise ValueError
    return value


Whole = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Cron = Annotated[str, AfterValidator(_cron), "a cron expression of 5 or 6 fields, like '0 2 * * *'"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DeviceSection(_Section):
    """Where to run, and whether another provider may take over."""

    target: Device = "auto"
    fallback_enabled: bool = True
    vram_threshold: Number = Field(0.9, gt=0, le=1)


class CpuSection(_Section):
    """The torch backend (``device.target: torch``), which computes on the CPU."""

    use_compile: bool = False
    use_ipex: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"


class GpuSection(_Section):
    """Providers with their own memory: half precision first, how full, and what when they fail.

    Of the two ``vram_threshold`` the lower one counts.
    """

    use_amp: bool = True
    vram_threshold: Number = Field(0.9, gt=0, le=1)
    fallback_to_cpu: bool = True


class QuantizationSection(_Section):
    """Defaults of ``memopt quantize`` and its gate."""

    enabled: bool = True
    quant_type: Literal["int8", "int4", "int2", "fp16"] = "int8"
    calibration_method: Literal["minmax", "entropy", "percentile", "mse"] = "minmax"
    per_channel: bool = True
    symmetric: bool = True
    mixed_precision_layers: tuple[str, ...] = ()
    cosine_threshold: Number = Field(0.95, ge=-1, le=1)
    ppl_threshold: Number = Field(0.15, ge=0)


class ConsolidationSection(_Section):
    """When and how the memory store condenses itself."""

    time_based_enabled: bool = True
    time_based_schedule: Cron = "0 2 * * *"
    pressure_based_enabled: bool = True
    pressure_threshold_mb: Number = Field(1000, gt=0)
    hot_memory_threshold: Whole = Field(10, ge=1)
    cold_memory_age_days: Number = Field(30, gt=0)
    batch_size: Whole = Field(50, ge=1)
    llm_provider: Literal["ollama", "anthropic", "openai", "extractive"] = "ollama"
    llm_model: str = "llama3.2:3b"
    llm_endpoint: str = "http://localhost:11434"
    summary_max_length: Whole = Field(500, ge=1)
    keep_original: bool = True


class FederationSection(_Section):
    """The weight-sync client."""

    enable_delta_sync: bool = True
    delta_threshold: Number = Field(0.01, ge=0)
    compression_enabled: bool = True
    max_retries: Whole = Field(3, ge=0)
    timeout_seconds: Number = Field(30, gt=0)
