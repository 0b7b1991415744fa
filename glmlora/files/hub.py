"""Where a model is, and keywords of transformers' `from_pretrained` and `save_pretrained` that are
about downloads or about things this package does in one way only.

Nothing is ever downloaded and no code of a model directory is executed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from ..names import did_you_mean


class DownloadKeywords(TypedDict, total=False):
    """Accepted by every from_pretrained, whatever the value, and without meaning."""

    trust_remote_code: bool | None
    revision: str | None
    code_revision: str | None
    cache_dir: str | os.PathLike[str] | None
    token: str | bool | None
    use_auth_token: str | bool | None
    local_files_only: bool
    force_download: bool
    resume_download: bool | None
    proxies: dict[str, str] | None
    mirror: str | None
    repo_type: str | None
    user_agent: Any
    tqdm_class: Any


NOTHING = frozenset(DownloadKeywords.__annotations__)


def model_directory(path: str | os.PathLike, subfolder: str = "") -> Path:
    """`path`, or `subfolder` in it, as a Path. OSError if there is no such directory, with what is
    near it: nothing is ever downloaded.
    """
    directory = Path(path, subfolder or "")
    if directory.is_dir():
        return directory
    given = os.fspath(directory if subfolder else path)
    if directory.exists():
        raise NotADirectoryError(
            f"{given!r}: is a file, expected the directory of a model (config.json, weights, "
            "tokenizer)"
        )
    name = str(directory)
    if name.startswith("~") and Path(name).expanduser().is_dir():
        hint = f"; did you mean {os.path.expanduser(name)!r}? ~ is the shell's, not a path's"
    else:
        hint = near(directory)
    how = ""
    if not hint and not subfolder and _is_hub_id(given):
        how = (
            f": this looks like a model's name on a hub. Get it by `modelscope download --model "
            f"{given} --local_dir {directory.name}` or `huggingface-cli download {given} "
            f"--local-dir {directory.name}`, and give that directory"
        )
    raise OSError(
        f"{given!r}: looked for a local directory (from {os.getcwd()}) and found none{hint}; "
        f"glmlora downloads nothing, so give the path of a model that is already on this machine"
        f"{how}"
    )


def _is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "~"))


def near(directory: Path) -> str:
    """The nearest name beside a missing directory, or which of its parents is the first missing."""
    parent = directory.absolute().parent
    while not parent.is_dir() and parent != parent.parent:
        directory, parent = parent, parent.parent
    try:
        names = [p.name for p in parent.iterdir() if p.is_dir()]
    except OSError:
        return ""
    near = difflib.get_close_matches(directory.name, names, n=1)
    by_case = [n for n in names if n.lower() == directory.name.lower()]
    found = by_case or near
    return f"; did you mean {str(parent / found[0])!r}?" if found else ""


def check_keywords(
    what: str,
    given: Mapping[str, Any],
    known: Iterable[str],
    neutral: Mapping[str, tuple[Any, ...] | None],
    reasons: Mapping[str, str],
) -> None:
    """Pass keywords that mean nothing: those of NOTHING; those of `neutral` with a value that asks
    for nothing (None is always one; None in place of the values: all are).

    ValueError for other values of `neutral`, and for names of `reasons`, which say what to do
    instead; TypeError for other names, with the nearest of `known`.
    """
    for name, value in given.items():
        if name in NOTHING or value is None and (name in neutral or name in reasons):
            continue
        if name in neutral:
            values = neutral[name]
            if values is None or any(value is v or value == v for v in values):
                continue
        if name not in neutral and name not in reasons:
            near = did_you_mean(name, [*known, *neutral, *reasons, *NOTHING])
            raise TypeError(f"{what}: got an unexpected keyword argument {name!r}{near}")
        raise ValueError(f"{what}: {name}={value!r:.80}: {reasons.get(name, 'is not supported')}")
