"""The training loop: updates, logs, evaluations.

An update is `gradient_accumulation_steps` micro-batches: the core adds up gradients of summed
losses (`backward`) and divides by the labelled tokens once (`step`), so that 8x1, 4x2 and 1x8 rows
give one result.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import _core
from ..batch import Encoded, epoch_order, grouped_epoch_order
from ..files.regular import read_text, regular
from ..files.write import write_text
from ..interrupts import Shield, Terminated, signals_arrived
from ..model.device import memory_available
from ..model.parameters import embedding_of
from .arguments import TrainingArguments
from .checkpoints import Checkpoints, decisive_facts, step_of
from .evaluation import evaluate_labels, evaluate_loss, labels_of, progress, speed
from .methods import Trainee
from .state import Progress, Schedule, TrainState

#: Records whose micro-batches are looked at before the first update, for the memory of the largest.
LOOK_AHEAD = 1 << 22
EVENTS = ("on_train_begin", "on_step_end", "on_log", "on_save", "on_train_end")


class Loop:
    """One run over `encoded` with the arguments `args`.

    eval_encoded: what evaluation_strategy evaluates. argument_files: name -> text of the files that
    go with each save.
    """

    def __init__(
        self,
        trainee: Trainee,
        encoded: Encoded,
        args: TrainingArguments,
        eval_encoded: Encoded | None = None,
        callbacks: Sequence[Any] = (),
        argument_files: Mapping[str, str] | None = None,
    ):
        self.trainee, self.core = trainee, trainee.base.core
        self.encoded, self.eval_encoded = encoded, eval_encoded
        self.args = args
        self.callbacks = checked_callbacks(callbacks)
        self.output_dir = Path(args.output_dir)
        self.schedule = Schedule.of(args, len(encoded))
        self.state = TrainState(
            output_dir=str(self.output_dir),
            model=trainee.model,
            tokenizer=trainee.tokenizer,
            max_steps=self.schedule.updates,
            num_train_epochs=self.schedule.epochs,
        )
        self.at = Progress()
        facts = decisive_facts(trainee, encoded, args, self.schedule)
        self.checkpoints = Checkpoints(trainee, args, self.schedule, facts, argument_files or {})
        self.prints = True  # each record
        self.labels: list[tuple[int, ...]] = []
        if args.label_metrics and eval_encoded is not None:
            self.labels = labels_of(encoded, eval_encoded)
        self._warned_masked = self._warned_log = False

    def order(self, epoch: int) -> np.ndarray:
        """Record numbers of an epoch, micro-batch after micro-batch: a function of (seed, epoch, n)
        only.
        """
        size, n = self.args.per_device_train_batch_size, len(self.encoded)
        if self.args.group_by_length:
            order = grouped_epoch_order(self.encoded.lengths, epoch, self.args.order_seed, size)
        else:
            order = epoch_order(n, epoch, self.args.order_seed)
        return order[: n // size * size] if self.args.dataloader_drop_last else order

    # Memory

    def _largest(self) -> tuple[int, int, int]:
        """Most tokens, rows of the user's batch, and labelled tokens of any micro-batch to come.

        Of the first LOOK_AHEAD records: a larger one that comes later takes its memory then.
        """
        lengths = self.encoded.lengths
        targets = lengths - self.encoded.source_lengths
        size = self.args.per_device_train_batch_size
        tokens = labelled = 0
        epochs = max(1, min(1000, LOOK_AHEAD // len(lengths)))
        for epoch in range(min(self.state.num_train_epochs, epochs)):
            order = self.order(epoch)
            starts = np.arange(0, len(order), size)
            tokens = max(tokens, int(np.add.reduceat(lengths[order], starts).max()))
            labelled = max(labelled, int(np.add.reduceat(targets[order], starts).max()))
        return tokens, min(size, len(lengths)), min(labelled, tokens)

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
        MemoryError before the first step, FloatingPointError naming step and records; Ctrl-C,
        SIGTERM, SIGHUP and memory that ends save a checkpoint at the last finished update, and are
        raised again.
        """
        if not self._any_label():
            raise ValueError("data: no label is left to train on: all are masked")
        self.take_memory()
        if resume is not None:
            self.at = self.checkpoints.restore(resume, self.state)
            if self.args.ignore_data_skip:
                self.at.micro_batches = 0
        self._begin_log_file(resume)
        started = time.perf_counter()
        self.started = started - self.at.elapsed
        s = self.state
        self.bar = progress(s.max_steps, self.args.disable_tqdm, s.global_step)
        try:
            self.trainee.model.train()
            self._call("on_train_begin")
            self._epochs()
            if self.args.load_best_model_at_end and s.best_model_checkpoint:
                self._load_best(s.best_model_checkpoint)
        except (KeyboardInterrupt, Terminated, MemoryError) as error:
            self.bar.close()
            self._keep_interrupted(error)
            raise
        finally:
            self.bar.close()
            self.core.zero_grad()
        samples = (
            self.schedule.samples * s.global_step / s.max_steps
        )  # fewer where a callback stopped it
        summary = speed("train", self.started, samples, s.global_step)
        summary["total_flos"] = s.total_flos
        summary["train_loss"] = self.at.loss_total / max(1, s.global_step)
        summary["epoch"] = round(s.epoch, 2)
        s.log_history.append({**summary, "step": s.global_step})
        return summary

    def finish(self) -> None:
        """Write the end state into the root of output_dir."""
        with Shield(), self._told_what_is_kept():
            self.checkpoints.save_end(self.state)
        self._call("on_train_end")

    def _any_label(self) -> bool:
        for start in range(0, len(self.encoded), 256):
            rows = np.arange(start, min(start + 256, len(self.encoded)))
            if self.encoded.batch(rows).n_targets:
                return True
        return False

    def _epochs(self) -> None:
        s, accumulation = self.state, self.args.gradient_accumulation_steps
        while s.global_step < s.max_steps and not s.should_stop:
            order, size = self.order(self.at.epoch), self.args.per_device_train_batch_size
            for first in range(self.at.micro_batches, self.schedule.n_micro, accumulation):
                last = min(first + accumulation, self.schedule.n_micro)
                group = [order[i * size : (i + 1) * size] for i in range(first, last)]
                self._update(group)
                # The end of the run counts as the end of its last epoch.
                ended = first + len(group) >= self.schedule.n_micro or s.global_step >= s.max_steps
                self._after_update(ended)
                if s.global_step >= s.max_steps or s.should_stop:
                    return

    def _update(self, group: Sequence[np.ndarray]) -> None:
        """One optimiser step on the micro-batches; counts it in one piece with the step."""
        a, s, at, core = self.args, self.state, self.at, self.core
        factor = _core.lr_factor(
            a.lr_scheduler_type, s.global_step, self.schedule.warmup, s.max_steps, a.learning_rate
        )
        lr = a.learning_rate * factor
        loss, labelled, tokens = 0.0, 0, 0
        rows = group[0]
        try:
            for rows in group:
                batch = self.encoded.batch(rows)
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
                    noise=a.neftune_noise_alpha or 0.0,
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
                        a.loraplus_lr_ratio,
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
                s.epoch = at.epoch + at.micro_batches / self.schedule.n_micro
                s.num_input_tokens_seen += tokens
                s.total_flos += 6.0 * tokens * self._flop_weights
                if at.micro_batches >= self.schedule.n_micro:
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
            base = self.trainee.base
            embedding = self.core.shape(embedding_of(base.config))
            self._n_weights = base.num_parameters() - int(np.prod(embedding, dtype=np.int64))
        return self._n_weights

    def _warn_masked(self, rows: np.ndarray) -> None:
        if not self._warned_masked:
            self._warned_masked = True
            warnings.warn(
                f"a micro-batch adds nothing: all labels of its records {rows.tolist()} are masked "
                "(warned once)",
                stacklevel=5,
            )

    def _after_update(self, epoch_ended: bool) -> None:
        """Log, evaluate and save where it is due; callbacks."""
        self._call("on_step_end")
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
            due = strategy == "steps" and self.state.global_step % self.schedule.every[what] == 0
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
        self._call("on_log")

    def _record(self, record: dict[str, Any]) -> None:
        """Into log_history, and as one dict on standard output where it `prints`."""
        record = {**record, "epoch": round(self.state.epoch, 2)}
        self.state.log_history.append({**record, "step": self.state.global_step})
        if self.prints:
            self.bar.write(str(record), file=sys.stdout)
            sys.stdout.flush()

    def _begin_log_file(self, resume: Path | None) -> None:
        """Delete trainer_log.jsonl, or leave in it what the resumed checkpoint knows of."""
        path = self.output_dir / "trainer_log.jsonl"
        if resume is None:
            path.unlink(missing_ok=True)
        elif path.is_file():
            last, kept = self.state.global_step, []
            for line in read_text(path, errors="replace").splitlines():
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
        path = self.output_dir / "trainer_log.jsonl"
        try:
            with open(path, "a", encoding="utf-8", opener=regular) as file:
                file.write(json.dumps(line) + "\n")
        except (OSError, ValueError) as error:  # trainer_state.json has the same
            if not self._warned_log:
                self._warned_log = True
                text = f"{path}: a line could not be written: {error} (warned once)"
                warnings.warn(text, stacklevel=6)

    def evaluate(self) -> dict[str, float]:
        """Scores of the evaluation data, logged; keeps track of the best, and ends a run that has
        found none for early_stopping_patience evaluations.
        """
        s, a = self.state, self.args
        metrics = self.scores(disable_tqdm=True)
        with Shield():
            self._record(metrics)
            if a.load_best_model_at_end:
                name = f"eval_{str(a.metric_for_best_model).removeprefix('eval_')}"
                value, best = metrics[name], s.best_metric
                if best is None or (value > best if a.greater_is_better else value < best):
                    s.best_metric = value
                    s.best_model_checkpoint = str(self.checkpoints.path(self.state))
                since = step_of(s.best_model_checkpoint) or 0
                worse = sum(r["step"] > since for r in s.log_history if name in r)
                if a.early_stopping_patience and worse >= a.early_stopping_patience:
                    s.should_stop = True
        self._call("on_log")
        return metrics

    def scores(self, disable_tqdm: bool | None) -> dict[str, float]:
        """Loss of the evaluation data, with label_metrics those of its labels, and the speed."""
        encoded, size = self.eval_encoded, self.args.per_device_eval_batch_size
        assert encoded is not None
        metrics = evaluate_loss(self.core, encoded, size, disable_tqdm)
        if self.args.label_metrics:
            self.trainee.model.eval()
            metrics |= evaluate_labels(self.trainee.base, encoded, self.labels)
            self.trainee.model.train()
        return metrics

    def _call(self, event: str) -> None:
        for callback in self.callbacks:
            handler = getattr(callback, event, None)
            if handler is not None:
                handler(self.state)
            elif event == "on_log" and not _is_observer(callback):
                callback(dict(self.state.log_history[-1]))

    def save_checkpoint(self) -> None:
        """Raises OSError naming the file, and the checkpoint to go on from."""
        with Shield(), self._told_what_is_kept():
            elapsed = time.perf_counter() - self.started
            self.checkpoints.save(self.state, replace(self.at, elapsed=elapsed))
        self._call("on_save")

    @contextmanager
    def _told_what_is_kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            saved, s = self.checkpoints.saved, self.state
            kept = f"the newest checkpoint is {saved[-1]}" if saved else "there is no checkpoint"
            raise OSError(
                error.errno,
                f"{error.strerror or error} (update {s.global_step} of {s.max_steps} is not saved; "
                f"{kept})",
                error.filename,
            ) from error

    def _load_best(self, best: str) -> None:
        try:
            with Shield():
                self.trainee.load(best)
        except (OSError, ValueError) as error:  # what was trained is worth more than no result
            warnings.warn(
                f"load_best_model_at_end: {error}; the weights of the last update are kept",
                stacklevel=4,
            )

    def _keep_interrupted(self, error: BaseException) -> None:
        """Save what was done so far, and say how to go on."""
        s = self.state
        self.core.zero_grad()
        where = f"interrupted after update {s.global_step} of {s.max_steps}"
        if isinstance(error, Terminated):
            where += f" by {signal.Signals(int(str(error)) - 128).name}"
        if signals_arrived() > 1:  # perhaps in the middle of an update
            print(f"{where}, twice: nothing more is saved", file=sys.stderr)
            return
        if s.global_step == 0:
            print(f"{where}: nothing to save", file=sys.stderr)
            return
        path = self.checkpoints.path(self.state)
        if self.checkpoints.saved[-1:] != [path]:
            print(f"{where}: saving {path}; once more ends at once", file=sys.stderr)
            try:
                self.save_checkpoint()
            except OSError as failure:  # what was asked for is the end, not this save
                print(f"{where}: {path} could not be written: {failure}", file=sys.stderr)
                return
            except (KeyboardInterrupt, Terminated):
                if not path.exists():
                    print(f"{where}, twice: {path} is not saved", file=sys.stderr)
                raise
        print(
            f"{where}: everything up to here is in {path}; go on with "
            f"resume_from_checkpoint={str(path)!r} (--resume_from_checkpoint {path})",
            file=sys.stderr,
        )


# Small things


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def _is_observer(callback: Any) -> bool:
    return any(hasattr(callback, event) for event in EVENTS)


def checked_callbacks(callbacks: Sequence[Any]) -> list[Any]:
    """The callbacks; TypeError for one that no event can call."""
    for callback in callbacks:
        if isinstance(callback, type):
            raise TypeError(f"callbacks: expected an object, got the class {callback.__name__}")
        if not _is_observer(callback) and not callable(callback):
            raise TypeError(
                f"callbacks: expected a function of the log record, or an object with some of "
                f"{', '.join(EVENTS)}; got {type(callback).__name__}"
            )
    return list(callbacks)
