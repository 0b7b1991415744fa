"""Base weights that are other ones while an adapter is attached: those that it has whole
(modules_to_save), and what is left of those that PiSSA and OLoRA took a part of.

`model.replaced` has what the base has in their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..files.tensor import Tensor
from .modeling import ChatGLMForConditionalGeneration, _converted


def replace(model: ChatGLMForConditionalGeneration, tensors: Mapping[str, Tensor]) -> None:
    """Put these in the places of base weights, after those of an adapter before were put back."""
    put_back(model)
    model.replaced = exchange(model, tensors)


def put_back(model: ChatGLMForConditionalGeneration) -> None:
    """The base as it was."""
    exchange(model, model.replaced)
    model.replaced = {}


def exchange(model: ChatGLMForConditionalGeneration, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Put tensors in the places of base weights; returns what was there. A weight that is being
    trained keeps its gradient and moments.
    """
    before = {}
    for name, tensor in tensors.items():
        if name in model.core.trainable():
            before[name] = Tensor(model.core.read(name))
            model.core.write(name, np.ascontiguousarray(tensor.numpy(), np.float32))
        else:
            before[name] = model._tensor(name)
            model._bind(name, tensor)
    return before


def keep(model: ChatGLMForConditionalGeneration) -> None:
    """Make what stands in the places of base weights the base's, in the types of those."""
    for name, before in model.replaced.items():
        tensor = model._tensor(name)
        if isinstance(before, Tensor) and before.dtype != tensor.dtype:
            model._bind(name, _converted(tensor, before.dtype))
    model.replaced = {}
