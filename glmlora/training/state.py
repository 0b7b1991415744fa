"""One run: how long it is, where it stands, what its callbacks see."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..batch import updates_per_epoch
from .arguments import TrainingArguments

#: Beyond these, a step more is no other number in a schedule.
MOST_UPDATES = 1 << 53


@dataclass(frozen=True)
class Schedule:
    """How long a run over n records is, and when it logs, saves and evaluates.

    n_micro: micro-batches of an epoch; updates, epochs, warmup (in updates), samples: of the whole
    run; every: "logging", "save", "eval" -> updates in between, or None.
    """

    n_micro: int
    updates: int
    epochs: int
    warmup: int
    samples: float
    every: dict[str, float | None]

    @classmethod
    def of(cls, args: TrainingArguments, n: int) -> Schedule:
        """Raises ValueError where n records fill no micro-batch."""
        size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        n_micro = n // size if args.dataloader_drop_last else -(-n // size)
        if n_micro == 0:
            raise ValueError(
                f"dataloader_drop_last: {n} records fill no micro-batch of {size} rows "
                "(per_device_train_batch_size)"
            )
        per_epoch = updates_per_epoch(n, size, accumulation, args.dataloader_drop_last)
        samples: float
        if args.max_steps > 0:
            updates, samples = args.max_steps, args.max_steps * size * accumulation
        else:
            updates = math.ceil(args.num_train_epochs * per_epoch)
            samples = n * args.num_train_epochs
        if max(updates, args.warmup_steps) > MOST_UPDATES:
            raise ValueError(
                f"max_steps, num_train_epochs, warmup_steps: expected a run of at most "
                f"{MOST_UPDATES} updates, got {max(updates, args.warmup_steps):.3g}"
            )
        every = {}
        for what in ("logging", "save", "eval"):
            steps = getattr(args, f"{what}_steps")
            if steps is not None and steps < 1:
                steps = math.ceil(updates * steps)
            every[what] = steps
        return cls(
            n_micro=n_micro,
            updates=updates,
            epochs=-(-updates // per_epoch),
            warmup=args.warmup_steps or math.ceil(updates * args.warmup_ratio),
            samples=samples,
            every=every,
        )


@dataclass
class TrainState:
    """What callbacks see, and the content of trainer_state.json. They may set `should_stop`.

    epoch: epochs done, with a fraction; log_history: the records so far, the last one the newest.
    """

    output_dir: str
    model: Any = None
    tokenizer: Any = None
    max_steps: int = 0
    num_train_epochs: int = 0
    global_step: int = 0
    epoch: float = 0.0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    total_flos: float = 0.0
    num_input_tokens_seen: int = 0
    should_stop: bool = False


@dataclass
class Progress:
    """Where a run stands at the end of an update, beside what the core holds.

    epoch, micro_batches: index of the epoch and micro-batches done in it; losses are sums of update
    losses (token means) since the last log and in all; elapsed: seconds of the run so far.
    """

    epoch: int = 0
    micro_batches: int = 0
    updates: int = 0
    adam_steps: int = 0
    loss_since_log: float = 0.0
    updates_since_log: int = 0
    loss_total: float = 0.0
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    elapsed: float = 0.0
