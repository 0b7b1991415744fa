"""`glmlora doctor --speed`: what this machine's products do at most, and what that makes of models.

A token of a chat reads every matrix once, so it takes at least their bytes by the memory's speed;
prompts and training take at least their operations by the speed of products. Both are measured
through the core's own op, `linear_forward` (csrc/ops.h), on shapes of a 6B model.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import numpy as np

from .. import _core
from ..model.device import compute_dtype
from .optable import F16, I4, I8, Mat, Ops

COLUMNS = 4096


class Stored(NamedTuple):
    """A form of weights: dtype of the core, bits of a weight, columns that share a scale (0: a row;
    None: no scales)."""

    title: str
    dtype: int
    bits: int
    group: int | None


FORMS = (
    Stored("float16", F16, 16, None),
    Stored("int8", I8, 8, 0),
    Stored("int4", I4, 4, 0),
    Stored("int4 by 32", I4, 4, 32),
)
# Weights of the layers and of the output layer, which stays in 16 bits, of common sizes.
MODELS = {"1.5B": (1.35e9, 0.12e9), "6B": (5.71e9, 0.27e9), "9B": (8.16e9, 0.62e9)}


class Speed(NamedTuple):
    """Bytes a second of one-row products by form; operations a second of many rows by the type of
    products: those of models of 16 bits and, over int8, of models of 8 bits, and int8."""

    reading: dict[str, float]
    products: dict[str, float]


def measure(rows: int = 16384, many: int = 512, seconds: float = 0.05) -> Speed:
    """Speeds with the threads that are set; each the best of what `seconds` hold, of 2 at least.
    rows: of the float16 matrix that one row of x meets, 128 MiB that no cache keeps; others have as
    many bytes. `many` rows meet an eighth of the rows.

    Raises ValueError where GLMLORA_ISA forces what cannot be used.
    """
    usual, narrow = compute_dtype(None, ["F16"]), compute_dtype(None, ["I8"])
    ops = {kind: Ops(f"cpu/{kind}") for kind in (usual, narrow, "int8")}
    memory = np.full(rows * COLUMNS * 2, 17, np.uint8)  # as numbers of every type, none special
    scales = np.full((4 * rows, COLUMNS // 32), 0.01, np.float16)

    def seconds_of(kind: str, form: Stored, n: int, width: int) -> float:
        one = np.uint16 if form.dtype == F16 else np.int8
        data = memory[: width * COLUMNS * form.bits // 8].view(one).reshape(width, -1)
        if form.group is None:
            data = data.view(np.float16)
        scale = scales[:width] if form.group else np.ascontiguousarray(scales[:width, 0])
        weight = Mat(data, form.dtype, None if form.group is None else scale, form.group or 0)
        x, out = np.ones((n, COLUMNS), np.float32), np.empty((n, width), np.float32)
        times: list[float] = []
        while len(times) < 2 or sum(times) < seconds:
            start = time.perf_counter()
            ops[kind].linear_forward(out, x, weight, None, n, 1.0, 0)
            times.append(time.perf_counter() - start)
        return min(times)

    reading = {}
    for form in FORMS:
        width = rows * 16 // form.bits
        read = width * COLUMNS * (form.bits / 8 + (1 / 16 if form.group else 0))
        kind = usual if form.group is None else narrow
        reading[form.title] = read / seconds_of(kind, form, 1, width)
    width = max(rows // 8, 16)
    flops = 2.0 * many * width * COLUMNS
    products = {usual: flops / seconds_of(usual, FORMS[0], many, width)}
    for kind in sorted({narrow, "int8"} - {usual}):
        products[kind] = flops / seconds_of(kind, FORMS[1], many, width)
    return Speed(reading, products)


def expected(speed: Speed) -> dict[str, dict[str, float]]:
    """{size of a model: {form: tokens a second of one chat, at most}}."""
    found = {}
    for size, (layers, output) in MODELS.items():
        found[size] = {}
        for form in FORMS:
            read = layers * (form.bits / 8 + (1 / 16 if form.group else 0))
            wait = read / speed.reading[form.title] + 2 * output / speed.reading["float16"]
            found[size][form.title] = 1 / wait
    return found


def lines() -> list[str]:
    """The report's."""
    speed, used = measure(), _core.backend_name("cpu").removeprefix("cpu:")
    forced = "GLMLORA_ISA's" if os.environ.get("GLMLORA_ISA") else "the best set here"
    reading = ", ".join(f"{title} {rate / 1e9:.3g} GB/s" for title, rate in speed.reading.items())
    products = ", ".join(
        f"{kind} {rate / 1e9:.3g} GFLOP/s" for kind, rate in speed.products.items()
    )
    text = [
        f"speed         {used}, {forced}; {_core.get_num_threads()} threads",
        f"              reading weights for a token: {reading}",
        f"              products of many rows: {products}",
        "              tokens/s of one chat, at most:",
    ]
    for size, rates in expected(speed).items():
        told = ", ".join(f"{title} {rate:.3g}" for title, rate in rates.items())
        text.append(f"              {size:>6}: {told}")
    return text
