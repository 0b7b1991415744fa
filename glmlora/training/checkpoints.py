"""Checkpoints of a run, and exact resume.

Everything a later update depends on is in `Progress` and in the core (trained weights, moments,
number of steps). A checkpoint-N folder holds both, so a resumed run equals an uninterrupted one bit
for bit:

    trained weights              as methods.py saves them
    optimizer.safetensors        both moments of every trained weight
    rng_state.json               Progress, the facts that decide the result of the run, and a digest
                                 of every other part
    scheduler.json, trainer_state.json, training_args.bin, finetuning_args.json
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..batch import Encoded
from ..files.checkpoint import atomic_directory
from ..files.regular import regular
from ..files.safetensors import read_safetensors, write_safetensors
from ..files.staging import remove_tree
from ..files.write import read_json, write_json, write_text
from .arguments import TrainingArguments
from .methods import Trainee
from .state import Progress, Schedule, TrainState

NOT_SAVED = "is not what was saved with this checkpoint: it is damaged, or of another step or run"
MOMENTS = ("exp_avg", "exp_avg_sq")
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


def decisive_facts(
    trainee: Trainee, encoded: Encoded, args: TrainingArguments, schedule: Schedule
) -> dict[str, Any]:
    """All that decides the result of a run, by the name of the field that says it."""
    digest = hashlib.sha256()
    for array in (encoded.ids, encoded.offsets, encoded.source_lengths):
        digest.update(np.ascontiguousarray(array).tobytes())
    return {
        **trainee.describe(),
        **{name: getattr(args, name) for name in DECISIVE},
        # None is what checkpoints have that were saved before there was another ratio
        "loraplus_lr_ratio": args.loraplus_lr_ratio if args.loraplus_lr_ratio != 1 else None,
        "neftune_noise_alpha": args.neftune_noise_alpha or None,
        "data_seed": args.order_seed,
        "warmup_steps": schedule.warmup,
        "max_steps": schedule.updates,
        "data_rows": len(encoded),
        "data_sha256": digest.hexdigest(),
        "ignored_id": encoded.ignored_id,
        "base_layers": trainee.base.config.num_layers,
    }


class Checkpoints:
    """The checkpoint-N folders of one run, oldest first in `saved`.

    facts: what must be the same when the run is resumed. argument_files: name -> text of the files
    that say the arguments of the run.
    """

    def __init__(
        self,
        trainee: Trainee,
        args: TrainingArguments,
        schedule: Schedule,
        facts: Mapping[str, Any],
        argument_files: Mapping[str, str],
    ):
        self.trainee, self.core = trainee, trainee.base.core
        self.args, self.schedule = args, schedule
        self.facts, self.argument_files = facts, argument_files
        self.output_dir = Path(args.output_dir)
        self.saved: list[Path] = []

    def path(self, state: TrainState) -> Path:
        """Where a checkpoint of the last finished update goes."""
        return self.output_dir / f"checkpoint-{state.global_step}"

    def save(self, state: TrainState, at: Progress) -> Path:
        """Write checkpoint-N as a whole or not at all; then drop those beyond save_total_limit."""
        path, core = self.path(state), self.core
        moments = [
            (f"{n}.{what}", "F32", core.shape(n), lambda n=n, what=what: core.read(n, what))
            for n in self.trainee.names
            for what in MOMENTS
        ]
        scheduler = {
            "lr_scheduler_type": self.args.lr_scheduler_type,
            "last_step": state.global_step,
            "warmup_steps": self.schedule.warmup,
            "total_steps": state.max_steps,
            "learning_rate": self.args.learning_rate,
        }
        with atomic_directory(path) as folder:
            self._write_weights(folder, state, state.global_step)
            write_safetensors(folder / "optimizer.safetensors", moments)
            write_json(folder / "scheduler.json", scheduler)
            self._write_state(folder, state)
            stored = {"progress": asdict(at), "run": self.facts, "saved": time.time()}
            stored["files"] = {name: _digest(folder / name) for name in _parts(folder)}
            write_json(folder / "rng_state.json", {**stored, "sha256": _json_digest(stored)})
        if path in self.saved:
            self.saved.remove(path)
        self.saved.append(path)
        self._drop_old(state)
        return path

    def save_end(self, state: TrainState) -> None:
        """Write the end state into the root of output_dir."""
        best = step_of(state.best_model_checkpoint) if self.args.load_best_model_at_end else None
        self._write_weights(self.output_dir, state, best or state.global_step)
        self._write_state(self.output_dir, state)

    def _write_weights(self, folder: Path, state: TrainState, step: int) -> None:
        """step: the update that the weights are of."""
        of_step = (record for record in state.log_history if record["step"] == step)
        self.trainee.note_scores({n: x for record in of_step for n, x in record.items()})
        self.trainee.save(folder, self.args.save_safetensors)
        for name, text in self.argument_files.items():
            write_text(folder / name, text)

    def _write_state(self, folder: Path, s: TrainState) -> None:
        every = self.schedule.every
        content = {
            "best_global_step": step_of(s.best_model_checkpoint),
            "best_metric": s.best_metric,
            "best_model_checkpoint": s.best_model_checkpoint,
            "epoch": s.epoch,
            "eval_steps": every["eval"],
            "global_step": s.global_step,
            "is_hyper_param_search": False,
            "is_local_process_zero": True,
            "is_world_process_zero": True,
            "log_history": s.log_history,
            "logging_steps": every["logging"],
            "max_steps": s.max_steps,
            "num_input_tokens_seen": s.num_input_tokens_seen,
            "num_train_epochs": s.num_train_epochs,
            "save_steps": every["save"],
            "stateful_callbacks": {},
            "total_flos": s.total_flos,
            "train_batch_size": self.args.per_device_train_batch_size,
            "trial_name": None,
            "trial_params": None,
        }
        write_json(folder / "trainer_state.json", content)

    def _drop_old(self, state: TrainState) -> None:
        limit = self.args.save_total_limit
        if limit is None:
            return
        keep = set(self.saved[-limit:])
        if state.best_model_checkpoint:
            best = Path(state.best_model_checkpoint)
            # The best one takes the place of the oldest kept, but never of the newest.
            if best in self.saved and best not in keep:
                keep = {best, *(self.saved[-limit + 1 :] if limit > 1 else self.saved[-1:])}
        for path in [p for p in self.saved if p not in keep]:
            with suppress(OSError):
                remove_tree(path)
            self.saved.remove(path)

    def restore(self, path: Path, state: TrainState) -> Progress:
        """Become the run that wrote `path`, at that point: weights, moments and `state`.

        Raises ValueError naming the first difference between the two runs with both values, or a
        file that is damaged, missing or of another checkpoint, and then the whole checkpoint before
        it, where there is one.
        """
        try:
            return self._restore(path, state)
        except (ValueError, OSError) as error:
            before = self._before(path)
            if before is None:
                raise
            raise ValueError(
                f"{error}; the checkpoint before it is whole: go on with "
                f"resume_from_checkpoint={str(before)!r}"
            ) from error

    def _before(self, path: Path) -> Path | None:
        """The newest whole checkpoint of this run beside `path` and before it."""
        step = step_of(path)
        for other in reversed(checkpoints_in(path.parent)):
            if step is None or (step_of(other) or 0) < step:
                with suppress(ValueError, OSError):
                    self._check(other)
                    return other
        return None

    def _check(self, path: Path) -> dict[str, Any]:
        """The content of rng_state.json, if `path` is a whole checkpoint of this run."""
        file = path / "rng_state.json"
        stored: dict[str, Any] = read_json(file, dict)
        for key in ("run", "progress", "files"):
            if not isinstance(stored.get(key), dict):
                raise ValueError(f"{file}: expected the keys 'run', 'progress' and 'files'")
        if _json_digest(stored) != stored.get("sha256"):
            raise ValueError(f"{file}: {NOT_SAVED}")
        self._check_facts(path, stored["run"])
        _check_parts(path, stored["files"])
        return stored

    def _restore(self, path: Path, state: TrainState) -> Progress:
        rng_state, trainer_state = path / "rng_state.json", path / "trainer_state.json"
        stored = self._check(path)
        content = read_json(trainer_state, dict)
        try:
            at = Progress(**stored["progress"])
        except TypeError as error:
            raise ValueError(f"{rng_state}: progress: {error}") from None
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
        try:
            for name in ("global_step", "epoch", "log_history", "total_flos"):
                setattr(state, name, content[name])
            state.num_input_tokens_seen = content["num_input_tokens_seen"]
            state.best_metric = content["best_metric"]
            state.best_model_checkpoint = content["best_model_checkpoint"]
        except KeyError as error:
            raise ValueError(f"{trainer_state}: has no {error}") from None
        if state.global_step != at.updates:
            raise ValueError(
                f"{path}: trainer_state.json is at step {state.global_step}, rng_state.json at "
                f"{at.updates}"
            )
        # What lies beyond belongs to a run that ended later: it will be written anew.
        self.saved = [p for p in checkpoints_in(self.output_dir) if step_of(p) <= state.global_step]
        return at

    def _check_facts(self, path: Path, theirs: Mapping[str, Any]) -> None:
        ours = json.loads(json.dumps(self.facts))
        for name in sorted({*theirs, *ours} - {"trained_shapes", "data_sha256", "base_sha256"}):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"resume_from_checkpoint: {path} was trained with {name} {theirs.get(name)!r}, "
                    f"this run has {ours.get(name)!r}; give the same, or start anew from its "
                    "weights with checkpoint_dir"
                )
        for name, what in (
            ("data_sha256", "data"),
            ("base_sha256", "base weights"),
            ("trained_shapes", "trained weights"),
        ):
            if theirs.get(name) != ours.get(name):
                raise ValueError(
                    f"resume_from_checkpoint: {path} was trained with other {what}: {name} is "
                    f"{_short(theirs.get(name))} there and {_short(ours.get(name))} here"
                )


def _parts(folder: Path) -> list[str]:
    """Names of the files that a resumed run depends on. Not those that only say how to load the
    weights elsewhere: users edit the path of the base in them.
    """
    ends = (".safetensors", ".bin", ".index.json", "_state.json", "_args.json")
    parts = [n for n in os.listdir(folder) if n.endswith(ends) or n == "scheduler.json"]
    return sorted(name for name in parts if name != "rng_state.json")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", opener=regular) as file:
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def _json_digest(stored: Mapping[str, Any]) -> str:
    """Of a state without the digest in it."""
    text = json.dumps({k: v for k, v in stored.items() if k != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_parts(path: Path, digests: Mapping[str, str]) -> None:
    """ValueError or OSError naming a part that is damaged, missing, or of another checkpoint."""
    for name in sorted({*digests, *_parts(path)}):
        if name not in digests:
            raise ValueError(f"{path / name}: was not saved with this checkpoint")
        if not (path / name).exists():
            raise FileNotFoundError(f"{path / name}: is missing from this checkpoint")
        if _digest(path / name) != digests[name]:
            raise ValueError(f"{path / name}: {NOT_SAVED}")


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoint-N folders with something in them, by N."""
    found = []
    if directory.is_dir():
        for path in directory.iterdir():
            if step_of(path) is not None and path.is_dir() and any(path.iterdir()):
                found.append(path)
    return sorted(found, key=lambda p: step_of(p) or 0)


def find_checkpoint(wanted: Any, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names: a folder, or "last" (True) for the newest
    of output_dir. ValueError where there is none.
    """
    if wanted is None or wanted is False or str(wanted).lower() == "false":
        return None
    if wanted is True or str(wanted).lower() in ("last", "true"):
        found = checkpoints_in(output_dir)
        if not found:
            raise ValueError(f"resume_from_checkpoint: {output_dir} holds no checkpoint-N folder")
        return max(found, key=_age)
    path = Path(wanted)
    for name in ("rng_state.json", "optimizer.safetensors", "trainer_state.json"):
        if not (path / name).is_file():
            raise ValueError(
                f"resume_from_checkpoint: {os.fspath(path)!r} is no checkpoint of this program: it "
                f"has no {name}; expected a checkpoint-N folder, or 'last'"
            )
    return path


def _age(path: Path) -> tuple[float, int]:
    """When a checkpoint was saved and at which step, as its state says: files may have been copied,
    and an older run of more steps may have used the same folder. One whose state cannot be read or
    is of another step counts by the times of its files, so that it is not passed over without a
    word: `restore` says what is wrong.
    """
    step = step_of(path) or 0
    try:
        stored = read_json(path / "rng_state.json", dict)
        if stored["progress"]["updates"] == step:
            return float(stored["saved"]), step
    except (ValueError, OSError, KeyError, TypeError):
        pass
    return max(file.stat().st_mtime for file in path.iterdir()), step


def step_of(path: str | os.PathLike | None) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d+)", os.path.basename(os.fspath(path or "")))
    return int(found[1]) if found else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 70 else text[:67] + "..."
