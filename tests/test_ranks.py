"""Several ranks train one model: what they compute is what one process computes, and none of them
goes on, or waits, alone. Programs of several ranks are started by tests/mpi.py."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from emulator import built, needs_compiler
from mpi import PATHS, needs_mpi, ranks_of, start, train_together
from training import dataset_dir, losses, model_dir, records, run

from glmlora import AutoModel, LoraConfig, get_peft_model
from glmlora.batch import Encoded
from glmlora.files.checkpoint import load_state_dict
from glmlora.training.ranks import Alone, launched_size, world
from glmlora.training.sharing import Tree, check_shares, deal, deal_runs, labels_per_row, sum_of

# Every method, rows of many lengths, dropout and noise, each of which must not see how many there
# are; 5 rows x 3 of 23 records, so that the last update of an epoch is short.
COMMON = {
    "per_device_train_batch_size": 5,
    "gradient_accumulation_steps": 3,
    "num_train_epochs": 2,
    "neftune_noise_alpha": 5.0,
}
METHODS = {
    "lora": {"lora_target": "query_key_value,dense", "lora_dropout": 0.2},
    "p_tuning": {"pre_seq_len": 4, "prefix_projection": True, "learning_rate": 1e-3},
    "freeze": {"num_layer_trainable": 1, "learning_rate": 1e-3},
    # a key's bias has no gradient but rounding's, of which AdamW would make whole steps
    "full": {"learning_rate": 1e-3, "adam_epsilon": 1e-4},
}


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("base"))


# What needs no MPI


def test_rows_are_dealt_by_tokens():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 500, 64)
    dealt = deal(lengths, 5)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(64))
    assert all((np.diff(part) > 0).all() for part in dealt)
    sums = [lengths[part].sum() for part in dealt]
    assert max(sums) - min(sums) < 30  # of about 3,200 each
    assert [part.tolist() for part in deal([3, 1], 3)] == [[0], [1], []]


def test_runs_are_neighbours_and_cover_all():
    rng = np.random.default_rng(1)
    for n in (1, 2, 3, 5, 8):
        weights = rng.integers(1, 100, 7)
        runs = deal_runs(weights, n)
        assert [i for part in runs for i in part] == list(range(7))
        assert len(runs) == n
    assert deal_runs([10, 1, 1, 10], 2) == [range(0, 2), range(2, 4)]
    assert deal_runs([], 2) == [range(0, 0), range(0, 0)]


@pytest.mark.parametrize("leaves", [1, 2, 3, 5, 7, 8, 13])
def test_a_tree_has_the_same_bits_however_it_is_cut(leaves):
    rng = np.random.default_rng(leaves)
    values = rng.standard_normal((leaves, 50)).astype(np.float32) * 10.0 ** rng.integers(-3, 4)

    def grown(cuts):
        whole = Tree()
        for first, last in zip([0, *cuts], [*cuts, leaves], strict=True):
            part = Tree()
            for i in range(first, last):
                part.take((0, i), values[i].copy())
            assert len(part.pieces) <= 2 * leaves.bit_length()
            for place, array in part.pieces:
                whole.take(place, array)
        return whole.total()

    want = grown([])
    np.testing.assert_allclose(want, values.astype(np.float64).sum(0), rtol=1e-5, atol=1e-2)
    for first in range(leaves + 1):
        for second in range(first, leaves + 1):
            assert grown([first, second]).tobytes() == want.tobytes()
    if leaves == 5:  # pairs of neighbours, then what is left
        by_hand = ((values[0] + values[1]) + (values[2] + values[3])) + values[4]
        assert want.tobytes() == by_hand.tobytes()


def test_sums_begin_at_the_first():
    values = np.array([1e16, 1.0, -1e16, 1.0])
    assert sum_of(values) == ((1e16 + 1.0) - 1e16) + 1.0


def test_labels_of_each_row():
    encoded = Encoded(
        ids=np.array([5, 6, 7, 8, 9, 4, 4, 4], np.int32),
        offsets=np.array([0, 3, 5, 8]),
        source_lengths=np.array([1, 0, 1]),
        n_cut=0,
        ignored_id=4,
    )
    assert labels_per_row(encoded).tolist() == [2, 1, 0]


def test_gradients_go_out_and_come_back(tiny_model):
    """Sums, which `step` divides by the tokens that it is told."""
    core = AutoModel.from_pretrained(tiny_model).core
    names = ["transformer.encoder.final_layernorm.weight"]
    names += [n for n in core.names() if n.endswith("0.mlp.dense_h_to_4h.weight")]
    core.set_trainable(names)
    ids, lengths = np.arange(1, 8), np.array([3, 4])
    core.backward(ids, lengths, np.array([0, 4]), np.array([2, 6]), dropout=False)
    assert core.accumulated_tokens == 2 and core.accumulated_rows == 2
    gradients = np.empty(core.gradient_size, np.float32)
    core.read_gradients(gradients)
    assert gradients.size == sum(-(-core.read(n).size // 16) * 16 for n in names)
    want = np.concatenate([core.read(n, "grad").ravel() for n in reversed(names)]) * 2  # matrices
    np.testing.assert_allclose(gradients[gradients != 0], want[want != 0], rtol=1e-6)
    norm = core.grad_norm()
    core.write_gradients(gradients[20:50] * 0, 20)
    part = np.empty(60, np.float32)
    core.read_gradients(part, 10)
    assert not part[10:40].any() and part[:10].any() and part[40:].any()
    assert core.grad_norm() < norm
    core.write_gradients(gradients * 3)
    core.accumulated_tokens = 6
    assert core.grad_norm() == pytest.approx(norm, rel=1e-6)
    frozen = np.zeros(4, np.float32)
    frozen.flags.writeable = False
    for bad, text in (
        (lambda: core.read_gradients(np.empty(4, np.float32), core.gradient_size - 3), "are not"),
        (lambda: core.write_gradients(np.empty(4, np.float32), -1), "first: expected 0 or more"),
        (lambda: core.read_gradients(np.empty((2, 2), np.float32)), "array: "),
        (lambda: core.read_gradients(np.empty(8, np.float32)[::2]), "not contiguous"),
        (lambda: core.read_gradients(frozen), "can be written"),
        (lambda: setattr(core, "accumulated_tokens", -1), "accumulated_tokens: expected 0"),
        (lambda: setattr(core, "accumulated_rows", -1), "accumulated_rows: expected 0"),
    ):
        with pytest.raises(ValueError, match=text):
            bad()
    with pytest.raises(ValueError, match="array: expected a C-contiguous array of float32"):
        core.read_gradients(np.empty(4, np.int32))


def test_rows_have_the_numbers_that_are_given(tiny_model, tmp_path):
    """Dropout of a row is a function of its number in the update, in whichever call it comes."""
    model = AutoModel.from_pretrained(tiny_model)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["query_key_value"])
    core = get_peft_model(model, config, seed=1).get_base_model().core
    core.set_trainable([n for n in core.names() if ".lora_B" in n])
    ids, lengths = np.arange(1, 13), np.array([3, 4, 5])
    begin = np.array([0, 3, 7])

    def gradient(calls):
        core.zero_grad()
        for order, numbers in calls:
            flat = np.concatenate([ids[begin[i] : begin[i] + lengths[i]] for i in order])
            some = lengths[list(order)]
            rows = np.cumsum(some) - 2
            core.backward(flat, some, rows, flat[rows + 1], dropout_seed=9, numbers=numbers)
        out = np.empty(core.gradient_size, np.float32)
        core.read_gradients(out)
        return out

    want = gradient([((0, 1, 2), None)])
    assert gradient([((0, 1, 2), np.array([0, 1, 2]))]).tobytes() == want.tobytes()
    apart = gradient([((2,), np.array([2])), ((0, 1), np.array([0, 1]))])
    np.testing.assert_allclose(apart, want, atol=1e-5)
    assert np.abs(gradient([((0, 1, 2), np.array([2, 1, 0]))]) - want).max() > 1e-3
    for numbers, text in ((np.array([0, 1]), "numbers: expected 3"), (-lengths, "numbers.0.: ")):
        with pytest.raises(ValueError, match=text):
            gradient([((0, 1, 2), numbers)])


def test_every_rank_has_something_to_do():
    many = type("Many", (Alone,), {"size": 4})()
    check_shares(many, 4, 4, True)
    check_shares(many, 4, 1, False)
    with pytest.raises(ValueError, match="4 ranks share the 3 rows of an update"):
        check_shares(many, 3, 3, False)
    with pytest.raises(ValueError, match="deterministic: 4 ranks share the 2 micro-batches"):
        check_shares(many, 16, 2, True)


@pytest.mark.parametrize(
    ("environ", "size"),
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, 3),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, 2),
        ({"PMIX_RANK": "1", "SLURM_STEP_NUM_TASKS": "8"}, 8),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}, 1),  # srun without MPI
    ],
)
def test_what_launchers_say(environ, size):
    assert launched_size(environ) == size


def test_without_mpi4py_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "glmlora\[mpi\]"'):
        world()


def test_another_mpi_than_that_of_the_launcher(monkeypatch):
    class World:
        size = 1

    class Mpi:
        COMM_WORLD = World

        @staticmethod
        def Get_library_version():
            return "Other MPI 1\nmore"

    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", type("mpi4py", (), {"MPI": Mpi}))
    with pytest.raises(RuntimeError, match="2 processes .* sees 1: .*Other MPI 1. than"):
        world()


def test_one_process_may_be_deterministic(tiny_model, tmp_path):
    """It differs from the usual sum in its last bits, and is the same twice; the two do not go on
    from each other's checkpoints.
    """
    plain = run(tiny_model, tmp_path / "plain", **COMMON)
    once = run(tiny_model, tmp_path / "a", deterministic=True, **COMMON)
    again = run(tiny_model, tmp_path / "b", deterministic=True, **COMMON)
    assert losses(once) == losses(again) != losses(plain)
    close(weights(tmp_path / "a"), weights(tmp_path / "plain"))
    settings = {**COMMON, "resume_from_checkpoint": str(tmp_path / "plain" / "checkpoint-4")}
    with pytest.raises(ValueError, match="was trained with deterministic None"):
        run(tiny_model, tmp_path / "c", deterministic=True, **settings)


# Several ranks


def weights(folder):
    return {name: np.asarray(a, np.float32) for name, a in load_state_dict(folder).items()}


def close(found, wanted, atol=2e-5):
    """To float32's rounding, of values up to about 1 after some updates of AdamW."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-4, atol=atol, err_msg=name)


def settings_of(method, **more):
    return {**COMMON, **METHODS[method], "finetuning_type": method, **more}


@pytest.fixture(scope="module")
def together(tiny_model, tmp_path_factory):
    """n -> folder of the runs of n ranks: each method, and LoRA with `deterministic`, once with
    evaluation.
    """
    place = tmp_path_factory.mktemp("together")
    data = records(23)
    data[3]["output"] = data[4]["output"] = "2"
    common = {"deterministic": True, "save_steps": 2, "save_strategy": "steps"}
    named = {method: settings_of(method) for method in METHODS}
    named["deterministic"] = settings_of("lora", **common)
    named["evaluated"] = settings_of(
        "lora",
        dev_ratio=0.3,
        evaluation_strategy="steps",
        eval_steps=1,
        save_steps=1,
        per_device_eval_batch_size=2,
        label_metrics=True,
        load_best_model_at_end=True,
        early_stopping_patience=2,
        deterministic=True,
        learning_rate=0.05,
    )
    given = {}

    def of(n):
        if n not in given:
            folder = place / str(n)
            runs = [(tiny_model, folder / name, data, s) for name, s in named.items()]
            if n == 1:
                done = [run(*one[:3], **one[3]) for one in runs]
                answers = [[[list(x) for x in losses(r)], r.log_history] for r in done]
            else:
                folder.mkdir()
                answers = train_together(n, folder, runs)
            given[n] = folder, dict(zip(named, answers, strict=True))
        return given[n]

    return of


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_ranks_are_one_process_to_rounding(together, method, n):
    folder, answers = together(n)
    alone, wanted = together(1)
    close(weights(folder / method), weights(alone / method))
    found = np.array(answers[method][0])
    np.testing.assert_allclose(found, np.array(wanted[method][0]), rtol=1e-4)


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_deterministic_ranks_are_one_process_bit_for_bit(together, n):
    (folder, answers), (alone, wanted) = together(n), together(1)
    assert answers["deterministic"][0] == wanted["deterministic"][0]
    for name in ("adapter_model.safetensors", "checkpoint-2/optimizer.safetensors"):
        found = (folder / "deterministic" / name).read_bytes()
        assert found == (alone / "deterministic" / name).read_bytes()


@needs_mpi
@pytest.mark.parametrize("n", [2, 3])
def test_evaluations_of_ranks_are_those_of_one_process(together, n):
    """Loss and scores of labels, the best checkpoint, and when to stop."""
    (folder, answers), (alone, wanted) = together(n), together(1)

    def scores(log):
        timed = ("runtime", "per_second")
        return [{k: x for k, x in r.items() if not k.endswith(timed)} for r in log]

    assert scores(answers["evaluated"][1]) == scores(wanted["evaluated"][1])
    name = "adapter_model.safetensors"
    assert (folder / "evaluated" / name).read_bytes() == (alone / "evaluated" / name).read_bytes()
    assert any("eval_accuracy" in r for r in answers["evaluated"][1])


@needs_mpi
@pytest.mark.parametrize("n", [2])
def test_another_number_of_ranks_goes_on(together, tiny_model, tmp_path, n):
    """Two ranks go on where one process was, bit for bit where it is deterministic."""
    alone, wanted = together(1)
    begun = str(alone / "deterministic" / "checkpoint-2")
    data = records(23)
    data[3]["output"] = data[4]["output"] = "2"
    more = {"deterministic": True, "save_steps": 2, "resume_from_checkpoint": begun}
    answers = train_together(
        n, tmp_path, [(tiny_model, tmp_path / "on", data, settings_of("lora", **more))]
    )
    assert answers[0][0] == wanted["deterministic"][0]
    name = "adapter_model.safetensors"
    assert (tmp_path / "on" / name).read_bytes() == (alone / "deterministic" / name).read_bytes()


def words(model, data, out, *more):
    """A run of `glmlora train` without an end in sight."""
    given = {
        "model_name_or_path": model,
        "dataset": "paper_label",
        "dataset_dir": data,
        "output_dir": out,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3000,
        "logging_steps": 10,
        "save_steps": 10,
        "save_total_limit": 3,
        "learning_rate": 1e-3,
    }
    flags = [str(w) for name, value in given.items() for w in (f"--{name}", value)]
    return [sys.executable, "-m", "glmlora", "train", "--do_train", *flags, "--disable_tqdm", *more]


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-3000:]
        time.sleep(0.02)


@needs_mpi
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_one_rank_ends_all(tiny_model, tmp_path, number):
    """A checkpoint of the last update is there, but after SIGKILL; it is whole then, too."""
    out = tmp_path / "out"
    process = start(2, words(tiny_model, dataset_dir(tmp_path), out))
    wait_for(out / "checkpoint-20", process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    os.kill(ranks[1], number)
    said = process.communicate(timeout=30)[0]
    assert process.returncode != 0
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
        assert time.monotonic() < end
        time.sleep(0.05)
    if number != signal.SIGKILL:
        assert process.returncode == 143
        assert said.count("everything up to here is in") == 1
        step = int(said.partition("interrupted after update ")[2].partition(" ")[0])
        assert (out / f"checkpoint-{step}").is_dir()
    done = run_one(tiny_model, tmp_path, out)
    assert done.returncode == 0, done.stderr


def run_one(model, tmp_path, out):
    """Go on in one process from the newest checkpoint of `out`, for an update; its process."""
    more = words(model, dataset_dir(tmp_path), out, "--resume_from_checkpoint", "last")
    more[more.index("--num_train_epochs") + 1] = "3000"
    code = (
        "import sys; from glmlora import cli; from glmlora.training.loop import Loop\n"
        "def end(self, group, old=Loop._update): old(self, group); self.state.should_stop = True\n"
        "Loop._update = end\n"
        f"sys.exit(cli.main({more[3:]!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


FAILING = """
import sys
sys.path[:0] = {paths!r}
from glmlora import cli
from mpi import rank_here
sys.exit(cli.main({words!r} + {more!r}.get(rank_here(), [])))
"""


@needs_mpi
@pytest.mark.parametrize(
    ("more", "text"),
    [
        (
            {"1": ["--lora_rank", "16"]},
            "rank 1: lora_rank: rank 1 has 16, rank 0 has 8;",
        ),
        ({"1": ["--dataset_dir", "nowhere"]}, "rank 1: .*nowhere"),
        ({"0": ["--max_samples", "7"]}, "rank 1: data_rows: rank 1 has 12, rank 0 has 7"),
    ],
)
def test_what_one_rank_has_otherwise_ends_all_with_a_sentence(tiny_model, tmp_path, more, text):
    line = words(tiny_model, dataset_dir(tmp_path), tmp_path / "out")[3:]
    code = FAILING.format(paths=PATHS, words=line, more=more)
    process = start(2, [sys.executable, "-c", code])
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1, said
    assert said.count("glmlora: ") == 1
    assert re.search(text, said), said


BROKEN = """
import os, sys
sys.path[:0] = {paths!r}
import training
from glmlora.training.loop import Loop
from mpi import rank_here
rank = rank_here()
class Broken:
    def on_step_end(self, state):
        if state.global_step == 3:
            raise OSError(28, "No space left on device", "somewhere")
def poisoned(self, batch, old=Loop._update):
    if self.state.global_step == 3 and rank == "1":
        core = self.core
        name = next(n for n in core.names() if "lora_B" in n)
        core.write(name, core.read(name) * float("nan"))
    old(self, batch)
if {poison}:
    Loop._update = poisoned
try:
    training.run({model!r}, {out!r}, callbacks=[] if {poison} else [Broken()])
except Exception as error:
    with open({out!r} + "/error-" + rank, "w") as file:
        file.write(type(error).__name__ + ": " + str(error))
"""


@needs_mpi
@pytest.mark.parametrize("poison", [False, True])
def test_an_error_of_one_rank_is_raised_on_all(tiny_model, tmp_path, poison):
    """A disk that is full on rank 0, numbers that are none on rank 1."""
    out = tmp_path / "out"
    code = BROKEN.format(paths=PATHS, poison=poison, model=tiny_model, out=str(out))
    process = start(2, [sys.executable, "-c", code])
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    told = [(out / f"error-{rank}").read_text() for rank in (0, 1)]
    if poison:
        assert told[1].startswith("FloatingPointError: update 4 of 10: ")
        assert "its last micro-batch has the records [" in told[1]
        assert told[0].startswith("FloatingPointError: update 4 of 10: rank 1: ")
    else:
        assert told[0] == "OSError: [Errno 28] No space left on device: 'somewhere'"
        assert told[1] == "OSError: rank 0: [Errno 28] No space left on device: 'somewhere'"


@needs_mpi
@needs_compiler
def test_each_rank_has_a_gpu(tiny_model, tmp_path):
    """Two ranks on two emulated GPUs train as one rank on one; a third finds none."""
    library = {"GLMLORA_CUDA_LIBRARY": str(built()), "EMU_DEVICES": "2", "GLMLORA_DEVICE": "emu"}
    small = {"max_steps": 2, "lora_dropout": 0.2, "save_strategy": "no"}
    data = records(8)
    answers = train_together(2, tmp_path, [(tiny_model, tmp_path / "two", data, small)], **library)
    alone = train_together(1, tmp_path, [(tiny_model, tmp_path / "one", data, small)], **library)
    np.testing.assert_allclose(answers[0][0], alone[0][0], rtol=1e-4)
    close(weights(tmp_path / "two"), weights(tmp_path / "one"))
    line = words(tiny_model, dataset_dir(tmp_path), tmp_path / "three")
    process = start(3, line, **library)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "mpiexec: 3 ranks on one machine with 2 GPUs: start a rank for each GPU" in said
