"""Shards of a table, answered by any processes, become the bytes of one run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from glmlora import cli
from glmlora.files.journal import Journal
from glmlora.model import loading
from glmlora.tables import answers as table_answers
from glmlora.tables import shards
from glmlora.tables.shards import every, shrinking

WORDS = " ".join(tiny.SENTENCES).split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    model = tiny.tiny_model_dir(place, padded_vocab_size=480)
    return tiny.tiny_tokenizer_dir(model, 400)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        f"{i},{' '.join(WORDS[i : i + 1 + i % 5])}".replace(",", ";").replace(";", ",", 1)
        for i in range(23)
    ]
    Path("in.csv").write_text("\n".join(["uuid,title", *lines, ""]), encoding="utf-8")
    return tmp_path


DRAWN = ["--temperature", "1", "--seed", "5", "--max-length", "50"]
WEIGHED = ["--labels", "0,1,medicine", "--proba"]


def predict(base, *words, output="o.csv", table="in.csv"):
    given = ["--model", base, "--input", table, "--template", "{title}", "--output", output]
    return cli.main(["predict", *map(str, [*given, *words])])


def gather(*words, output="g.csv"):
    return cli.main(["gather", "parts", "--output", output, *words])


def error_of(capsys, status):
    assert status == 1
    return capsys.readouterr().err


def test_all_rows_are_dealt_once():
    for rows, n in ((10, 3), (7, 7), (1, 1), (100_003, 40)):
        for ranges in (every(n, rows), shrinking(rows, n)):
            assert sorted(row for part in ranges for row in part) == list(range(rows))
    sizes = [len(part) for part in every(3, 10_000)]
    assert max(sizes) - min(sizes) <= 1
    sizes = [len(part) for part in shrinking(10_000, 3)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 1666
    assert sum(size <= shards.SMALLEST for size in sizes) >= 3 and len(sizes) < 30


@pytest.mark.parametrize("how", [DRAWN, WEIGHED, ["--choices", "0,1", *DRAWN]])
def test_gathered_shards_are_the_bytes_of_one_run(base, place, how):
    form = ["--columns", "title,label,uuid", "--add", "k=v"]
    whole = predict(base, *how, *form)
    for part in (3, 1, 4, 2):
        assert predict(base, *how, *form, "--shard", f"{part}/4", output="parts") == 0
    assert gather() == whole == ("--choices" in how)
    assert Path("g.csv").read_bytes() == Path("o.csv").read_bytes()
    names = [f"{part}-of-4.journal" for part in (1, 2, 3, 4)]
    assert sorted(os.listdir("parts")) == [*names, "job.json"]
    assert gather("--overwrite", "--fallback", "0", output="f.csv") == 0


def test_a_drawn_seed_is_that_of_all_shards(base, place):
    for part in (1, 2):
        assert predict(base, *DRAWN[:2], *DRAWN[4:], "--shard", f"{part}/2", output="parts") == 0
    seed = json.loads(Path("parts/job.json").read_text())["seed"]
    lines = [Path(f"parts/{i}-of-2.journal").read_text().splitlines()[0] for i in (1, 2)]
    assert [json.loads(line)["seed"] for line in lines] == [seed, seed]
    assert gather() == 0


class Stop:
    """Ends the answers of a run after some rows."""

    def __init__(self, monkeypatch, after):
        add, self.left = Journal.add, after

        def counted(journal, row, result):
            add(journal, row, result)
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

        monkeypatch.setattr(Journal, "add", counted)


def test_what_is_missing_is_named(base, place, capsys, monkeypatch):
    assert predict(base, *DRAWN, "--shard", "2/3", output="parts") == 0
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        assert predict(base, *DRAWN, "--shard", "1/3", output="parts") == 130
    told = error_of(capsys, gather())
    assert "shards 1/3 (6 of 8 rows), 3/3 (7 of 7 rows): run these shards (again)" in told
    assert not os.path.exists("g.csv")
    asked = []
    rows = table_answers.chat_rows

    def counted(model, tokenizer, prompts, **more):
        asked.append(len(prompts))
        return rows(model, tokenizer, prompts, **more)

    monkeypatch.setattr(table_answers, "chat_rows", counted)
    for part in (1, 2, 3):
        assert predict(base, *DRAWN, "--shard", f"{part}/3", output="parts") == 0
    assert asked == [6, 7]  # what was there is not computed again
    assert gather() == 0 and predict(base, *DRAWN) == 0
    assert Path("g.csv").read_bytes() == Path("o.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--seed", "6"], "settings differs (seed: 5 there, 6 here)"),
        (["--template", "x{title}"], "template differs ('{title}' there, 'x{title}' here)"),
        (["--choices", "0,1"], "choices differs (None there, '0,1' here)"),
        (["--columns", "uuid"], "columns differs (None there, 'uuid' here)"),
        (["--shard", "2/4"], "--shard: parts has 3 shards, not 4"),
        (["--shard", "4/3"], "--shard: expected a shard and how many there are"),
        (["--shard", "0/3"], "--shard: expected a shard and how many there are"),
        (["--shard", "2"], "--shard: expected a shard and how many there are"),
        (["--overwrite"], "--overwrite: has no effect with --shard"),
        (["--output", "in.csv"], "--output: in.csv is a file, expected the folder of all shards"),
        (["--output", "no/parts"], "--output: there is no folder"),
        (["--output", "."], "--output: . has files, and is no folder of shards"),
        (["--output", "new", "--shard", "1/24"], "--shard: expected at most 23 shards"),
    ],
)
def test_a_shard_of_another_job_is_refused(base, place, capsys, monkeypatch, words, text):
    with monkeypatch.context() as patch:
        Stop(patch, 2)
        assert predict(base, *DRAWN, "--shard", "1/3", output="parts") == 130
    before = sorted(os.listdir("parts"))
    monkeypatch.setattr(loading, "load_model", lambda *a: pytest.fail("the model is loaded"))
    status = predict(base, *DRAWN, "--shard", "2/3", *words, output="parts")
    assert text in error_of(capsys, status)
    assert sorted(os.listdir("parts")) == before


def test_a_table_that_changed_is_refused(base, place, capsys):
    for part in (1, 2):
        assert predict(base, *WEIGHED, "--shard", f"{part}/2", output="parts") == 0
    text = Path("in.csv").read_text()
    Path("in.csv").write_text(text.replace("22,", "23,"))
    assert "in.csv: is another table by now: table differs (content)" in error_of(capsys, gather())
    status = predict(base, *WEIGHED, "--shard", "1/2", output="parts")
    assert "table differs (content)" in error_of(capsys, status)
    Path("in.csv").write_text(text)
    shutil.copytree("parts", "other")
    path = Path("parts/2-of-2.journal")
    path.write_bytes(Path("parts/1-of-2.journal").read_bytes())
    told = error_of(capsys, gather())
    assert "2-of-2.journal: is the journal of another job: shard differs (first: 0 there" in told
    lines = Path("other/2-of-2.journal").read_text().splitlines(keepends=True)
    path.write_text(lines[0].replace("0", "1", 1) + "".join(lines[1:]))
    assert "2-of-2.journal: its first line is damaged" in error_of(capsys, gather())
    assert not os.path.exists("g.csv")


def test_an_output_that_is_there_is_refused(base, place, capsys):
    assert "parts/job.json: not there" in error_of(capsys, gather())
    assert predict(base, *WEIGHED, "--shard", "1/1", output="parts") == 0
    assert "in.csv is the input" in error_of(capsys, gather(output="in.csv"))
    Path("g.csv").write_text("mine")
    assert "g.csv exists: pass --overwrite" in error_of(capsys, gather())
    assert Path("g.csv").read_text() == "mine" and gather("--overwrite") == 0


def test_two_processes_that_begin_at_once_agree(base, place):
    """On one seed and one job.json, whoever writes it."""
    code = "import sys; from glmlora import cli; sys.exit(cli.main(sys.argv[1:]))"
    given = ["--model", base, "--input", "in.csv", "--template", "{title}", "--output", "parts"]
    words = [sys.executable, "-c", code, "predict", *map(str, given), "--max-length", "40"]
    both = [subprocess.Popen([*words, "--shard", f"{part}/2"]) for part in (1, 2)]
    assert [one.wait() for one in both] == [0, 0]
    assert sorted(os.listdir("parts")) == ["1-of-2.journal", "2-of-2.journal", "job.json"]
    assert gather() == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 2}, "format: expected 1, got 2"),
        ({"seed": "x"}, "seed: expected int, got 'x'"),
        ({"shards": [[0, 5, 1]] * 2}, "shards: expected each row in one of them"),
        ({"shards": [7]}, "shards: expected each row in one of them"),
        ({"form": {}}, "form: has no 'input'"),
    ],
)
def test_a_job_that_somebody_edited(tmp_path, change, text):
    stored = {"format": 1, "form": {"input": "a"}, "job": {}, "seed": 1, "shards": [[0, 5, 1]]}
    (tmp_path / "job.json").write_text(json.dumps({**stored, **change}))
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        shards.gather(str(tmp_path), str(tmp_path / "o.csv"))
