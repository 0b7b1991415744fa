"""What is told to experiment trackers: TensorBoard by its own package where that is installed,
MLflow and SwanLab by modules in their place that write down what they are told."""

import sys
from types import SimpleNamespace

import pytest
from training import model_dir, run

from glmlora.training.arguments import parse_train_arguments


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("base"))


SETTINGS = {"max_steps": 4, "save_steps": 2, "evaluation_strategy": "steps", "dev_ratio": 0.2}
SETTINGS |= {"eval_steps": 2}


def numbers_of(result, name):
    return [(r["step"], r[name]) for r in result.log_history if name in r]


def test_tensorboard_reads_what_was_logged(tiny_model, tmp_path):
    """Also after a run that was stopped beyond its checkpoint: no update stands there twice."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Stop:
        def on_step_end(self, state):
            if state.global_step == 3:
                raise OSError("stopped")

    out = tmp_path / "out"
    told = {**SETTINGS, "report_to": "tensorboard", "logging_dir": str(tmp_path / "logs")}
    with pytest.raises(OSError, match="stopped"):
        run(tiny_model, out, callbacks=[Stop()], **told)
    result = run(tiny_model, out, resume_from_checkpoint="last", **told)
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    for tag, name in (
        ("train/loss", "loss"),
        ("train/grad_norm", "grad_norm"),
        ("train/learning_rate", "learning_rate"),
        ("eval/loss", "eval_loss"),
    ):
        found = [(e.step, e.value) for e in events.Scalars(tag)]
        assert found == [(s, pytest.approx(x, rel=1e-6)) for s, x in numbers_of(result, name)]
    (settings, *_) = events.Tensors("settings/text_summary")
    assert b"lora_rank: 8" in settings.tensor_proto.string_val[0]


class Told:
    """A module in the place of MLflow or SwanLab."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return SimpleNamespace(
                info=SimpleNamespace(run_id="r1"), public=SimpleNamespace(run_id="r1")
            )

        return call

    def named(self, name):
        return [call for call in self.calls if call[0] == name]


@pytest.mark.parametrize(
    ("tracker", "start", "log", "end", "again"),
    [
        ("mlflow", "start_run", "log_metrics", "end_run", {"run_id": "r1"}),
        ("swanlab", "init", "log", "finish", {"id": "r1", "resume": "allow"}),
    ],
)
def test_trackers_are_told_each_record(
    tiny_model, tmp_path, monkeypatch, tracker, start, log, end, again
):
    """Hyperparameters once; a resumed run goes on with the tracker's run."""
    module = Told()
    monkeypatch.setitem(sys.modules, tracker, module)
    told = {**SETTINGS, "report_to": [tracker], "run_name": "mine"}
    result = run(tiny_model, tmp_path, **told)
    ((_, _, begun),) = module.named(start)
    assert "mine" in begun.values() and not again.items() <= begun.items()
    settings = begun.get("config") or {
        n: x for _, (part,), _ in module.named("log_params") for n, x in part.items()
    }
    assert str(settings["lora_rank"]) == "8" and str(settings["learning_rate"]) == "0.01"
    said = [(kw["step"], args[0]) for _, args, kw in module.named(log)]
    losses = [(step, x["train/loss"]) for step, x in said if "train/loss" in x]
    assert losses == numbers_of(result, "loss")
    assert [s for s, x in said if "eval/loss" in x] == [2, 4]
    assert len(module.named(end)) == 1
    module.calls.clear()
    run(tiny_model, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **told)
    ((_, _, begun),) = module.named(start)
    assert again.items() <= begun.items()
    said = [kw["step"] for _, args, kw in module.named(log) if "train/loss" in args[0]]
    assert said == [3, 4] and not module.named("log_params")


def test_a_tracker_that_is_missing_is_named_before_training(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    with pytest.raises(ModuleNotFoundError, match=r'report_to: swanlab .*"glmlora\[swanlab\]"'):
        run(tiny_model, tmp_path, report_to="swanlab")
    assert not list(tmp_path.glob("checkpoint-*"))


def test_other_trackers_have_no_effect():
    told = parse_train_arguments({"output_dir": "o", "do_train": True, "report_to": ["wandb"]})
    assert told.notices == [
        "report_to has no effect: wandb: expected some of tensorboard, mlflow, swanlab"
    ]
