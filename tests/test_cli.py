"""The command line: flags that are refused or told, chat in a terminal, predict's checks and the
columns that it writes (what it keeps when it is stopped: test_journal.py)."""

import csv
import inspect
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
import tiny

from glmlora import cli
from glmlora.files.checkpoint import write_safetensors
from glmlora.files.rows import table_rows
from glmlora.tables import answers as table_answers
from glmlora.tables import output
from glmlora.templates import fill_template
from glmlora.tools.project import tiny_directory

TINY = str(tiny_directory())


def scripted(directory, answer, first="答：", family="chatglm2"):
    """A model that answers with the pieces `answer`, whatever the question: its next token depends
    on the last one alone, and `first` is the piece that every prompt ends with.
    """
    import sentencepiece

    tiny.tiny_tokenizer_dir(directory)
    pieces = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    size, hidden = 640, 64
    config = {
        **tiny.TINY_CONFIG,
        "_name_or_path": f"THUDM/{family}-6b",
        "padded_vocab_size": size,
        "seq_length": 256,
        "hidden_size": hidden,
    }
    weights = tiny.tiny_weights(config)
    for name, values in weights.items():
        if "dense" in name:
            values[:] = 0
        elif "layernorm" in name:
            values[:] = 1
    embedding = weights["transformer.embedding.word_embeddings.weight"]
    output = weights["transformer.output_layer.weight"]
    embedding[:], output[:] = 0, 0
    embedding[:, hidden - 1] = 1
    start = pieces.piece_size() + 7 if first is None else pieces.encode(first)[-1]
    chain = [start, *(pieces.piece_to_id(piece) for piece in answer), 2]
    assert len(set(chain)) == len(chain)
    for i, (here, following) in enumerate(zip(chain, chain[1:], strict=False)):
        embedding[here] = 0
        embedding[here, i] = 1
        output[following, i] = 100
    output[2, hidden - 1] = 100
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", weights)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": config["_name_or_path"]})
    )
    return str(directory)


def glmlora(*words, stdin=b"", **environment):
    return subprocess.run(
        [sys.executable, "-m", "glmlora", *map(str, words)],
        input=stdin,
        capture_output=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore", **environment},
        timeout=60,
    )


def run(capsys, *words):
    """(status, standard error) of a command in this process."""
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


# Flags


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["chat", "--adaptor", "x", "--model", TINY], 2, "--adaptor (did you mean '--adapter'?)"),
        (["chat", "--modle", TINY], 2, "--modle (did you mean '--model'?)"),
        (["chat", "--temp", "1", "--model", TINY], 2, "unknown flag --temp "),
        (["chat", "--model_name_or_path", TINY], 2, "(did you mean '--model'?)"),
        (["chat", "--checkpoint-dir", "x", "--model", TINY], 2, "(did you mean '--adapter'?)"),
        (["chat", "--template", "x", "--model", TINY], 2, "the form of the model's family"),
        (["predcit"], 2, "invalid choice: 'predcit' (did you mean 'predict'?)"),
        (["chat", "--model", TINY, "--temperature", "-1"], 1, "temperature: expected 0"),
        (["chat", "--model", TINY, "--top_p", "2"], 1, "top_p: expected 0 to 1"),
        (["chat", "--model", TINY, "--top-k", "1.5"], 2, "--top-k"),
        (["chat", "--model", "nowhere"], 1, "nowhere"),
        (["merge", "--model", TINY, "--adapter", "ou", "--output", "o"], 1, "--adapter: 'ou'"),
        (["merge", "--model", TINY, "--adapter", ".", "--output", "o"], 1, "P-Tuning prefix"),
    ],
)
def test_wrong_words_are_named(words, status, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, error = run(capsys, *words)
    assert found == status and text in error and "Traceback" not in error


def test_the_model_is_checked_before_the_data(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["--output_dir", "o", "--do_train", "--dataset", "none", "--dataset_dir", "none"]
    for model, more, message in (
        ("nowhere", [], "nowhere"),
        (TINY, ["--checkpoint_dir", "a"], "checkpoint_dir: 'a': looked for a directory"),
        (TINY, ["--tokenizer_name", "t"], "'t'"),
        (TINY, [], "dataset_dir: none/dataset_info.json: looked for"),
    ):
        status, error = run(capsys, "train", "--model_name_or_path", model, *given, *more)
        assert status == 1 and message in error


def test_a_near_adapter_is_named(capsys, tmp_path):
    (tmp_path / "output").mkdir()
    _, error = run(capsys, "chat", "--model", TINY, "--adapter", tmp_path / "ouptut")
    assert "did you mean 'output'?" in error


def test_no_flag_is_parsed_and_forgotten():
    """Each flag of each verb is read somewhere outside the parsers (and train's: see
    test_arguments.py).
    """
    source = inspect.getsource(cli)
    for maker in (cli._parser, cli._sampling_flags, cli._predict_flags, cli._plan_flags):
        source = source.replace(inspect.getsource(maker), "")
    for verb, parser in cli._parser()[1].items():
        for action in parser._actions:
            name = action.dest
            used = f"args.{name}" in source or f'"{name}"' in source
            assert used or name == "help", (verb, name)
            assert not action.option_strings[1:] or name == "help" or "_" in name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "lora", "--pre-seq-len", "4"], "pre_seq_len has no effect"),
        (["--method", "full", "--lora_rank", "4"], "lora_rank has no effect: method is 'full'"),
        (["--method", "chat", "--labels", "4"], "labels has no effect"),
        (["--method", "freeze", "--num_layer_trainable", "1"], ""),
        (["--method", "lroa"], "method: expected one of"),
        (["--memory", "16GB"], "memory: what a GPU has"),
    ],
)
def test_flags_of_plan(words, told, capsys):
    status, error = run(capsys, "plan", "--model", TINY, "--seq", "64", *words)
    assert told in error and bool(error) == bool(told)
    assert status == int("expected" in told or "GPU" in told)


def test_a_flag_given_twice_is_told(capsys, tmp_path):
    words = ["--model", "a", "--top-p", ".5", "--top_p=.6", "--model", "b"]
    _, error = run(capsys, "chat", *words)
    assert "--top_p is given twice: .6 is used, not .5" in error
    assert "--model is given twice: b is used, not a" in error and "'b'" in error


def test_what_follows_a_script_is_its_own(capsys, tmp_path):
    (tmp_path / "s.py").write_text("import sys; print(sys.argv[1:], file=sys.stderr)")
    status, error = run(capsys, "run", tmp_path / "s.py", "--modle", "x", "--modle", "y")
    assert status == 0 and "['--modle', 'x', '--modle', 'y']" in error and "twice" not in error


# Chat


def test_a_bad_turn_does_not_end_the_conversation(tmp_path):
    model = scripted(tmp_path / "m", "ab")
    lines = [b"x y " * 300, "你好".encode("gbk"), b"hi"]
    for environment in ({"LANG": "C.UTF-8"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}):
        result = glmlora("chat", "--model", model, stdin=b"\n".join(lines), **environment)
        said, told = result.stdout.decode().split(), result.stderr.decode()
        assert said == ["ab"], (said, told)
        assert "positions for 256" in told and "is not UTF-8 text" in told
        assert result.returncode == 1 and "Traceback" not in told


def test_all_verbs_run_without_a_locale(tmp_path):
    """ASCII in and out: UTF-8 is read, and what cannot be shown is shown by number."""
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    words = ["chat", "--model", TINY, "--temperature", "0"]
    result = glmlora(*words, stdin="你好\n".encode(), **ascii_only)
    assert result.stdout.startswith(b"\\u4f60\\u597d") and result.returncode == 0, result.stderr
    (tmp_path / "r.json").write_text('[{"instruction": "你好", "output": "一"}]', encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"r": {"file_name": "r.json"}}')
    words = ["--model_name_or_path", TINY, "--do_train", "--dataset", "r", "--max_steps", "1"]
    words += ["--dataset_dir", tmp_path, "--output_dir", tmp_path / "o"]
    result = glmlora("train", *words, **ascii_only)
    assert result.returncode == 0 and b"\\u4f60\\u597d" in result.stdout, result.stderr


def test_a_warning_is_one_line(table):
    table.write_bytes("title,abstract\n标题,摘要\na,b\n".encode("gb18030"))
    words = ["predict", "--model", TINY, "--input", table, "--output", table.parent / "o.csv"]
    result = glmlora(*words, PYTHONWARNINGS="default")
    told = [line for line in result.stderr.decode().splitlines() if "GB18030" in line]
    assert result.returncode == 0
    assert len(told) == 1 and told[0].startswith(f"glmlora: UserWarning: {table}: not UTF-8")
    assert read(table.parent / "o.csv")[1][:2] == ["标题", "摘要"]


def test_an_answer_that_the_terminal_cannot_show():
    words = ["chat", "--model", TINY, "--temperature", "0"]
    result = glmlora(*words, stdin="你好\n".encode(), PYTHONIOENCODING="utf-8:strict")
    assert "你好！我是" in result.stdout.decode()
    environment = {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    result = glmlora(*words, stdin="Who are you?\n你好\n".encode(), **environment)
    assert result.returncode == 0 and b"output is in" in result.stderr, result.stderr


def test_what_stops_an_answer_does_not_end_the_conversation(capsys, monkeypatch):
    """Ctrl-C, and an error of any kind: the turn is gone, the history before it stays."""
    stops = [None, KeyboardInterrupt(), KeyError("a fault"), MemoryError("1 GB"), None]
    asked = []

    class Model:
        def stream_chat(self, tokenizer, query, history):
            asked.append((query, list(history)))
            yield "half", [*history, (query, "half")]
            stop = stops[len(asked) - 1]
            if stop is not None:
                raise stop
            yield "halfway", [*history, (query, "halfway")]

    monkeypatch.setattr(cli, "_load", lambda *a: (Model(), None))
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\nc\nd\ne\n"))
    assert cli.main(["chat", "--model", TINY]) == 1
    assert [query for query, _ in asked] == list("abcde")
    assert [history for _, history in asked] == [[], *[[("a", "halfway")]] * 4]
    out, error = capsys.readouterr()
    assert out.splitlines() == ["halfway", "half [interrupted]", "half", "half", "halfway"]
    assert "Traceback" in error and "glmlora: MemoryError: 1 GB" in error


def test_a_tools_call_is_json(tmp_path):
    model = scripted(tmp_path / "m", ["a", "<0x0A>", "b"], first=None, family="chatglm3")
    result = glmlora("chat", "--model", model, "--temperature", "0", stdin=b"q\n")
    answer = result.stdout.decode().strip().splitlines()
    assert answer[-1] == '{"name": "a", "content": "b"}', (answer, result.stderr)


class Terminal:
    """`glmlora chat` in a pseudo-terminal."""

    def __init__(self, *words):
        self.end, child = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "glmlora", "chat", *words],
            stdin=child,
            stdout=child,
            stderr=child,
            env=os.environ | {"TERM": "xterm", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(child)
        self.seen = ""

    def until(self, text, key=""):
        """What is shown up to `text`, text included; `key` is typed again while nothing comes."""
        limit = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < limit, f"{text!r} does not come: {self.seen!r}"
            if select.select([self.end], [], [], 1)[0]:
                self.seen += os.read(self.end, 4096).decode("utf-8", "replace")
            else:
                self.type(key)
        before, text, self.seen = self.seen.partition(text)
        return before + text

    def type(self, text):
        os.write(self.end, text.encode())


def test_chat_in_a_terminal(tmp_path):
    """Arrow keys, backspace over a character of three bytes, Ctrl-C at the prompt, Ctrl-D."""
    pytest.importorskip("readline")
    terminal = Terminal("--model", scripted(tmp_path / "m", "ab"))
    try:
        terminal.until("> ")
        terminal.type("xz\x1b[Dy\r")
        assert "^[" not in terminal.until("ab\r\n")
        terminal.until("> ")
        terminal.type("好\x7f\x7fc\r")
        terminal.until("ab\r\n")
        terminal.until("> ")
        terminal.type("half a question")
        terminal.until("question")
        time.sleep(0.3)  # Python's readline hears a signal only while it waits for a key
        terminal.type("\x03")
        # Python's readline does not see a signal that comes just before it waits for a key.
        terminal.until("> ", key="\x03")
        terminal.type("\x1b[A\r")  # the question before
        terminal.until("ab\r\n")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.end)


# Predict


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text("uuid,title,abstract\n7,a,b\n8,c,d\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--output", "none/o.csv"], "--output: there is no folder"),
        (["--output", "o.jsonl"], "--output: csv is written"),
        (["--output", "."], "--output: . is a directory"),
        (["--output", "in.csv", "--overwrite"], "--output: in.csv is the input"),
        (["--add", "nonsense"], "--add: expected COLUMN=TEXT, got 'nonsense'"),
        (["--add", "k=1", "--add", "k=2"], "--add: 'k' is given twice"),
        (["--add", "label=1"], "--add: 'label' is the column of the answers"),
        (["--columns", "uuid,tilte"], "'tilte' is no column of the table (did you mean 'title'?)"),
        (["--columns", "uuid,uuid"], "--columns: 'uuid' is named twice"),
        (["--columns", "uuid,,"], "--columns: '' is no column"),
        (["--template", "{tilte}"], "'tilte' is no column of in.csv (did you mean 'title'?)"),
        (["--template", "{title"], "template: expected '}'"),
        (["--template", "{}"], "template: expected the name of a column between braces"),
        (["--template", "{title.x}"], "template: expected the name of a column"),
        (["--choices", "0,,1"], "--choices[1]: expected an answer"),
        (["--answer-column", " "], "--answer-column: expected a name"),
        (["--input", "none.csv"], "--input: 'none.csv': looked for a table"),
        (["--input", "inn.csv"], "found none (did you mean 'in.csv'?)"),
        (["--model", "nowhere", "--input", "none.csv"], "nowhere"),
        (["--device", "gpu", "--input", "none.csv"], "device: expected 'cpu'"),
        (["--adapter", "nowhere", "--input", "none.csv"], "--adapter: 'nowhere'"),
    ],
)
def test_predict_checks_first(words, text, table, capsys, monkeypatch):
    monkeypatch.chdir(table.parent)
    monkeypatch.setattr(cli, "_load", lambda *a: pytest.fail("the model is loaded"))
    given = ["--model", TINY, "--input", "in.csv", "--output", "o.csv", *words]
    status, error = run(capsys, "predict", *given)
    assert status == 1 and text in error
    assert os.listdir(table.parent) == ["in.csv"]


def test_a_template_without_columns_is_told_once(table):
    with pytest.warns(UserWarning, match="names no {column}") as told:
        rows = table_rows(table, "--input")
        output.check_question("which?", rows, str(table))
        assert fill_template("which?", rows) == ["which?"] * len(rows)
    assert len(told) == 1


class Answers:
    """Stands for the model's answers."""

    def __init__(self, monkeypatch, *answers):
        monkeypatch.setattr(cli, "_load", lambda *a: (None, None))
        monkeypatch.setattr(table_answers, "chat_rows", self.rows)
        monkeypatch.setattr("glmlora.training.methods.unwrapped", lambda model: None)
        self.answers = answers

    def rows(self, model, tokenizer, prompts, **sampling):
        return reversed(list(enumerate(self.answers)))


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def predict(capsys, table, *words):
    given = ["--model", TINY, "--input", table, "--output", table.parent / "o.csv", *words]
    return run(capsys, "predict", *given)


@pytest.mark.parametrize(
    ("words", "header", "row"),
    [
        ([], "uuid,title,abstract,label", "7,a,b,x"),
        (["--columns", "uuid, K", "--add", "K=tmp"], "uuid,K,label", "7,tmp,x"),
        (["--add", "K=a=b"], "uuid,title,abstract,K,label", "7,a,b,a=b,x"),
        (["--columns", "uuid", "--add", "K=tmp"], "uuid,K,label", "7,tmp,x"),
        (["--columns", "uuid", "--answer_column", "title"], "uuid,title", "7,x"),
    ],
)
def test_columns_of_the_output(words, header, row, table, capsys, monkeypatch):
    Answers(monkeypatch, " x\n", "y")
    assert predict(capsys, table, *words)[0] == 0
    found = read(table.parent / "o.csv")
    assert [",".join(cells) for cells in found[:2]] == [header, row]
    assert sorted(os.listdir(table.parent)) == ["in.csv", "o.csv"]


def test_columns_that_only_later_rows_have(tmp_path, capsys, monkeypatch):
    path = tmp_path / "in.jsonl"
    path.write_text('{"title": "a", "abstract": "b"}\n{"title": "a", "abstract": "b", "n": [1]}\n')
    Answers(monkeypatch, "x", "y")
    assert predict(capsys, path)[0] == 0
    assert read(tmp_path / "o.csv")[0] == ["title", "abstract", "n", "label"]
    assert read(tmp_path / "o.csv")[2] == ["a", "b", "[1]", "y"]


def test_answers_of_every_kind(table, capsys, monkeypatch):
    """A tool's call is text as the model wrote it, or the row is odd."""
    Answers(monkeypatch, {"name": "a", "content": "b"}, {"name": "f", "parameters": {"n": "好"}})
    assert predict(capsys, table)[0] == 0
    answers = [row[-1] for row in read(table.parent / "o.csv")]
    assert answers == ["label", "a\nb", '{"name": "f", "parameters": {"n": "好"}}']
    status, error = predict(capsys, table, "--overwrite", "--choices", "a,b")
    assert status == 1 and "2 of 2 answers are none of" in error
    status, error = predict(capsys, table, "--overwrite", "--choices", "a", "--fallback", "-")
    assert status == 0 and [row[-1] for row in read(table.parent / "o.csv")][1:] == ["-", "-"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_a_library_computes_does_not_hold_the_end_up(number, status):
    """Python would wait for the thread that the interrupted encoding is in."""
    code = (
        "import os, sys, threading, time\n"
        "from glmlora import cli, interrupts\n"
        "def busy():\n"
        f"    threading.Timer(0.05, os.kill, (os.getpid(), {int(number)})).start()\n"
        "    time.sleep(30)\n"
        "def doctor(args):\n"
        "    with interrupts.ending_signals():\n"
        "        interrupts.interruptible(busy)\n"
        "cli.doctor = doctor\n"
        "sys.argv = ['glmlora', 'doctor']\n"
        "print('begins')\n"
        "sys.exit(cli.main())\n"
    )
    found = subprocess.run(  # a longer time than this is the failure
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20
    )
    assert (found.returncode, found.stdout) == (status, "begins\n"), found.stderr
