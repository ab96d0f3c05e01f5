"""The flat settings of the founding design, over those of :mod:`memopt.config`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from memopt.config import OptimizationConfig as Settings
from memopt.config import load_config
from memopt.errors import ConfigurationError
from memopt.files import atomic_path
from memopt.registry import check_names
from memopt.yamlfile import read_yaml

# What the founding design sets where nothing is said, and memopt otherwise.
_DEFAULTS = {
    "cpu_use_compile": True,
    "cpu_use_ipex": True,
    "quantization_enabled": False,
    "quantization_calibration_method": "ptq",
    "consolidation_llm_provider": "ollama",
    "consolidation_keep_original": False,
}
_VARIABLES = {
    "OPTIMIZATION_DEVICE": "device_target",
    "OPTIMIZATION_QUANTIZATION_ENABLED": "quantization_enabled",
}


class OptimizationConfig:
    """``section_key`` attributes, such as ``device_target``; checked by :meth:`validate`.

    Raises:
        ConfigurationError: an unknown name.

    >>> config = OptimizationConfig(device_target="cpu")
    >>> config.validate()
    >>> config.to_dict()["device_target"], config.settings().device.target
    ('cpu', 'cpu')
    """

    def __init__(self, **values: Any) -> None:
        names = _names()
        check_names("setting", values, names)
        known = Settings.model_construct().model_dump(mode="json")
        for name, (section, key) in names.items():
            default = _DEFAULTS.get(name, known[section][key])
            setattr(self, name, values.get(name, default))

    @classmethod
    def from_yaml(cls, config_path: str | Path) -> OptimizationConfig:
        """Read a file of sections; a file that is not there gives the defaults.

        Raises:
            ConfigurationError: no YAML, or an unknown section or key.
        """
        raw = (read_yaml(Path(config_path)) or {}) if Path(config_path).exists() else {}
        if not isinstance(raw, dict):
            raise ConfigurationError(f"{config_path} holds no sections")
        flat: dict[str, Any] = {}
        for section, keys in raw.items():
            if not isinstance(keys, dict):
                raise ConfigurationError(f"{config_path}: {section} is {keys!r}, not a section")
            flat |= {f"{section}_{key}": value for key, value in keys.items()}
        return cls(**flat)

    def apply_env_overrides(self) -> None:
        """Take OPTIMIZATION_DEVICE and OPTIMIZATION_QUANTIZATION_ENABLED from the environment."""
        for variable, name in _VARIABLES.items():
            if variable in os.environ:
                text = os.environ[variable]
                boolean = isinstance(getattr(self, name), bool)
                setattr(self, name, text.lower() == "true" if boolean else text)

    def validate(self) -> None:
        """Check every value.

        Raises:
            ConfigurationError: naming the setting, its value and what is allowed.
        """
        self.settings()

    def settings(self) -> Settings:
        """Return the same as the settings that memopt takes."""
        # Every value is given, and what is given wins over files and the environment.
        return load_config(None, self._nested())

    def to_dict(self) -> dict[str, Any]:
        """Return every value by its flat name."""
        return {name: getattr(self, name) for name in _names()}

    def save(self, config_path: str | Path) -> None:
        """Write the file that :meth:`from_yaml` reads, and ``memopt --config`` too."""
        with atomic_path(Path(config_path)) as temporary:
            temporary.write_text(yaml.safe_dump(self._nested(), sort_keys=False), encoding="utf-8")

    def _nested(self) -> dict[str, dict[str, Any]]:
        nested: dict[str, dict[str, Any]] = {}
        for name, (section, key) in _names().items():
            nested.setdefault(section, {})[key] = getattr(self, name)
        return nested

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OptimizationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _names() -> dict[str, tuple[str, str]]:
    return {
        f"{section}_{key}": (section, key)
        for section, field in Settings.model_fields.items()
        for key in getattr(field.annotation, "model_fields", {})
    }
