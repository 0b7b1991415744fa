"""The prompt template that weights were trained with, beside them in their folder.

`prompt_template.json` holds {"template": "vendored"}; it is written where the template is not the
family's own, which chats take anyway. Other programs do not look at it.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..families.vendored import TEMPLATES
from ..files.checkpoint import read_json, write_json

FILE = "prompt_template.json"


def read_template(directory: str | os.PathLike[str]) -> str | None:
    """The template that the weights in a directory were trained with, None where it does not say.
    ValueError naming the file.
    """
    file = Path(directory) / FILE
    if not file.is_file():
        return None
    template = read_json(file, dict).get("template")
    if template not in TEMPLATES:
        raise ValueError(
            f"{file}: template: expected one of {', '.join(TEMPLATES)}, got {template!r}"
        )
    return str(template)


def write_template(
    directory: str | os.PathLike[str], template: str | None, usual: str | None = None
) -> None:
    """Say it in a directory; nothing stays there of one that is not known (None), or `usual`."""
    file = Path(directory) / FILE
    if template in (None, usual):
        file.unlink(missing_ok=True)
    else:
        write_json(file, {"template": template})
