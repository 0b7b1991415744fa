"""Tables in parquet files, by pyarrow, which Ray brings along."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

from .regular import regular
from .write import LFS_POINTER_MAX, refuse_lfs_pointer

FIRST = 14, 0, 1  # of pyarrow: those before may execute what a file says


def import_pyarrow() -> Any:
    """The module pyarrow, with pyarrow.parquet. ImportError that says how it is installed."""
    wanted = 'parquet files need pyarrow, 14.0.1 or newer: pip install "glmlora[parquet]"'
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{wanted} ({error})") from None
    if tuple(int(part) for part in pyarrow.__version__.split(".")[:3] if part.isdigit()) < FIRST:
        raise ImportError(f"{wanted}, this is {pyarrow.__version__}")
    return pyarrow


def read_parquet(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a parquet file, None where there is no value. ImportError without pyarrow,
    ValueError naming the file where it is none, or a column stands twice; OSError as open() does.
    """
    pyarrow = import_pyarrow()
    with open(path, "rb", opener=regular) as file:
        refuse_lfs_pointer(path, file.read(LFS_POINTER_MAX))
        file.seek(0)
        try:
            table = pyarrow.parquet.ParquetFile(file).read()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{os.fspath(path)}: not a parquet file: {error}") from None
    names = table.column_names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{os.fspath(path)}: column {twice!r} stands twice")
    return list(table.to_pylist())


def parquet_bytes(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """A parquet file of columns by name. One whose values are of several kinds is text."""
    pyarrow = import_pyarrow()

    def array(values: Sequence[Any]) -> Any:
        try:
            return pyarrow.array(values)
        except pyarrow.ArrowException:
            texts = [None if value is None else str(value) for value in values]
            return pyarrow.array(texts, pyarrow.string())

    file = io.BytesIO()
    table = pyarrow.table({name: array(values) for name, values in columns.items()})
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()
