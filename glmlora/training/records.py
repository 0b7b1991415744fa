"""Records of data sets, read from files or a user's own table, and their ids.

A record is a dict of `prompt`, `query`, `response` (str) and `history` (list of [query, answer]).
Strings stay strings: the answer "0" is text, not an empty answer. pandas is never imported; a
DataFrame is known by its methods.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..batch import IGNORED, Encoded
from ..families import prompt as prompts
from ..files.regular import read_bytes
from ..files.rows import EXTENSIONS, read_rows
from ..files.write import read_json
from ..model.configuration import ChatGLMConfig
from .arguments import DataArguments

#: Fields of a record and the column names they are looked for in a user's own table.
COLUMNS = {
    "prompt": ("prompt", "instruction"),
    "query": ("query", "input"),
    "response": ("response", "output"),
    "history": ("history",),
}
#: Columns of a data set whose entry has no `columns`.
DEFAULT_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}

# Keys of dataset_info.json that are refused, with what to do instead.
_REFUSED_KEYS = {
    **dict.fromkeys(
        ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name"),
        "nothing is downloaded; save the data as a csv, json or jsonl file below dataset_dir "
        "and set file_name",
    ),
    "script_url": "loading scripts are not run; save their data as a csv, json or jsonl file "
    "and set file_name",
    "tags": "only the alpaca form is read; convert the conversations to instruction, input, "
    "output and history",
    "num_samples": "use max_samples",
    "subset": "only hub data sets have subsets",
    "folder": "only hub data sets have folders",
}
_KNOWN_KEYS = ("file_name", "file_sha1", "columns", "formatting", "ranking", "split")


# Records


class _Counts:
    """Things found in rows, warned about once per kind with their number and first rows."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, row: str) -> None:
        self._found.setdefault(kind, []).append(row)

    def warn(self) -> None:
        for kind, rows in self._found.items():
            first = ", ".join(rows[:3]) + (", ..." if len(rows) > 3 else "")
            warnings.warn(
                f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} {kind}: {first}", stacklevel=4
            )


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, (float, np.floating)) and math.isnan(value)


def _text(value: Any, column: str, row: str, counts: _Counts) -> str:
    """A cell as text; "" for a missing one."""
    if _is_missing(value):
        return ""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{row}: {column}: not valid text: lone surrogate at {error.start}"
                ) from None
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bool, int, float)):
        counts.add(f"had a number as {column}, converted to text", row)
        return str(value)
    if isinstance(value, (list, tuple, dict)) and not value:
        return ""
    raise ValueError(
        f"{row}: {column}: expected text, got {type(value).__name__} {str(value)[:60]!r}"
    )


def _history(value: Any, row: str, counts: _Counts) -> list[list[str]]:
    if isinstance(value, str) and value.strip():  # a csv cell
        import json

        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(
                f"{row}: history: expected a JSON list of [query, answer], got {value[:60]!r}"
            ) from None
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if _is_missing(value) or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"{row}: history: expected a list of [query, answer], got {type(value).__name__}"
        )
    pairs = []
    for pair in value:
        if isinstance(pair, np.ndarray):
            pair = pair.tolist()
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(
                f"{row}: history: expected pairs [query, answer], got {str(pair)[:60]!r}"
            )
        pairs.append([_text(part, "history", row, counts) for part in pair])
    return pairs


def _find_columns(rows: Sequence[Any], source: str) -> set[str]:
    """All column names; raises ValueError for a row that is no object."""
    names: set[str] = set()
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{source} row {index}: expected an object of columns, got {type(row).__name__}"
            )
        names.update(row)
    return names


def _records(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str | None], source: str
) -> list[dict[str, Any]]:
    """Rows as records; those without prompt or answer are left out. Every kind of repair is warned
    about once.
    """
    counts = _Counts()
    records = []
    n_float_like = 0
    for index, cells in enumerate(rows):
        row = f"{source} row {index}"
        values = {field: cells.get(name) if name else None for field, name in columns.items()}
        response = _text(values.get("response"), "answer", row, counts)
        if not response:
            counts.add("skipped, answer empty or missing", row)
            continue
        prompt = _text(values.get("prompt"), "prompt", row, counts)
        if not prompt:
            counts.add("skipped, prompt empty or missing", row)
            continue
        n_float_like += re.fullmatch(r"-?\d+\.0", response) is not None
        records.append(
            {
                "prompt": prompt,
                "query": _text(values.get("query"), "query", row, counts),
                "response": response,
                "history": _history(values.get("history"), row, counts),
            }
        )
    counts.warn()
    if records and n_float_like == len(records):
        warnings.warn(
            f"{source}: all answers look like {records[0]['response']!r}: a missing label "
            "turned the column into "
            "floats, and the model would learn to answer so; drop rows without a label and "
            "use str(int(label))",
            stacklevel=3,
        )
    if rows and not records:
        raise ValueError(
            f"{source}: all {len(rows)} rows have an empty or missing prompt or answer"
        )
    return records


def _choose_columns(present: Iterable[str], source: str) -> dict[str, str | None]:
    """Which column of a user's own table is which field."""
    present = list(present)
    chosen: dict[str, str | None] = {}
    for field, names in COLUMNS.items():
        found = [name for name in names if name in present]
        if len(found) > 1:
            raise ValueError(
                f"{source}: expected one of the columns {' and '.join(found)}, got both"
            )
        if not found and field in ("prompt", "response"):
            there = ", ".join(sorted(map(str, present))) or "no columns"
            raise ValueError(
                f"{source}: expected a column {' or '.join(map(repr, names))}, got {there}"
            )
        chosen[field] = found[0] if found else None
    return chosen


def records_from(data: Any) -> list[dict[str, Any]]:
    """Records from a DataFrame, a list of dicts, or the path of a csv, json or jsonl file.

    Columns: `prompt` or `instruction`, `query` or `input` (optional), `response` or `output`,
    `history` (optional). Numbers become text; rows without prompt or answer are left out; both are
    named by one counted warning per kind. Raises ValueError naming the missing column and those
    there, a bad row, or that no row is left; TypeError for other data.
    """
    if isinstance(data, (str, os.PathLike)):
        source = os.fspath(data)
        rows: Sequence[Any] = read_rows(source)
    elif hasattr(data, "columns") and (hasattr(data, "to_dict") or hasattr(data, "iterrows")):
        source = "DataFrame"
        names = list(data.columns)
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"DataFrame: column {twice[0]!r} stands twice")
        columns = _choose_columns(names, source)
        used = [name for name in columns.values() if name]
        # Column by column: a row of a mixed frame would turn its ints into floats.
        cells = zip(*(list(data[name]) for name in used), strict=True)
        return _nonempty(
            _records([dict(zip(used, row, strict=True)) for row in cells], columns, source), source
        )
    elif isinstance(data, Iterable) and not isinstance(data, (Mapping, bytes)):
        source, rows = "data", list(data)
    else:
        raise TypeError(
            f"data: expected a DataFrame, a list of dicts or a file name, got {type(data).__name__}"
        )
    if not rows:
        raise ValueError(f"{source}: expected at least one row, got none")
    return _nonempty(
        _records(rows, _choose_columns(_find_columns(rows, source), source), source), source
    )


def _nonempty(records: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    if not records:
        raise ValueError(f"{source}: expected at least one row, got none")
    return records


# dataset_info.json


def load_datasets(
    names: str | Sequence[str], dataset_dir: str | os.PathLike, max_samples: int | None = None
) -> list[dict[str, Any]]:
    """Records of the named data sets (a list, or text with commas), concatenated in that order.

    `dataset_dir` holds dataset_info.json; `max_samples` cuts each data set to its first rows.
    Raises ValueError naming an unknown data set, a refused key, a missing column or a bad row;
    FileNotFoundError for a missing file. A missing or different SHA-1 is a warning.
    """
    if isinstance(names, str):
        names = names.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError("dataset: expected at least one name, got none")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples: expected at least 1, got {max_samples}")
    directory = os.fspath(dataset_dir)
    info_path = os.path.join(directory, "dataset_info.json")
    info = read_json(info_path, dict)
    records: list[dict[str, Any]] = []
    unchecked: list[str] = []
    for name in names:
        if name not in info:
            there = ", ".join(sorted(info)) or "none"
            raise ValueError(f"dataset: {name!r} is not in {info_path}, which has: {there}")
        records += _load_dataset(name, info[name], info_path, directory, max_samples, unchecked)
    if unchecked:
        warnings.warn(
            f"{info_path}: no file_sha1, data not checked: {', '.join(unchecked)}", stacklevel=2
        )
    return records


def _load_dataset(
    name: str,
    entry: Any,
    info_path: str,
    directory: str,
    max_samples: int | None,
    unchecked: list[str],
) -> list[dict[str, Any]]:
    where = f"{info_path}: {name}"
    columns = _check_entry(entry, where)
    path = os.path.join(directory, entry["file_name"])
    files = _data_files(path, where)
    _check_sha1(entry.get("file_sha1"), files, where, name, unchecked)
    rows: list[Any] = []
    for file in files:
        rows += read_rows(file)
    rows = rows[:max_samples]
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got none")
    present = _find_columns(rows, name)
    needed = [
        column
        for field, column in columns.items()
        # The default columns are a convention: records without any input are common.
        if column and column not in present and ("columns" in entry or field != "query")
    ]
    if needed:
        raise ValueError(
            f"{path}: expected {'columns' if len(needed) > 1 else 'column'} {', '.join(needed)}, "
            f"got {', '.join(sorted(present)) or 'no columns'}; `columns` in {info_path} can "
            "name others"
        )
    return _records(rows, columns, name)


def _check_entry(entry: Any, where: str) -> dict[str, str | None]:
    """Columns by field of one entry of dataset_info.json; ValueError for keys that are not
    supported.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {type(entry).__name__}")
    for key, instead in _REFUSED_KEYS.items():
        if entry.get(key) is not None:
            raise ValueError(f"{where}: {key}: not supported: {instead}")
    if entry.get("formatting", "alpaca") != "alpaca":
        raise ValueError(
            f"{where}: formatting: expected 'alpaca', got {entry['formatting']!r}: "
            f"{_REFUSED_KEYS['tags']}"
        )
    if entry.get("ranking"):
        raise ValueError(f"{where}: ranking: not supported: only the sft stage is; remove the key")
    if entry.get("split", "train") != "train":
        raise ValueError(
            f"{where}: split: not supported: only hub data sets have splits; remove the key"
        )
    unknown = [key for key in entry if key not in _KNOWN_KEYS and key not in _REFUSED_KEYS]
    if unknown:
        warnings.warn(f"{where}: unknown keys are not used: {', '.join(unknown)}", stacklevel=4)
    file_name = entry.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise ValueError(
            f"{where}: file_name: expected the name of a file or folder, got {file_name!r}"
        )
    sha1 = entry.get("file_sha1")
    if sha1 is not None and not isinstance(sha1, str):
        raise ValueError(f"{where}: file_sha1: expected text, got {sha1!r}")
    columns = entry.get("columns", DEFAULT_COLUMNS)
    if not isinstance(columns, dict):
        raise ValueError(f"{where}: columns: expected an object, got {type(columns).__name__}")
    for field, column in columns.items():
        if field not in COLUMNS:
            raise ValueError(
                f"{where}: columns: expected keys from {', '.join(COLUMNS)}, got {field!r}"
            )
        if column is not None and not isinstance(column, str):
            raise ValueError(f"{where}: columns: {field}: expected a column name, got {column!r}")
    for field in ("prompt", "response"):
        if not columns.get(field):
            raise ValueError(
                f"{where}: columns: expected the key {field!r}, got {', '.join(columns) or 'none'}"
            )
    return {field: columns.get(field) for field in COLUMNS}


def _data_files(path: str, where: str) -> list[str]:
    """The file itself, or all files of a folder by name; they must be of one kind."""
    if os.path.isdir(path):
        files = [
            os.path.join(path, file)
            for file in sorted(os.listdir(path))
            if not file.startswith(".")
        ]
    elif os.path.exists(path):
        files = [path]
    else:
        raise FileNotFoundError(f"{where}: file_name: {path} does not exist")
    kinds = sorted({os.path.splitext(file)[1].lower() for file in files})
    if len(kinds) != 1 or kinds[0] not in EXTENSIONS:
        raise ValueError(
            f"{path}: expected files of one kind: csv, json or jsonl; got "
            f"{', '.join(kinds) or 'none'}"
        )
    return files


def _check_sha1(
    expected: str | None, files: list[str], where: str, name: str, unchecked: list[str]
) -> None:
    if expected is None:
        unchecked.append(name)
        return
    if len(files) != 1:
        warnings.warn(
            f"{where}: file_sha1: one sum for {len(files)} files, data not checked", stacklevel=4
        )
        return
    import hashlib

    found = hashlib.sha1(read_bytes(files[0]), usedforsecurity=False).hexdigest()
    if found != expected.lower():
        warnings.warn(
            f"{where}: file_sha1: expected {expected}, {files[0]} has {found}", stacklevel=4
        )


# Ids


def encode_records(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    max_source_length: int = 512,
    max_target_length: int = 512,
    truncation: str = "template",
    source_prefix: str | None = None,
    template: str = "auto",
) -> Encoded:
    """Ids of the records in the tokenizer's chat template, special ids and end id included.

    At most `max_source_length` ids of prompt and `max_target_length` of answer. Raises ValueError
    for no records.
    """
    if not records:
        raise ValueError("records: expected at least one, got none")
    pieces: list[Sequence[int]] = []
    offsets = np.zeros(len(records) + 1, np.int64)
    source_lengths = np.zeros(len(records), np.int32)
    n_cut = 0
    for index, record in enumerate(records):
        source, was_cut = prompts.encode_source(
            tokenizer,
            record["prompt"],
            record.get("query"),
            record.get("history"),
            max_source_length,
            truncation=truncation,
            source_prefix=source_prefix,
            template=template,
        )
        target = prompts.encode_target(tokenizer, record["response"], max_target_length, template)
        pieces += (source, target)
        source_lengths[index] = len(source)
        offsets[index + 1] = offsets[index] + len(source) + len(target)
        n_cut += bool(was_cut)
    ids = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
    return Encoded(ids, offsets, source_lengths, n_cut)


def encode(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    args: DataArguments,
    config: ChatGLMConfig,
    source: str,
    verbose: bool = False,
) -> Encoded:
    """The ids of the records by the arguments of a run.

    verbose: print the first record as the model gets it.
    Raises ValueError, naming `source`, for a record that is too long for the model, and for ids
    that the model does not have.
    """
    encoded = encode_records(
        records,
        tokenizer,
        args.max_source_length,
        args.max_target_length,
        args.truncation,
        args.source_prefix,
        args.template,
    )
    if args.ignore_pad_token_for_loss:
        encoded.ignored_id = tokenizer.pad_token_id
    if verbose:
        print(_example(encoded, tokenizer))
    if encoded.n_cut:
        print(
            f"{encoded.n_cut} of {len(encoded)} prompts were longer than max_source_length "
            f"{args.max_source_length} and were cut"
        )
    longest = int(encoded.lengths.argmax())
    if encoded.lengths[longest] > config.seq_length:
        raise ValueError(
            f"{source}: record {longest} has {encoded.lengths[longest]} ids, the model has "
            f"positions for {config.seq_length} (seq_length): use a smaller max_source_length or "
            "max_target_length"
        )
    if int(encoded.ids.max()) >= config.padded_vocab_size:
        raise ValueError(
            f"tokenizer: id {int(encoded.ids.max())} is outside the model's vocabulary of "
            f"{config.padded_vocab_size} ids: it belongs to another model"
        )
    return encoded


def _example(encoded: Encoded, tokenizer: Any) -> str:
    """The first record as the model gets it: ids and text, labels with masked ids as the pad."""
    batch = encoded.batch(np.arange(1))
    ids, labels = batch.ids.tolist(), batch.labels.tolist()
    shown = [tokenizer.pad_token_id if i == IGNORED else i for i in labels]
    return (
        f"input_ids:\n{ids}\ninputs:\n{tokenizer.decode(ids, skip_special_tokens=False)}\n"
        f"label_ids:\n{labels}\nlabels:\n{tokenizer.decode(shown, skip_special_tokens=False)}"
    )
