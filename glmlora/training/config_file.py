"""A file of flags, in JSON or YAML."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..files.regular import regular
from ..files.write import read_json


def is_config(word: str) -> bool:
    """Whether a word of a command line is such a file."""
    return word.endswith((".json", ".yaml", ".yml"))


def read_config(path: str) -> dict[str, Any]:
    """Flags from a .json or .yaml file, whose top must be an object."""
    if not is_config(path):
        raise ValueError(f"{path}: expected a file ending in .json or .yaml")
    if path.endswith(".json"):
        return read_json(path, dict, unique=True)
    try:
        import yaml
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: reading YAML needs PyYAML (pip install pyyaml); or use a .json file"
        ) from None
    try:
        with open(path, encoding="utf-8-sig", opener=regular) as file:
            text = file.read()
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    node = yaml.compose(text)
    if isinstance(node, yaml.MappingNode):
        names = [str(key.value) for key, _ in node.value]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"{path}: {twice[0]!r} stands twice")
    if not isinstance(values, dict):
        raise ValueError(
            f"{path}: expected a mapping of flags to values, got {type(values).__name__}"
        )
    return values
