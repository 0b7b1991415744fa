"""The optimiser of a training loop of one's own; the arithmetic is the core's (one flat block,
AdamW after clipping).
"""

from __future__ import annotations

import math
from typing import Any


class AdamW:
    """AdamW over a model's trainable weights (Loshchilov and Hutter, "Decoupled Weight Decay
    Regularization").

    model: a model or PeftModel with something to train. lr may be set between steps; weight_decay
    is not applied to biases and norm weights; max_grad_norm clips the global norm (0: no clipping).
    loraplus_lr_ratio: lora_B has so many times the rate (Hayou et al. 2024, "LoRA+").
    Moments are float32 and live in the model's core; another choice of trainable weights starts
    them anew. Raises ValueError naming the argument.
    """

    def __init__(
        self,
        model: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        loraplus_lr_ratio: float = 1.0,
    ):
        self.model = model
        self.lr = lr
        try:
            self.betas = tuple(_number("betas", b, below=1.0) for b in betas)
        except TypeError:
            self.betas = ()
        if len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas!r}")
        self.eps = _number("eps", eps)
        self.weight_decay = _number("weight_decay", weight_decay)
        self.max_grad_norm = _number("max_grad_norm", max_grad_norm)
        self.loraplus_lr_ratio = _number("loraplus_lr_ratio", loraplus_lr_ratio)
        if not model.trainable_names:
            raise ValueError(
                "model: nothing is trainable: use get_peft_model, is_trainable=True or "
                "requires_grad_(True) first"
            )

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = _number("lr", value)

    def step(self) -> float:
        """Clip, update every trainable weight, forget the gradients. Returns the global norm before
        clipping.

        Raises RuntimeError when no gradient was accumulated, FloatingPointError for a norm that is
        not finite (nothing is changed then).
        """
        core = self.model.core
        if not core.accumulated_tokens:
            raise RuntimeError("step: no gradient was accumulated: call model.backward(...) first")
        more = self.eps, self.weight_decay, self.max_grad_norm, self.loraplus_lr_ratio
        return core.step(self.lr, *self.betas, *more)

    def zero_grad(self) -> None:
        """Forget the accumulated gradients."""
        self.model.zero_grad()


def _number(name: str, value: Any, below: float = math.inf) -> float:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    if not known or not 0 <= value < below:
        limit = "" if below == math.inf else f" to below {below}"
        raise ValueError(f"{name}: expected a number from 0{limit}, got {value!r}")
    return float(value)
