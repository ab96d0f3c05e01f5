"""YAML files whose keys are text and occur once: a typo never wins or loses silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from memopt.errors import ConfigurationError


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        ConfigurationError: the file is not UTF-8 text or not YAML, or a key is there twice or is
            not text; with line and column.
        OSError: it cannot be read.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.yaml"
    >>> _ = path.write_text("a: 1\\na: 2\\n")
    >>> read_yaml(path)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: ...a.yaml is not valid YAML: the key 'a' is there twice ...
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigurationError(f"{path} is not valid YAML: {line}") from error


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys, and any type for a key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                what = "is there twice" if isinstance(key, str) else "is not text"
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} {what}", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
