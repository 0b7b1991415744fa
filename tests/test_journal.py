"""A prediction that is stopped, however, goes on where it was, and ends with the same bytes."""

import csv
import datetime
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy
import pytest
import tiny

import glmlora
from glmlora import cli
from glmlora.files import journal
from glmlora.files.journal import Journal, digests
from glmlora.files.rows import table_rows
from glmlora.generation.generate import ROWS
from glmlora.tables import answers as table_answers
from glmlora.tables import job, output
from glmlora.tools.project import tiny_directory

JOB = {"model": {"a.bin": journal.digest(b"a")}, "template": "{t}", "settings": {"top_p": 0.5}}


def keep(path, results, job=JOB, seed=7):
    with Journal(path, job, seed) as kept:
        for row, result in results.items():
            kept.add(row, result)


def found(path, job=JOB, seed=7, **more):
    with Journal(path, job, seed, **more) as kept:
        return dict(kept.results)


# The file


def test_what_was_kept_is_there_again(tmp_path):
    path = tmp_path / "o.csv.journal"
    results = {2: {"answer": "好\n\ud800"}, 0: {"proba": [0.1, 2.5e-300]}}
    keep(path, results)
    with Journal(path, JOB, seed=9) as kept:
        assert kept.results == results and kept.missing(4) == [1, 3]
        assert kept.seed == 7  # the one that was drawn
        kept.add(1, None)
    assert found(path) == {**results, 1: None}
    for line in path.read_bytes().splitlines():
        assert "crc32" in json.loads(line)


def test_a_journal_without_a_row_does_not_stay(tmp_path):
    keep(tmp_path / "o.journal", {})
    assert os.listdir(tmp_path) == []
    with Journal(None, JOB, 7) as kept:
        kept.add(0, "x")
        assert kept.missing(2) == [1]
    assert os.listdir(tmp_path) == []


def test_every_torn_end(tmp_path, monkeypatch):
    """Whatever part of the last line is there, only its row is missing."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # hundreds of them
    path = tmp_path / "o.journal"
    keep(path, {0: "a", 1: "b"})
    lines = path.read_bytes().splitlines(keepends=True)
    assert [list(json.loads(line))[0] for line in lines] == [
        *("journal", "process", "row", "row", "process")
    ]
    for size in range(len(lines[3])):
        path.write_bytes(b"".join(lines[:3]) + lines[3][:size])
        with Journal(path, JOB, 7) as kept:
            assert kept.results == {0: "a"}
            kept.add(1, "c")
        assert found(path) == {0: "a", 1: "c"}
        assert all(json.loads(line) for line in path.read_bytes().splitlines())
    for size in range(len(lines[0])):  # killed while it began
        path.write_bytes(lines[0][:size])
        assert found(path) == {}


def test_every_damaged_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    path = tmp_path / "o.journal"
    keep(path, {0: "a", 1: "b", 2: "c"})
    data = path.read_bytes()
    line = data.splitlines(keepends=True)[3]
    start = data.index(line)
    for place in range(start, start + len(line)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        rows = found(path)
        assert rows.pop(0) == "a" and set(rows) <= {2} and rows.get(2, "c") == "c"
    path.write_bytes(data.replace(b'"top_p": 0.5', b'"top_p": 0.6'))
    with pytest.raises(ValueError, match="its first line is damaged, or it is no journal"):
        found(path)


@pytest.mark.parametrize("text", ["my notes\n", "my notes", '{"a": 1}\n', "\n"])
def test_another_file_is_not_replaced(tmp_path, text):
    path = tmp_path / "o.journal"
    path.write_text(text)
    with pytest.raises(ValueError, match="no journal of a job; move it away, or pass --overwrite"):
        found(path)
    assert path.read_text() == text
    assert found(path, anew=True) == {}


def line(value):
    """A line with the right sum, whatever it says."""
    body = json.dumps(value)[:-1].encode()
    return body + b', "crc32": "%08x"}\n' % zlib.crc32(body)


def test_lines_that_somebody_made(tmp_path):
    path = tmp_path / "o.journal"
    for first in ({"journal": 1}, {"journal": 1, "job": []}, {"journal": 1, "job": JOB}):
        path.write_bytes(line(first))
        with pytest.raises(ValueError, match="its first line does not say what the job is"):
            found(path)
    rows = [{"row": "1", "result": 1}, {"row": [1], "result": 1}, {"row": 2}, {"process": 3}]
    first = {"journal": 1, "job": JOB, "seed": 3}
    path.write_bytes(b"".join(map(line, [first, *rows, {"row": 5, "result": None}])))
    assert found(path) == {5: None}


@pytest.mark.parametrize(
    ("part", "value", "text"),
    [
        ("model", {"a.bin": journal.digest(b"b")}, "model differs (a.bin)"),
        ("adapter", {"b.bin": journal.digest(b"b")}, "adapter differs (none there, one here)"),
        ("model", None, "model differs (one there, none here)"),
        ("template", "{u}", "template differs ('{t}' there, '{u}' here)"),
        ("settings", {"top_p": 0.5, "seed": 3}, "settings differs (seed: None there, 3 here)"),
    ],
)
def test_another_job_is_refused(tmp_path, part, value, text):
    path = tmp_path / "o.journal"
    keep(path, {0: "a"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path}: is the journal of another job: ") as refused:
        found(path, {**JOB, part: value})
    assert text in str(refused.value) and "pass --overwrite to begin anew" in str(refused.value)
    assert path.read_bytes() == before
    with Journal(path, {**JOB, part: value}, 8, anew=True) as kept:
        assert kept.results == {} and kept.seed == 8 and text in kept.replaced


def test_a_journal_of_a_later_format_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(journal, "FORMAT", 2)
        keep(tmp_path / "o.journal", {0: "a"})
    with pytest.raises(ValueError, match="format 2, expected 1"):
        found(tmp_path / "o.journal")


def test_two_processes_do_not_write_one_journal(tmp_path):
    path = tmp_path / "o.journal"
    code = (
        "import sys\nfrom glmlora.files.journal import Journal\n"
        "with Journal(sys.argv[1], {}, 0) as kept:\n"
        "    kept.add(0, 1)\n    print('open', flush=True)\n    sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"open\n"
        for anew in (False, True):
            with pytest.raises(OSError, match=f"process {other.pid} on .* writes this") as refused:
                found(path, {}, anew=anew)
            assert refused.value.errno == errno.EBUSY and refused.value.filename == str(path)
        other.kill()
    assert found(path, {}) == {0: 1}


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """There the process that is named in the journal tells, until it says that it has ended."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "none")

    monkeypatch.setattr(journal.fcntl, "flock", flock)
    path = tmp_path / "o.journal"
    with Journal(path, JOB, 7) as kept:
        kept.add(0, "a")
        with pytest.raises(OSError, match=f"process {os.getpid()} on"):
            found(path)
    assert found(path) == {0: "a"}


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    path, write, room = tmp_path / "o.journal", os.write, 0

    def some(file, data):
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(file, data[:room])
        room -= written
        return written

    with Journal(path, JOB, 7) as kept:
        kept.add(0, "a")
        monkeypatch.setattr(journal.os, "write", some)
        room = 9
        with pytest.raises(OSError, match="No space left") as full:
            kept.add(1, "b")
        assert full.value.filename == str(path)
    monkeypatch.undo()
    assert found(path) == {0: "a"}


def test_the_disk_is_waited_for_once_a_second(tmp_path, monkeypatch):
    now, synced, fsync = 100.0, 0, os.fsync

    def counted(file):
        nonlocal synced
        synced += 1
        fsync(file)

    monkeypatch.setattr(journal.time, "monotonic", lambda: now)
    with Journal(tmp_path / "o.journal", JOB, 7) as kept:
        monkeypatch.setattr(journal.os, "fsync", counted)
        for row in range(40):
            now += 0.26
            kept.add(row, "a")
        assert synced == 10
    assert synced == 11


def test_files_by_their_content(tmp_path, monkeypatch):
    """Of a large file, a changed piece of a thousandth is seen, and its size."""
    monkeypatch.setattr(journal, "_WHOLE", 1 << 16)
    data = bytearray(os.urandom(1 << 23))
    for name in ("a.bin", "b.txt", "c.bin"):
        (tmp_path / name).write_bytes(data)
    pattern = re.compile(r".*\.bin")
    first = digests(tmp_path, pattern)
    assert list(first) == ["a.bin", "c.bin"] and first["a.bin"] == first["c.bin"]
    os.utime(tmp_path / "a.bin", (1, 1))  # a copy is the same
    assert digests(tmp_path, pattern) == first
    for place in (0, len(data) // 3, len(data) - len(data) // 1000):
        changed = bytearray(data)
        changed[place : place + len(data) // 1000] = bytes(len(data) // 1000)
        (tmp_path / "a.bin").write_bytes(changed)
        assert digests(tmp_path, pattern)["a.bin"] != first["a.bin"]
    (tmp_path / "a.bin").write_bytes(bytes(data) + b"x")
    assert digests(tmp_path, pattern)["a.bin"] != first["a.bin"]


# The job


def test_a_job_of_any_results(tmp_path, capsys):
    """What `run_job` gives `compute`, takes from it, and tells when it stops."""
    asked = []

    def compute(missing, stop=None):
        asked.append(missing)
        for row in reversed(missing):
            if row == stop:
                raise KeyboardInterrupt
            yield row, {"proba": [row / 3, 1 - row / 3]}

    path = tmp_path / "o.journal"
    with pytest.raises(KeyboardInterrupt), Journal(path, JOB, 7) as kept:
        job.run_job(kept, 4, lambda missing: compute(missing, stop=1))
    told = capsys.readouterr().err
    assert f"2 of 4 rows are kept in {path}: the same job goes on from there" in told
    with Journal(path, JOB, 7) as kept:
        results = job.run_job(kept, 4, compute)
        assert results == [{"proba": [row / 3, 1 - row / 3]} for row in range(4)]
        assert job.run_job(kept, 4, None) == results  # nothing is computed
    assert asked == [[0, 1, 2, 3], [0, 1]]
    with pytest.raises(RuntimeError, match="no result came for 1 rows, the first is 1"):
        job.run_job(Journal(None, JOB, 7), 2, lambda missing: [(0, "x")])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("base")
    model = tiny.tiny_model_dir(place, padded_vocab_size=480)
    return tiny.tiny_tokenizer_dir(model, 400)


PROMPTS = [f"{word} {i}" for i, word in enumerate(" ".join(tiny.SENTENCES).split()[:40])]
PROMPTS[3] *= 200  # too long


@pytest.mark.parametrize("beams", [1, 2])
def test_an_answer_depends_on_its_row_alone(base, beams):
    """Not on the rows beside it, of which a resumed run has others: sampled, at every size."""
    model = glmlora.AutoModel.from_pretrained(base)
    tokenizer = glmlora.AutoTokenizer.from_pretrained(base)
    few = PROMPTS if beams == 1 else PROMPTS[:9]

    def ask(rows, seed=3):
        sampling = {"temperature": 1.5, "max_new_tokens": 12, "max_length": None}
        kept = Journal(None, JOB, seed)
        found = table_answers.answers(
            model, tokenizer, few, kept, rows, num_beams=beams, **sampling
        )
        return {row: result.get("answer", "no answer") for row, result in found}

    whole = ask(range(len(few)))
    assert sorted(whole) == list(range(len(few))) and whole[3] == "no answer"
    for some in ([5], [0, 8], list(range(1, len(few), 2)), list(range(len(few)))[3:]):
        assert ask(some) == {row: whole[row] for row in some}
    if beams == 1:
        assert len(set(whole.values())) > 25 and ask(range(40), seed=4) != whole
        same = table_answers.answers(model, tokenizer, ["x"] * 8, Journal(None, JOB, 3), range(8))
        assert len({result["answer"] for _, result in same}) > 1  # a draw of its own


def test_a_model_in_memory(base, tmp_path):
    """What is loaded, trained or attached is told apart; what is the same is not."""
    model = glmlora.AutoModel.from_pretrained(base)
    tokenizer = glmlora.AutoTokenizer.from_pretrained(base)
    copy = shutil.copytree(base, tmp_path / "copy")
    seen = [job.describe_model(model, tokenizer)]
    other = glmlora.AutoModel.from_pretrained(copy)
    assert job.describe_model(other, glmlora.AutoTokenizer.from_pretrained(copy)) == seen[0]
    config = {"task_type": glmlora.TaskType.CAUSAL_LM, "r": 2}
    tuned = glmlora.get_peft_model(model, glmlora.LoraConfig(**config), seed=1)
    seen.append(job.describe_model(tuned, tokenizer))
    moved = glmlora.get_peft_model(
        glmlora.AutoModel.from_pretrained(copy), glmlora.LoraConfig(**config), seed=1
    )
    assert job.describe_model(moved, tokenizer) == seen[1]
    name = next(n for n in model.core.names() if "lora_B" in n)
    model.core.write(name, model.core.read(name) + 1)
    seen.append(job.describe_model(tuned, tokenizer))
    with tuned.disable_adapter():
        seen.append(job.describe_model(tuned, tokenizer))
        assert seen[-1]["model"] == seen[0]["model"] != seen[-2]["model"]
        seen.pop()  # its adapter has a name, and so has the one of zeros before
    for how in ({"lora_alpha": 9}, {"r": 4}):
        fresh = glmlora.AutoModel.from_pretrained(base)
        tuned = glmlora.get_peft_model(fresh, glmlora.LoraConfig(**{**config, **how}), seed=1)
        seen.append(job.describe_model(tuned, tokenizer))
    seen.append(job.describe_model(other.half(), tokenizer))
    seen.append(job.describe_model(other.quantize(8), tokenizer))
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    keep(tmp_path / "o.journal", {0: 1}, job.describe_job(seen[0], [{"t": "a"}], "{t}", {}))
    with pytest.raises(ValueError, match=r"model differs \(weights\)"):
        found(tmp_path / "o.journal", job.describe_job(seen[2], [{"t": "a"}], "{t}", {}))


def test_a_cell_that_json_has_not(tmp_path):
    """Each of a long array's values counts, a date and NumPy's numbers do."""
    long = numpy.arange(5000.0)
    cells = [long, long + (long == 2500), numpy.int64(3), datetime.date(2026, 1, 2)]
    jobs = [job.describe_job({}, [{"t": cell}], "{t}", {}) for cell in cells]
    assert all(a != b for i, a in enumerate(jobs) for b in jobs[:i])
    assert job.describe_job({}, [{"t": 3}], "{t}", {}) == jobs[2]


def test_rows_of_any_table(tmp_path):
    pandas = pytest.importorskip("pandas")
    (tmp_path / "t.csv").write_text("n,t\n1,a\n")
    assert table_rows(tmp_path / "t.csv", "table") == [{"n": "1", "t": "a"}]
    assert table_rows((row for row in [{"n": 1}]), "table") == [{"n": 1}]
    columns = {"n": [1, 2, 3], "x": [0.5, float("nan"), 2], "t": ["a", None, pandas.NA]}
    rows = table_rows(pandas.DataFrame(columns, index=[7, 7, 8]), "table")
    assert [list(map(repr, row.values())) for row in rows] == [
        *(["1", "0.5", "'a'"], ["2", "None", "None"], ["3", "2.0", "None"])
    ]
    for data, error in (
        ({"n": [1]}, TypeError),
        ([], ValueError),
        (["a"], ValueError),
        (pandas.DataFrame([[1, 2]], columns=["a", "a"]), ValueError),
    ):
        with pytest.raises(error):
            table_rows(data, "table")


def test_a_row_that_fails_alone(base, monkeypatch):
    """Numbers that are not finite end a batch: only the row that they are of has no answer."""
    asked = []

    def rows(model, tokenizer, prompts, seeds, keep_errors):
        asked.append(len(prompts))
        assert keep_errors
        for i, prompt in enumerate(prompts):
            if i > 2 or len(prompts) == 1:
                if "bad" in prompts:
                    raise FloatingPointError("layer 3 row 1")
            yield i, prompt.upper()

    monkeypatch.setattr(table_answers, "chat_rows", rows)
    kept = Journal(None, JOB, 3)
    prompts = ["a", "b", "c", "d", "bad", *"efghijklmnopqrstuv"]
    found = dict(table_answers.answers(None, None, prompts, kept, range(len(prompts))))
    assert found.pop(4) == {"error": "layer 3 row 1"}
    assert found == {i: {"answer": p.upper()} for i, p in enumerate(prompts) if i != 4}
    assert asked == [23, *[1] * ROWS, 23 - 3 - ROWS]
    with pytest.raises(FloatingPointError):  # a model whose weights are not finite
        list(table_answers.answers(None, None, ["bad"] * 20, kept, range(20)))


# The command


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text("uuid,title\n" + "".join(f"{i},t{i}\n" for i in range(6)))
    return tmp_path


class Answers:
    """Stands for the model: answers by prompt, of which some may be what stops it."""

    def __init__(self, monkeypatch, answers):
        self.asked, self.seeds, self.answers = [], [], answers
        monkeypatch.setattr(cli, "_load", lambda *a: (None, None))
        monkeypatch.setattr("glmlora.training.methods.unwrapped", lambda model: None)
        monkeypatch.setattr(table_answers, "chat_rows", self.rows)

    def rows(self, model, tokenizer, prompts, seeds, keep_errors, **sampling):
        self.asked.append(list(prompts))
        self.seeds.append(seeds)
        for i, prompt in enumerate(prompts):
            answer = self.answers.get(prompt, "0")
            if isinstance(answer, BaseException) and not isinstance(answer, ValueError):
                raise answer
            yield i, answer


def predict(capsys, *words, model=None):
    given = ["predict", "--model", model or tiny_directory(), "--input", "in.csv", *words]
    given += [] if "--template" in words else ["--template", "{title}"]
    status = cli.main([*map(str, given), "--output", "o.csv", "--columns", "uuid"])
    return status, capsys.readouterr().err


def stopped(capsys, monkeypatch, *words, **more):
    """A run that Ctrl-C ends after three rows."""
    Answers(monkeypatch, {"t1": "1", "t3": KeyboardInterrupt()})
    status, told = predict(capsys, *words, **more)
    assert status == 130 and "3 of 6 rows are kept in o.csv.journal" in told
    assert sorted(os.listdir()) == ["in.csv", "o.csv.journal"]


def test_the_same_command_goes_on(place, capsys, monkeypatch):
    stopped(capsys, monkeypatch)
    first = json.loads(Path("o.csv.journal").read_text().splitlines()[0])
    model = Answers(monkeypatch, {})
    status, told = predict(capsys)
    assert status == 0 and "o.csv.journal: goes on after 3 of 6 rows" in told
    assert model.asked == [["t3", "t4", "t5"]]
    assert model.seeds == [[table_answers.seed_of((first["seed"], row)) for row in (3, 4, 5)]]
    assert [row[1] for row in read("o.csv")] == ["label", *"010000"]
    assert sorted(os.listdir()) == ["in.csv", "o.csv"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["--template", "x{title}"], "template differs ('{title}' there, 'x{title}' here)"),
        (["--temperature", "0.5"], "settings differs (temperature: 0.01 there, 0.5 here)"),
        (["--seed", "3"], "seed: None there, 3 here"),
        (["--dtype", "float32"], "dtype: None there, 'float32' here"),
        ("table", "table differs (content)"),
        ("rows", "table differs (rows: 6 there, 7 here, content)"),
        ("weights", "model differs (model.safetensors)"),
        ("tokenizer", "tokenizer differs (tokenizer.model)"),
        ("adapter", "adapter differs (none there, one here)"),
    ],
)
def test_a_journal_of_something_else_is_refused(place, capsys, monkeypatch, change, text):
    model = shutil.copytree(tiny_directory(), place.parent / "m", dirs_exist_ok=True)
    for file in model.iterdir():
        file.chmod(0o644)
    stopped(capsys, monkeypatch, model=model)
    before = Path("o.csv.journal").read_bytes()
    monkeypatch.setattr(cli, "_load", lambda *a: pytest.fail("the model is loaded"))
    words = change if isinstance(change, list) else []
    if change == "table":
        Path("in.csv").write_text(Path("in.csv").read_text().replace("t5", "t6"))
    elif change == "rows":
        Path("in.csv").write_text(Path("in.csv").read_text() + "6,t6\n")
    elif change == "weights":
        with open(model / "model.safetensors", "r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"x")
    elif change == "tokenizer":
        with open(model / "tokenizer.model", "ab") as file:
            file.write(b"x")
    elif change == "adapter":
        folder = place.parent / "a"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
        words = ["--adapter", folder]
    status, told = predict(capsys, *words, model=model)
    assert status == 1 and text in told and "--overwrite to begin anew" in told, told
    assert Path("o.csv.journal").read_bytes() == before
    model_ = Answers(monkeypatch, {})
    status, told = predict(capsys, *words, "--overwrite", model=model)
    assert status == 0 and "begun anew" in told and len(model_.asked[0]) == len(read("o.csv")) - 1


def test_the_form_of_the_output_may_change(place, capsys, monkeypatch):
    stopped(capsys, monkeypatch)
    model = Answers(monkeypatch, {})
    words = ["--add", "k=v", "--answer-column", "a", "--choices", "0,1", "--fallback", "1"]
    assert predict(capsys, *words)[0] == 0
    assert model.asked == [["t3", "t4", "t5"]]
    assert read("o.csv")[:2] == [["uuid", "k", "a"], ["0", "v", "0"]]


def test_odd_answers_have_a_column_of_their_own(place, capsys, monkeypatch):
    Answers(monkeypatch, {"t2": "2", "t4": "x"})
    status, told = predict(capsys, "--choices", "0,1")
    assert status == 1
    assert "2 of 6 answers are none of ['0', '1'], they stand in the column 'label_raw'" in told
    assert "row 2: '2'; row 4: 'x'" in told
    assert "o.csv: 2 rows are without an answer" in told and "from o.csv.journal" in told
    assert read("o.csv")[0] == ["uuid", "label", "label_raw"]
    assert read("o.csv")[2:4] == [["1", "0", "0"], ["2", "", "2"]]
    Answers(monkeypatch, {})
    monkeypatch.setattr(cli, "_load", lambda *a: pytest.fail("the model is loaded"))
    assert predict(capsys, "--choices", "0,1")[0] == 1  # the same again, from the journal
    status, told = predict(capsys, "--choices", "0,1", "--fallback", "1")
    assert status == 1 and "o.csv exists: pass --overwrite" in told
    status, told = predict(capsys, "--choices", "0,1", "--fallback", "1", "--overwrite")
    assert status == 0 and "'1' stands for them" in told
    assert read("o.csv")[:4] == [["uuid", "label"], ["0", "0"], ["1", "0"], ["2", "1"]]
    assert sorted(os.listdir()) == ["in.csv", "o.csv"]


@pytest.mark.parametrize(
    ("words", "odd", "text"),
    [
        (["--pattern", "[a-z]+(, [a-z]+)*"], "1248", "no match of '[a-z]+(, [a-z]+)*'"),
        (["--pattern", "(?i).*B.*"], "2345678", "no match of '(?i).*B.*'"),
        (["--between", "-3, 10"], "0134678", "no whole number from -3 to 10"),
    ],
)
def test_answers_that_do_not_count(place, capsys, monkeypatch, words, odd, text):
    lines = "".join(f"{i},t{i}\n" for i in range(9))
    Path("in.csv").write_text("uuid,title\n" + lines)
    given = ["a, b", "A, b", "10", "no", "10 of", "-3", "x", "one\ntwo", "11"]
    if "--pattern" in words and odd == "1248":
        given[5], given[7] = "c", "d, e"
    Answers(monkeypatch, {f"t{i}": answer for i, answer in enumerate(given)})
    status, told = predict(capsys, *words)
    assert status == 1 and f"{len(odd)} of 9 answers are {text}, they stand in" in told
    wanted = ["" if str(i) in odd else answer for i, answer in enumerate(given)]
    assert read("o.csv")[1:] == [[str(i), wanted[i], given[i]] for i in range(9)]


def test_bad_rows_stay_in_the_table(place, capsys, monkeypatch):
    Answers(monkeypatch, {"t1": ValueError("too long"), "t2": "1"})
    status, told = predict(capsys)
    assert status == 1 and "1 of 6 rows have no answer: row 1: too long" in told
    assert [row[1] for row in read("o.csv")] == ["label", "0", "", *"1000"]
    status, told = predict(capsys, "--fallback", "9", "--overwrite")
    assert status == 0 and "'9' stands for them" in told and read("o.csv")[2] == ["1", "9"]


def test_an_answer_with_line_ends_is_one_cell(place, capsys, monkeypatch):
    Answers(monkeypatch, {"t1": "a\rb", "t2": "a\nb", "t3": 'a\r\nb,"c'})
    assert predict(capsys)[0] == 0
    assert [row[1] for row in read("o.csv")][2:5] == ["a\rb", "a\nb", 'a\r\nb,"c']
    assert Path("o.csv").read_bytes().startswith(b"uuid,label\n0,0\n")


def test_no_row_has_an_answer(place, capsys, monkeypatch):
    Answers(monkeypatch, {f"t{i}": ValueError(f"too long {i}") for i in range(6)})
    status, told = predict(capsys)
    assert status == 1 and "ValueError: no row has an answer: too long 0" in told
    assert told.count("row") == 1 + table_answers.TOLD
    assert os.listdir() == ["in.csv"]


def test_a_prompt_that_is_too_long(base, place, capsys):
    Path("in.csv").write_text(f"uuid,title\n0,a\n1,{'a b ' * 200}\n2,c\n")
    status, told = predict(capsys, "--temperature", "0", model=base)
    assert status == 1 and re.search(r"row 1: prompt of \d+ tokens: the model has positions", told)
    found = [row[1] for row in read("o.csv")]
    assert found[2] == "" and found[1] and found[3]


def test_killed_between_the_output_and_the_journals_end(place, capsys, monkeypatch):
    Answers(monkeypatch, {"t1": "1"})
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda self: None)
        assert predict(capsys)[0] == 0
    assert sorted(os.listdir()) == ["in.csv", "o.csv", "o.csv.journal"]
    before = Path("o.csv").read_bytes()
    assert predict(capsys)[0] == 0
    assert Path("o.csv").read_bytes() == before and not Path("o.csv.journal").exists()


def test_an_output_that_is_there(place, capsys, monkeypatch):
    """It is refused before rows are computed, and with --overwrite a stopped job still goes on."""
    stopped(capsys, monkeypatch)
    Path("o.csv").write_text("mine")
    model = Answers(monkeypatch, {})
    status, told = predict(capsys)
    assert status == 1 and "o.csv exists: pass --overwrite" in told and not model.asked
    assert predict(capsys, "--overwrite")[0] == 0 and model.asked == [["t3", "t4", "t5"]]


def test_an_output_without_room_is_known_first(place, capsys, monkeypatch):
    asked = []

    def full(file, start, size):
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    Path("in.csv").write_text("uuid,title\n" + f"{'1' * 999},t\n" * 70)
    monkeypatch.setattr(output.os, "posix_fallocate", full)
    model = Answers(monkeypatch, {})
    status, told = predict(capsys)
    assert status == 1 and "--output: cannot be written: No space left" in told
    assert asked == [70 * (1000 + 128)] and not model.asked
    assert os.listdir() == ["in.csv"]


def test_half_a_character_is_known_first(place, capsys, monkeypatch):
    Path("in.json").write_text('[{"uuid": "a", "title": "b"}, {"uuid": "\\ud800", "title": "c"}]')
    model = Answers(monkeypatch, {})
    status, told = predict(capsys, "--input", "in.json")
    assert status == 1 and "row 1 has half a character in column 'uuid'" in told and not model.asked


def test_a_column_with_the_odd_answers_name(place, capsys, monkeypatch):
    model = Answers(monkeypatch, {})
    status, told = predict(capsys, "--add", "label_raw=1", "--choices", "0,1")
    assert status == 1 and "'label_raw' is a column that tells of the answers" in told
    assert not model.asked
    assert predict(capsys, "--add", "label_raw=1", "--choices", "0", "--fallback", "0")[0] == 0


def killed(*words):
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_and_run_again():
    assert "5 kills of 200 rows, 5 with rows kept: all equal" in killed()


def test_killed_while_labels_are_weighed():
    """The bits of each probability do not depend on the rows that are left."""
    assert "3 kills of 200 rows, 3 with" in killed("--labels", "--kills", "3")


@pytest.mark.deep
def test_killed_at_many_moments():
    assert "50 kills of 3000 rows" in killed("--rows", "3000", "--kills", "50", "--fresh")


# From Python


@pytest.fixture(scope="module")
def loaded(base):
    model = glmlora.AutoModel.from_pretrained(base)
    return model, glmlora.AutoTokenizer.from_pretrained(base)


@pytest.fixture
def titles(place):
    return [{"uuid": i, "title": f"t{i}"} for i in range(6)]


def test_a_table_from_python(loaded, titles, monkeypatch):
    model, tokenizer = loaded
    asked = Answers(monkeypatch, {"t1": "1", "t4": "odd", "t5": ValueError("too long")})
    got = model.predict_table(tokenizer, titles, "{title}", choices=[0, 1], answer_column="a")
    assert [row["a"] for row in got] == ["0", "1", "0", "0", "", ""]
    assert [row["a_raw"] for row in got] == ["0", "1", "0", "0", "odd", ""]
    assert got[3] == {**titles[3], "a": "0", "a_raw": "0"} and len(asked.asked) == 1
    got = model.predict_table(tokenizer, titles, "{title}", choices=[0, 1], fallback="1")
    assert [row["label"] for row in got] == list("010011") and "label_raw" not in got[0]
    assert os.listdir() == ["in.csv"]


def test_a_frame_of_labels_with_probabilities(loaded, titles):
    pandas = pytest.importorskip("pandas")
    model, tokenizer = loaded
    frame = pandas.DataFrame(titles, index=list("abcdef"))
    got = model.predict_table(tokenizer, frame, "Is it? {title}", labels=[0, 1], proba=True)
    want = model.classify(tokenizer, frame, [0, 1], template="Is it? {title}")
    assert list(got.columns) == ["uuid", "title", "label", "proba_0", "proba_1"]
    assert list(got.index) == list("abcdef") and list(got["label"]) == want.label
    assert abs(got[["proba_0", "proba_1"]].to_numpy() - want.proba).max() <= 1e-6
    assert list(frame.columns) == ["uuid", "title"]


def test_a_table_from_python_goes_on(loaded, titles, monkeypatch):
    model, tokenizer = loaded
    Answers(monkeypatch, {"t3": KeyboardInterrupt()})
    call = [tokenizer, titles, "{title}"]
    with pytest.raises(KeyboardInterrupt):
        model.predict_table(*call, output="o.csv")
    assert sorted(os.listdir()) == ["in.csv", "o.csv.journal"]
    with pytest.raises(ValueError, match="settings differs"):
        model.predict_table(*call, output="o.csv", temperature=0.5)
    asked = Answers(monkeypatch, {})
    got = model.predict_table(*call, output="o.csv")
    assert asked.asked == [["t3", "t4", "t5"]] and [row["label"] for row in got] == ["0"] * 6
    assert [row[-1] for row in read("o.csv")] == ["label", *"000000"]
    assert sorted(os.listdir()) == ["in.csv", "o.csv"]
    with pytest.raises(FileExistsError, match=r"o\.csv exists"):
        model.predict_table(*call, output="o.csv")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"template": "{titel}"}, "template: 'titel' is no column of the table"),
        ({"proba": True}, "proba: has no effect without labels"),
        ({"labels": [0], "temperature": 1}, "temperature: has no effect with labels"),
        ({"labels": [0], "choices": [0]}, "choices: has no effect with labels"),
        ({"labels": ["a", "a"]}, "labels: 'a' is there twice"),
        ({"labels": [0], "between": [0, 1]}, "between: has no effect with labels"),
        ({"choices": []}, "choices: expected at least one answer"),
        ({"choices": [0], "pattern": "0"}, "pattern: expected one of choices or pattern, got both"),
        ({"pattern": "(0"}, r"pattern: '\(0' is no regular expression: missing \)"),
        ({"pattern": 0}, "pattern: 0 is no regular expression"),
        ({"between": [3, 1]}, r"between: expected the smallest and the largest .*got \[3, 1\]"),
        ({"between": [0, 1.5]}, "between: expected the smallest"),
        ({"between": [0, 1, 2]}, "between: expected the smallest"),
        ({"between": "ab"}, "between: expected the smallest"),
        ({"table": []}, "table: the table has no rows"),
        ({"answer_column": " "}, "answer_column: expected a name"),
    ],
)
def test_what_a_table_from_python_refuses(loaded, titles, given, message):
    model, tokenizer = loaded
    with pytest.raises(TypeError, match="predict_table: unknown argument 'choice'.*'choices'"):
        model.predict_table(tokenizer, titles, "{title}", choice=[0])
    with pytest.raises(ValueError, match=message):
        model.predict_table(tokenizer, **{"table": titles, "template": "{title}", **given})
