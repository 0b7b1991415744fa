"""Records of data sets, read from files or a user's own table, and their ids.

A record is a dict of `prompt`, `query`, `response` (str) and `history` (list of [query, answer]),
and of `system` (str) where there is such a text. Strings stay strings: the answer "0" is text, not
an empty answer. What a row has beside that is told. pandas is never imported; a DataFrame is known
by its methods.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .. import tell
from ..batch import IGNORED, Encoded
from ..families import prompt as prompts
from ..files.regular import read_bytes
from ..files.rows import EXTENSIONS, is_missing, read_rows
from ..files.write import read_json
from ..model.configuration import ChatGLMConfig
from ..names import did_you_mean, listed, near_path
from .arguments import DataArguments
from .conversations import MESSAGES, Tags, Unusable, read_conversation, read_tags

#: Fields of a record and the column names they are looked for where nobody names the columns.
COLUMNS = {
    "prompt": ("prompt", "instruction"),
    "query": ("query", "input"),
    "response": ("response", "output"),
    "history": ("history",),
    "system": ("system",),
}
# Columns of question and answer in tables that have no such pair.
_OTHER_PAIRS = (
    ("query", "response"),
    ("input", "output"),
    ("content", "summary"),
    ("question", "answer"),
    ("prompt", "completion"),
)
_FIELDS = (*COLUMNS, "messages")

# Keys of dataset_info.json that are refused, with what to do instead.
_REFUSED_KEYS = {
    **dict.fromkeys(
        ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name"),
        "nothing is downloaded; save the data as a csv, json or jsonl file below dataset_dir "
        "and set file_name",
    ),
    "script_url": "loading scripts are not run; save their data as a csv, json or jsonl file "
    "and set file_name",
    "num_samples": "use max_samples",
    "subset": "only hub data sets have subsets",
    "folder": "only hub data sets have folders",
}
_KNOWN_KEYS = ("file_name", "file_sha1", "columns", "formatting", "ranking", "split", "tags")
# Keys of `columns` that are refused.
_REFUSED_COLUMNS = {
    **dict.fromkeys(("images", "videos", "audios"), "the models here read text only"),
    **dict.fromkeys(("chosen", "rejected", "kto_tag"), "only the sft stage is supported"),
    "tools": "calls of tools are not learnt",
}


# Records


class _Counts:
    """Things found in rows, warned about once per kind with their number and first rows."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}

    def add(self, kind: str, row: str) -> None:
        rows = self._found.setdefault(kind, [])
        if rows[-1:] != [row]:  # a row may have the same in several of its messages
            rows.append(row)

    def warn(self) -> None:
        for kind, rows in self._found.items():
            first = ", ".join(rows[:3]) + (", ..." if len(rows) > 3 else "")
            if len(rows) == 1:
                kind = re.sub("^have ", "has ", kind).replace("end in ", "ends in ")
            tell.warn(f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} {kind}: {first}")

    def skipped(self) -> list[str]:
        """Why rows were left out, with how many."""
        kinds = ((kind.removeprefix("skipped, "), rows) for kind, rows in self._found.items())
        return [f"{len(rows)}: {kind}" for kind, rows in kinds if f"skipped, {kind}" in self._found]


def _text(value: Any, column: str, row: str, counts: _Counts) -> str:
    """A cell as text; "" for a missing one."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{row}: {column}: not valid text: lone surrogate at {error.start}"
                ) from None
        return value
    if is_missing(value):
        return ""
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
    if value is None:
        return []
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
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return []
    if not isinstance(value, (list, tuple)):
        raise ValueError(
            f"{row}: history: expected a list of [query, answer], got {type(value).__name__}"
        )
    if value and all(isinstance(item, Mapping) for item in value):  # messages
        value = _rounds(value, row, counts)
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


def _rounds(messages: Any, row: str, counts: _Counts) -> list[list[str]]:
    """A history of messages as pairs."""
    what = f"{row}: history"
    try:
        found = read_conversation(
            messages, what, Tags(), lambda v: _text(v, "history", row, counts), lambda kind: None
        )
    except Unusable as error:
        raise ValueError(f"{what}: expected whole rounds of user and assistant: {error}") from None
    if found.system or len(messages) != 2 * (len(found.rounds) + 1):
        raise ValueError(f"{what}: expected messages of user and assistant in turns")
    return [*found.rounds, [found.prompt, found.response]]


def _conversation(
    values: Mapping[str, Any], row: str, tags: Tags, counts: _Counts
) -> dict[str, Any] | None:
    """The record of a row of messages; None for one that is skipped."""
    try:
        found = read_conversation(
            values["messages"],
            f"{row}: messages",
            tags,
            lambda value: _text(value, "message", row, counts),
            lambda kind: counts.add(kind, row),
        )
    except Unusable as error:
        counts.add(f"skipped, {error}", row)
        return None
    system = found.system or _text(values.get("system"), "system", row, counts)
    record = {"prompt": found.prompt, "query": "", "response": found.response}
    return {**record, "history": found.rounds, "system": system}


def _flat(values: Mapping[str, Any], row: str, counts: _Counts) -> dict[str, Any]:
    """The record of a row with a column for each field."""
    record: dict[str, Any] = {
        "prompt": _text(values.get("prompt"), "prompt", row, counts),
        "query": _text(values.get("query"), "query", row, counts),
        "response": _text(values.get("response"), "answer", row, counts),
    }
    if not record["response"] or not record["prompt"]:
        return record
    record["history"] = _history(values.get("history"), row, counts)
    record["system"] = _text(values.get("system"), "system", row, counts)
    return record


def _find_columns(rows: Sequence[Any], source: str) -> list[str]:
    """The columns of all rows, in the order in which they are met; raises ValueError for a row that
    is no object.
    """
    names: dict[str, None] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{source} row {index}: expected an object of columns, got {type(row).__name__}"
            )
        names.update(dict.fromkeys(row))
    return list(names)


def _records(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str | None],
    source: str,
    tags: Tags | None = None,
) -> list[dict[str, Any]]:
    """Rows as records; those without prompt or answer are left out. Every kind of repair is warned
    about once.
    """
    counts = _Counts()
    records = []
    n_float_like = 0
    used = [(field, name) for field, name in columns.items() if name]
    for index, cells in enumerate(rows):
        row = f"{source} row {index}"
        values = {field: cells.get(name) for field, name in used}
        if "messages" in values:
            record = _conversation(values, row, tags or Tags(), counts)
        else:
            record = _flat(values, row, counts)
        if record is None:
            continue
        if not record["response"]:
            counts.add("skipped, answer empty or missing", row)
            continue
        if not record["prompt"]:
            counts.add("skipped, prompt empty or missing", row)
            continue
        n_float_like += re.fullmatch(r"-?\d+\.0", record["response"]) is not None
        if not record["system"]:
            del record["system"]
        records.append(record)
    counts.warn()
    if records and n_float_like == len(records):
        tell.warn(
            f"{source}: all answers look like {records[0]['response']!r}: a missing label "
            "turned the column into "
            "floats, and the model would learn to answer so; drop rows without a label and "
            "use str(int(label))"
        )
    if rows and not records:
        raise ValueError(
            f"{source}: all {len(rows)} rows are skipped: {'; '.join(counts.skipped())}"
        )
    return records


def _warn_of_unused(
    values: Iterable[tuple[str, Iterable[Any]]],
    n: int,
    source: str,
    columns: Mapping[str, str | None] | None = None,
) -> None:
    """Tell the columns that have something and are not used, with how many rows have it.

    values: names and values of the n unused ones. columns: by field, where they were chosen by
    their names: one that is nearly the name of a missing field is told as such.
    """
    missing = [
        name
        for field, names in COLUMNS.items()
        if columns and not columns.get(field) and (field == "system" or "messages" not in columns)
        for name in names
    ]
    told: list[str] = []
    for name, cells in values:
        rows = sum(not _is_empty(value) for value in cells)
        if rows:
            near = did_you_mean(str(name).strip().lower(), missing)
            told.append(f"{name} ({rows} {'row' if rows == 1 else 'rows'}){near}")
        if len(told) == 10:
            break
    if told:
        more = f", ... ({n} columns in all)" if len(told) == 10 < n else ""
        tell.warn(f"{source}: columns not used: {', '.join(told)}{more}")


def _unused(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Iterator[tuple[str, Iterable[Any]]]:
    for name in names:
        yield name, [row.get(name) for row in rows]


def _is_empty(value: Any) -> bool:
    return is_missing(value) or (isinstance(value, (str, list, tuple, dict)) and not value)


def _choose_columns(present: Iterable[str], source: str, more: str = "") -> dict[str, str | None]:
    """Which column is which field, where nobody says. more: the end of the error's message."""
    present = list(present)
    chosen: dict[str, str | None] = {}
    for field, names in COLUMNS.items():
        found = [name for name in names if name in present]
        if len(found) > 1:
            raise ValueError(
                f"{source}: expected one of the columns {' and '.join(found)}, got both{more}"
            )
        chosen[field] = found[0] if found else None
    if chosen["prompt"] and chosen["response"]:
        return chosen
    conversation = [name for name in MESSAGES if name in present]
    if len(conversation) > 1:
        both = " and ".join(conversation)
        raise ValueError(f"{source}: expected one of the columns {both}, got both{more}")
    if conversation:
        return {"messages": conversation[0], "system": chosen["system"]}
    for prompt, response in _OTHER_PAIRS:
        if prompt in present and response in present:
            query = None if chosen["query"] == prompt else chosen["query"]
            return {**chosen, "prompt": prompt, "query": query, "response": response}
    field = "response" if chosen["prompt"] else "prompt"
    expected = " or ".join(map(repr, COLUMNS[field]))
    near = ""
    for name in present if len(present) <= 100 else ():
        suggestion = did_you_mean(str(name).strip().lower(), COLUMNS[field])
        near = near or (f"; {name!r}{suggestion}" if suggestion else "")
    raise ValueError(
        f"{source}: expected a column {expected}, got {listed(sorted(map(str, present)))}"
        f"{near}{more}"
    )


def records_from(data: Any) -> list[dict[str, Any]]:
    """Records from a DataFrame, a list of dicts, or the path of a csv, json or jsonl file.

    Columns: `prompt` or `instruction`, `query` or `input` (optional), `response` or `output`,
    `history` and `system` (optional); or `messages` or `conversations`, lists of messages whose
    last answer is learnt; or query and response, content and summary, question and answer. Numbers
    become text; rows without prompt or answer are left out, other columns are not used; each is
    named by one counted warning per kind. Raises ValueError naming the missing column and those
    there, a bad row, or that no row is left; TypeError for other data.
    """
    return read_records(data)[0]


def read_records(data: Any, max_samples: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """(records as `records_from` gives them, rows that were there); of the first `max_samples`."""
    if isinstance(data, (str, os.PathLike)):
        source = os.fspath(data)
        if not os.path.exists(source):
            raise FileNotFoundError(
                f"data: {source!r}: looked for a file (from {os.getcwd()}) and found none"
                f"{near_path(source)}"
            )
        rows: Sequence[Any] = read_rows(source)
    elif hasattr(data, "columns") and (hasattr(data, "to_dict") or hasattr(data, "iterrows")):
        source = "DataFrame"
        rows, columns = _frame_rows(data)
        rows = rows[:max_samples]
        return _nonempty(_records(rows, columns, source), source), len(rows)
    elif isinstance(data, Iterable) and not isinstance(data, (Mapping, bytes)):
        source, rows = "data", list(data)
    else:
        more = ""
        if isinstance(data, Mapping):  # of columns, or of data sets
            more = "; pandas.DataFrame(data) makes rows of a dict of columns"
            if any(hasattr(value, "column_names") for value in data.values()):
                more = f"; give one of its data sets, e.g. data[{next(iter(data))!r}]"
        raise TypeError(
            f"data: expected a DataFrame, a list of dicts or a file name, got "
            f"{type(data).__name__}{more}"
        )
    if not rows:
        raise ValueError(f"{source}: expected at least one row, got none")
    rows = rows[:max_samples]
    present = _find_columns(rows, source)
    columns = _choose_columns(present, source)
    unused = [name for name in present if name not in columns.values()]
    _warn_of_unused(_unused(rows, unused), len(unused), source, columns)
    return _nonempty(_records(rows, columns, source), source), len(rows)


def _frame_rows(data: Any) -> tuple[list[dict[str, Any]], dict[str, str | None]]:
    """The rows of a DataFrame, used columns alone, and which column is which field."""
    names = list(data.columns)
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"DataFrame: column {twice!r} stands twice")
    columns = _choose_columns(names, "DataFrame")
    used = [name for name in columns.values() if name]
    unused = [name for name in names if name not in used]
    cells_of = ((name, data[name]) for name in unused)
    _warn_of_unused(cells_of, len(unused), "DataFrame", columns)
    # Column by column: a row of a mixed frame would turn its ints into floats.
    cells = zip(*(list(data[name]) for name in used), strict=True)
    return [dict(zip(used, row, strict=True)) for row in cells], columns


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
    if not os.path.exists(info_path):
        near = near_path(info_path if os.path.isdir(directory) else directory)
        raise FileNotFoundError(
            f"dataset_dir: {info_path}: looked for the list of data sets (from {os.getcwd()}) and "
            f"found none{near}"
        )
    info = read_json(info_path, dict, unique=True)
    records: list[dict[str, Any]] = []
    unchecked: list[str] = []
    for name in names:
        if name not in info:
            more = did_you_mean(name, info)
            if os.path.exists(os.path.join(directory, name)):
                more = f"; for that file, add an entry with file_name {name!r}"
            raise ValueError(
                f"dataset: {name!r} is not in {info_path}, which has: {listed(sorted(info))}{more}"
            )
        records += _load_dataset(name, info[name], info_path, directory, max_samples, unchecked)
    if unchecked:
        tell.warn(f"{info_path}: no file_sha1, data not checked: {', '.join(unchecked)}")
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
    named = _check_entry(entry, where)
    tags = read_tags(entry.get("tags"), where)
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
    more = f"; `columns` in {info_path} can name others"
    if named is None:
        columns = _choose_columns(present, path, more)
    else:
        columns = named
        needed = [column for column in columns.values() if column and column not in present]
        if needed:
            near = did_you_mean(needed[0], present[:1000])
            raise ValueError(
                f"{path}: expected {'columns' if len(needed) > 1 else 'column'} "
                f"{', '.join(needed)}{near}, got {listed(sorted(present))}{more}"
            )
    if entry.get("tags") and "messages" not in columns:
        raise ValueError(f"{where}: tags: need a column of messages; set formatting to 'sharegpt'")
    unused = [column for column in present if column not in columns.values()]
    _warn_of_unused(_unused(rows, unused), len(unused), name, None if named else columns)
    return _records(rows, columns, name, tags)


def _check_entry(entry: Any, where: str) -> dict[str, str | None] | None:
    """Columns by field of one entry of dataset_info.json, None where it names none; ValueError for
    keys that are not supported.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {type(entry).__name__}")
    for key, instead in _REFUSED_KEYS.items():
        if entry.get(key) is not None:
            raise ValueError(f"{where}: {key}: not supported: {instead}")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise ValueError(
            f"{where}: formatting: expected 'alpaca', 'sharegpt' or 'openai', got {formatting!r}"
        )
    if entry.get("ranking"):
        raise ValueError(f"{where}: ranking: not supported: only the sft stage is; remove the key")
    if entry.get("split", "train") != "train":
        raise ValueError(
            f"{where}: split: not supported: only hub data sets have splits; remove the key"
        )
    unknown = [key for key in entry if key not in _KNOWN_KEYS and key not in _REFUSED_KEYS]
    if unknown:
        shown = ", ".join(f"{key}{did_you_mean(key, _KNOWN_KEYS)}" for key in unknown[:10])
        tell.warn(f"{where}: unknown keys are not used: {shown}")
    file_name = entry.get("file_name")
    if not isinstance(file_name, str) or not file_name:
        raise ValueError(
            f"{where}: file_name: expected the name of a file or folder, got {file_name!r}"
        )
    sha1 = entry.get("file_sha1")
    if sha1 is not None and not isinstance(sha1, str):
        raise ValueError(f"{where}: file_sha1: expected text, got {sha1!r}")
    columns = entry.get("columns")
    if columns is None:
        default = {"sharegpt": "conversations", "openai": "messages"}.get(formatting)
        return {"messages": default} if default else None
    return _check_columns(columns, where)


def _check_columns(columns: Any, where: str) -> dict[str, str | None]:
    """`columns` of an entry, by field."""
    if not isinstance(columns, dict):
        raise ValueError(f"{where}: columns: expected an object, got {type(columns).__name__}")
    for field, column in columns.items():
        if field in _REFUSED_COLUMNS and column is not None:
            raise ValueError(f"{where}: columns: {field}: not supported: {_REFUSED_COLUMNS[field]}")
        if field not in _FIELDS and field not in _REFUSED_COLUMNS:
            raise ValueError(
                f"{where}: columns: expected keys from {', '.join(_FIELDS)}, got {field!r}"
                f"{did_you_mean(str(field), _FIELDS)}"
            )
        if column is not None and not isinstance(column, str):
            raise ValueError(f"{where}: columns: {field}: expected a column name, got {column!r}")
    named = {field: columns.get(field) for field in _FIELDS}
    if named["messages"]:
        others = [field for field in ("prompt", "query", "response", "history") if named[field]]
        if others:
            raise ValueError(
                f"{where}: columns: expected messages or {', '.join(others)}, got both"
            )
        return {"messages": named["messages"], "system": named["system"]}
    for field in ("prompt", "response"):
        if not named[field]:
            raise ValueError(
                f"{where}: columns: expected the key {field!r}, got {', '.join(columns) or 'none'}"
            )
    del named["messages"]
    return named


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
        raise FileNotFoundError(f"{where}: file_name: {path} does not exist{near_path(path)}")
    kinds = sorted({os.path.splitext(file)[1].lower() for file in files})
    if len(kinds) != 1 or kinds[0] not in EXTENSIONS:
        raise ValueError(
            f"{path}: expected files of one kind: csv, json, jsonl or parquet; got "
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
        tell.warn(f"{where}: file_sha1: one sum for {len(files)} files, data not checked")
        return
    import hashlib

    found = hashlib.sha1(read_bytes(files[0]), usedforsecurity=False).hexdigest()
    if found != expected.lower():
        tell.warn(f"{where}: file_sha1: expected {expected}, {files[0]} has {found}")


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
    n_cut = n_answers_cut = 0
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
            system=record.get("system"),
        )
        target = prompts.encode_target(tokenizer, record["response"], max_target_length, template)
        pieces += (source, target)
        if len(target) == max_target_length:
            longer = prompts.encode_target(
                tokenizer, record["response"], max_target_length + 1, template
            )
            n_answers_cut += len(longer) > len(target)
        source_lengths[index] = len(source)
        offsets[index + 1] = offsets[index] + len(source) + len(target)
        n_cut += bool(was_cut)
    ids = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
    return Encoded(ids, offsets, source_lengths, n_cut, n_answers_cut=n_answers_cut)


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
        # A pad that is the end as well has to be learnt.
        pad = tokenizer.pad_token_id
        encoded.ignored_id = None if pad == prompts.end_id(tokenizer, args.template) else pad
    if verbose:
        print(_example(encoded, tokenizer))
    if encoded.n_cut:
        print(
            f"{encoded.n_cut} of {len(encoded)} prompts were longer than max_source_length "
            f"{args.max_source_length} and were cut"
        )
    if encoded.n_answers_cut:
        print(
            f"{encoded.n_answers_cut} of {len(encoded)} answers were longer than max_target_length "
            f"{args.max_target_length} and were cut"
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
