"""`glmlora quantize`: a model directory with its linear layers in 8 or 4 bits, made of a float one
that need not fit into the memory.

Weights are read, quantized and written one after the other, so that the memory holds one matrix,
and the disk nothing but the result.
"""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files.hub import model_directory
from ..files.tensor import Source
from ..files.write import check_new_directory
from ..model.auto import AutoModel
from ..model.configuration import ChatGLMConfig
from ..model.quantization import check_form, is_quantized, quantized_sources
from ..model.saving import weight_sources, write_model
from ..progress import bar

_BESIDE = 64 << 20  # bytes for a tokenizer and other small files


def quantize(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    bits: int,
    group_size: int | None = None,
    family: str | None = None,
) -> int:
    """Write the model of a directory into a new one, as `AutoModel.from_pretrained(model).quantize(
    bits, group_size=group_size).save_pretrained(output)` does, bit for bit, in the memory of one
    matrix. Returns the bytes of the weights.

    bits: 8 or 4. group_size: columns that share a scale, a multiple of 32 with 4 bits; None:
    row-wise. family: see ChatGLMConfig. `output` is there with all of its files at the end, or
    is left as it was. Raises ValueError for other bits, a model that is quantized already, and a
    weight that is not finite, OSError naming a directory that is not there, and where the disk has
    no room for the result, FileExistsError where something is in `output`.
    """
    bits, group = check_form(bits, group_size)
    if not bits:
        raise ValueError("bits: expected 4 or 8, got 0")
    directory, target = model_directory(model), Path(output)
    check_new_directory(target)
    config = ChatGLMConfig.from_pretrained(directory, family=family)
    try:
        if is_quantized(config, bits, group):
            raise ValueError(f"the model is stored in {bits} bits already")
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    opened = AutoModel.from_pretrained(
        directory, family=family, device="cpu", compute_dtype="float32"
    )
    weights = quantized_sources(weight_sources(opened), opened._linear_shapes(), bits, group)
    total = sum(source.nbytes for source in weights)
    _check_room(target, total + _BESIDE)
    opened.config.quantization_bit = bits
    opened.config.quantization_group_size = group or None
    was_there = target.exists()
    shown = dict(desc="Quantizing", unit="B", unit_scale=True, disable=total < 1 << 28)
    try:
        with bar(total=total, **shown) as progress:
            write_model(opened, target, [_counted(source, progress) for source in weights])
    except BaseException:
        if not was_there:
            with suppress(OSError):
                target.rmdir()
        raise
    return total


def _counted(source: Source, progress: Any) -> Source:
    """The source, whose bytes a bar counts when they are due."""

    def get() -> Any:
        value = source.get()
        progress.update(source.nbytes)
        return value

    return source._replace(get=get)


def _check_room(target: Path, needed: int) -> None:
    """OSError (ENOSPC) where the disk of a new directory has less room than that."""
    place = next(p for p in (target, *target.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        what = f"{needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise OSError(errno.ENOSPC, what, os.fspath(target))
