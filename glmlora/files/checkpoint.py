"""Model directories: weights in one file or in shards with an index, in safetensors or torch's
form.

Formats stand in safetensors.py and torchfile.py, writing rules in write.py; their public names are
here too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .foreign import folder_kind
from .mapped import in_memory
from .safetensors import read_safetensors, write_safetensors
from .small import REPLACED
from .staging import staged
from .tensor import Source, Tensor, Tensors, same, short_repr, sources, to_arrays, to_bf16
from .torchfile import ZIP_MAGIC, read_torch, write_torch
from .write import (
    atomic_directory,
    atomic_file,
    map_file,
    read_json,
    write_json,
    write_text,
)

__all__ = [
    "Source",
    "Tensor",
    "atomic_directory",
    "atomic_file",
    "load_checkpoint",
    "load_state_dict",
    "read_json",
    "read_safetensors",
    "read_torch",
    "read_weights",
    "save_sharded",
    "to_bf16",
    "write_json",
    "write_safetensors",
    "write_text",
    "write_torch",
]

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
INDEX = ".index.json"
SUFFIXES = (".safetensors", ".bin")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# Under which a training program's file (Lightning, DeepSpeed, a script) has the model's tensors.
STATE_DICTS = ("state_dict", "model_state_dict", "module", "model")
RECOMPUTED = "inv_freq"  # rotary frequencies: files have them or not, and nobody reads them


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Map one weight file of either form, recognised by its first bytes: name -> Tensor.

    Raises ValueError if it is neither, damaged, or holds other things than named tensors; OSError
    if unreadable.
    """
    head = in_memory(map_file(path)[:32]).tobytes()
    if head[8:9] == b"{" and not head.startswith((ZIP_MAGIC, b"{")):
        return read_safetensors(path)
    if os.fspath(path).endswith(".safetensors"):
        if head.startswith(ZIP_MAGIC):
            raise ValueError(f"{path}: is a torch file under a safetensors name: rename it to .bin")
        return read_safetensors(path)
    return _flat(path, read_torch(path))


def _flat(path: str | os.PathLike, value: Any) -> dict[str, Tensor]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, expected names and tensors")
    value = _state_dict(value)
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise ValueError(
                f"{path}: {short_repr(name)} is a {kind}, expected only names and tensors"
            )
    return value


def _state_dict(value: dict[Any, Any]) -> dict[Any, Any]:
    """The model's tensors in what a training program saved beside other things; else `value`."""
    parts = [value[name] for name in STATE_DICTS if isinstance(value.get(name), dict)]
    whole = [part for part in parts if part and all(isinstance(t, Tensor) for t in part.values())]
    return whole[0] if len(whole) == 1 and len(parts) == 1 else value


def load_checkpoint(
    directory: str | os.PathLike,
    prefer: str = "safetensors",
    wrap: Callable[[list[str]], Iterable[str]] = lambda names: names,
    only: bool = False,
) -> dict[str, Tensor]:
    """Map the weights of a model directory, sharded or not: name -> Tensor. Nothing is read yet.

    `prefer` is "safetensors" or "bin", for directories with both; with `only`, no other form is
    taken. `wrap` gets the list of shard names, if there are shards, and is iterated over in its
    place (a progress bar). Raises FileNotFoundError for a missing folder, file or shard; ValueError
    naming file and tensor for damaged files and for an index that does not agree with its shards.
    """
    directory = Path(directory)
    if prefer not in ("safetensors", "bin"):
        raise ValueError(f"prefer: expected 'safetensors' or 'bin', got {prefer!r}")
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory")
    order = (SAFETENSORS, TORCH) if prefer == "safetensors" else (TORCH, SAFETENSORS)
    order = order[:1] if only else order
    for name in order:
        if (directory / name).exists():
            return _read_kind(directory / name)
        if (directory / (name + INDEX)).exists():
            return _load_shards(directory, name + INDEX, wrap)
    tried = ", ".join(file for name in order for file in (name, name + INDEX))
    raise FileNotFoundError(
        f"{directory}: no weights: found none of {tried}{folder_kind(directory)}"
    )


def _read_kind(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return _flat(path, read_torch(path))


def recomputed(name: str) -> bool:
    """Whether a tensor is one that models compute anew: in a file or not, it changes nothing."""
    return name.rpartition(".")[2] == RECOMPUTED


def _load_shards(directory: Path, index_name: str, wrap) -> dict[str, Tensor]:
    index = directory / index_name
    weight_map = read_json(index, expect=dict).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: weight_map: expected an object of tensor and file names")
    wanted: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file) or not file.endswith(SUFFIXES):
            what = f"{short_repr(file)} as the file of {short_repr(name)}"
            raise ValueError(
                f"{index}: {what}: expected the plain name of a {' or '.join(SUFFIXES)} file in "
                "the same folder"
            )
        wanted.setdefault(file, []).append(name)
    for file in wanted:
        if not (directory / file).exists():
            raise FileNotFoundError(
                f"{directory / file}: missing; {index_name} names it for {len(wanted[file])} "
                "tensors"
            )
    tensors: dict[str, Tensor] = {}
    for file in wrap(sorted(wanted)):
        shard = _read_kind(directory / file)
        missing = [name for name in wanted[file] if name not in shard and not recomputed(name)]
        if missing:
            raise ValueError(
                f"{directory / file}: tensor {_first(missing)} missing, which {index_name} "
                "places here"
            )
        for name, tensor in shard.items():
            if name in tensors and not recomputed(name) and not same(tensors[name], tensor):
                raise ValueError(
                    f"{directory / file}: tensor {short_repr(name)} is in another shard too, with "
                    "other values"
                )
            tensors.setdefault(name, tensor)
    listed = [name for name in weight_map if name in tensors]
    return {name: tensors[name] for name in dict.fromkeys([*listed, *tensors])}


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and not re.search(r"[/\\:\0]", name)


def _first(names: list[str]) -> str:
    return short_repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def load_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read a weight file, or a directory of one, into NumPy arrays: what torch.load is used for,
    without torch.

    `path` is a .bin, .pt or .safetensors file, a model directory or an adapter directory. Returns
    name -> array; bfloat16 is widened to float32, other types stay, read-only; copies, unless
    the memory does not suffice (a warning says so). Errors as in load_checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        tensors = read_weights(path)
    else:
        adapters = [path / name for name in ADAPTERS if (path / name).exists()]
        models = (SAFETENSORS, TORCH, SAFETENSORS + INDEX, TORCH + INDEX)
        whole = any((path / name).exists() for name in models)
        tensors = _read_kind(adapters[0]) if adapters and not whole else load_checkpoint(path)
    return to_arrays(tensors, "load_state_dict")


def save_sharded(
    directory: str | os.PathLike,
    tensors: Tensors,
    max_shard_size: int | str = "10GB",
    safetensors: bool = True,
    beside: Callable[[Path], None] | None = None,
) -> list[str]:
    """Write the weights of a model directory: one file, or shards of at most `max_shard_size`
    bytes and an index.

    `tensors` as for write_safetensors; shards are filled in the order given, and a tensor larger
    than the limit has one to itself. Everything is written beside the old files first and takes
    their place at the end, when weight files of an earlier save in the same form are removed; an
    interrupted save leaves the old weights (`staging.staged`). beside: writes further files into
    the directory it is given; they take their place together with the weights. Returns the names
    of the weight files. Raises OSError naming the file; FileExistsError when a .bin would stand
    beside safetensors weights, which readers prefer.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    name = SAFETENSORS if safetensors else TORCH
    if not safetensors:
        for other in (SAFETENSORS, SAFETENSORS + INDEX):
            if (directory / other).exists():
                raise FileExistsError(
                    f"{directory / other}: readers prefer it to {TORCH}; remove it first"
                )
    shards = _split(sources(tensors), _parse_size(max_shard_size))
    stem, suffix = os.path.splitext(name)
    files = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}{suffix}" for i in range(len(shards))]
    if len(shards) == 1:
        files = [name]
    write = write_safetensors if safetensors else write_torch
    stale = _weight_files(name, beside is not None)
    with staged(directory, stale) as new:
        for file, shard in zip(files, shards, strict=True):
            write(new / file, shard)
        if len(files) > 1:
            weight_map = {
                s.name: file for file, shard in zip(files, shards, strict=True) for s in shard
            }
            total = sum(s.nbytes for shard in shards for s in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(new / (name + INDEX), index)
            files.append(name + INDEX)
        if beside is not None:
            beside(new)
    return files


def _split(listed: list[Source], limit: int) -> list[list[Source]]:
    shards: list[list[Source]] = [[]]
    size = 0
    for source in listed:
        if shards[-1] and size + source.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(source)
        size += source.nbytes
    return shards


def _parse_size(size: int | str) -> int:
    """Bytes of 5000, "5000", "500MB", "10GB" (powers of ten) or "10GiB" (powers of two)."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d{1,15}) *([KMG]I?B|)", str(size).strip().upper(), re.ASCII)
    if match is None or int(match[1]) == 0:
        raise ValueError(f"max_shard_size: expected bytes or a size such as '10GB', got {size!r}")
    return int(match[1]) * units[match[2]]


def _weight_files(name: str, whole: bool) -> re.Pattern[str]:
    """Names of all weight files in the form of `name`, whatever the number of shards; of a `whole`
    directory also of what another model's save may have left.
    """
    stem, suffix = map(re.escape, os.path.splitext(name))
    weights = rf"{stem}(-\d{{5}}-of-\d{{5}})?{suffix}({re.escape(INDEX)})?"
    return re.compile(f"{weights}|{REPLACED.pattern}" if whole else weights)
