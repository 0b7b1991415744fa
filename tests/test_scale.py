"""Tables answered by Ray's workers: the bytes of one process, whatever is killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

import glmlora
from glmlora import cli, scale
from glmlora.scale import engine
from glmlora.scale.engine import resources

try:
    import ray
except ImportError:
    ray = None
needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not here: pip install glmlora[ray]")

ROWS = [{"id": i, "title": f"word {7 * i} {'x' * (i % 5)}"} for i in range(150)]
DRAWN = {"temperature": 1.0, "max_length": 40, "seed": 5}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    model = tiny.tiny_model_dir(place, padded_vocab_size=480)
    return str(tiny.tiny_tokenizer_dir(model, 400))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"{row['id']},{row['title']}" for row in ROWS]
    Path("in.csv").write_text("\n".join(["id,title", *lines, ""]))
    return tmp_path


def words(base, *more):
    given = ["--model", base, "--input", "in.csv", "--template", "{title}", "--output", "o.csv"]
    return ["predict", *given, *more]


# Without Ray


def test_cores_and_gpus_are_dealt():
    assert resources([(2, 0)], None, False) == (1, {"num_cpus": 2, "num_gpus": 0})
    assert resources([(2, 0)], 2, False) == (2, {"num_cpus": 1, "num_gpus": 0})
    assert resources([(8, 0), (4, 0)], None, False) == (2, {"num_cpus": 4, "num_gpus": 0})
    assert resources([(8, 0), (4, 0)], 3, False) == (3, {"num_cpus": 4, "num_gpus": 0})
    assert resources([(8, 2), (64, 0)], None, True) == (2, {"num_cpus": 4, "num_gpus": 1})
    with pytest.raises(ValueError, match="workers: expected at most 12, Ray's cores, got 13"):
        resources([(8, 0), (4, 0)], 13, False)
    with pytest.raises(ValueError, match="workers: expected at most 2, Ray's GPUs, got 3"):
        resources([(8, 2)], 3, True)
    with pytest.raises(ValueError, match="no node of Ray has a GPU"):
        resources([(8, 0)], None, True)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--workers", "2"], "--workers: has no effect without --engine ray"),
        (["--engine", "ray", "--shard", "1/2"], "--engine: has no effect with --shard"),
        (["--engine", "ray", "--workers", "0"], "workers: expected a whole number from 1, got 0"),
        (["--engine", "ray"], 'pip install "glmlora[ray]"'),
    ],
)
def test_flags_are_checked_first(base, place, capsys, monkeypatch, more, text):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(words(base, *more)) == 1
    assert text in capsys.readouterr().err and os.listdir() == ["in.csv"]


# With it


@needs_ray
def test_killed_workers():
    """The command, in processes of its own."""
    script = Path(__file__).with_name("killed_workers.py")
    given = ["--rows", "600", "--workers", "2", "--every", "0.3", "--layers", "12", "--stops", "1"]
    done = subprocess.run([sys.executable, script, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "workers killed over 600 rows: equal, each row kept once" in done.stdout
    assert "SIGTERM: status 143" in done.stdout and "\n0 workers" not in done.stdout


@pytest.fixture(scope="module")
def running():
    """A Ray of this process, for the tests below."""
    if ray is None:
        pytest.skip("Ray is not here")
    with engine.ray_running(2) as found:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        yield found


@pytest.fixture(scope="module")
def loaded(base):
    return glmlora.AutoModel.from_pretrained(base), glmlora.AutoTokenizer.from_pretrained(base)


def predict(table, base, folder, **more):
    given = {"workers": 2, **DRAWN, **more}
    return scale.predict(table, base, "{title}", folder=folder, **given)


@pytest.mark.parametrize("how", [{"choices": None}, {"labels": [0, 1], "proba": True}])
def test_a_dataset_comes_back_in_order(running, loaded, base, tmp_path, capsys, how):
    import ray.data

    model, tokenizer = loaded
    given = {**how} if "labels" in how else {**how, **DRAWN}
    if "choices" in how:  # the answer of the last row does not count: one shard has such a one
        answers = [row["label"] for row in model.predict_table(tokenizer, ROWS, "{title}", **DRAWN)]
        given["choices"] = sorted({*answers} - {answers[-1], ""})
    want = model.predict_table(tokenizer, ROWS, "{title}", **given)
    blocks = ray.data.from_items(ROWS, override_num_blocks=3)
    found = scale.predict(blocks, base, "{title}", folder=tmp_path / "f", workers=2, **given)
    assert found.take_all() == want
    told = capsys.readouterr().err
    assert ("of 150 answers are none of" in told) == ("choices" in how)
    other = ray.data.from_items(ROWS, override_num_blocks=7)  # the same rows, cut otherwise
    again = scale.predict(other, base, "{title}", folder=tmp_path / "f", **given)
    assert again.take_all() == want and "goes on after 150 of 150" in capsys.readouterr().err
    with pytest.raises(ValueError, match="table differs"):
        fewer = ray.data.from_items(ROWS[1:] + ROWS[:1])
        scale.predict(fewer, base, "{title}", folder=tmp_path / "f", **given)


def test_rows_of_python_and_of_a_file(running, loaded, base, place):
    model, tokenizer = loaded
    want = model.predict_table(tokenizer, ROWS, "{title}", **DRAWN)
    assert predict(ROWS, base, place / "f") == want
    texts = [{**row, "id": str(row["id"])} for row in want]
    assert predict("in.csv", base, place / "g") == texts


def test_what_is_wrong_is_known_first(running, base, tmp_path):
    import ray.data

    rows = [*ROWS[:70], {"id": 70, "title": None}]
    for table in (ray.data.from_items(rows, override_num_blocks=2), rows):
        with pytest.raises(ValueError, match="row 70 has no value in column 'title'"):
            predict(table, base, tmp_path / "f")
    with pytest.raises(ValueError, match="'title' is no column of the table"):
        predict(ray.data.from_items([{"id": 1}]), base, tmp_path / "f")
    with pytest.raises(ValueError, match="workers: expected at most 2"):
        predict(ROWS, base, tmp_path / "f", workers=3)


class Dies:
    """Stands for what answers: a worker that ends, or raises, with its first row."""

    def __init__(self, error=None):
        self.error = error

    def settings(self):
        return {"device": "cpu"}

    def answering(self, asked, columns):
        if self.error is not None:
            raise self.error
        os._exit(3)


def test_workers_that_die_at_once_end_the_job(running, tmp_path, monkeypatch):
    from glmlora.tables.shards import open_shards

    monkeypatch.setattr(engine, "DEATHS", 2)
    shards = open_shards(str(tmp_path / "f"), {}, 1, [range(2)], {})
    with pytest.raises(RuntimeError, match="2 workers died one after another at shard 1 without"):
        engine.answer_shards(running, shards, Dies(), None, [], lambda number: [], workers=1)
    with pytest.raises(ValueError, match="^the file is damaged$"):
        source = Dies(ValueError("the file is damaged"))
        engine.answer_shards(running, shards, source, None, [], lambda number: [], workers=1)
