"""Rows whose texts are equal or nearly equal, found exactly: no pair is missed by chance.

Texts are compared as sets of shingles: SHINGLE neighbouring words in lower case, a Chinese,
Japanese or Korean character being a word. Two are near-equal where the sets' Jaccard similarity
(shared shingles over all shingles) is at least THRESHOLD: of 200 words, 9 single ones may differ.

Prefix filtering (Chaudhuri et al. 2006) finds the pairs: with the shingles of every set in one
common order, rare ones first, near-equal sets of n shingles share one of the first
n - ceil(THRESHOLD n) + 1. So only rows that share a rare shingle are compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHINGLE = 3
THRESHOLD = 0.75
MOST_COMPARED = 2_000_000  # pairs; a table that has more is all of one mould
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_RARITY_BITS = 22
# Scripts without spaces between words: kana, Han, Hangul
_CHARACTER = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]")


@dataclass(frozen=True)
class Similar:
    """Groups of rows, two or more each, all rows of a group linked by near-equal texts.

    equal: (rows,) int64: the first row whose text is equal but for case and spacing; group: (rows,)
    int64: the first row of the group that a row is in; similarity: by group, the lowest Jaccard
    similarity that links it. complete: False where more pairs than MOST_COMPARED were alike.
    """

    equal: np.ndarray
    group: np.ndarray
    similarity: dict[int, float]
    complete: bool


def words_of(text: str) -> list[str]:
    """The words that texts are compared by."""
    text = text.lower()
    if not text.isascii():
        text = _CHARACTER.sub(r" \g<0> ", text)
    return text.split()


def similar_rows(texts: Sequence[str]) -> Similar:
    """The groups of equal and near-equal texts; a text without words is in no group."""
    counts, words = _word_hashes(texts)
    equal = _first_equal(counts, words)
    rows = np.flatnonzero((equal == np.arange(len(texts))) & (counts >= SHINGLE))
    sets = _shingles(counts, words, rows)
    del words
    left, right, complete = _candidates(sets)
    group = equal.copy()
    similarity: dict[int, float] = {}

    def root(row: int) -> int:
        while group[row] != row:
            group[row] = group[group[row]]
            row = int(group[row])
        return row

    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        one, other = sorted((root(int(rows[a])), root(int(rows[b]))))
        if one == other:
            continue
        shared = _shared(sets[a], sets[b])
        jaccard = shared / (len(sets[a]) + len(sets[b]) - shared)
        if jaccard >= THRESHOLD:
            group[other] = one
            lowest = min(jaccard, similarity.pop(other, 1.0))
            similarity[one] = min(lowest, similarity.get(one, 1.0))
    group = np.array([root(row) for row in range(len(texts))], np.int64)
    return Similar(equal, group, similarity, complete)


def _word_hashes(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(words of each text (rows,) int64, the hashes of all words in a row uint64)."""
    counts = np.zeros(len(texts), np.int64)
    parts = [np.zeros(0, np.int64)]
    for row, text in enumerate(texts):
        words = words_of(text)
        counts[row] = len(words)
        parts.append(np.fromiter(map(hash, words), np.int64, len(words)))
    return counts, np.concatenate(parts).view(np.uint64)


def _first_equal(counts: np.ndarray, words: np.ndarray) -> np.ndarray:
    """For each row the first one with the same words; itself where it has none."""
    ends = np.cumsum(counts)
    powers = np.full(int(counts.max(initial=0)) + 1, _MULTIPLIER)
    powers[:1] = 1
    powers = np.cumprod(powers)
    first: dict[tuple[int, int], int] = {}
    equal = np.arange(len(counts))
    for row, (end, count) in enumerate(zip(ends.tolist(), counts.tolist(), strict=True)):
        if count:
            digest = int(words[end - count : end] @ powers[:count])
            equal[row] = first.setdefault((digest, count), row)
    return equal


def _shingles(counts: np.ndarray, words: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """The set of shingles of each of the rows: uint64, ascending, rare ones first."""
    hashes = words[: len(words) - SHINGLE + 1].copy()
    for k in range(1, SHINGLE):
        hashes *= _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
        hashes += words[k : len(words) - SHINGLE + 1 + k]
    hashes *= _MULTIPLIER
    seen = np.bincount((hashes >> np.uint64(64 - _RARITY_BITS)).view(np.int64))
    starts = np.cumsum(counts) - counts
    sets = []
    for row in rows.tolist():
        start = int(starts[row])
        here = hashes[start : start + int(counts[row]) - SHINGLE + 1]
        often = np.minimum(seen[(here >> np.uint64(64 - _RARITY_BITS)).view(np.int64)], 0xFFFF)
        keys = (often.astype(np.uint64) << np.uint64(48)) | (here & np.uint64((1 << 48) - 1))
        keys.sort()
        if len(keys) > 1:
            keys = keys[np.concatenate(([True], keys[1:] != keys[:-1]))]
        sets.append(keys)
    return sets


def _candidates(sets: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, bool]:
    """Pairs of places in `sets` that may be near-equal, and whether they are all."""
    sizes = np.array([len(keys) for keys in sets], np.int64)
    firsts = [len(keys) - math.ceil(THRESHOLD * len(keys)) + 1 for keys in sets]
    keys = np.concatenate(
        [np.zeros(0, np.uint64), *(s[:n] for s, n in zip(sets, firsts, strict=True))]
    )
    owner = np.repeat(np.arange(len(sets)), firsts)
    order = np.argsort(keys, kind="stable")
    keys, owner = keys[order], owner[order]
    at = np.arange(max(0, len(keys) - 1))
    found: list[np.ndarray] = []
    total, distance = 0, 1
    while len(at):  # pairs that stand `distance` apart among those that share a shingle
        at = at[at + distance < len(keys)]
        at = at[keys[at] == keys[at + distance]]
        one, other = owner[at], owner[at + distance]
        low, high = np.minimum(sizes[one], sizes[other]), np.maximum(sizes[one], sizes[other])
        fits = low >= THRESHOLD * high
        pairs = np.minimum(one, other) * len(sets) + np.maximum(one, other)
        found.append(np.unique(pairs[fits]))
        total += len(found[-1])
        distance += 1
        if total > MOST_COMPARED:
            break
    pairs = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
    width = max(1, len(sets))
    return pairs // width, pairs % width, not len(at)


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """Shingles in both sets."""
    both = np.concatenate((one, other))
    both.sort(kind="stable")
    return int(np.count_nonzero(both[1:] == both[:-1]))
