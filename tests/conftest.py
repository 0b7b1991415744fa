"""Paths that tests share. The shared folder holds the golden data and real papers; it is not
part of the project."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture
def shared() -> Path:
    """The folder with golden fixtures, seed notebook and real papers; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(
            "../shared (golden fixtures, real papers) is absent: it is not part of the project"
        )
    return SHARED
