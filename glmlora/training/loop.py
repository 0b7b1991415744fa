"""The training loop: updates, logs, checkpoints and exact resume.

An update is `gradient_accumulation_steps` micro-batches: the core adds up gradients of summed
losses (`backward`) and divides by the labelled tokens once (`step`), so that 8x1, 4x2 and 1x8 rows
give one result. Everything a later update depends on is in `Progress` and in the core (trained
weights, moments, number of steps); a checkpoint holds both, so a resumed run equals an
uninterrupted one bit for bit.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..batch import Encoded, epoch_order, grouped_epoch_order, micro_batches, updates_per_epoch
from ..files.checkpoint import (
    atomic_directory,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from ..files.write import write_text
from ..model.device import memory_available
from .arguments import TrainingArguments
from .evaluation import evaluate_loss, progress, speed
from .methods import Trainee

MOMENTS = ("exp_avg", "exp_avg_sq")
EVENTS = ("on_train_begin", "on_step_end", "on_log", "on_save", "on_train_end")
#: Training arguments that change the numbers of a run: a resumed run must have the same ones.
DECISIVE = (
    "seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "dataloader_drop_last",
    "group_by_length",
)


@dataclass
class TrainState:
    """What callbacks see, and what trainer_state.json tells. They may set `should_stop`.

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


class Shield:
    """Ctrl-C waits until the block ends, so that the state is never between two updates."""

    def __enter__(self) -> Shield:
        self._pending, self._old = False, None
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._old = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: Any) -> None:
        self._pending = True

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._old is not None:
            signal.signal(signal.SIGINT, self._old)
        if self._pending and kind is None:
            raise KeyboardInterrupt


class Loop:
    """One run over `encoded` with the arguments `args`.

    ignored_id: label id left out of the loss, or None. eval_encoded: what evaluation_strategy
    evaluates. facts: further things that decide the result (data lengths, base), compared on
    resume. write_arguments(directory): writes the argument files that go with each save.
    """

    def __init__(
        self,
        trainee: Trainee,
        encoded: Encoded,
        args: TrainingArguments,
        ignored_id: int | None = None,
        eval_encoded: Encoded | None = None,
        callbacks: Sequence[Any] = (),
        facts: Mapping[str, Any] | None = None,
        write_arguments: Callable[[Path], None] = lambda directory: None,
    ):
        self.trainee, self.core = trainee, trainee.base.core
        self.encoded, self.eval_encoded = encoded, eval_encoded
        self.args, self.ignored_id = args, ignored_id
        self.callbacks = [_checked(callback) for callback in callbacks]
        self.write_arguments = write_arguments
        self.output_dir = Path(args.output_dir)
        self.order_seed = args.seed if args.data_seed is None else args.data_seed
        self.at = Progress()
        self._set_lengths()
        self.facts = {**self._own_facts(), **(facts or {})}
        self.saved: list[Path] = []  # checkpoints of this run, oldest first
        self._warned_masked = False

    def _set_lengths(self) -> None:
        """Numbers of micro-batches, updates, epochs and warm-up updates; when to log and save."""
        a, n = self.args, len(self.encoded)
        size = a.per_device_train_batch_size
        self.n_micro = n // size if a.dataloader_drop_last else -(-n // size)
        if self.n_micro == 0:
            raise ValueError(
                f"dataloader_drop_last: {n} records fill no micro-batch of {size} rows "
                "(per_device_train_batch_size)"
            )
        per_epoch = updates_per_epoch(
            n, size, a.gradient_accumulation_steps, a.dataloader_drop_last
        )
        total = a.max_steps if a.max_steps > 0 else math.ceil(a.num_train_epochs * per_epoch)
        self.state = TrainState(
            output_dir=str(self.output_dir),
            model=self.trainee.model,
            tokenizer=self.trainee.tokenizer,
            max_steps=total,
            num_train_epochs=-(-total // per_epoch),
        )
        self.warmup = a.warmup_steps or math.ceil(total * a.warmup_ratio)
        self.samples = (
            total * size * a.gradient_accumulation_steps
            if a.max_steps > 0
            else n * a.num_train_epochs
        )
        self.every = {}
        for what in ("logging", "save", "eval"):
            steps = getattr(a, f"{what}_steps")
            if steps is not None and steps < 1:
                steps = math.ceil(total * steps)
            self.every[what] = steps

    def _own_facts(self) -> dict[str, Any]:
        """All that decides the result, by the name of the field that says it."""
        import hashlib

        digest = hashlib.sha256()
        for array in (self.encoded.ids, self.encoded.offsets, self.encoded.source_lengths):
            digest.update(np.ascontiguousarray(array).tobytes())
        told = {name: getattr(self.args, name) for name in DECISIVE}
        told["data_seed"] = self.order_seed
        told["warmup_steps"] = self.warmup
        told["max_steps"] = self.state.max_steps
        told["data_rows"] = len(self.encoded)
        told["data_sha256"] = digest.hexdigest()
        told["ignored_id"] = self.ignored_id
        return {**self.trainee.describe(), **told}

    # Memory

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Record numbers of the micro-batches of an epoch, a function of (seed, epoch, n) only."""
        size = self.args.per_device_train_batch_size
        if self.args.group_by_length:
            order = grouped_epoch_order(self.encoded.lengths, epoch, self.order_seed, size)
        else:
            order = epoch_order(len(self.encoded), epoch, self.order_seed)
        return micro_batches(order, size, self.args.dataloader_drop_last)

    def _largest(self) -> tuple[int, int, int]:
        """Most tokens, rows of the user's batch, and labelled tokens of any micro-batch to come."""
        lengths = self.encoded.lengths
        targets = lengths - self.encoded.source_lengths
        tokens = labelled = 0
        for epoch in range(self.at.epoch, self.state.num_train_epochs):
            for rows in self.batches(epoch):
                tokens = max(tokens, int(lengths[rows].sum()))
                labelled = max(labelled, int(targets[rows].sum()))
        size = min(self.args.per_device_train_batch_size, len(lengths))
        return tokens, size, min(labelled, tokens)

    def _largest_eval(self) -> tuple[int, int, int] | None:
        if self.eval_encoded is None:
            return None
        lengths, size = self.eval_encoded.lengths, self.args.per_device_eval_batch_size
        targets = lengths - self.eval_encoded.source_lengths
        starts = np.arange(0, len(lengths), size)
        most = [int(np.add.reduceat(a, starts).max()) for a in (lengths, targets)]
        return most[0], min(size, len(lengths)), most[1]

    def take_memory(self) -> None:
        """Take all memory of the run, so that no step allocates.

        Raises MemoryError before anything is taken that is not there: bytes needed by kind, bytes
        available, and what to change.
        """
        core, base = self.core, self.trainee.base
        sizes, eval_sizes = self._largest(), self._largest_eval()
        n_trained = sum(int(np.prod(core.shape(n), dtype=np.int64)) for n in self.trainee.names)
        trained = 16 * n_trained
        if core.trainable():
            core.set_trainable([])  # moments of an earlier loop are not of this run
        self._check_room(trained, 0, sizes)
        base.prepare_training()
        checkpointing = self.args.gradient_checkpointing or base.gradient_checkpointing
        held = core.plan(*sizes, True)["held"]
        budget = base.activation_budget(checkpointing, held)
        planned = core.plan(*sizes, True, budget)
        self._check_room(trained, planned["activations"] - held, sizes, taken=trained)
        core.reserve(*sizes, True, budget)
        if eval_sizes is not None:
            core.reserve(*eval_sizes, False)

    def _check_room(
        self, trained: int, activations: int, sizes: tuple[int, int, int], taken: int = 0
    ) -> None:
        available = memory_available(self.trainee.base.device)
        if trained + activations - taken <= available:
            return
        tokens, rows, _ = sizes
        parts = [f"{trained} bytes for parameters, gradients and moments"]
        if activations:
            parts.append(
                f"{activations} bytes for activations of the largest micro-batch "
                f"({tokens} tokens in {rows} rows)"
            )
        advice = "train fewer weights (finetuning_type lora, smaller lora_rank)"
        if activations:
            advice = (
                "use a smaller per_device_train_batch_size with more gradient_accumulation_steps "
                f"(same result), a smaller max_source_length, or {advice}"
            )
        self.core.set_trainable([])
        raise MemoryError(
            f"not enough memory to train: needs {' and '.join(parts)}, of which {taken} are taken; "
            f"{available} bytes are available; {advice}"
        )

    # The loop

    def run(self, resume: Path | None = None) -> dict[str, float]:
        """Train; returns the summary record without `step`.

        resume: a checkpoint-N directory to go on from. Raises ValueError for one of another run,
        MemoryError before the first step, FloatingPointError naming step and records; Ctrl-C saves
        a checkpoint at the last finished update and is raised again.
        """
        if not self._any_label():
            raise ValueError("data: no label is left to train on: all are masked")
        self.take_memory()
        if resume is not None:
            self.resume(resume)
        self._begin_log_file(resume)
        started = time.perf_counter()
        self.started = started - self.at.elapsed
        s = self.state
        self.bar = progress(s.max_steps, self.args.disable_tqdm, s.global_step)
        try:
            self.trainee.model.train()
            self._tell("on_train_begin")
            self._epochs()
            if self.args.load_best_model_at_end and s.best_model_checkpoint:
                with Shield():
                    self.trainee.load(s.best_model_checkpoint)
        except KeyboardInterrupt:
            self.bar.close()
            self._keep_interrupted()
            raise
        finally:
            self.bar.close()
            self.core.zero_grad()
        samples = self.samples * s.global_step / s.max_steps  # fewer where a callback stopped it
        summary = speed("train", self.started, samples, s.global_step)
        summary["total_flos"] = s.total_flos
        summary["train_loss"] = self.at.loss_total / max(1, s.global_step)
        summary["epoch"] = round(s.epoch, 2)
        s.log_history.append({**summary, "step": s.global_step})
        return summary

    def finish(self) -> None:
        """Write the end state into the root of output_dir."""
        with Shield():
            self.trainee.save(self.output_dir, self.args.save_safetensors)
            self.write_arguments(self.output_dir)
            write_json(self.output_dir / "trainer_state.json", self.state_dict())
        self._tell("on_train_end")

    def _any_label(self) -> bool:
        for start in range(0, len(self.encoded), 256):
            rows = np.arange(start, min(start + 256, len(self.encoded)))
            if self.encoded.batch(rows, self.ignored_id).n_targets:
                return True
        return False

    def _epochs(self) -> None:
        s, accumulation = self.state, self.args.gradient_accumulation_steps
        while s.global_step < s.max_steps and not s.should_stop:
            batches = self.batches(self.at.epoch)
            for first in range(self.at.micro_batches, self.n_micro, accumulation):
                group = batches[first : first + accumulation]
                self._update(group)
                # The end of the run counts as the end of its last epoch.
                ended = first + len(group) >= self.n_micro or s.global_step >= s.max_steps
                self._after_update(ended)
                if s.global_step >= s.max_steps or s.should_stop:
                    return

    def _update(self, group: Sequence[np.ndarray]) -> None:
        """One optimiser step on the micro-batches; counts it in one piece with the step."""
        a, s, at, core = self.args, self.state, self.at, self.core
        factor = _core.lr_factor(
            a.lr_scheduler_type, s.global_step, self.warmup, s.max_steps, a.learning_rate
        )
        lr = a.learning_rate * factor
        loss, labelled, tokens = 0.0, 0, 0
        rows = group[0]
        try:
            for rows in group:
                batch = self.encoded.batch(rows, self.ignored_id)
                positions, targets = batch.rows_and_targets()
                tokens += batch.n_tokens
                if not positions.size:
                    self._warn_masked(rows)
                    continue
                mean = core.backward(
                    batch.ids,
                    batch.lengths,
                    positions,
                    targets,
                    dropout_seed=a.seed,
                    dropout=True,
                )
                loss += mean * positions.size
                labelled += positions.size
            with Shield():
                # With every label masked nothing is learnt: the step is counted, weights stay.
                if labelled:
                    at.grad_norm = core.step(
                        lr,
                        a.adam_beta1,
                        a.adam_beta2,
                        a.adam_epsilon,
                        a.weight_decay,
                        a.max_grad_norm,
                    )
                    loss /= labelled
                at.adam_steps = core.steps
                at.learning_rate = lr
                at.loss_since_log += loss
                at.loss_total += loss
                at.updates_since_log += 1
                at.micro_batches += len(group)
                at.updates += 1
                s.global_step = at.updates
                s.epoch = at.epoch + at.micro_batches / self.n_micro
                s.num_input_tokens_seen += tokens
                s.total_flos += 6.0 * tokens * self._flop_weights
                if at.micro_batches >= self.n_micro:
                    at.epoch, at.micro_batches = at.epoch + 1, 0
        except FloatingPointError as error:
            seen = np.concatenate([g for g in group]).tolist()
            raise FloatingPointError(
                f"update {s.global_step + 1} of {s.max_steps}: {error}; its last micro-batch has "
                f"the records {rows.tolist()}, in this order, and the whole update {seen}. "
                "Nothing was saved after it; try a smaller learning_rate, or look at these records"
            ) from None
        self.bar.update()
        spent = max(time.perf_counter() - self.started - at.elapsed, 1e-9)
        self._seen_now += tokens
        self.bar.set_postfix(
            {"loss": f"{loss:.4f}", "tok/s": f"{self._seen_now / spent:.0f}"}, refresh=False
        )

    _seen_now = 0

    @property
    def _flop_weights(self) -> int:
        if not hasattr(self, "_n_weights"):
            base, embedding = self.trainee.base, "transformer.embedding.word_embeddings.weight"
            whole = base.num_parameters()
            self._n_weights = whole - int(np.prod(self.core.shape(embedding), dtype=np.int64))
        return self._n_weights

    def _warn_masked(self, rows: np.ndarray) -> None:
        if not self._warned_masked:
            self._warned_masked = True
            warnings.warn(
                f"a micro-batch adds nothing: all labels of its records {rows.tolist()} are masked "
                "(told once)",
                stacklevel=5,
            )

    def _after_update(self, epoch_ended: bool) -> None:
        """Log, evaluate and save where it is due; callbacks."""
        self._tell("on_step_end")
        due = {what: self._due(what, epoch_ended) for what in ("logging", "save", "eval")}
        if due["logging"] or (self.args.logging_first_step and self.state.global_step == 1):
            self._log_loss()
        if due["eval"] and self.eval_encoded is not None:
            self.evaluate()
        if due["save"]:
            self.save_checkpoint()

    def _due(self, what: str, epoch_ended: bool) -> bool:
        strategy = getattr(self.args, f"{what}_strategy")
        if strategy == "epoch":
            due = epoch_ended
        else:
            due = strategy == "steps" and self.state.global_step % self.every[what] == 0
        if what == "eval" and due:
            reached = self.state.epoch if strategy == "epoch" else self.state.global_step
            due = reached >= self.args.eval_delay
        return due

    def _log_loss(self) -> None:
        at = self.at
        if not at.updates_since_log:
            return
        with Shield():
            record = {
                "loss": round(at.loss_since_log / at.updates_since_log, 4),
                "grad_norm": at.grad_norm,
                "learning_rate": at.learning_rate,
            }
            at.loss_since_log, at.updates_since_log = 0.0, 0
            self._record(record)
            self._append_log_line()
        self._tell("on_log")

    def _record(self, record: dict[str, Any]) -> None:
        """Into log_history, and as one dict on standard output."""
        record = {**record, "epoch": round(self.state.epoch, 2)}
        self.state.log_history.append({**record, "step": self.state.global_step})
        self.bar.write(str(record), file=sys.stdout)
        sys.stdout.flush()

    def _begin_log_file(self, resume: Path | None) -> None:
        """Delete trainer_log.jsonl, or leave in it what the resumed checkpoint knows of."""
        path = self.output_dir / "trainer_log.jsonl"
        if resume is None:
            path.unlink(missing_ok=True)
        elif path.is_file():
            last, kept = self.state.global_step, []
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    if json.loads(line)["current_steps"] <= last:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):  # half a line of a killed run
                    continue
            write_text(path, "".join(kept))

    def _append_log_line(self) -> None:
        s, record = self.state, self.state.log_history[-1]
        elapsed = time.perf_counter() - self.started
        line = {
            "current_steps": s.global_step,
            "total_steps": s.max_steps,
            "loss": record["loss"],
            "reward": None,
            "learning_rate": record["learning_rate"],
            "epoch": record["epoch"],
            "percentage": round(100 * s.global_step / s.max_steps, 2),
            "elapsed_time": _clock(elapsed),
            "remaining_time": _clock(elapsed / s.global_step * (s.max_steps - s.global_step)),
        }
        with open(self.output_dir / "trainer_log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def evaluate(self) -> dict[str, float]:
        """Loss of the evaluation data, logged; keeps track of the best."""
        s, a = self.state, self.args
        assert self.eval_encoded is not None
        metrics = evaluate_loss(
            self.core,
            self.eval_encoded,
            a.per_device_eval_batch_size,
            self.ignored_id,
            disable_tqdm=True,
        )
        with Shield():
            self._record(metrics)
            if a.load_best_model_at_end:
                value = metrics["eval_loss"]
                best = s.best_metric
                if best is None or (value > best if a.greater_is_better else value < best):
                    s.best_metric = value
                    s.best_model_checkpoint = str(self.checkpoint_path())
        self._tell("on_log")
        return metrics

    def _tell(self, event: str) -> None:
        for callback in self.callbacks:
            handler = getattr(callback, event, None)
            if handler is not None:
                handler(self.state)
            elif event == "on_log" and not _is_observer(callback):
                callback(dict(self.state.log_history[-1]))

    # Checkpoints

    def checkpoint_path(self) -> Path:
        """Where a checkpoint of the last finished update goes."""
        return self.output_dir / f"checkpoint-{self.state.global_step}"

    def state_dict(self) -> dict[str, Any]:
        """The content of trainer_state.json."""
        s, a = self.state, self.args
        return {
            "best_global_step": _step_of(s.best_model_checkpoint),
            "best_metric": s.best_metric,
            "best_model_checkpoint": s.best_model_checkpoint,
            "epoch": s.epoch,
            "eval_steps": self.every["eval"],
            "global_step": s.global_step,
            "is_hyper_param_search": False,
            "is_local_process_zero": True,
            "is_world_process_zero": True,
            "log_history": s.log_history,
            "logging_steps": self.every["logging"],
            "max_steps": s.max_steps,
            "num_input_tokens_seen": s.num_input_tokens_seen,
            "num_train_epochs": s.num_train_epochs,
            "save_steps": self.every["save"],
            "stateful_callbacks": {},
            "total_flos": s.total_flos,
            "train_batch_size": a.per_device_train_batch_size,
            "trial_name": None,
            "trial_params": None,
        }

    def save_checkpoint(self) -> Path:
        """Write checkpoint-N as a whole or not at all; then drop those beyond save_total_limit."""
        path, core = self.checkpoint_path(), self.core
        with Shield():
            at = {**asdict(self.at), "elapsed": time.perf_counter() - self.started}
            moments = [
                (f"{n}.{what}", "F32", core.shape(n), lambda n=n, what=what: core.read(n, what))
                for n in self.trainee.names
                for what in MOMENTS
            ]
            scheduler = {
                "lr_scheduler_type": self.args.lr_scheduler_type,
                "last_step": self.state.global_step,
                "warmup_steps": self.warmup,
                "total_steps": self.state.max_steps,
                "learning_rate": self.args.learning_rate,
            }
            with atomic_directory(path) as folder:
                self.trainee.save(folder, self.args.save_safetensors)
                self.write_arguments(folder)
                write_safetensors(folder / "optimizer.safetensors", moments)
                write_json(folder / "scheduler.json", scheduler)
                write_json(folder / "rng_state.json", {"progress": at, "run": self.facts})
                write_json(folder / "trainer_state.json", self.state_dict())
            if path in self.saved:
                self.saved.remove(path)
            self.saved.append(path)
            self._drop_old()
        self._tell("on_save")
        return path

    def _drop_old(self) -> None:
        limit = self.args.save_total_limit
        if limit is None:
            return
        keep = set(self.saved[-limit:])
        if self.state.best_model_checkpoint:
            best = Path(self.state.best_model_checkpoint)
            # The best one takes the place of the oldest kept, but never of the newest.
            if best in self.saved and best not in keep:
                keep = {best, *(self.saved[-limit + 1 :] if limit > 1 else self.saved[-1:])}
        for path in [p for p in self.saved if p not in keep]:
            shutil.rmtree(path, ignore_errors=True)
            self.saved.remove(path)

    def _keep_interrupted(self) -> None:
        """After Ctrl-C: save what was done so far, and say how to go on."""
        s = self.state
        self.core.zero_grad()
        where = f"interrupted after update {s.global_step} of {s.max_steps}"
        if s.global_step == 0:
            print(f"{where}: nothing to save", file=sys.stderr)
            return
        path = self.checkpoint_path()
        if not self.saved or self.saved[-1] != path:
            print(f"{where}: saving {path}", file=sys.stderr)
            try:
                self.save_checkpoint()
            except OSError as error:  # what was asked for is the end, not this save
                print(f"{where}: {path} could not be written: {error}", file=sys.stderr)
                return
        print(
            f"{where}: everything up to here is in {path}; go on with "
            f"resume_from_checkpoint={str(path)!r} (--resume_from_checkpoint {path})",
            file=sys.stderr,
        )

    def resume(self, path: Path) -> None:
        """Become the run that wrote `path`, at that point.

        Raises ValueError naming the first difference between the two runs with both values, or a
        file that is damaged or missing; OSError for one that cannot be read.
        """
        stored = read_json(path / "rng_state.json", dict)
        told, state = stored.get("run"), read_json(path / "trainer_state.json", dict)
        if not isinstance(told, dict) or not isinstance(stored.get("progress"), dict):
            raise ValueError(f"{path / 'rng_state.json'}: expected the keys 'progress' and 'run'")
        ours = json.loads(json.dumps(self.facts))
        for name in sorted({*told, *ours} - {"trained_shapes", "data_sha256", "base_sha256"}):
            if told.get(name) != ours.get(name):
                raise ValueError(
                    f"resume_from_checkpoint: {path} was trained with {name} {told.get(name)!r}, "
                    f"this run has {ours.get(name)!r}; give the same, or start anew from its "
                    "weights with checkpoint_dir"
                )
        for name, what in (
            ("data_sha256", "data"),
            ("base_sha256", "base weights"),
            ("trained_shapes", "trained weights"),
        ):
            if told.get(name) != ours.get(name):
                raise ValueError(
                    f"resume_from_checkpoint: {path} was trained with other {what}: {name} is "
                    f"{_short(told.get(name))} there and {_short(ours.get(name))} here"
                )
        try:
            at = Progress(**stored["progress"])
        except TypeError as error:
            raise ValueError(f"{path / 'rng_state.json'}: progress: {error}") from None
        moments = read_safetensors(path / "optimizer.safetensors")
        self.trainee.load(path)
        for name in self.trainee.names:
            for what in MOMENTS:
                tensor = moments.get(f"{name}.{what}")
                if tensor is None or tensor.shape != self.core.shape(name):
                    raise ValueError(
                        f"{path / 'optimizer.safetensors'}: {name}.{what}: expected shape "
                        f"{self.core.shape(name)}, got {getattr(tensor, 'shape', 'nothing')}"
                    )
                self.core.write(name, np.ascontiguousarray(tensor.numpy()), what)
        self.core.steps = at.adam_steps
        s = self.state
        try:
            for name in ("global_step", "epoch", "log_history", "total_flos"):
                setattr(s, name, state[name])
            s.num_input_tokens_seen = state["num_input_tokens_seen"]
            s.best_metric = state["best_metric"]
            s.best_model_checkpoint = state["best_model_checkpoint"]
        except KeyError as error:
            raise ValueError(f"{path / 'trainer_state.json'}: has no {error}") from None
        if s.global_step != at.updates:
            raise ValueError(
                f"{path}: trainer_state.json is at step {s.global_step}, rng_state.json at "
                f"{at.updates}"
            )
        self.at = at
        if self.args.ignore_data_skip:
            at.micro_batches = 0
        # What lies beyond belongs to a run that ended later: it will be written anew.
        self.saved = [p for p in checkpoints_in(self.output_dir) if _step_of(p) <= s.global_step]


# Small things


def checkpoints_in(directory: Path) -> Iterator[Path]:
    """Whole checkpoint-N folders, by N."""
    found = []
    if directory.is_dir():
        for path in directory.iterdir():
            complete = path.is_dir() and (path / "trainer_state.json").is_file()
            if _step_of(path) is not None and complete:
                found.append(path)
    return iter(sorted(found, key=lambda p: _step_of(p) or 0))


def find_checkpoint(wanted: Any, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names: a folder, or "last" (True) for the newest
    of output_dir. ValueError where there is none.
    """
    if wanted is None or wanted is False or str(wanted).lower() == "false":
        return None
    if wanted is True or str(wanted).lower() in ("last", "true"):
        # By time first: an older run of more steps may have used the same folder.
        found = sorted(
            checkpoints_in(output_dir),
            key=lambda p: ((p / "trainer_state.json").stat().st_mtime, _step_of(p)),
        )
        if not found:
            raise ValueError(f"resume_from_checkpoint: {output_dir} holds no checkpoint-N folder")
        return found[-1]
    path = Path(wanted)
    for name in ("rng_state.json", "optimizer.safetensors", "trainer_state.json"):
        if not (path / name).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {os.fspath(path)!r} is no checkpoint of this program: it "
                f"has no {name}; expected a checkpoint-N folder, or 'last'"
            )
    return path


def _step_of(path: str | os.PathLike | None) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(os.fspath(path or "")))
    return int(found[1]) if found else None


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 70 else text[:67] + "..."


def _is_observer(callback: Any) -> bool:
    return any(hasattr(callback, event) for event in EVENTS)


def _checked(callback: Any) -> Any:
    if isinstance(callback, type):
        raise TypeError(f"callbacks: expected an object, got the class {callback.__name__}")
    if not _is_observer(callback) and not callable(callback):
        raise TypeError(
            f"callbacks: expected a function of the log record, or an object with some of "
            f"{', '.join(EVENTS)}; got {type(callback).__name__}"
        )
    return callback
