"""`glmlora init`: a project folder in which the workflow's notebook and training script run as
they are."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from .. import families
from . import papers

PACKAGE = Path(__file__).resolve().parent.parent
TEMPLATE = PACKAGE / "template"
FILES = {  # file of the template -> its place in the project
    "dataset_info.json": "data/dataset_info.json",
    "train_bash.py": "src/train_bash.py",
    "xfg_train.sh": "xfg_train.sh",
    "xfg.ipynb": "xfg.ipynb",
}
BASE = families.default().checkpoint.split("/")[-1]  # the folder that the notebook names


def tiny_directory() -> Path:
    """The embedded model glm-tiny. FileNotFoundError when it is not there."""
    path = PACKAGE / "tiny"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{path}: glm-tiny's model.safetensors is missing; reinstall glmlora"
        )
    return path


def _fill(project: Path) -> None:
    for name, place in FILES.items():
        target = project / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(TEMPLATE / name, target)
    (project / "csv_data").mkdir()
    papers.write_tables(project / "csv_data")


def _place_base(base: Path, model: str | os.PathLike | None) -> None:
    """The model beside the project: a copy of glm-tiny, or a link to the user's own."""
    if model is not None:
        source = Path(model).resolve()
        if not (source / "config.json").is_file():
            raise FileNotFoundError(
                f"--model {model}: no config.json there, expected a model directory"
            )
        if base.exists() or base.is_symlink():
            if base.resolve() == source:
                return
            raise FileExistsError(
                f"{base} exists and is not {model}: move it away or leave --model out"
            )
        base.symlink_to(source, target_is_directory=True)
        return
    if (base / "config.json").is_file():
        return  # the user's own model, or glm-tiny of another project
    if base.exists() or base.is_symlink():
        raise FileExistsError(f"{base} exists but holds no config.json: move it away")
    partial = Path(tempfile.mkdtemp(prefix=f".{BASE}.", dir=base.parent))
    try:
        for file in sorted(tiny_directory().iterdir()):
            shutil.copyfile(file, partial / file.name)
        partial.chmod(0o755)
        partial.rename(base)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def init(directory: str | os.PathLike, model: str | os.PathLike | None = None) -> Path:
    """Make `directory`: csv_data/ with synthetic papers, data/dataset_info.json, xfg_train.sh,
    src/train_bash.py,
    xfg.ipynb; and the base model beside it: a copy of glm-tiny, or a link to the directory `model`.

    Nothing of the user's is overwritten (FileExistsError names what is in the way) and nothing
    half-made stays.
    Returns the project's path.
    """
    project = Path(directory)
    taken = sorted(p.name for p in project.iterdir()) if project.is_dir() else []
    if taken:
        raise FileExistsError(
            f"{project} is not empty (it holds {', '.join(taken[:5])}): choose a new directory"
        )
    if project.exists() and not project.is_dir():
        raise FileExistsError(f"{project} is a file: choose a new directory")
    project.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{project.name}.", dir=project.resolve().parent))
    try:
        _fill(partial)
        partial.chmod(0o755)
        _place_base(project.resolve().parent / BASE, model)
        if project.is_dir():
            project.rmdir()
        partial.rename(project)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return project
