"""The sections of the settings: every field, its default and what it allows.

``memopt/config.py`` reads them from files, the environment and arguments.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Device = Literal[
    "auto",
    "cuda",
    "rocm",
    "vulkan",
    "webgpu",
    "mps",
    "coreml",
    "openvino",
    "cpu",
    "arm",
    "aoti",
    "torch",
]


def _cron(value: str) -> str:
    # Five or six fields is all that can be said without croniter, which only extra `memory` brings.
    if len(value.split()) not in (5, 6):
        raise ValueError
    try:
        from croniter import CroniterBadDateError, croniter
    except ImportError:
        return value
    try:
        # 30 February is a valid expression that no day answers to.
        croniter(value).get_next()
    except (CroniterBadDateError, ValueError, ArithmeticError) as error:
        raise ValueError from error
    return value


def _number(value: Any) -> Any:
    # `batch_size: yes` is True in YAML, which pydantic would take for 1.
    if isinstance(value, bool):
        raise ValueError
    return value


def _renamed(names: dict[str, str]) -> BeforeValidator:
    """Names that the founding design gave to values which have another name here."""
    return BeforeValidator(
        lambda value: names.get(value, value) if isinstance(value, str) else value
    )


Whole = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Cron = Annotated[str, AfterValidator(_cron), "a cron expression of 5 or 6 fields, like '0 2 * * *'"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def idle(self) -> dict[str, str]:
        """Return the keys whose value is not in force, with what is instead."""
        return {}


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
    """Defaults of ``memopt quantize`` and its gate; what is not set is the recipe's own."""

    enabled: bool = True
    quant_type: Literal["int8", "int4", "int2", "fp16"] = "int8"
    calibration_method: Annotated[
        Literal["minmax", "entropy", "percentile", "mse", "gptq"], _renamed({"ptq": "minmax"})
    ] = "minmax"
    per_channel: bool = True
    symmetric: bool = True
    mixed_precision_layers: tuple[str, ...] = ()
    cosine_threshold: Number = Field(0.95, ge=-1, le=1)
    ppl_threshold: Number = Field(0.05, ge=0)

    def idle(self) -> dict[str, str]:
        """Nothing here overrules a recipe, or the gate of a method, that is not written down."""
        always = {"enabled", "ppl_threshold"}
        unset = set(type(self).model_fields) - self.model_fields_set - always
        return dict.fromkeys(unset, "not set: the recipe's own")


_OLLAMA = {"llm_model": "llama3.2:3b", "llm_endpoint": "http://localhost:11434"}


class ConsolidationSection(_Section):
    """How ``memopt memory consolidate`` condenses a store, and when ``memory worker`` does."""

    time_based_enabled: bool = True
    time_based_schedule: Cron = "0 2 * * *"
    pressure_based_enabled: bool = True
    pressure_threshold_mb: Number = Field(1000, gt=0)
    hot_memory_threshold: Whole = Field(10, ge=1)
    cold_memory_age_days: Number = Field(30, gt=0)
    batch_size: Whole = Field(50, ge=2)
    llm_provider: Annotated[
        Literal["extractive", "ollama", "anthropic", "openai", "memopt"],
        _renamed({"claude": "anthropic"}),
    ] = "extractive"
    llm_model: str = _OLLAMA["llm_model"]
    llm_endpoint: str = _OLLAMA["llm_endpoint"]
    summary_max_length: Whole = Field(500, ge=1)
    keep_original: bool = True

    def idle(self) -> dict[str, str]:
        """A schedule that is off, and a model or a server that the provider does not have."""
        found = {}
        if not self.time_based_enabled:
            found["time_based_schedule"] = "time_based_enabled is false"
        if not self.pressure_based_enabled:
            found["pressure_threshold_mb"] = "pressure_based_enabled is false"
        for key in ("llm_model", "llm_endpoint"):
            if self.llm_provider == "extractive":
                found[key] = "no language model is asked"
            elif self.llm_provider == "memopt" and key == "llm_endpoint":
                found[key] = "a bundle runs here"
            elif self.llm_provider != "ollama" and getattr(self, key) == _OLLAMA[key]:
                found[key] = f"ollama's; {self.llm_provider}'s own is taken"
        return found

    def language_model(self) -> str | None:
        """Return who writes the summaries, as ``--llm`` takes it; None for sentences extracted.

        >>> ConsolidationSection(llm_provider="ollama").language_model()
        'ollama:llama3.2:3b@http://localhost:11434'
        """
        if self.llm_provider == "extractive":
            return None
        idle = self.idle()
        model = "" if "llm_model" in idle else f":{self.llm_model}"
        url = "" if "llm_endpoint" in idle else f"@{self.llm_endpoint}"
        return f"{self.llm_provider}{model}{url}"


class FederationSection(_Section):
    """The weight-sync client."""

    enable_delta_sync: bool = True
    delta_threshold: Number = Field(0.01, ge=0)
    compression_enabled: bool = True
    max_retries: Whole = Field(3, ge=0)
    timeout_seconds: Number = Field(30, gt=0)
