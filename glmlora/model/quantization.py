"""Linear layers stored as integers: THUDM's row-wise int8 and int4, and int4 in groups of columns.

A matrix (out, in) becomes an int8 `weight`, (out, in) for 8 bits and (out, in / 2) for 4 (two
columns a byte, the even one in the high nibble, two's complement), and a float16 `weight_scale`:
(out,), or in groups (out, ceil(in / group size)), which is this package's own form, named by
`quantization_group_size` in config.json. value = integer * scale. Scales and integers are computed
by the core (`quantize` in csrc/ops.h).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np

from .. import _core
from ..files.tensor import Source, Tensor

GROUP_SIZE = 32  # where nobody says: 4.5 bits a weight
SCALE = "_scale"  # `weight_scale` stands beside `weight`


class QuantizedTensor:
    """A quantized matrix where a Tensor is expected.

    integers (out, in) or (out, in / 2) I8, scale float16 Tensors as they are in the file; dtype
    "I8" or "I4"; group: columns that share a scale, 0 for whole rows.
    """

    __slots__ = ("dtype", "group", "integers", "scale")

    def __init__(self, integers: Tensor, scale: Tensor, bits: int, group: int = 0):
        self.integers = integers
        self.scale = scale
        self.dtype = "I8" if bits == 8 else "I4"
        self.group = group

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that it stands for."""
        rows, columns = self.integers.shape
        return rows, columns * (2 if self.dtype == "I4" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of integers and scales."""
        return self.integers.nbytes + self.scale.nbytes

    def numpy(self) -> np.ndarray:
        """The values, float32 (out, in): integer * scale, which float32 holds exactly."""
        integers = self.integers.numpy()
        if self.dtype == "I4":  # shifts of int8 keep the sign
            integers = np.stack([integers >> 4, integers << 4 >> 4], axis=-1)
        wide = integers.reshape(self.shape).astype(np.float32)
        scale = self.scale.numpy().astype(np.float32).reshape(wide.shape[0], -1)
        if self.group:
            scale = np.repeat(scale, self.group, axis=1)[:, : wide.shape[1]]
        wide *= scale
        return wide

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.dtype}, {self.shape}, group={self.group})"


def quantize(name: str, tensor: Tensor, bits: int, group: int = 0) -> QuantizedTensor:
    """The quantized form of a float matrix.

    Raises ValueError naming the tensor where a value is not finite or float16 cannot hold a scale,
    and for 4 bits of an odd number of columns.
    """
    _check_columns(name, tensor.shape, bits)
    integers, scale = _core.quantize(tensor.data, tensor.dtype, bits, group)
    if not np.isfinite(scale).all():
        row = int(np.argwhere(~np.isfinite(scale.reshape(len(scale), -1)).all(1))[0, 0])
        raise ValueError(
            f"{name}: row {row} has a value that is not finite or too large for float16, so it "
            "cannot be quantized"
        )
    return QuantizedTensor(Tensor(integers), Tensor(scale), bits, group)


def _check_columns(name: str, shape: tuple[int, ...], bits: int) -> None:
    if bits == 4 and shape[1] % 2:
        raise ValueError(f"{name}: 4 bits need an even number of columns, got {shape}")


def quantized_sources(
    sources: Iterable[Source], names: Container[str], bits: int, group: int = 0
) -> list[Source]:
    """What is written of a float model that is to be quantized: the matrices `names` as integers
    and their scales, the others as they are.

    A matrix is read and quantized when its integers are due, and its scales are due next: a writer
    that takes the sources in this order has one matrix in memory at a time. Raises ValueError as
    `quantize` does, for an odd number of columns now, else when the matrix is due.
    """
    found: list[Source] = []
    for source in sources:
        if source.name not in names:
            found.append(source)
            continue
        _check_columns(source.name, source.shape, bits)
        rows, columns = source.shape
        made: list[Tensor] = []

        def due(source: Source = source, made: list[Tensor] = made) -> Tensor:
            if not made:
                tensor = source.get()
                tensor = tensor if isinstance(tensor, Tensor) else Tensor(tensor, source.dtype)
                result = quantize(source.name, tensor, bits, group)
                made[:] = result.scale, result.integers
                _core.drop_pages(tensor.data)
            return made.pop()

        scales = (rows, -(-columns // group)) if group else (rows,)
        found.append(Source(source.name, "I8", (rows, columns * bits // 8), due))
        found.append(Source(source.name + SCALE, "F16", scales, due))
    return found


def check_form(bits: object, group: object) -> tuple[int, int]:
    """(bits, group) of a config or a call, 0 for what is absent. ValueError for other forms."""
    if bits not in (None, 0, 4, 8) or isinstance(bits, bool | float):
        raise ValueError(f"quantization_bit: expected 0, 4 or 8, got {bits!r}")
    if group in (None, 0):
        return bits or 0, 0
    if type(group) is not int or group < 32 or group % 32 or bits != 4:
        raise ValueError(
            f"quantization_group_size: expected a multiple of 32 with 4 bits, got {group!r} with "
            f"{bits!r}"
        )
    return 4, group


def is_quantized(config: Any, bits: int, group: int | None = None) -> bool:
    """Whether a model of this config is quantized to `bits` bits already, and, unless `group` is
    None, in groups of that size. ValueError where it is quantized otherwise: its integers cannot
    become others.
    """
    stored, size = check_form(config.quantization_bit, config.quantization_group_size)
    if not stored:
        return False
    form = f"in groups of {size} columns" if size else "row-wise"
    if stored != bits or (group is not None and group != size):
        asked = f"{bits} bits" + (f" in groups of {group} columns" if group else "")
        raise ValueError(
            f"quantization_bit, quantize: the model is stored in {stored} bits ({form}) already, "
            f"{asked} were asked for: open the float model to quantize it otherwise"
        )
    return True


def join(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], bits: int, group: int
) -> dict[str, Tensor | QuantizedTensor]:
    """A quantized checkpoint's tensors with `weight` and `weight_scale` of each linear in one.

    shapes: of the matrices that are quantized, by name. Raises ValueError naming a tensor that is
    of another type or shape than config.json says. Absent ones are the caller's to name.
    """
    joined = dict(tensors)
    for name, (rows, columns) in shapes.items():
        if name not in joined:
            continue
        integers, scale = joined[name], joined.pop(name + SCALE, None)
        if integers.dtype != "I8" or scale is None:
            what = f"type {integers.dtype}" if integers.dtype != "I8" else f"no {name + SCALE}"
            raise ValueError(
                f"tensor {name}: {what}, but config.json says quantization_bit {bits}: expected "
                "I8 integers and their scales; for a float checkpoint set it to 0 and call "
                f"quantize({bits})"
            )
        if scale.dtype in ("F32", "BF16"):
            scale = Tensor(_core.convert(scale.data, scale.dtype, "F16"), "F16")
        expected = (rows, columns if bits == 8 else columns // 2)
        per_row = (rows, -(-columns // group)) if group else (rows,)
        for what, tensor, dtype, shape in (
            (name, integers, "I8", expected),
            (name + SCALE, scale, "F16", per_row),
        ):
            if tensor.dtype != dtype or tensor.shape != shape:
                raise ValueError(
                    f"tensor {what}: expected {dtype} {shape} for quantization_bit {bits}, got "
                    f"{tensor.dtype} {tensor.shape}"
                )
        if not np.isfinite(scale.numpy()).all():
            raise ValueError(f"tensor {name + SCALE}: a scale is not finite")
        joined[name] = QuantizedTensor(integers, scale, bits, group)
    return joined
