"""Weights in ggml's blocks, without its package; test_gguf.py compares the bytes with its own."""

import numpy as np
import pytest

from glmlora import _core


def parts(blocks, bits):
    """Scales (n, 1) and integers (n, 32) of blocks."""
    blocks = blocks.reshape(-1, 2 + 4 * bits)
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    if bits == 8:
        return scale, blocks[:, 2:].view(np.int8).astype(np.float32)
    low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
    return scale, np.concatenate([low, high], 1).astype(np.float32) - 8


@pytest.mark.parametrize("bits", [8, 4])
def test_a_value_is_the_nearest_multiple_of_its_blocks_scale(bits):
    x = np.random.default_rng(0).normal(0, 1, (5, 96)).astype(np.float32)
    x[2, 32:64] = 0
    scale, integers = parts(_core.ggml_blocks(x, bits), bits)
    rows = x.reshape(-1, 32)
    largest = rows[np.arange(15), np.abs(rows).argmax(1)]
    exact = np.abs(largest) / 127 if bits == 8 else largest / -8
    assert np.array_equal(scale[:, 0], exact.astype(np.float16).astype(np.float32))
    off = np.abs(rows - exact[:, None] * integers)
    inside = integers < 7 if bits == 4 else True  # the eighth multiple has no integer
    assert (off <= 0.501 * np.abs(exact)[:, None] + 1e-9)[inside & np.ones_like(off, bool)].all()
    assert not integers[7].any() and not scale[7]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_a_block_cannot_hold_is_refused(value):
    x = np.zeros((2, 64), np.float32)
    x[1, 40] = value
    for bits in (8, 4):
        with pytest.raises(ValueError, match="not finite or too large for float16"):
            _core.ggml_blocks(x, bits)
    with pytest.raises(ValueError, match="rows of a multiple of 32, got 40"):
        _core.ggml_blocks(np.zeros((2, 40), np.float32), 8)
    with pytest.raises(ValueError, match="bits: expected 8 or 4, got 5"):
        _core.ggml_blocks(x, 5)
