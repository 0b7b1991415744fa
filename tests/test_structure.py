"""The house: what may import what, that only glmlora/families names a family, how long files and
functions are, and that a new family is one file."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import glmlora

PACKAGE = Path(glmlora.__file__).parent
ROOT = PACKAGE.parent

# Folders and top-level modules from the ground up; those on one floor do not import each other.
FLOORS = (
    ("_core", "interrupts", "names", "old_pandas", "progress", "tell"),
    ("families", "files"),
    ("batch", "encoding", "rendering", "seeds", "templates"),
    ("task", "tokenization"),
    ("questions",),
    ("generation",),
    ("tables",),
    ("model",),
    ("training",),
    ("head", "tools", "vote"),
    ("classifier", "inspection", "submission"),
    ("notebook", "standins"),
    ("compat",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
LONGEST_FILE, LONGEST_FUNCTION = 800, 130
FAMILY_NAME = re.compile(r"chatglm-?\d|\bglm-?4|[\"'](v2|v3|g4|0414|z1|hf)[\"']", re.IGNORECASE)


def modules():
    """Dotted name below glmlora -> path, of every module but the package's own __init__."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] == "template" or parts == ("__init__",):
            continue
        found[".".join(p for p in parts if p != "__init__")] = path
    return found


MODULES = modules()


def imports(name, path):
    """Modules below glmlora that a module imports anywhere, in functions and for types, too; "" is
    the package itself."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [a.name.split(".")[1:] for a in node.names if a.name.split(".")[0] == "glmlora"]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                start = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "glmlora":
                start = []
            else:
                continue
            module = [p for p in (node.module or "").split(".") if p]
            start = start + (module if node.level else module[1:])
            names = [
                [*start, a.name] if known([*start, a.name]) else list(start) for a in node.names
            ]
        else:
            continue
        yield from (".".join(n) for n in names)


def known(parts):
    return ".".join(parts) in MODULES or parts == ["_core"]


GRAPH = {name: sorted(set(imports(name, path))) for name, path in MODULES.items()}


def test_imports_only_go_down():
    wrong = []
    for name, targets in GRAPH.items():
        for target in targets:
            above, below = name.split(".")[0], target.split(".")[0]
            if not below:  # the public names: for what stands on top of everything
                fine = FLOOR[above] >= FLOOR["tools"]
            else:
                fine = above == below or FLOOR[above] > FLOOR[below]
            if not fine:
                wrong.append(f"{name} imports {target or 'glmlora'}")
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_imports():
    state = {}

    def visit(name, way):
        if state.get(name) == "done" or name not in GRAPH:
            return
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        for target in GRAPH[name]:
            if target != name:
                visit(target, [*way, name])
        state[name] = "done"

    for name in GRAPH:
        visit(name, [])


def test_only_families_name_a_family():
    named = []
    for name, path in [*MODULES.items(), ("_core", PACKAGE / "_core.pyi")]:
        if name.split(".")[0] != "families":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if FAMILY_NAME.search(line):
                    named.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not named, "\n".join(named)


def c_files():
    if not (ROOT / "csrc").is_dir():
        pytest.skip("csrc/ is not here: an installed package")
    return [p for p in sorted((ROOT / "csrc").rglob("*.[ch]")) if p.name != "ref_tmpl.h"]


def test_no_file_is_too_long():
    paths = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi"), *c_files()]
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in paths}
    long = [f"{p.relative_to(ROOT)}: {n} lines" for p, n in lengths.items() if n > LONGEST_FILE]
    assert not long, "\n".join(long)


def c_functions(path):
    """(name, lines) of the functions of a C file: from a head at the margin to its brace there."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = None
    for number, line in enumerate(lines):
        if re.match(r"[a-zA-Z_].*[^;,]$|[a-zA-Z_].*\($", line) and "(" in line and head is None:
            head = number
        elif line.startswith("}") and head is not None:
            yield lines[head], number - head + 1
            head = None
        elif not line or line.endswith(";") and not line.startswith(" "):
            if head is not None and not any(x.startswith("{") for x in lines[head:number]):
                head = None


def test_no_function_is_too_long():
    long = []
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > LONGEST_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}: {lines} lines")
    counted = 0
    for path in c_files():
        for head, lines in c_functions(path):
            counted += 1
            if lines > LONGEST_FUNCTION:
                long.append(f"{path.relative_to(ROOT)}: {head}: {lines} lines")
    assert counted > 300  # else the search above went blind
    assert not long, "\n".join(long)


TOY = """
import re

from .chatglm3 import ChatGLM3


class Toy(ChatGLM3):
    name, alias, title = "toy", "toyglm", "ToyGLM"
    named = re.compile("toyglm")
    special_tokens = (*ChatGLM3.special_tokens, "<|toy|>")
    end_tokens = (*ChatGLM3.end_tokens, "<|toy|>")

    def in_tokenizer(self, config):
        return "<|toy|>" in repr(config)

    def stream_ids(self, tokenizer, query, number, role):
        ids = super().stream_ids(tokenizer, query, number, role)
        return [tokenizer.get_command("<|toy|>"), *ids]


FAMILY = Toy()
"""
USE = """
import sys
from pathlib import Path

sys.path[:0] = [sys.argv[1], sys.argv[3]]
import glmlora, training

assert glmlora.__file__.startswith(sys.argv[1])
place = training.model_dir(Path(sys.argv[2]), _name_or_path="someone/toyglm-6b")
model = glmlora.AutoModel.from_pretrained(place).eval()
tokenizer = glmlora.AutoTokenizer.from_pretrained(place, family="toyglm")
assert model.config.family == tokenizer.family == "toy"
ids = tokenizer.build_chat_input("hello")["input_ids"][0].tolist()
assert ids[2] == tokenizer.get_command("<|toy|>")
settings = {"history": [], "do_sample": False, "max_length": len(ids) + 9}
answer, history = model.chat(tokenizer, "hello", **settings)
assert history[0] == {"role": "user", "content": "hello"}, history
run = training.run(place, Path(sys.argv[2]) / "out", max_steps=2, family="toyglm")
tuned = glmlora.PeftModel.from_pretrained(model, run.output_dir)
tuned.chat(tokenizer, "hello", **settings)
tokenizer.save_pretrained(sys.argv[2] + "/saved")
assert glmlora.AutoTokenizer.from_pretrained(sys.argv[2] + "/saved").family == "toy"
"""


def test_a_new_family_is_one_file(tmp_path):
    copy = tmp_path / "lib"
    shutil.copytree(PACKAGE, copy / "glmlora", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "glmlora/families/toy.py").write_text(TOY)
    words = [sys.executable, "-c", USE, str(copy), str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


# What could execute what is read, or reach the network, and who uses it: for the host's name, the
# libraries of CUDA, tests of the core that users start, and chat templates, in their own process.
CALLS = {"eval", "exec", "compile", "__import__"}
OF_OS = {"system", "popen", "execv", "execve", "execvp", "spawnv", "startfile"}
IMPORTS = {"ctypes", "dill", "ftplib", "http", "joblib", "marshal", "pickle", "requests", "runpy"}
IMPORTS |= {"shelve", "socket", "ssl", "subprocess", "urllib", "code", "cloudpickle", "jinja2"}
USED = {
    ("files.owner", "socket"),
    ("model.device", "ctypes"),
    ("rendering", "subprocess"),
    ("rendering.worker", "jinja2"),
    ("tools.optable", "ctypes"),
    ("tools.selftest", "subprocess"),
}


def executing(path):
    """What a module imports or calls of those."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = {a.name.split(".")[0] for a in node.names} & IMPORTS
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]} & IMPORTS if not node.level else set()
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = {node.func.id} & CALLS
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = {node.attr} & OF_OS if node.value.id == "os" else set()
        else:
            continue
        yield from names


def test_only_notebooks_are_executed():
    found = {
        (name, what)
        for name, path in MODULES.items()
        if name.split(".")[0] != "notebook"
        for what in executing(path)
    }
    assert found == USED, found ^ USED
    assert "eval" in executing(MODULES["notebook.shell"])


def test_what_the_security_page_names_is_there():
    page = ROOT / "SECURITY.md"
    if not page.is_file():
        pytest.skip("SECURITY.md is not here: an installed package")
    text = page.read_text(encoding="utf-8")
    tests = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(tests) > 20
    for file, name in tests:
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"
    for path in re.findall(r"`(glmlora/[\w/]+\.\w+)`", text):
        assert (ROOT / path).is_file(), path
    limits = re.findall(r"\| (\d+)[^|]*\| `([\w.]+)\.(\w+)` \|", text)
    assert len(limits) > 6
    for value, module, name in limits:
        assert getattr(importlib.import_module(module), name) == int(value), name
