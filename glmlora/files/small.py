"""The small files of a model directory: what goes beside the weights into a directory that is
saved, byte for byte.

config.json and tokenizer_config.json name Python files in `auto_map`. They are copied, never run;
where one is absent, so that other programs would look for it in vain, the reference is dropped.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .regular import read_bytes
from .write import read_json

GENERATION = "generation_config.json"
#: Files that would speak of another model where a save does not write them.
REPLACED = re.compile(r"generation_config\.json|prompt_template\.json|task\.json")
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json", "added_tokens.json")
TOKENIZER = (
    *(TOKENIZER_CONFIG, "tokenizer.model", "tokenizer.json", "special_tokens_map.json"),
    *("ice_text.model", "vocab.txt", "vocab.json", "merges.txt", *TEMPLATES),
)
_OTHERS = re.compile(r"(MODEL_)?LICEN[SC]E(\..{1,8})?|NOTICE(\..{1,8})?|configuration\.json")
_LARGEST = 64 << 20  # bytes; a tokenizer.json has about 20 MB
_CODE = 1 << 20


def copy_small_files(source: Path, new: Path, target: Path) -> None:
    """Copy the tokenizer's files, templates, licences and named code of the model directory
    `source` into `new`, whose files will be put into `target`. What is in `target` already stays
    there, but for code.
    """
    config = _fields(source / "config.json")
    maps = [config.get("auto_map"), _fields(source / TOKENIZER_CONFIG).get("auto_map")]
    copy_code(source, new, *maps)
    for name in sorted(os.listdir(source)):
        small = name in TOKENIZER or _OTHERS.fullmatch(name)
        if small and not (target / name).exists() and not (new / name).exists():
            copy(source / name, new / name)


def copy(file: Path, to: Path, largest: int = _LARGEST) -> bool:
    """Copy one regular file, unless it is too large for a small one; whether it was copied."""
    if not file.is_file() or file.stat().st_size > largest:
        return False
    to.write_bytes(read_bytes(file))
    return True


def copy_code(source: Path, to: Path, *auto_maps: Any) -> None:
    """Copy the Python files that `auto_map` entries name, and those that they import from beside
    them.
    """
    todo = [name for auto_map in auto_maps for name in _modules(auto_map)]
    done: set[str] = set()
    while todo:
        name = todo.pop()
        file = source / name
        if name in done or not file.is_file():
            continue
        done.add(name)
        if not _same_folder(source, to) and copy(file, to / name, _CODE):
            text = read_bytes(file).decode("utf-8", "replace")
            found = re.findall(r"^\s*from\s+\.(\w+)\s+import\s", text, re.MULTILINE)
            todo += [f"{module}.py" for module in found]


def _same_folder(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and os.path.samefile(a, b)


def whole_references(auto_map: Any, folders: Iterable[Path]) -> Any:
    """The entries of an `auto_map` whose files are in one of the folders, or in another repository
    ("user/model--module.Class"); None where nothing is left.
    """
    if not isinstance(auto_map, Mapping):
        return auto_map if auto_map and _is_there(auto_map, list(folders)) else None
    folders = list(folders)
    return {k: v for k, v in auto_map.items() if _is_there(v, folders)} or None


def _is_there(reference: Any, folders: list[Path]) -> bool:
    names = _modules({"": reference})
    return all(any((folder / name).is_file() for folder in folders) for name in names)


def _modules(auto_map: Any) -> list[str]:
    """Names of the Python files in the model's own directory that an `auto_map` names."""
    values = auto_map.values() if isinstance(auto_map, Mapping) else [auto_map]
    flat = [r for v in values for r in (v if isinstance(v, list | tuple) else [v])]
    own = [r for r in flat if isinstance(r, str) and "--" not in r]
    return [f"{r.partition('.')[0]}.py" for r in own if re.fullmatch(r"\w+(\.\w+)+", r)]


def _fields(file: Path) -> dict[str, Any]:
    try:
        return read_json(file, dict)
    except (OSError, ValueError):
        return {}
