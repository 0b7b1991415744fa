"""What a run logs, told to experiment trackers: `report_to` names them. Each is a callback of the
loop; its library is imported when the run begins, and where it is missing that is said then.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..files.write import read_json, write_json
from .state import TrainState

#: In output_dir: the runs of trackers that a resumed run goes on with.
RUNS = "trackers.json"


class Tracker:
    """One run: `start` with the hyperparameters, `tell` numbers of an update, `end`.

    output_dir: of the run; name: how the tracker shows it; settings: the hyperparameters.
    """

    def __init__(self, output_dir: Path, name: str, settings: Mapping[str, Any]):
        self.output_dir, self.name, self.settings = output_dir, name, settings
        self._told = 0

    def on_train_begin(self, state: TrainState) -> None:
        """Open the run, that of the checkpoint where one is resumed."""
        self._told = len(state.log_history)
        self.start(state.global_step)

    def on_log(self, state: TrainState) -> None:
        """Tell the numbers of the newest records, by the names that transformers gives them."""
        for record in state.log_history[self._told :]:
            numbers = {n: float(x) for n, x in record.items() if isinstance(x, (int, float))}
            step = int(numbers.pop("step"))
            self.tell({_named(n): x for n, x in numbers.items()}, step)
        self._told = len(state.log_history)

    def on_train_end(self, state: TrainState) -> None:
        """Tell the summary, and close the run."""
        self.on_log(state)
        self.end()

    def start(self, step: int) -> None:
        """Open the run; `step` updates are done."""

    def tell(self, numbers: Mapping[str, float], step: int) -> None:
        """Numbers of an update."""

    def end(self) -> None:
        """Close the run."""

    def _known_run(self) -> dict[str, Any]:
        path = self.output_dir / RUNS
        return read_json(path, dict) if path.is_file() else {}

    def _note_run(self, key: str, value: str) -> None:
        write_json(self.output_dir / RUNS, {**self._known_run(), key: value})


class TensorBoard(Tracker):
    """Event files in logging_dir, by default output_dir/runs."""

    def __init__(
        self, output_dir: Path, name: str, settings: Mapping[str, Any], folder: Path | None = None
    ):
        super().__init__(output_dir, name, settings)
        self.folder = folder or output_dir / "runs"
        writer = _library("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._event = _library("tensorboard.compat.proto.event_pb2", "tensorboard")
        summary = _library("tensorboard.compat.proto.summary_pb2", "tensorboard")
        self._summary, self._metadata = summary.Summary, summary.SummaryMetadata
        self._tensor = _library("tensorboard.compat.proto.tensor_pb2", "tensorboard").TensorProto
        self._open = writer.EventFileWriter

    def start(self, step: int) -> None:
        self._writer = self._open(str(self.folder))
        if step:  # what a run that was stopped has told beyond its checkpoint
            log = self._event.SessionLog(status=self._event.SessionLog.START)
            self._add(session_log=log, step=step + 1)
        text = "".join(f"    {n}: {x}\n" for n, x in self.settings.items())
        plugin = self._metadata.PluginData(plugin_name="text")
        value = self._summary.Value(
            tag="settings/text_summary",
            metadata=self._metadata(plugin_data=plugin),
            tensor=self._tensor(dtype=7, string_val=[text.encode()]),  # DT_STRING
        )
        self._add(summary=self._summary(value=[value]), step=step)
        self._writer.flush()

    def tell(self, numbers: Mapping[str, float], step: int) -> None:
        values = [self._summary.Value(tag=n, simple_value=x) for n, x in numbers.items()]
        self._add(summary=self._summary(value=values), step=step)
        self._writer.flush()

    def end(self) -> None:
        self._writer.close()

    def _add(self, **what: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), **what))


class MLflow(Tracker):
    """A run of MLflow, where its own environment variables say."""

    def __init__(self, output_dir: Path, name: str, settings: Mapping[str, Any]):
        super().__init__(output_dir, name, settings)
        self._mlflow = _library("mlflow", "mlflow")

    def start(self, step: int) -> None:
        known = self._known_run().get("mlflow") if step else None
        if known:
            self._mlflow.start_run(run_id=known)
            return
        run = self._mlflow.start_run(run_name=self.name)
        self._note_run("mlflow", run.info.run_id)
        texts = {n: str(x)[:500] for n, x in self.settings.items()}
        items = list(texts.items())
        for first in range(0, len(items), 100):  # as many as it takes at once
            self._mlflow.log_params(dict(items[first : first + 100]))

    def tell(self, numbers: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def end(self) -> None:
        self._mlflow.end_run()


class SwanLab(Tracker):
    """A run of SwanLab, where its own settings say."""

    def __init__(self, output_dir: Path, name: str, settings: Mapping[str, Any]):
        super().__init__(output_dir, name, settings)
        self._swanlab = _library("swanlab", "swanlab")

    def start(self, step: int) -> None:
        known = self._known_run().get("swanlab") if step else None
        more = {"id": known, "resume": "allow"} if known else {}
        settings = json.loads(json.dumps(dict(self.settings), default=str))
        run = self._swanlab.init(experiment_name=self.name, config=settings, **more)
        found = getattr(getattr(run, "public", None), "run_id", None)
        if found and not known:
            self._note_run("swanlab", str(found))

    def tell(self, numbers: Mapping[str, float], step: int) -> None:
        self._swanlab.log(dict(numbers), step=step)

    def end(self) -> None:
        self._swanlab.finish()


TRACKERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "swanlab": SwanLab,
}


def trackers_of(
    names: Sequence[str],
    output_dir: str | os.PathLike[str],
    logging_dir: str | os.PathLike[str] | None,
    run_name: str | None,
    settings: Mapping[str, Any],
) -> list[Tracker]:
    """The trackers of these names, those of TRACKERS. ModuleNotFoundError that says what to install
    where the library of one is missing.
    """
    folder = Path(output_dir)
    name = run_name or folder.resolve().name
    made = []
    for kind in dict.fromkeys(n for n in names if n in TRACKERS):
        more = {"folder": Path(logging_dir)} if kind == "tensorboard" and logging_dir else {}
        made.append(TRACKERS[kind](folder, name, settings, **more))
    return made


def _named(name: str) -> str:
    own = name.removeprefix("eval_")
    return f"train/{name}" if own == name else f"eval/{own}"


def _library(module: str, name: str) -> Any:
    """ModuleNotFoundError naming the extra that brings it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'report_to: {name} is not installed: pip install "glmlora[{name}]" ({error})'
        ) from None
