"""A model on disk that answers tables: how it is found, described and loaded, in this process or in
another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import __version__
from .files.hub import model_directory
from .model import device as devices
from .model import loading
from .tables.answers import Asked
from .tables.job import Answering, describe_folders
from .task import Task, task_in
from .training.methods import unwrapped


@dataclass(frozen=True)
class Source:
    """The base model in the directory `model` with the adapter in another one, if any, and how they
    are loaded: as `load_model` has it. All of it is text, which other processes can be given.
    """

    model: str
    adapter: str | None = None
    family: str = "auto"
    dtype: str | None = None
    compute_dtype: str | None = None
    device: str = "auto"

    @property
    def directory(self) -> str:
        """The model's. OSError where it is not there."""
        return model_directory(self.model)

    @property
    def task(self) -> Task | None:
        """What was trained."""
        return task_in(self.adapter or self.directory)

    def describe(self) -> dict[str, Any]:
        """What answers depend on in the files, for a journal."""
        task, adapters = self.task, [self.adapter] if self.adapter else []
        if self.adapter and task is not None:
            adapters = [str(folder) for folder in task.folders(self.adapter)]
        return describe_folders(self.directory, adapters)

    def settings(self) -> dict[str, Any]:
        """What answers depend on in how they are loaded."""
        loaded = {n: getattr(self, n) for n in ("family", "dtype", "compute_dtype")}
        return {**loaded, "device": devices.find(self.device).type, "glmlora": __version__}

    def load(self) -> tuple[Any, Any]:
        """Model and tokenizer: the base alone where its answers are those of folds or a head."""
        several = self.task is not None and self.task.is_ensemble
        adapter = None if several else self.adapter
        model, tokenizer = loading.load_model(
            self.model, adapter, self.dtype, self.compute_dtype, self.device, self.family
        )
        return unwrapped(model), tokenizer

    def answering(self, asked: Asked, columns: list[str]) -> Answering:
        """What answers rows of a table with these columns; nothing is loaded yet. ValueError for
        what cannot be asked of folds or a head.
        """
        several = asked.task is not None and asked.task.is_ensemble
        return Answering(asked, columns, self.load, self._classify(asked) if several else None)

    def _classify(self, asked: Asked) -> Callable[[list[dict[str, Any]]], Any]:
        """What weighs the labels of rows by folds or a head."""
        from .classifier import LoraClassifier

        task = asked.task
        assert task is not None and self.adapter is not None
        if asked.template != task.question or list(asked.labels) != task.answers:
            raise ValueError(
                f"--adapter: {self.adapter} has folds or a head, which weigh the labels "
                f"{task.answers} of the question they were trained with; leave --template, "
                "--labels and how answers are written away"
            )
        classifier = LoraClassifier.load(self.adapter, base=self.model)
        loaded: list[Any] = []

        def classify(rows: list[dict[str, Any]]) -> Any:
            if not loaded:
                loaded.extend(self.load())
                classifier.use_base(*loaded)
            return classifier.predict_proba(rows)

        return classify
