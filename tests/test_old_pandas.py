"""Rows by position under every pandas, while a notebook's bridge is there."""

import subprocess
import sys
import warnings

import numpy as np
import pytest

from glmlora import old_pandas

pandas = pytest.importorskip("pandas")
ROW = ["7", "Sorting", "Li, W.", 1]


@pytest.fixture
def row():
    table = pandas.DataFrame([ROW, ROW], columns=["uuid", "title", "author", "label"])
    old_pandas.install()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield table.loc[0]
    finally:
        old_pandas.uninstall()


def test_whole_numbers_are_positions(row):
    assert [row[i] for i in range(4)] == ROW and row[-1] == 1 and row["title"] == "Sorting"
    assert row[np.int64(3)] == 1
    assert list(row[1:3]) == ["Sorting", "Li, W."]
    with pytest.raises(IndexError):
        row[4]
    with pytest.raises(KeyError):
        row["abstract"]
    with pytest.raises(KeyError):
        row[True]


def test_numbers_that_are_labels_stay_labels(row):
    assert pandas.Series(["a", "b"], index=[1, 0])[1] == "a"
    mixed = pandas.Series(["a", "b", "c"], index=["x", 0, None])
    assert mixed[0] == "b"
    with pytest.raises(KeyError):
        pandas.Series(["a"], index=[5])[0]
    two = pandas.Series([1, 2], index=pandas.MultiIndex.from_tuples([(1, "a"), (0, "b")]))
    assert two[1].tolist() == [1]


def test_it_ends(row):
    usual = old_pandas._by_position.usual
    old_pandas.install()  # twice is once
    assert old_pandas._by_position.usual is usual
    old_pandas.uninstall()
    assert pandas.Series.__getitem__ is usual
    with pytest.raises((KeyError, FutureWarning)):  # pandas 3, pandas 2
        row[1]


CHILD = """
import sys, warnings
warnings.simplefilter("error", FutureWarning)
from glmlora import compat
compat.install()
assert "pandas" not in sys.modules
import pandas
print(pandas.DataFrame({"a": ["x"], "b": ["y"]}).loc[0][1])
compat.uninstall()
try:
    pandas.DataFrame({"a": ["x"], "b": ["y"]}).loc[0][1]
except (KeyError, FutureWarning):
    print("gone")
"""


def test_pandas_that_is_imported_later():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert done.stdout == "y\ngone\n", done.stderr
