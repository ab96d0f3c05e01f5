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
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from memopt.errors import ConfigurationError, InputError
from memopt.jsontext import parse_json
from memopt.registry import nearest
from memopt.settings import (
    ConsolidationSection,
    CpuSection,
    DeviceSection,
    FederationSection,
    GpuSection,
    QuantizationSection,
)
from memopt.yamlfile import parse_yaml, read_yaml

ENV_PREFIX = "MEMOPT_"
DEFAULT_FILE = "memopt.yaml"
# pydantic-settings builds its sources itself: this is how the file's values reach ours.
_file_values: ContextVar[Mapping[str, Any]] = ContextVar(
    "_file_values", default=MappingProxyType({})
)


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
        return (
            init_settings,
            env_settings,
            InitSettingsSource(settings_cls, dict(_file_values.get())),
        )


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
    file = config_file(path)
    values = _read_sections(file) if file else {}
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
        return {section: {key: parse_yaml(value, f"the value of {name}")}}
    except ConfigurationError as error:
        raise ConfigurationError(f"{text!r} has a value that is not YAML") from error


def origins(
    path: str | Path | None = None, arguments: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Return where each setting that is not a default comes from, by ``section.key``.

    Args:
        path, arguments: as of :func:`load_config`.

    >>> origins(None, {"device": {"target": "cpu"}})["device.target"]
    'argument'
    """
    file, given = config_file(path), arguments or {}
    values = _read_sections(file) if file else {}
    found = {}
    for section, field in OptimizationConfig.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            where = _origin([section, key], file, values, given, exactly=True)
            if where:
                found[f"{section}.{key}"] = where
    return found


def in_force(config: OptimizationConfig, where: Mapping[str, str] | None = None) -> str:
    """Return the settings as YAML; those that are not in force are comments, which say why.

    Args:
        where: of :func:`origins`; put beside what is not a default.

    >>> print(in_force(load_config(None, {"consolidation": {"time_based_enabled": False}})))
    device:
    ...
      time_based_enabled: false
      # time_based_schedule: 0 2 * * *  # time_based_enabled is false
    ...
    """
    lines = []
    for section, values in config.model_dump(mode="json").items():
        idle = getattr(config, section).idle()
        lines.append(f"{section}:")
        for key, value in values.items():
            text = _line(key, value)
            if key in idle:
                lines.append(f"  # {text}  # {idle[key]}")
                continue
            origin = (where or {}).get(f"{section}.{key}")
            lines.append(f"  {text}" + (f"  # {origin}" if origin else ""))
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any) -> str:
    text: str = yaml.safe_dump({key: value}, default_flow_style=True, width=float("inf"))
    return text.strip()[1:-1]


def as_yaml(config: OptimizationConfig) -> str:
    """Return the settings as YAML that :func:`load_config` reads back to the same settings."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def template() -> str:
    """Return a file with every setting at its default and what it allows, all commented out.

    Commented out, because a setting that is written counts as chosen: it would overrule what a
    command does by itself (the gate of each method of ``memopt quantize``, say).

    >>> print(template().splitlines()[4][:31])
      # target: auto  # auto, cuda,
    """
    lines = ["# Settings of memopt. Take the # away in front of what you change."]
    for section, values in OptimizationConfig.model_construct().model_dump(mode="json").items():
        about = (OptimizationConfig.model_fields[section].annotation.__doc__ or "").splitlines()[0]
        lines += ["", f"# {about}", f"{section}:"]
        for key, value in values.items():
            text = _line(key, value)
            lines.append(f"  # {text}  # {_allowed([section, key])}")
    return "\n".join(lines) + "\n"


def config_file(path: str | Path | None = None) -> Path | None:
    """Return the file that :func:`load_config` reads, None when there is none.

    Raises:
        ConfigurationError: a file that was named is not there.
    """
    named = path or os.environ.get("MEMOPT_CONFIG")
    if named:
        if not Path(named).is_file():
            raise ConfigurationError(
                f"no configuration file at {str(named)!r}", fix="make one: memopt config init"
            )
        return Path(named)
    return Path(DEFAULT_FILE) if Path(DEFAULT_FILE).is_file() else None


def _read_sections(path: Path) -> dict[str, Any]:
    raw = read_yaml(path)
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigurationError(
            f"{path} holds a {type(raw).__name__}, not sections",
            fix="start from: memopt config init",
        )
    # A section with nothing under it, or with comments only, is null in YAML.
    return {section: {} if values is None else values for section, values in raw.items()}


def _check_environment() -> None:
    # pydantic-settings looks up known names only: a typo in the section would be ignored.
    sections = OptimizationConfig.model_fields
    for variable in sorted(os.environ):
        # Case does not count in names, as in pydantic-settings.
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        name, value = variable[len(ENV_PREFIX) :].lower(), os.environ[variable]
        shown = f"environment variable {variable}={value!r}"
        section, nested, _ = name.partition("__")
        if nested and section not in sections:
            raise ConfigurationError(
                f"{shown}: unknown section {section!r}", fix=nearest(section, sections)
            )
        first, _, rest = name.partition("_")
        if not nested and rest and first in sections:
            raise ConfigurationError(
                f"{shown}: a section and its key are joined by two underscores",
                fix=f"write {ENV_PREFIX}{first.upper()}__{rest.upper()}",
            )
        if name in sections and not _is_json(value, dict):
            raise ConfigurationError(
                f"{shown} is not a JSON object",
                fix=f"write {ENV_PREFIX}{name.upper()}__KEY=value for one key",
            )
        field = _field(name.split("__"))
        if field and get_origin(field.annotation) is tuple and not _is_json(value, list):
            raise ConfigurationError(f"{shown} is not a JSON list", fix='write it as ["a", "b"]')


def _is_json(text: str, kind: type) -> bool:
    try:
        return isinstance(parse_json(text, "it"), kind)
    except InputError:
        return False


def _field(location: list[str]) -> FieldInfo | None:
    if len(location) < 2:
        return None
    section = OptimizationConfig.model_fields[location[0]].annotation
    found: FieldInfo | None = getattr(section, "model_fields", {}).get(location[1])
    return found


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
            fixes.append(f"allowed: {_allowed(location)}")
    fix = "; ".join(dict.fromkeys(fixes))
    return ConfigurationError("; ".join(lines), fix=fix)


def _allowed(location: list[str]) -> str:
    """Say which values a key takes, in words of the file and not of Python."""
    field = _field(location)
    if field is None:
        return f"a section with the keys {', '.join(_known(location))}"
    described = [entry for entry in field.metadata if isinstance(entry, str)]
    if described:
        return described[0]
    kind = field.annotation
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if kind is bool:
        return "true or false"
    if get_origin(kind) is tuple:
        return "a list of text, like [a, b]"
    limits = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    bounds = [
        f"{word} {value:g}"
        for name, word in limits.items()
        for entry in field.metadata
        if (value := getattr(entry, name, None)) is not None
    ]
    name = "a whole number" if kind is int else "a number" if kind is float else "text"
    return ", ".join([name, " and ".join(bounds)]) if bounds else name


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
    *,
    exactly: bool = False,
) -> str:
    """Say where a setting comes from; ``exactly`` leaves out what only names its section."""
    if _holds(arguments, location):
        return "argument"
    for depth in (2, 1):
        variable = ENV_PREFIX + "__".join(location[:depth]).upper()
        for name in sorted(os.environ):
            # More than two parts are wrong too, and the error is then that of the first two.
            if "__".join(name.upper().split("__")[:2]) == variable and (
                depth == 2
                or not exactly
                or _holds(parse_json(os.environ[name], name), location[1:])
            ):
                return f"environment variable {name}"
    if file is not None and _holds(values, location if exactly else location[:1]):
        return str(file)
    return "" if exactly else "configuration"


def _holds(values: Mapping[str, Any], location: list[str]) -> bool:
    current: Any = values
    for part in location:
        if not isinstance(current, Mapping) or part not in current:
            return False
        current = current[part]
    return True
