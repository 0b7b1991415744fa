"""Stop and go on: killed, interrupted and resumed runs equal the uninterrupted one bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training import adapter, losses, model_dir, records, run

import glmlora
from glmlora import _core
from glmlora.training import loop
from glmlora.training.checkpoints import find_checkpoint

TESTS = Path(__file__).resolve().parent
# Kills itself with the signal at the step; which micro-batch is running does not matter to -9.
CHILD = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's, which a run leaves alone, is not tested
sys.path[:0] = [{tests!r}, {root!r}]
import training
class Killer:
    def on_step_end(self, state):
        if state.global_step == {step}:
            os.kill(os.getpid(), {signal})
training.run({model!r}, {out!r}, callbacks=[Killer()], **{settings!r})
"""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("base"))


def child_code(model, out, step, signal_number, **settings):
    return CHILD.format(
        tests=str(TESTS),
        root=str(Path(_core.__file__).resolve().parent.parent),  # the build under test
        step=step,
        signal=int(signal_number),
        model=model,
        out=str(out),
        settings=settings,
    )


def run_child(*args, **settings):
    command = [sys.executable, "-c", child_code(*args, **settings)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def log_lines(out):
    """trainer_log.jsonl without the times, which no two runs share."""
    lines = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not k.endswith("_time")} for x in lines]


def test_killed_at_a_random_step_and_resumed(tiny_model, tmp_path):
    settings = {"lora_dropout": 0.2, "save_steps": 3, "logging_steps": 2, "weight_decay": 0.01}
    whole = run(tiny_model, tmp_path / "whole", **settings)
    step = random.Random(7).randrange(3, 10)
    killed = run_child(tiny_model, tmp_path / "killed", step, signal.SIGKILL, **settings)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    resumed = run(tiny_model, tmp_path / "killed", resume_from_checkpoint="last", **settings)
    assert losses(resumed) == losses(whole)
    assert resumed.metrics["train_loss"] == whole.metrics["train_loss"]
    assert resumed.metrics["total_flos"] == whole.metrics["total_flos"]
    assert adapter(tmp_path / "killed") == adapter(tmp_path / "whole")
    for name in ("checkpoint-9/optimizer.safetensors", "checkpoint-9/adapter_model.safetensors"):
        ours, theirs = ((tmp_path / d / name).read_bytes() for d in ("killed", "whole"))
        assert ours == theirs
    assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "whole")


@pytest.mark.parametrize(
    "method",
    [
        {"finetuning_type": "p_tuning", "pre_seq_len": 5},
        {"finetuning_type": "freeze", "num_layer_trainable": 1},
        {"finetuning_type": "full", "learning_rate": 1e-3},
        {"group_by_length": True, "save_safetensors": False},
        {"gradient_accumulation_steps": 3, "save_steps": 2},  # in the middle of an epoch
        {"use_dora": True, "modules_to_save": "output_layer", "neftune_noise_alpha": 5},
        {"init_lora_weights": "pissa", "learning_rate": 1e-3},
    ],
    ids=["p_tuning", "freeze", "full", "grouped", "uneven", "dora", "pissa"],
)
def test_every_method_resumes_exactly(tiny_model, tmp_path, method):
    whole = run(tiny_model, tmp_path / "whole", **method)
    checkpoint = tmp_path / "whole" / f"checkpoint-{method.get('save_steps', 4)}"
    resumed = run(tiny_model, tmp_path / "again", resume_from_checkpoint=checkpoint, **method)
    assert losses(resumed) == losses(whole)
    names = [p.name for p in (tmp_path / "whole").iterdir() if "model" in p.name]
    assert names
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_keeps_what_was_done(tiny_model, tmp_path, capsys):
    class Interrupt:
        def on_step_end(self, state):
            if state.global_step == 6:
                os.kill(os.getpid(), signal.SIGINT)

    whole = run(tiny_model, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path / "stopped", callbacks=[Interrupt()])
    said = capsys.readouterr().err
    assert "interrupted after update 6 of 10" in said and "resume_from_checkpoint" in said
    assert (tmp_path / "stopped" / "checkpoint-6").is_dir()
    resumed = run(tiny_model, tmp_path / "stopped", resume_from_checkpoint=True)
    # The callback came before the log of update 6, which the resumed run therefore has not.
    assert [x for x in losses(whole) if x[0] > 7] == [x for x in losses(resumed) if x[0] > 7]
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "whole")


def test_sigint_at_any_moment(tiny_model, tmp_path):
    """From outside, wherever the run is just then: it ends cleanly, and goes on exactly."""
    settings = {"num_train_epochs": 12, "lora_dropout": 0.2, "save_steps": 1000}
    run(tiny_model, tmp_path / "whole", **settings)
    code = child_code(tiny_model, tmp_path / "stopped", -1, 0, **settings)
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(8):  # the line of trainable parameters and 7 logs
        child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode not in (0, -signal.SIGKILL) and b"KeyboardInterrupt" in said
    assert b"interrupted after update" in said
    run(tiny_model, tmp_path / "stopped", resume_from_checkpoint="last", **settings)
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "whole")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_sigterm_and_sighup_save_as_ctrl_c_does(tiny_model, tmp_path, number, status):
    stopped = run_child(tiny_model, tmp_path / "stopped", 6, number)
    assert stopped.returncode == status
    assert f"interrupted after update 6 of 10 by {number.name}" in stopped.stderr
    assert "resume_from_checkpoint" in stopped.stderr and "Traceback" not in stopped.stderr
    resumed = run(tiny_model, tmp_path / "stopped", resume_from_checkpoint="last")
    whole = run(tiny_model, tmp_path / "whole")
    assert [x for x in losses(whole) if x[0] > 7] == [x for x in losses(resumed) if x[0] > 7]
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "whole")


def test_a_second_signal_ends_at_once(tiny_model, tmp_path, capsys, monkeypatch):
    """While the first one saves: what was saved before stays, and no half of anything."""

    class Interrupt:
        def on_step_end(self, state):
            if state.global_step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    def write(*args):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("goes on writing")

    monkeypatch.setattr("glmlora.training.checkpoints.write_json", write)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path, callbacks=[Interrupt()], save_steps=1000)
    said = capsys.readouterr().err
    assert "once more ends at once" in said and "checkpoint-6 is not saved" in said
    assert [p.name for p in tmp_path.iterdir()] == ["trainer_log.jsonl"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_in_the_middle_of_an_update(tiny_model, tmp_path, capsys, monkeypatch):
    """Weights have made the step that the counters have not: that state is not saved."""
    real = loop.Loop._update

    class Core:
        def __init__(self, core):
            self.core = core

        def __getattr__(self, name):
            if name == "steps":  # read right after the step
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return getattr(self.core, name)

    def update(self, group):
        core = self.core
        if self.state.global_step == 2:
            self.core = Core(core)
        try:
            real(self, group)
        finally:
            self.core = core

    monkeypatch.setattr(loop.Loop, "_update", update)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path, save_steps=1)
    assert "after update 2 of 10, twice: nothing more is saved" in capsys.readouterr().err
    assert find_checkpoint("last", tmp_path).name == "checkpoint-2"


def test_handlers_of_the_user_stay(tiny_model, tmp_path):
    """nohup's, or a launcher's own."""
    seen = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    class Both:
        def on_step_end(self, state):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGHUP)

    try:
        assert run(tiny_model, tmp_path, max_steps=2, callbacks=[Both()]).global_step == 2
    finally:
        signal.signal(signal.SIGTERM, old)
        signal.signal(signal.SIGHUP, ignored)
    assert seen == [signal.SIGTERM] * 2


def test_memory_that_ends_keeps_what_was_done(tiny_model, tmp_path, capsys):
    class Full:
        def on_step_end(self, state):
            if state.global_step == 3:
                raise MemoryError("not enough")

    with pytest.raises(MemoryError, match="not enough"):
        run(tiny_model, tmp_path, callbacks=[Full()])
    assert "interrupted after update 3 of 10: everything up to here" in capsys.readouterr().err
    assert find_checkpoint("last", tmp_path).name == "checkpoint-3"


def test_a_best_checkpoint_that_is_gone_costs_no_result(tiny_model, tmp_path):
    class Lose:
        def on_step_end(self, state):
            if state.global_step == 10:
                shutil.rmtree(state.best_model_checkpoint)

    settings = {"eval_data": records(4), "evaluation_strategy": "steps", "eval_steps": 4}
    settings |= {"load_best_model_at_end": True, "save_steps": 4, "callbacks": [Lose()]}
    with pytest.warns(UserWarning, match="load_best_model_at_end: .*last update are kept"):
        run(tiny_model, tmp_path, **settings)
    assert adapter(tmp_path)


def test_interrupted_before_the_first_update(tiny_model, tmp_path, capsys):
    class Interrupt:
        def on_train_begin(self, state):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model, tmp_path, callbacks=[Interrupt()])
    assert "nothing to save" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["lora", "p_tuning", "freeze"])
def test_the_model_is_usable_after_an_interrupt(tiny_model, tmp_path, method):
    settings = {"finetuning_type": method, "num_layer_trainable": 1, "pre_seq_len": 4}
    model = glmlora.AutoModel.from_pretrained(tiny_model)
    tokenizer = glmlora.AutoTokenizer.from_pretrained(tiny_model)

    def stop(record):
        raise KeyboardInterrupt

    names = model.core.names()
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "a", tokenizer=tokenizer, callbacks=[stop], **settings)
    assert not model.training and model.core.trainable() == [] and model.core.names() == names
    assert isinstance(model.chat(tokenizer, "title", max_length=64)[0], str)
    # The same object goes on where it stopped.
    settings["resume_from_checkpoint"] = "last"
    resumed = run(model, tmp_path / "a", tokenizer=tokenizer, **settings)
    del settings["resume_from_checkpoint"]
    whole = run(tiny_model, tmp_path / "b", **settings)
    assert losses(resumed) == losses(whole)


def test_resuming_over_another_base_is_refused(tiny_model, tmp_path):
    run(tiny_model, tmp_path / "a", max_steps=4)
    other = model_dir(tmp_path, seed=1)
    with pytest.raises(ValueError, match="other base weights"):
        run(other, tmp_path / "b", max_steps=4,
            resume_from_checkpoint=tmp_path / "a" / "checkpoint-4")  # fmt: skip


def test_a_refused_resume_leaves_the_log(tiny_model, tmp_path):
    run(tiny_model, tmp_path)
    before = (tmp_path / "trainer_log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="lora_rank"):
        run(tiny_model, tmp_path, lora_rank=2, resume_from_checkpoint="last")
    assert (tmp_path / "trainer_log.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"lora_rank": 4}, "lora_rank 8, this run has 4"),
        ({"lora_dropout": 0.5}, "lora_dropout 0.1, this run has 0.5"),
        ({"seed": 7}, "data_seed 42, this run has 7"),
        ({"per_device_train_batch_size": 4}, "max_steps 10, this run has 6"),
        ({"learning_rate": 1e-3}, "learning_rate 0.01, this run has 0.001"),
        ({"data": records(19)}, "data_rows 20, this run has 19"),
        ({"finetuning_type": "freeze", "num_layer_trainable": 1}, "finetuning_type 'lora'"),
        ({"data": records(21)[1:]}, "other data: data_sha256"),
        ({"lora_target": "dense"}, "lora_target"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha None, this run has 5.0"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights None, this run has 'pissa'"),
        ({"use_dora": True}, "use_dora None, this run has True"),
    ],
)
def test_resuming_another_run_is_refused(tiny_model, tmp_path, changed, text):
    run(tiny_model, tmp_path / "a", save_steps=5)
    checkpoint = str(tmp_path / "a" / "checkpoint-5")
    before = {p: p.read_bytes() for p in (tmp_path / "a" / "checkpoint-5").iterdir()}
    with pytest.raises(ValueError, match="resume_from_checkpoint") as caught:
        run(tiny_model, tmp_path / "b", resume_from_checkpoint=checkpoint, **changed)
    assert text in str(caught.value)
    assert before == {p: p.read_bytes() for p in (tmp_path / "a" / "checkpoint-5").iterdir()}


def test_nothing_to_resume(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint-N folder"):
        run(tiny_model, tmp_path / "empty", resume_from_checkpoint="last")
    run(tiny_model, tmp_path / "a", max_steps=4)
    with pytest.raises(ValueError, match="is no checkpoint of this program: it has no rng_state"):
        run(tiny_model, tmp_path / "b", resume_from_checkpoint=tmp_path / "a")


PARTS = ["adapter_model.safetensors", "optimizer.safetensors", "rng_state.json", "scheduler.json",
         "trainer_state.json"]  # fmt: skip


@pytest.fixture(scope="module")
def three(tiny_model, tmp_path_factory):
    """A run with checkpoint-2, -4 and -6."""
    out = tmp_path_factory.mktemp("three")
    run(tiny_model, out, max_steps=6, save_steps=2)
    return out


def cut(file):
    file.write_bytes(file.read_bytes()[:-20])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def take_from_2(file):
    shutil.copy(file.parent.parent / "checkpoint-2" / file.name, file)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("spoil", [cut, flip, take_from_2, Path.unlink])
def test_a_checkpoint_of_other_parts_is_refused(tiny_model, tmp_path, three, name, spoil):
    """The file is named, and the checkpoint before it."""
    out = tmp_path / "out"
    shutil.copytree(three, out)
    spoil(out / "checkpoint-6" / name)
    with pytest.raises(ValueError, match="the checkpoint before it is whole") as caught:
        run(tiny_model, out, max_steps=6, save_steps=2, resume_from_checkpoint="last")
    text = str(caught.value)
    assert str(out / "checkpoint-4") in text.partition("whole")[2] and "PosixPath" not in text
    # Of a state from another step every part is another one.
    assert name in text or (name == "rng_state.json" and spoil in (take_from_2, flip))


def test_only_a_whole_checkpoint_before_is_offered(tiny_model, tmp_path, three):
    out = tmp_path / "out"
    shutil.copytree(three, out)
    flip(out / "checkpoint-6" / "optimizer.safetensors")
    flip(out / "checkpoint-4" / "trainer_state.json")
    with pytest.raises(ValueError, match="checkpoint-2'$"):
        run(tiny_model, out, max_steps=6, save_steps=2, resume_from_checkpoint="last")
    with pytest.raises(ValueError, match="lora_rank") as caught:  # no other run's is offered
        run(tiny_model, out, max_steps=6, lora_rank=4, resume_from_checkpoint="last")
    assert "is whole" not in str(caught.value)
    flip(out / "checkpoint-2" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="optimizer.safetensors: is not what was saved") as caught:
        run(tiny_model, out, max_steps=6, save_steps=2, resume_from_checkpoint="last")
    assert "is whole" not in str(caught.value)


def test_a_digit_that_changed_in_the_state_is_seen(tiny_model, tmp_path, three):
    out = tmp_path / "out"
    shutil.copytree(three, out)
    file = out / "checkpoint-6" / "rng_state.json"
    stored = json.loads(file.read_text())
    stored["progress"]["loss_total"] += 1
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="rng_state.json: is not what was saved"):
        run(tiny_model, out, max_steps=6, save_steps=2, resume_from_checkpoint="last")


def test_weights_beside_those_of_the_checkpoint_are_refused(tiny_model, tmp_path, three):
    out = tmp_path / "out"
    shutil.copytree(three, out)
    shutil.copy(
        out / "checkpoint-2/adapter_model.safetensors", out / "checkpoint-6/model.safetensors"
    )
    with pytest.raises(ValueError, match="checkpoint-6/model.safetensors: was not saved with"):
        run(tiny_model, out, max_steps=6, save_steps=2, resume_from_checkpoint="last")


def test_the_last_checkpoint_is_the_last_by_its_state(tiny_model, tmp_path, three):
    """Not by the times of its files, which a copy changes, nor by its name alone."""
    out = tmp_path / "out"
    shutil.copytree(three, out)
    for file in (out / "checkpoint-2").iterdir():
        os.utime(file, (2e9, 2e9))
    assert find_checkpoint("last", out) == out / "checkpoint-6"
    run(tiny_model, out, max_steps=3, save_steps=3)  # a newer run of fewer steps
    assert find_checkpoint("last", out) == out / "checkpoint-3"


def test_half_written_checkpoints_are_not_seen(tiny_model, tmp_path):
    whole = run(tiny_model, tmp_path / "a")
    shutil.copytree(tmp_path / "a" / "checkpoint-8", tmp_path / "a" / ".checkpoint-9.tmp")
    (tmp_path / "a" / "checkpoint-9").mkdir()
    resumed = run(tiny_model, tmp_path / "a", resume_from_checkpoint="last")
    assert losses(resumed) == losses(whole)
    assert not (tmp_path / "a" / "checkpoint-9" / "trainer_state.json").exists()


def test_resuming_a_finished_run_changes_nothing(tiny_model, tmp_path):
    run(tiny_model, tmp_path, save_steps=5)
    before = adapter(tmp_path)
    again = run(tiny_model, tmp_path, save_steps=5, resume_from_checkpoint="last")
    assert again.global_step == 10 and adapter(tmp_path) == before


def test_nothing_in_a_checkpoint_is_pickled(tiny_model, tmp_path):
    run(tiny_model, tmp_path, max_steps=4)
    for path in (tmp_path / "checkpoint-4").iterdir():
        if path.suffix not in (".safetensors", ".md"):
            json.loads(path.read_text(encoding="utf-8"))
