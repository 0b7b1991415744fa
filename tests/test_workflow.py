"""The workflow end to end on glm-tiny: the document's notebook untouched, ours, the command
line."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glmlora.tools import project

ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    "PYTHONWARNINGS": "ignore",
    "MPLBACKEND": "Agg",
}


def read(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.reader(f))


def shorten(path, rows, words=8):
    """Fewer rows, abstracts of a few words: the same workflow in seconds."""
    table = read(path)
    if "abstract" in table[0]:
        at = table[0].index("abstract")
        for row in table[1:]:
            row[at] = " ".join(row[at].split()[:words])
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows(table[: rows + 1])


@pytest.fixture
def folder(tmp_path):
    home = project.init(tmp_path / "xfg")
    shorten(home / "csv_data/train.csv", 64)
    return home


def glmlora(*words, cwd=None, stdin=None, status=0):
    result = subprocess.run(
        [sys.executable, "-m", "glmlora", *map(str, words)],
        cwd=cwd,
        env=ENV,
        input=stdin,
        capture_output=True,
        text=True,
    )
    assert result.returncode == status, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def check_submission(path, rows):
    table = read(path)
    assert table[0] == ["uuid", "Keywords", "label"]
    assert len(table) == rows + 1
    assert {row[1] for row in table[1:]} == {"tmp"} and {row[2] for row in table[1:]} <= {"0", "1"}
    assert path.read_bytes().endswith(b"\n") and b"\r" not in path.read_bytes()


OUTPUT = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "all_results.json",
    "finetuning_args.json",
    "train_results.json",
    "trainer_log.jsonl",
    "trainer_state.json",
    "training_args.bin",
]


def run_the_documents_notebook(model, tmp_path, shared):
    """It as the document has it, over another model and a few papers, to its submission."""
    (tmp_path / "chatglm2-6b").symlink_to(model, target_is_directory=True)
    home = project.init(tmp_path / "xfg", model=model)
    shorten(home / "csv_data/train.csv", 16)
    shorten(home / "csv_data/testB.csv", 2000, words=2)
    glmlora("run", shared / "seed/xfg.ipynb", cwd=home)
    check_submission(home / "submit.csv", 2000)


def test_the_documents_notebook_untouched(folder, shared):
    """`glmlora run` on the notebook as the document has it; its last cell wants 2,000 rows."""
    shorten(folder / "csv_data/testB.csv", 2000, words=2)
    result = glmlora("run", shared / "seed/xfg.ipynb", cwd=folder)
    check_submission(folder / "submit.csv", 2000)
    records = json.loads((folder / "data/paper_label.json").read_text(encoding="utf-8"))
    assert len(records) == 64 and set(records[0]) == {"instruction", "input", "output"}
    files = set(os.listdir(folder / "output/label_xfg"))
    assert set(OUTPUT) <= files, sorted(files)
    out = result.stdout
    places = [
        out.index(w) for w in ("trainable params: ", "input_ids", "***** train metrics *****")
    ]
    assert places == sorted(places)
    assert "glm-tiny" in out  # the answer to the greeting, as the cell shows it


def execute(cells, cwd, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    for name in ("PYTHONPATH", "MPLBACKEND"):
        monkeypatch.setenv(name, ENV[name])
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + ENV["PATH"])
    monkeypatch.setenv("JUPYTER_ALLOW_INSECURE_WRITES", "1")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(cwd)}}).execute()
    return book


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


def test_the_documents_cells_in_jupyter(folder, shared, monkeypatch):
    """One line comes first, and training in a shell cell after the second."""
    shorten(folder / "csv_data/testB.csv", 2000, words=2)
    cells = code_cells(shared / "seed/xfg.ipynb")
    execute(["%load_ext glmlora", *cells[:2], "!sh xfg_train.sh", *cells[2:]], folder, monkeypatch)
    check_submission(folder / "submit.csv", 2000)


def outputs(book):
    """What the cells show: the text of all, and kind -> number of outputs."""
    found = [output for cell in book.cells for output in cell.get("outputs", [])]
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in found]
    kinds = [kind for output in found for kind in output.get("data", {})]
    kinds += [output.name for output in found if output.output_type == "stream"]
    return "".join(texts), {kind: kinds.count(kind) for kind in kinds}


def test_our_notebook(folder, monkeypatch):
    for name in ("testB", "testB_labels", "sample_submit"):
        shorten(folder / f"csv_data/{name}.csv", 40)
    assert (folder / "xfg.ipynb").read_bytes() == (ROOT / "notebooks/xfg.ipynb").read_bytes()
    monkeypatch.setitem(ENV, "MPLBACKEND", "module://matplotlib_inline.backend_inline")
    book = execute(code_cells(folder / "xfg.ipynb"), folder, monkeypatch)
    check_submission(folder / "submit.csv", 40)
    assert {"adapter_model.safetensors", "task.json"} <= set(
        os.listdir(folder / "output/label_xfg")
    )
    shown, kinds = outputs(book)
    story = ["papers to learn", "epoch 0.5", "weight of the model", "in the order", "of 40 papers"]
    places = [shown.index(words) for words in story]
    assert places == sorted(places), shown
    assert kinds["image/png"] == 2 and kinds["text/html"] == 4, kinds  # report, scores, vote, head
    assert "grad_norm" not in shown and "Warning" not in shown
    with_counts = importlib.util.find_spec("sklearn") is not None
    assert ("word counts " in shown) == with_counts != ("the model alone" in shown)


def test_init_refuses_and_leaves_nothing(tmp_path):
    home = tmp_path / "p"
    glmlora("init", home)
    assert "is not empty" in glmlora("init", home, status=1).stderr
    (tmp_path / "q").mkdir()
    (tmp_path / "q/mine.txt").write_text("mine")
    assert "mine.txt" in glmlora("init", tmp_path / "q", status=1).stderr
    other = tmp_path / "elsewhere"
    result = glmlora("init", other / "r", "--model", tmp_path / "none", status=1)
    assert "no config.json" in result.stderr and not (other / "r").exists()
    assert sorted(os.listdir(other)) == []
    glmlora("init", other / "r", "--model", tmp_path / "chatglm2-6b")
    assert (other / "chatglm2-6b").is_symlink()


def test_chat_streams_and_remembers(tmp_path):
    tiny = project.tiny_directory()
    words = ["你好", "clear", "Hello", "stop"]
    result = glmlora("chat", "--model", tiny, "--temperature", 0, stdin="\n".join(words))
    assert result.stdout.splitlines() == [
        "你好！我是 glm-tiny，一个很小的语言模型。",
        "Hello! I am glm-tiny, a very small language model.",
    ]


def test_predict(tmp_path):
    tiny = project.tiny_directory()
    table = tmp_path / "t.csv"
    table.write_text(
        "uuid,title,abstract\n7,Heart failure,Survival of patients after infarction.\n"
        "8,Routing,We train an algorithm on a network of computers.\n"
    )
    out = tmp_path / "o.csv"
    words = ["predict", "--model", tiny, "--input", table, "--output", out, "--choices", "0,1"]
    glmlora(*words, "--columns", "uuid,Keywords", "--add", "Keywords=tmp")
    assert [row[:2] for row in read(out)] == [["uuid", "Keywords"], ["7", "tmp"], ["8", "tmp"]]
    assert {row[2] for row in read(out)[1:]} <= {"0", "1"}
    assert "pass --overwrite" in glmlora(*words, status=1).stderr
    words[-1] = "yes,no"
    result = glmlora(*words, "--overwrite", status=1)
    assert "2 of 2 answers are none of" in result.stderr and len(read(out)) == 3
    glmlora(*words, "--overwrite", "--fallback", "no")
    assert read(out)[1][-1] == "no"
    missing = glmlora(*words, "--overwrite", "--template", "{summary}", status=1)
    assert "summary" in missing.stderr and "title" in missing.stderr


def test_train_and_merge_from_the_command_line(folder, tmp_path):
    glmlora("run", write_records(folder), cwd=folder)
    base, adapter = folder.parent / "chatglm2-6b", folder / "output/label_xfg"
    merged = tmp_path / "merged"
    glmlora("merge", "--model", base, "--adapter", adapter, "--output", merged)
    assert (
        "not empty"
        in glmlora(
            "merge", "--model", base, "--adapter", adapter, "--output", merged, status=1
        ).stderr
    )
    result = glmlora("chat", "--model", merged, "--temperature", 0, stdin="Who are you?\n")
    assert result.stdout.strip()


def write_records(folder):
    script = folder / "make.py"
    script.write_text(
        "import csv, json, subprocess\n"
        "rows = list(csv.DictReader(open('csv_data/train.csv', encoding='utf-8')))\n"
        "data = [dict(instruction='--> ', input=r['title'], output=r['label']) for r in rows]\n"
        "json.dump(data, open('data/paper_label.json', 'w', encoding='utf-8'))\n"
        "subprocess.run(['sh', 'xfg_train.sh'], check=True)\n"
    )
    return script


@pytest.mark.parametrize(
    "words, status, text",
    [
        (["--version"], 0, "0.1.0"),
        (["doctor"], 0, "All that is needed is here"),
        (["run", "nothing.ipynb"], 1, "no such notebook"),
        (["run", "/"], 1, "is a directory, expected a notebook or script"),
        (["chat", "--model", "nowhere"], 1, "nowhere"),
        (["train", "--no_such_flag", "1"], 1, "no_such_flag"),
        (["train", "--output_dir", "x", "--stage", "ppo"], 1, "ppo"),
        (["nonsense"], 2, "invalid choice"),
        ([], 2, "VERB"),
    ],
)
def test_small_verbs(words, status, text, tmp_path):
    result = glmlora(*words, cwd=tmp_path, status=status)
    assert text in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
