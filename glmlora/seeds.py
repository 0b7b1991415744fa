"""Where random numbers come from: one global seed and a count of the seeds taken since it was set.

Streams: (global seed, number of the call) -> seed of a call; (that, row, index) -> one draw.
"""

from __future__ import annotations

import os
import threading

import numpy as np

_random_lock = threading.Lock()
_global_seed = int.from_bytes(os.urandom(8), "little")
_calls = 0


def set_seed(seed: int) -> None:
    """Make what follows repeatable: sampling, fresh adapters and prefixes, dropout. seed: a whole
    number.
    """
    global _global_seed, _calls
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed: expected a whole number, got {seed!r}")
    with _random_lock:
        _global_seed, _calls = int(seed) % 2**64, 0


def next_key() -> tuple[int, int]:
    """What `seed_of` makes the next seed of, once it is needed: many a seed never is."""
    global _calls
    with _random_lock:
        _calls += 1
        return _global_seed, _calls - 1


def seed_of(key: tuple[int, int]) -> int:
    """A seed of 64 bits."""
    return int(np.random.Philox(key=np.array(key, np.uint64)).random_raw())


def next_seed() -> int:
    """A seed of 64 bits that depends on `set_seed` and on how many were taken since."""
    return seed_of(next_key())


def generator(seed: int | None = None) -> np.random.Generator:
    """A NumPy generator (Philox) of `seed`, or of the next global one."""
    key = next_seed() if seed is None else int(seed) % 2**64
    return np.random.Generator(np.random.Philox(key=key))
