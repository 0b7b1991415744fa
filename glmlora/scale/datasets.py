"""A Ray Dataset whose rows are answered: its blocks stay where Ray has them, in memory or on disk,
and workers read the rows of their shard.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..files.rows import is_missing
from ..prediction import Source
from ..tables.answers import Asked, answer_columns
from ..tables.job import check_rows, plain_value, tell_of_answers
from ..tables.shards import Shards
from .engine import answer_shards

Piece = tuple[Any, int, int]  # (reference of a block, first row in it, rows)


def is_dataset(table: Any) -> bool:
    """Whether this is a Dataset of Ray."""
    return type(table).__module__.startswith("ray.data.")


def _rows(table: Any) -> list[dict[str, Any]]:
    """The rows of a table of pyarrow, as `read_rows` gives those of a file."""
    return [
        {name: None if is_missing(value) else value for name, value in row.items()}
        for row in table.to_pylist()
    ]


def _tables(pieces: list[Piece]) -> list[Any]:
    """The tables of pyarrow that the pieces are."""
    import ray

    blocks = ray.get([block for block, _, _ in pieces])
    return [block.slice(at, n) for block, (_, at, n) in zip(blocks, pieces, strict=True)]


def _rows_of(pieces: list[Piece]) -> list[dict[str, Any]]:
    """The rows of pieces of blocks."""
    return [row for table in _tables(pieces) for row in _rows(table)]


def _count(block: Any) -> int:
    return int(block.num_rows)


def _look(block: Any, first: int, asked: Asked) -> tuple[str, int]:
    """(why a row of a block cannot be asked or "", a sum of its rows). first: the first one's
    number. The sums of blocks add up to the same, however a table is cut into them.
    """
    rows, total = _rows(block), 0
    for number, row in enumerate(rows, first):
        text = json.dumps([number, row], default=plain_value).encode()
        total += int.from_bytes(hashlib.sha256(text).digest()[:16], "little")
    try:
        check_rows(asked, rows, first)
    except ValueError as error:
        return str(error), total
    return "", total


def _answered(pieces: list[Piece], shards: Shards, number: int, asked: Asked, raw: bool) -> Any:
    """The rows of a shard with their answers, a table of pyarrow. raw: whether any row of any shard
    has an answer that does not count.
    """
    import pyarrow

    table = pyarrow.concat_tables(_tables(pieces), promote_options="default")
    found = shards.results_of(number)[0]
    results = [found[row] for row in shards.ranges[number - 1]]
    columns = answer_columns(results, asked)[0]
    if raw:
        columns[asked.raw_column] = [result.get("answer", "") for result in results]
    for name, cells in columns.items():
        if name in table.column_names:
            table = table.drop_columns([name])
        kind = pyarrow.float64() if cells and isinstance(cells[0], float) else pyarrow.string()
        table = table.append_column(name, pyarrow.array(cells, kind))
    return table


class Blocks:
    """The blocks of a Dataset, computed: each is a table of pyarrow. ValueError for one without
    rows.
    """

    def __init__(self, ray: Any, dataset: Any):
        self._ray = ray
        whole = dataset.materialize()
        self._blocks: list[Piece] = []  # with the number of its first row in the table
        self.rows = 0
        count = ray.remote(num_cpus=0)(_count)
        blocks = whole.to_arrow_refs()
        for block, n in zip(blocks, ray.get([count.remote(b) for b in blocks]), strict=True):
            if n:
                self._blocks.append((block, self.rows, n))
                self.rows += n
        if not self.rows:
            raise ValueError("table: the Dataset has no rows")
        self.columns = [str(name) for name in whole.schema().names]

    def look(self, asked: Asked) -> dict[str, Any]:
        """How many rows there are and a sum of them, for a job. ValueError naming one that cannot
        be asked.
        """
        look = self._ray.remote(num_cpus=0)(_look)
        calls = [look.remote(block, first, asked) for block, first, _ in self._blocks]
        total = 0
        for wrong, part in self._ray.get(calls):
            if wrong:
                raise ValueError(wrong)
            total += part
        return {"rows": self.rows, "content": f"sha256:{total % 2**128:032x}"}

    def _pieces(self, rows: range) -> list[Piece]:
        """What of the blocks these rows are."""
        found = []
        for block, first, n in self._blocks:
            begin, end = max(first, rows.start), min(first + n, rows.stop)
            if begin < end:
                found.append((block, begin - first, end - begin))
        return found

    def answer(self, shards: Shards, source: Source, asked: Asked, workers: int | None) -> None:
        """Have all rows of the shards answered: see `answer_shards`."""
        if shards.missing():
            answer_shards(
                self._ray,
                shards,
                source,
                asked,
                self.columns,
                lambda number: self._pieces(shards.ranges[number - 1]),
                _rows_of,
                workers,
            )

    def answered(self, shards: Shards, asked: Asked) -> Any:
        """The Dataset with the answers, a block a shard. Rows without one that counts are told."""
        bad: dict[int, str] = {}
        odd: dict[int, str] = {}
        for number, rows in enumerate(shards.ranges, 1):
            results = shards.results_of(number)[0]
            of_shard = [results[row] for row in rows]
            _, none, other = answer_columns(of_shard, asked)
            bad |= {rows[i]: why for i, why in none.items()}
            odd |= {rows[i]: of_shard[i]["answer"] for i in other}
        tell_of_answers(self.rows, bad, odd, asked)
        raw = bool(odd) and asked.fallback is None and not asked.proba
        build = self._ray.remote(num_cpus=1)(_answered)
        return self._ray.data.from_arrow_refs(
            [
                build.remote(self._pieces(rows), shards, number, asked, raw)
                for number, rows in enumerate(shards.ranges, 1)
            ]
        )
