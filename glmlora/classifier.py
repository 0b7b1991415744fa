"""`LoraClassifier`: a GLM model with LoRA as a classifier of scikit-learn's kind.

It trains by `glmlora.train` on prompts that its template makes of the rows, and predicts by
`classify`: the probability of each label as the model's answer. scikit-learn itself is not needed.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from . import tell
from .batch import updates_per_epoch
from .files.rows import is_missing
from .files.safetensors import read_safetensors, write_safetensors
from .files.staging import staged
from .files.tensor import to_arrays
from .generation.features import check_depth
from .head import Head, fit_head
from .interrupts import Terminated
from .model.auto import AutoModel
from .model.peft import PeftModel
from .model.quantization import GROUP_SIZE, is_quantized
from .names import did_you_mean, listed
from .progress import say
from .questions import rows_and_columns, task_queries, usual_instruction
from .task import FILE, Task, base_digest, check_asked, read_task, write_task
from .templates import places_of
from .tokenization import AutoTokenizer
from .tools.project import tiny_directory
from .training.classes import (
    SCORES,
    THRESHOLDS,
    best_threshold,
    class_weights,
    label_scores,
    resampled,
    stratified_folds,
    stratified_split,
)
from .training.trainer import train

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
HEAD_FILE = "head.safetensors"
METHODS = {  # what is trained -> the files that it is in
    "lora": ADAPTER_FILES,
    "head": (HEAD_FILE,),
    "lora+head": (*ADAPTER_FILES, HEAD_FILE),
}
_REPLACED = re.compile(
    r"fold-\d+|adapter_(config\.json|model\.(safetensors|bin))|head\.safetensors"
)
EVALUATIONS = 2  # of the rows held out, an epoch
#: A small model has to change nearly as a whole to learn a task, a large one knows most of it.
SMALL, SMALL_RANK, RANK = 1024, 128, 16  # SMALL: of hidden sizes, the first that is not
RATE = 0.192  # learning rate times hidden size: 1e-3 for the model inside, 5e-5 for one of 4096


class NotFittedError(ValueError, AttributeError):
    """What `predict` raises before `fit`, where scikit-learn's own is not there."""


class LoraClassifier:
    """LoRA over a GLM model that answers each row with one of some labels.

    Follows scikit-learn's conventions, and works in its clone, cross-validation, grid searches and
    ensembles. X is a DataFrame, a list of dicts, a list or an array of texts, or the path of a csv,
    json or jsonl table; y has a label a row: text, whole numbers or booleans, which come back as
    they were.

    method: "lora"; "head": a linear head over the prompts' features of the base as it is
    (`model.features`), trained in seconds; "lora+head": one over those of the trained model. A head
    gives the probabilities in the place of the model's answer. depth: a head's features are those
    of so many layers, the first ones, and no others are run; None: all. features_cache: a folder
    that keeps the features of rows with method="head": other fits and folds on the same base, and
    predictions, compute those of new rows only.

    base: the model's directory; None: the small model inside the package. template: the row as
    text, e.g. "title: {title}", or "{text}" where X is texts; None: all columns. instruction:
    stands before it; None: names the labels. Where both are longer than max_source_length ids, the
    longest column is cut. lora_rank None: 128 for bases of a hidden size below 1024, else 16;
    lora_alpha None: twice that; learning_rate None: 0.192 / hidden size. training_arguments: a dict
    of other arguments of `glmlora.train`.

    validation: share of the rows of each label that is held out and scored EVALUATIONS times an
    epoch (`history_`); the weights with the smallest log-loss are kept. early_stopping: end after
    so many scores without a better one. class_weight: None, "balanced" or {label: weight}: rows of
    heavier labels are trained more often. threshold: "f1" or "accuracy": of two labels, the second
    is predicted from the probability on that is best on the rows held out; a number: from that on.
    folds: train so many models, each without one part of the rows; predictions are their mean, and
    `oof_proba_` has each row's by the model that has not seen it. random_state: a whole number
    makes a fit repeatable. verbose: 1 shows progress, 2 log records.

    After `fit`: classes_ (labels), adapters_ (each a dict from file name to bytes), task_ (Task),
    threshold_, history_ and log_history_ (dicts, with their `fold` where there are folds),
    feature_names_in_ and n_features_in_ of tables; with folds: oof_proba_ float64 (rows, labels),
    oof_fold_ int64 (rows), fold_scores_ (a dict a fold) and mean_scores_ (score -> (mean, standard
    deviation)).
    """

    _estimator_type = "classifier"

    def __init__(
        self,
        base: str | os.PathLike[str] | None = None,
        template: str | None = None,
        instruction: str | None = None,
        *,
        method: str = "lora",
        depth: int | None = None,
        features_cache: str | os.PathLike[str] | None = None,
        max_source_length: int = 640,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.1,
        lora_target: str | list[str] = "all-linear",
        learning_rate: float | None = None,
        num_train_epochs: float = 2.0,
        per_device_train_batch_size: int = 8,
        lr_scheduler_type: str = "cosine",
        quantization_bit: int | None = None,
        training_arguments: Mapping[str, Any] | None = None,
        validation: float = 0,
        early_stopping: int = 0,
        class_weight: Any = None,
        threshold: str | float | None = None,
        folds: int = 0,
        random_state: Any = None,
        verbose: int = 0,
    ):
        self.base = base
        self.template = template
        self.instruction = instruction
        self.method = method
        self.depth = depth
        self.features_cache = features_cache
        self.max_source_length = max_source_length
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.lora_target = lora_target
        self.learning_rate = learning_rate
        self.num_train_epochs = num_train_epochs
        self.per_device_train_batch_size = per_device_train_batch_size
        self.lr_scheduler_type = lr_scheduler_type
        self.quantization_bit = quantization_bit
        self.training_arguments = training_arguments
        self.validation = validation
        self.early_stopping = early_stopping
        self.class_weight = class_weight
        self.threshold = threshold
        self.folds = folds
        self.random_state = random_state
        self.verbose = verbose

    # What scikit-learn asks of an estimator

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name. deep: no effect, none is an estimator."""
        return {name: getattr(self, name) for name in _PARAMETERS}

    def set_params(self, **params: Any) -> LoraClassifier:
        """Set parameters by name. ValueError for one that there is not, before any is set."""
        for name in params:
            if name not in _PARAMETERS:
                raise ValueError(
                    f"LoraClassifier: {name!r} is no parameter{did_you_mean(name, _PARAMETERS)}; "
                    f"it has {listed(_PARAMETERS, 30)}"
                )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(two_d_array=False, string=True, allow_nan=True),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "adapters_")

    def __repr__(self) -> str:
        usual = inspect.signature(type(self)).parameters
        changed = (
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if value is not usual[name].default and value != usual[name].default
        )
        return f"LoraClassifier({', '.join(changed)})"

    def __getstate__(self) -> dict[str, Any]:
        """All but the loaded base, which stays where its path says."""
        return {name: value for name, value in vars(self).items() if name != "_loaded"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        if hasattr(self, "adapters_") and not os.path.isdir(self._base_directory()):
            tell.warn(
                f"LoraClassifier: its base {self._base_directory()} is not there: before it "
                "predicts, put it there, or name its place by set_params(base=..)"
            )

    # Training

    def fit(self, X: Any, y: Any) -> LoraClassifier:
        """Train on rows and their labels; what an earlier fit has left is replaced at the end.

        Raises TypeError, ValueError naming the parameter, row or column, before the training; and
        as `glmlora.train` does. Ctrl-C leaves a checkpoint in a temporary folder that is named.
        """
        self._check_parameters()
        place = self._base_directory()
        rows, columns = rows_and_columns(X)
        classes, codes = _coded(y, len(rows))
        self._check_classes(classes)
        weights = class_weights(self.class_weight, codes, classes)
        seed = self._seed()
        template = self.template
        if template is None:
            template = "{text}" if columns is None else "\n".join(f"{c}: {{{c}}}" for c in columns)
        labels = classes.tolist()
        instruction = self.instruction
        task = Task(
            base=None if self.base is None else os.path.abspath(place),
            instruction=usual_instruction(labels) if instruction is None else instruction,
            template=template,
            columns=columns or [],
            labels=labels,
            max_source_length=int(self.max_source_length),
            quantization_bit=self.quantization_bit,
            folds=int(self.folds),
            method=self.method,
            depth=self.depth,
            base_digest=base_digest(place),
        )
        _check_no_answer(task, rows, labels, codes)
        if self.folds:
            fold = stratified_folds(codes, self.folds, seed)
            parts = [np.flatnonzero(fold != number) for number in range(self.folds)]
        else:
            fold, parts = None, [np.arange(len(codes))]
        held_out = [
            stratified_split(codes[part], self.validation, seed) if self.validation else None
            for part in parts
        ]
        model, tokenizer = self._load_base()
        check_depth(model, self.depth)
        queries = task_queries(task, rows, columns, tokenizer)
        frozen = None
        if self.method == "head":
            frozen = self._features(task, model, tokenizer, queries)
        fits = []
        proba = np.zeros((len(codes), len(classes)))
        for number, (part, held) in enumerate(zip(parts, held_out, strict=True)):
            run = _Run(self, task, model, tokenizer, weights, seed + number)
            fits.append(run)
            if frozen is None:
                run.fit([queries[i] for i in part], codes[part], held)
            trained = part if held is None else part[~held]
            seen = part[held] if held is not None else part[:0]
            rest = np.flatnonzero(fold == number) if fold is not None else seen
            with _attached(model, run.adapter) as tuned:
                if self.method == "lora":
                    if len(rest):
                        proba[rest] = _proba(tuned, tokenizer, [queries[i] for i in rest], task)
                    continue
                if frozen is None:
                    vectors = self._features(task, tuned, tokenizer, queries)
                else:
                    vectors = frozen
            head = run.fit_head(vectors[trained], codes[trained])
            proba[rest] = np.exp(head.log_proba(vectors[rest]))
            if len(seen):
                run.log_scores(label_scores(codes[seen], np.exp(head.log_proba(vectors[seen]))))
        unseen = np.arange(len(codes)) if fold is not None else seen
        self.threshold_ = self._threshold(codes[unseen], proba[unseen])
        self.classes_ = classes
        scores = label_scores(codes[unseen], proba[unseen]) if len(unseen) else {}
        self.task_ = replace(task, threshold=self.threshold_, scores=scores)
        self.adapters_ = [one.adapter for one in fits]
        self.log_history_ = []
        for number, one in enumerate(fits):
            mark = {"fold": number} if self.folds else {}
            self.log_history_ += [{**mark, **record} for record in one.log_history]
        self.history_ = [
            {**({"fold": record["fold"]} if self.folds else {}), **_scores(record)}
            for record in self.log_history_
            if _scores(record)
        ]
        self._set_features(columns)
        self._set_fold_scores(codes, proba, fold)
        return self

    def _features(self, task: Task, model: Any, tokenizer: Any, queries: list[str]) -> np.ndarray:
        """What heads of the task read. Those of a trained model are of no use to another fit."""
        cache = self.features_cache if task.method == "head" else None
        return model.features(tokenizer, queries, depth=task.depth, cache=cache)

    def _set_features(self, columns: list[str] | None) -> None:
        if columns is None:
            vars(self).pop("feature_names_in_", None)
            vars(self).pop("n_features_in_", None)
        else:
            self.feature_names_in_ = np.array(columns, object)
            self.n_features_in_ = len(columns)

    def _set_fold_scores(
        self, codes: np.ndarray, proba: np.ndarray, fold: np.ndarray | None
    ) -> None:
        for name in ("oof_proba_", "oof_fold_", "fold_scores_", "mean_scores_"):
            vars(self).pop(name, None)  # of an earlier fit
        if fold is None:
            return
        self.oof_proba_, self.oof_fold_ = proba, fold
        self.fold_scores_ = [
            label_scores(codes[fold == number], proba[fold == number])
            for number in range(self.folds)
        ]
        self.mean_scores_ = {}
        for name in self.fold_scores_[0]:
            values = [scores[name] for scores in self.fold_scores_]
            self.mean_scores_[name] = (float(np.mean(values)), float(np.std(values)))

    def _check_parameters(self) -> None:
        for name, kinds, least, below in (
            ("validation", (int, float), 0, 1),
            ("early_stopping", (int,), 0, np.inf),
            ("folds", (int,), 0, np.inf),
            ("max_source_length", (int,), 3, np.inf),
        ):
            value = getattr(self, name)
            number = isinstance(value, (*kinds, np.integer)) and not isinstance(value, bool)
            if not number or not least <= value < below or (name == "folds" and value == 1):
                what = "a whole number" if kinds == (int,) else "a number"
                upto = f" to below {below}" if below == 1 else ""
                two = " (0, or 2 or more)" if name == "folds" else ""
                raise ValueError(f"{name}: expected {what} from {least}{upto}{two}, got {value!r}")
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if self.early_stopping and self.method == "head":
            raise ValueError("early_stopping: has no effect with method='head': no epochs are run")
        if self.depth is not None and self.method == "lora":
            raise ValueError("depth: has no effect with method='lora': all layers give the answer")
        if self.early_stopping and not self.validation:
            raise ValueError("early_stopping: needs rows held out: validation=0.1, for example")
        chosen = self.threshold
        if not (
            chosen is None
            or (isinstance(chosen, str) and chosen in THRESHOLDS)
            or (
                isinstance(chosen, int | float)
                and not isinstance(chosen, bool)
                and 0 <= chosen <= 1
            )
        ):
            raise ValueError(
                "threshold: expected None, 'accuracy', 'f1' or a number from 0 to 1, got "
                f"{chosen!r}{did_you_mean(str(chosen), THRESHOLDS)}"
            )
        if isinstance(chosen, str) and not self.validation and not self.folds:
            raise ValueError(
                f"threshold: {chosen!r} is chosen on rows held out: give validation or folds"
            )
        for name in dict(self.training_arguments or {}):
            if name in _PARAMETERS or name in _OURS:
                where = "its own parameter" if name in _PARAMETERS else "set by LoraClassifier"
                raise ValueError(f"training_arguments: {name!r} is {where}")

    def _check_classes(self, classes: np.ndarray) -> None:
        if len(classes) < 2:
            raise ValueError(
                f"y: expected two labels or more, all rows have {classes.tolist()[0]!r}"
            )
        if self.threshold is not None and len(classes) != 2:
            raise ValueError(f"threshold: is of two labels, y has {len(classes)}")

    def _seed(self) -> int:
        state = self.random_state
        if state is None:
            return int(np.random.randint(1 << 31))
        if isinstance(state, int | np.integer) and not isinstance(state, bool) and state >= 0:
            return int(state)
        if hasattr(state, "randint"):
            return int(state.randint(1 << 31))
        raise ValueError(
            "random_state: expected None, a whole number from 0 or a RandomState, got "
            f"{state!r:.80}"
        )

    def _threshold(self, codes: np.ndarray, proba: np.ndarray) -> float | None:
        if isinstance(self.threshold, str):
            return best_threshold(codes == 1, proba[:, 1], self.threshold)
        return None if self.threshold is None else float(self.threshold)

    # Prediction

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probabilities of the labels, float64 (rows, labels) in the order of `classes_`."""
        if not hasattr(self, "adapters_"):
            raise _not_fitted()
        rows, columns = rows_and_columns(X)
        model, tokenizer = self._load_base()
        queries = task_queries(self.task_, rows, columns, tokenizer)
        total, vectors = np.zeros((len(rows), len(self.classes_))), None
        for adapter in self.adapters_:
            with _attached(model, adapter) as tuned:
                if HEAD_FILE in adapter:
                    if vectors is None or tuned is not model:  # of the base they are the same
                        vectors = self._features(self.task_, tuned, tokenizer, queries)
                    total += np.exp(_stored_head(adapter).log_proba(vectors))
                else:
                    total += _proba(tuned, tokenizer, queries, self.task_)
        return total / len(self.adapters_)

    def predict(self, X: Any) -> np.ndarray:
        """The label of each row, (rows), of the type that y had: the likeliest, or by threshold_.

        Errors as `fit` and `classify` have them; scikit-learn's NotFittedError, or one of the same
        kinds, before `fit`.
        """
        proba = self.predict_proba(X)
        if self.threshold_ is None:
            return self.classes_[proba.argmax(axis=1)]
        return self.classes_[(proba[:, 1] >= self.threshold_).astype(int)]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of rows whose label is right, weighted by sample_weight (rows)."""
        right = self.predict(X) == np.asarray(y)
        return float(np.average(right, weights=sample_weight))

    # Files

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter as peft does, and task.json beside it; with folds, each adapter into a
        folder of its own: all of it or nothing. An adapter that was there goes, all else stays.
        OSError naming the file.
        """
        if not hasattr(self, "adapters_"):
            raise _not_fitted()
        Path(folder).mkdir(parents=True, exist_ok=True)
        with staged(Path(folder), stale=_REPLACED) as new:
            for place, adapter in zip(self.task_.folders(new), self.adapters_, strict=True):
                place.mkdir(exist_ok=True)
                for name, content in adapter.items():
                    (place / name).write_bytes(content)
            write_task(new, self.task_, folder)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
    ) -> LoraClassifier:
        """What `save` wrote, ready to predict. base: the model's directory, where it is no longer
        the one that task.json names. FileNotFoundError, ValueError naming file and field.
        """
        task = read_task(folder)
        if task.method not in METHODS:
            raise ValueError(
                f"{Path(folder) / FILE}: method: expected one of {', '.join(METHODS)}, got "
                f"{task.method!r}"
            )
        if not task.labels:
            raise ValueError(
                f"{Path(folder) / FILE}: labels: the adapter was trained to answer with any text, "
                "expected labels"
            )
        adapters = []
        for place in task.folders(folder):
            files = METHODS[task.method]
            missing = [name for name in files if not (place / name).is_file()]
            if missing:
                raise FileNotFoundError(f"{place / missing[0]}: not there, {FILE} says it is")
            adapters.append({name: (place / name).read_bytes() for name in files})
        self = cls(
            base=task.base if base is None else base,
            template=task.template,
            instruction=task.instruction,
            max_source_length=task.max_source_length,
            method=task.method,
            depth=task.depth,
            quantization_bit=task.quantization_bit,
            threshold=task.threshold,
            folds=task.folds,
        )
        if not os.path.isdir(self._base_directory()):
            raise FileNotFoundError(
                f"{Path(folder) / FILE}: its base {self._base_directory()} is not there; "
                "LoraClassifier.load(folder, base=..) names another place"
            )
        check_asked(task, base=self._base_directory())
        self.classes_ = np.array(task.labels)
        self.threshold_ = task.threshold
        self.task_, self.adapters_ = task, adapters
        self._set_features(task.columns or None)
        return self

    # The base

    def _base_directory(self) -> str:
        if not isinstance(self.base, str | os.PathLike | None):
            kind = type(self.base).__name__
            raise TypeError(f"base: expected the directory of a model, or None, got {kind}")
        return str(tiny_directory()) if self.base is None else os.fspath(self.base)

    def _load_base(self) -> tuple[Any, Any]:
        """The base model, in the form that it is trained in, and its tokenizer; read once."""
        wanted = self._base_directory(), self.quantization_bit
        place, bits = wanted
        if not os.path.isdir(place):
            raise FileNotFoundError(f"base: {place!r} is no directory; expected one with a model")
        if getattr(self, "_loaded", (None,))[0] != wanted:
            model, tokenizer = (
                AutoModel.from_pretrained(place),
                AutoTokenizer.from_pretrained(place),
            )
            self.use_base(model, tokenizer)
        return self._loaded[1], self._loaded[2]

    def use_base(self, model: Any, tokenizer: Any) -> None:
        """Train and predict over a model that is loaded already from the directory `base`; it is
        quantized where quantization_bit says so.
        """
        bits = self.quantization_bit
        if bits and not is_quantized(model.config, bits):
            model.quantize(bits, group_size=GROUP_SIZE if bits == 4 else None)
        self._loaded = (self._base_directory(), bits), model, tokenizer


_PARAMETERS = tuple(inspect.signature(LoraClassifier).parameters)
#: Arguments of `train` that a classifier sets itself.
_OURS = (
    *("output_dir", "finetuning_type", "seed", "save_strategy", "plot_loss", "disable_tqdm"),
    *("evaluation_strategy", "eval_strategy", "dev_ratio", "resume_from_checkpoint"),
    *("load_best_model_at_end", "label_metrics", "early_stopping_patience"),
    *("save_safetensors", "checkpoint_dir", "source_prefix", "tokenizer", "callbacks", "eval_data"),
)


def _not_fitted() -> ValueError:
    """scikit-learn's error where that is there, else ours."""
    try:
        from sklearn.exceptions import NotFittedError as error
    except ImportError:
        error = NotFittedError
    return error("this LoraClassifier is not fitted yet: call fit(X, y) first")


# One training


class _Run:
    """Trains one adapter for a task on a base model, which is as it was afterwards."""

    def __init__(
        self,
        settings: LoraClassifier,
        task: Task,
        model: Any,
        tokenizer: Any,
        weights: np.ndarray | None,
        seed: int,
    ):
        self.settings, self.task, self.seed = settings, task, seed
        self.model, self.tokenizer, self.weights = model, tokenizer, weights
        self.adapter: dict[str, bytes] = {}
        self.log_history: list[dict[str, Any]] = []

    def fit(self, queries: list[str], codes: np.ndarray, held_out: np.ndarray | None) -> _Run:
        """Train on the rows that are not held out (bool, rows; None: on all)."""
        s, answers = self.settings, self.task.answers
        records = [
            {"instruction": query, "output": answers[code]}
            for query, code in zip(queries, codes, strict=True)
        ]
        trained = np.arange(len(codes)) if held_out is None else np.flatnonzero(~held_out)
        trained = trained[resampled(codes[trained], self.weights, self.seed)]
        width = self.model.config.hidden_size
        rank = (SMALL_RANK if width < SMALL else RANK) if s.lora_rank is None else s.lora_rank
        given: dict[str, Any] = {
            "max_source_length": s.max_source_length,
            "lora_rank": rank,
            "lora_alpha": 2 * rank if s.lora_alpha is None else s.lora_alpha,
            "lora_dropout": s.lora_dropout,
            "lora_target": s.lora_target,
            "learning_rate": RATE / width if s.learning_rate is None else s.learning_rate,
            "num_train_epochs": s.num_train_epochs,
            "per_device_train_batch_size": s.per_device_train_batch_size,
            "lr_scheduler_type": s.lr_scheduler_type,
            "warmup_ratio": 0.05,
            "logging_steps": 10,
            "logging_first_step": True,
            "save_strategy": "no",
            **(s.training_arguments or {}),
        }
        if held_out is not None:
            given |= self._evaluation(
                [records[i] for i in np.flatnonzero(held_out)], _updates(given, len(trained))
            )
        folder = Path(tempfile.mkdtemp(prefix="glmlora-"))
        stopped = False
        try:
            result = train(
                self.model,
                [records[i] for i in trained],
                tokenizer=self.tokenizer,
                callbacks=[_print_scores] if s.verbose == 1 else [],
                output_dir=str(folder),
                finetuning_type="lora",
                seed=self.seed,
                plot_loss=False,
                disable_tqdm=not s.verbose,
                verbose=s.verbose > 1,
                **given,
            )
            result.model.unload()
            self.log_history = result.log_history
            self.adapter = {name: (folder / name).read_bytes() for name in ADAPTER_FILES}
        except (KeyboardInterrupt, Terminated):
            stopped = True  # what was done is in the folder, as its message says
            raise
        finally:
            if not stopped:
                shutil.rmtree(folder, ignore_errors=True)
        return self

    def fit_head(self, vectors: np.ndarray, codes: np.ndarray) -> Head:
        """Train a head over the rows' features, and keep it beside the adapter."""
        rows = None if self.weights is None else self.weights[codes]
        head = fit_head(vectors, codes, len(self.task.labels), rows, seed=self.seed)
        with tempfile.TemporaryDirectory(prefix="glmlora-") as folder:
            write_safetensors(Path(folder, HEAD_FILE), {"weight": head.weight, "bias": head.bias})
            self.adapter[HEAD_FILE] = Path(folder, HEAD_FILE).read_bytes()
        return head

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Add scores of the rows held out to the log."""
        record = {f"eval_{name}": value for name, value in scores.items()}
        self.log_history.append(record)
        if self.settings.verbose:
            _print_scores(record)

    def _evaluation(self, records: list[dict[str, str]], updates: int) -> dict[str, Any]:
        """Arguments of `train` that score these records in a run of so many updates, and keep the
        best weights. The last score is one of the last weights, or of nearly the last.
        """
        scores = max(2, round(EVALUATIONS * self.settings.num_train_epochs))
        every = max(1, updates // scores)
        return {
            "eval_data": records,
            "label_metrics": True,
            "evaluation_strategy": "steps",
            "eval_steps": every,
            "save_strategy": "steps",
            "save_steps": every,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "log_loss",
            "early_stopping_patience": self.settings.early_stopping or None,
        }


def _updates(given: Mapping[str, Any], rows: int) -> int:
    """Of a run of `train` with these arguments."""
    if given.get("max_steps", -1) > 0:
        return int(given["max_steps"])
    per_epoch = updates_per_epoch(
        rows,
        given["per_device_train_batch_size"],
        given.get("gradient_accumulation_steps", 1),
        given.get("dataloader_drop_last", False),
    )
    return math.ceil(given["num_train_epochs"] * per_epoch)


def _print_scores(record: Mapping[str, Any]) -> None:
    """A callback of `train`: one line for the scores of the rows held out."""
    scores = _scores(record)
    if scores:
        say(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))


def _scores(record: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of a log record, {} where it has none."""
    if "eval_log_loss" not in record:
        return {}
    scores = {name: record[f"eval_{name}"] for name in SCORES}
    return {**{name: record[name] for name in ("epoch", "step") if name in record}, **scores}


class _attached:
    """`with _attached(base, adapter) as model`: the base with an adapter, if there is one, taken
    off at the end.
    """

    def __init__(self, base: Any, adapter: Mapping[str, bytes]):
        self.base, self.adapter = base, adapter

    def __enter__(self) -> Any:
        self.model = None
        if ADAPTER_FILES[0] not in self.adapter:
            return self.base
        with tempfile.TemporaryDirectory(prefix="glmlora-") as folder:
            for name, content in self.adapter.items():
                Path(folder, name).write_bytes(content)
            self.model = PeftModel.from_pretrained(self.base, folder).eval()
        return self.model

    def __exit__(self, *error: Any) -> None:
        if self.model is not None:
            self.model.unload()


def _proba(model: Any, tokenizer: Any, queries: list[str], task: Task) -> np.ndarray:
    return model.classify(tokenizer, queries, labels=task.answers).proba


def _stored_head(adapter: Mapping[str, bytes]) -> Head:
    with tempfile.TemporaryDirectory(prefix="glmlora-") as folder:
        Path(folder, HEAD_FILE).write_bytes(adapter[HEAD_FILE])
        tensors = to_arrays(read_safetensors(Path(folder, HEAD_FILE)), "a head")
        return Head(np.array(tensors["weight"]), np.array(tensors["bias"]))


# Labels


def _coded(y: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The labels of y in order, and the number of each row's, int64 (n). ValueError naming a row
    that has none, or labels that cannot be told apart.
    """
    labels = np.asarray(y)
    if labels.ndim != 1:
        raise ValueError(f"y: expected one label a row, got shape {labels.shape}")
    if len(labels) != n:
        raise ValueError(f"y: expected {n} labels, one for each row of X, got {len(labels)}")
    for row, label in enumerate(labels.tolist()):
        if is_missing(label) or label == "":
            raise ValueError(f"y: row {row} has no label")
    if labels.dtype.kind == "f":
        whole = labels.astype(np.int64)
        if not (whole == labels).all():
            raise ValueError("y: expected labels, got fractions; this is no regression")
    try:
        classes, codes = np.unique(labels, return_inverse=True)
    except TypeError:
        kinds = sorted({type(label).__name__ for label in labels.tolist()})
        raise ValueError(f"y: expected labels of one type, got {listed(kinds)}") from None
    return classes, codes.reshape(-1)


def _check_no_answer(
    task: Task, rows: list[dict[str, Any]], labels: list[Any], codes: np.ndarray
) -> None:
    """ValueError for a column in the template that says every row's label."""
    for name in places_of(task.template):
        if all(row.get(name) == labels[code] for row, code in zip(rows, codes, strict=True)):
            raise ValueError(
                f"template: column {name!r} of X is y itself; leave it out of X, or give a "
                "template without it"
            )
