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
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {error}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, what: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        ConfigurationError: it is not YAML, a key is there twice or is not text, or it is nested or
            repeats itself (by aliases) beyond any settings file.

    >>> parse_yaml("[" * 999, "a.yaml")
    Traceback (most recent call last):
    ...
    memopt.errors.ConfigurationError: a.yaml is not valid YAML: it is nested too deep, or in itself
    """
    try:
        loader = _UniqueKeys(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > _LARGEST:
            raise ConfigurationError(
                f"{what} is not valid YAML: its aliases stand for over {_LARGEST:,} values"
            )
        return loader.construct_document(node)
    except RecursionError:
        raise ConfigurationError(
            f"{what} is not valid YAML: it is nested too deep, or in itself"
        ) from None
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:
        if isinstance(error, ConfigurationError):
            raise
        # Dates that do not exist and numbers of too many digits are plain ValueErrors.
        line = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise ConfigurationError(f"{what} is not valid YAML: {line}") from error


# Values of a document with its aliases written out; the largest settings have under a hundred.
_LARGEST = 10_000


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a node, those behind aliases each time they are named."""
    if id(node) not in known:
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


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
