"""Cells are read as IPython reads them: commands, magics, what programs see, how errors show."""

import json
import os
import signal
import subprocess
import sys
import time
from types import ModuleType

import pytest

import glmlora
from glmlora import compat
from glmlora.notebook import cells, source

CELLS = [
    "x = 1\nx",
    "PROMPT = '''Answer:\n!important\n%matplotlib is a library\n%%time\n'''\n!echo a",
    "!echo a \\\n  b \\\n  c\ny = 1",
    "x = !echo don't\ny = 2",
    "a, b = %time f(1)",
    "x: list = !ls | wc",
    "d['k=v'] = !ls \\\n  -l\ny = d['a=b']",
    "x = f(a=1,\n  b=2)\nz = !ls",
    "x = (1\n %2)\n!ls",
    "x = 5 \\\n % 3\n!ls",
    "s = 'a' \\\n  'b'\n%pwd",
    "y = '''a''' + \\\n '''\n!x'''\n%pwd",
    "!!ls",
    "if a:\n    !ls {x}\n    %cd b\nelif b:\n    x = !ls\nelse:\n    pass",
    "for i in r:\n\n    # a comment\n    x = !echo $i\n    print(x)",
    "async def f():\n    y = await g()\n    !ls",
    "  %time x\n  y = 1",
    '!echo "unbalanced ( [\nprint(1)',
    "!echo '{print $1}' # a comment\n# !echo no",
    "model.chat?\nprint??\n?f\n??f\n%time?\nf*?\na[0].b?",
    "s = f'{a!r}'\n!echo hi",
    "lambda x=1: 3\na == b\n!c",
    "if True: x = !ls",
    "%matplotlib inline  # a comment",
    "%",
]


@pytest.mark.parametrize("cell", CELLS)
def test_tokens_and_ipython_agree(cell):
    transformer = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager()
    read = source.by_ipython(transformer, cell)
    assert source.by_tokens(cell) == read
    assert read.count("\n") == cell.count("\n") + 1
    lines = [line for line in transformer.transform_cell(cell).split("\n") if line.strip()]
    assert [line for line in read.split("\n") if line.strip()] == lines


def test_commands_expand_as_in_ipython():
    text = pytest.importorskip("IPython.utils.text")
    from glmlora.notebook.shell import _Expander

    names = {"p": "hello", "n": [1, 2, 3], "self": 4, "s": ModuleType("s")}
    for command in (
        "echo {p} $p $$p ${p} '$p' {n[1:]} {n[0]!r:>3} {{p}}",
        "echo $missing {p}",
        "awk '{print $1}' $p",
        "echo $s.__name__ {self} {'a' + p} $",
        "echo }",
    ):
        try:
            expected = text.DollarFormatter().vformat(command, [], names)
        except Exception as error:
            with pytest.raises(type(error)):
                _Expander().expand(command, names)
        else:
            assert _Expander().expand(command, names) == expected


def code(text):
    return {"cell_type": "code", "source": text}


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs cells in a folder of their own; gives status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHELL", "/bin/sh")
    saved = {n: sys.modules.pop(n) for n in compat.STAND_INS if n in sys.modules}

    def run_cells(*texts, **notebook):
        found = [code(text) for text in texts]
        content = {"nbformat": 4, "metadata": {}, "cells": found} | notebook
        (tmp_path / "n.ipynb").write_text(json.dumps(content))
        status = compat.run("n.ipynb")
        return status, *capfd.readouterr()

    yield run_cells
    sys.modules.update(saved)


@pytest.fixture(params=["IPython", "tokens"])
def reader(request, monkeypatch):
    """With IPython, and as where it is not installed."""
    if request.param == "IPython":
        pytest.importorskip("IPython")
    else:
        monkeypatch.setitem(sys.modules, "IPython.core.inputtransformer2", None)


# what a cell prints
PRINTS = [
    ('P = """a\n!b\n%matplotlib c\n"""\nprint(P)', "a\n!b\n%matplotlib c\n\n"),
    ("p = 'hello'\n!echo {p}\n!echo $p {p}", "hello\nhello hello\n"),
    ("!echo a \\\n  b", "a b\n"),
    (
        "x = !echo 'a b'; echo c >&2\n(x.s, x.n, x.l, x.fields(0), x.grep('A'))",
        "('a b c', 'a b\\nc', ['a b', 'c'], ['a', 'c'], ['a b'])\n",
    ),
    ("!!echo a", "['a']\n"),
    ("def f(a):\n    !echo {a}\n    x = !echo $a\n    return x.s\nf('in')", "in\n'in'\n"),
    ("if True:\n    %time print('a')\n    !echo b", "a\nWall time"),
    ("\n# a comment\n%%time\nx = 1\nx + 1", "2\nWall time"),
    (
        "%%capture out\nprint('a')\n!echo b\n'c'\n####\n(out.stdout, out.outputs)\n",
        "('a\\nb\\n', ['c'])\n",
    ),
    ("n = 'w.txt'\n####\n%%writefile {n}\n!a\n{n}\n####\n!cat w.txt", "Writing w.txt\n!a\n{n}\n"),
    (
        "%%writefile -a w.txt\na\n####\n%%file w.txt\nb\n####\n%%writefile -a w.txt\nc\n"
        "####\n%cat w.txt",
        "Writing w.txt\nOverwriting w.txt\nAppending to w.txt\nb\nc\n",
    ),
    ("%env A_NAME=1 2\n%set_env A_NAME 3\n%env A_NAME", "env: A_NAME=1 2\nenv: A_NAME=3\n'3'\n"),
    ("%mkdir d\n%cd -q d  # there\n!touch f\n%ls\n%cd -q ..\n####\nls d", "f\nf\n"),
    ("x = %pwd\nimport os\nx == os.getcwd()", "True\n"),
    ("r = %timeit -n 2 -r 3 -o -q 1 + 1\n(r.loops, r.repeat)", "(2, 3)\n"),
    ("x = 2\n%timeit -n 1 -r 1 print('{x} $x')", "{x} $x\n"),
    ("%%timeit -n 1 -r 1 x = 3\nprint(x)", "3\n"),
    ("%%bash -s a --out b\necho $1 $((1 + 2))\n####\nb", "'a 3\\n'\n"),
    ("%%sh\necho a", "a\n"),
    ("%%python\nimport sys; print(len(sys.argv))", "1\n"),
    ("%%script sh\necho a", "a\n"),
    ("%%bash --no-raise-error\nexit 3\n####\n_exit_code", "3\n"),
    ("!exit 3\n_exit_code", "3\n"),
    ("import asyncio\nawait asyncio.sleep(0)\nawait asyncio.sleep(0, 'a')", "'a'\n"),
    ("import asyncio\nasync def f(): return 1\nasyncio.run(f())", "1\n"),
    ("async def f():\n    yield 1\nasync for x in f():\n    print(x)", "1\n"),
    ("display(1, 'a')", "1\n'a'\n"),
    ("2\n####\n_ + 1\n####\n(_, __, Out[1], _2, In[1])", "2\n3\n(3, 2, 2, 3, '2')\n"),
    ("_ = 5\n####\n7\n####\n_", "7\n5\n"),
    ("1;\n####\n2;  # quiet\n####\n'a;'", "'a;'\n"),
    ("get_ipython().system('echo a')\nget_ipython().run_line_magic('env', 'A=1')", "a\nenv: A=1\n"),
    ("get_ipython().magic('%time 1')", "Wall time"),
    ("get_ipython().run_cell_magic('bash', '', 'echo a')", "a\n"),
    ("get_ipython().getoutput('echo a').s", "'a'\n"),
    ("def m(line): return line + '!'\nget_ipython().register_magic_function(m)\n%m a", "'a!'\n"),
    ("%config InteractiveShell.ast_node_interactivity = 'all'\n####\n1\n2", "1\n2\n"),
    ("get_ipython().ast_node_interactivity = 'all'\n####\n1\n2", "1\n2\n"),
    ("%%bash  # a comment\necho a", "a\n"),
    ("%load_ext autoreload\n%autoreload 2\n%matplotlib inline\n1", "1\n"),
    (
        "from __future__ import annotations\n####\ndef f(a: b): pass\nf.__annotations__",
        "{'a': 'b'}\n",
    ),
    ("class A:\n    b: int\nA.__annotations__", "{'b': <class 'int'>}\n"),
    ("def q():\n    pass\nimport inspect\nprint(inspect.getsource(q))", "def q():\n    pass\n"),
    (
        "from tqdm.notebook import tqdm\nimport tqdm.std\ntqdm.notebook.tqdm is tqdm.std.tqdm",
        "True\n",
    ),
    ("def f(a): 'Does.'\nf?", "Signature: f(a)\nType: function\nDoes.\n"),
    ("%lsmagic", "Line magics: %aimport"),
    ("'__file__' in globals()", "False\n"),
]


@pytest.mark.parametrize("cell, shown", PRINTS)
def test_what_a_cell_prints(run, reader, cell, shown, monkeypatch):
    for name in ("A", "A_NAME"):
        monkeypatch.setenv(name, "")
    status, out, err = run(*cell.split("\n####\n"))
    assert status == 0, err
    assert out.startswith(shown), out


PROGRAM = "import transformers, peft, sys\nprint(transformers.AutoModel.__module__, sys.argv[1:])"
SEEN = "glmlora.model.auto ['a']\n"


@pytest.mark.parametrize(
    "cell",
    [
        "!python p.py a",
        "!python3 p.py a",
        "import sys\n!{sys.executable} p.py a",
        "!python -m p a",
        "!PYTHONPATH=. python p.py a",
        "%env PYTHONPATH=.\n!python p.py a",
        "!sh p.sh",
        "%run p.py a",
        "%run p a",
        "%run -m p a",
        "%%bash\npython p.py a",
        "import subprocess, sys\nx = subprocess.getoutput(sys.executable + ' p.py a')\nprint(x)",
        "import os\nos.system('python p.py a');",
    ],
)
def test_programs_see_the_stand_ins(run, tmp_path, cell):
    (tmp_path / "p.py").write_text(PROGRAM)
    (tmp_path / "p.sh").write_text("python p.py a")
    path = os.environ["PATH"], os.environ.get("PYTHONPATH")
    sys.path_importer_cache.clear()
    status, out, err = run(cell)
    assert (status, out.removeprefix("env: PYTHONPATH=.\n")) == (0, SEEN), err
    assert (os.environ["PATH"], os.environ.get("PYTHONPATH")) == path


def test_programs_of_jupyter_see_them_after_load_ext(tmp_path, monkeypatch):
    """What `%load_ext glmlora` and `%unload_ext glmlora` call."""
    (tmp_path / "p.py").write_text(PROGRAM)
    path = os.environ["PATH"], os.environ.get("PYTHONPATH")
    saved = {n: sys.modules.pop(n) for n in compat.STAND_INS if n in sys.modules}
    try:
        glmlora.load_ipython_extension(None)
        words = ["sh", "-c", "python p.py a"]
        assert subprocess.check_output(words, cwd=tmp_path, text=True) == SEEN
    finally:
        glmlora.unload_ipython_extension(None)
        sys.modules.update(saved)
    assert (os.environ["PATH"], os.environ.get("PYTHONPATH")) == path


def test_another_python_keeps_its_packages(run, tmp_path):
    """Programs of another environment import what is installed there, under the same names."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there/transformers.py").write_text("x = 'the real one'")
    code = (
        "import sys; sys.prefix = 'elsewhere'; "
        "sys.path = [p for p in sys.path if 'site-packages' not in p] + ['there']; "
        "import transformers; print(transformers.x); import peft"
    )
    _, out, err = run(f'!python -c "{code}"')
    assert out == "the real one\n" and "No module named 'peft'" in err


def test_no_place_is_added_for_programs(run, tmp_path):
    """An empty entry on the path would be the current directory."""
    (tmp_path / "json.py").write_text("x = 1")
    cell = "!env -u PYTHONPATH python sub/p.py"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/p.py").write_text("import json, sys; print(json.dumps(1), '' in sys.path)")
    assert run(cell)[:2] == (0, "1 False\n")


def test_the_users_own_sitecustomize_is_kept(run, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.mine = 1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run("!python -c 'import sys, peft; print(sys.mine)'")[:2] == (0, "1\n")


@pytest.mark.parametrize(
    "command, told",
    [
        ("!true {missing}", "{missing} is not replaced (name 'missing' is not defined)\n"),
        (
            "!true $HOME {p}",
            "{p} is not replaced (name 'HOME' is not defined); for the shell's own",
        ),
        ("!true ${HOME}/{p}", "{p} is not replaced (name 'HOME' is not defined); for the"),
        ("!true $HOME ${HOME} '{print $1}' {a,b} {}", ""),
    ],
)
def test_variables_that_are_not_replaced_are_told(run, command, told):
    status, _, err = run(f"p = 1\n{command}")
    assert status == 0 and ("cell 1, line 2: " + told in err if told else "replaced" not in err)


def test_the_shells_own_variables(run, monkeypatch):
    """As the message says that they are written."""
    monkeypatch.setenv("OF_SHELL", "s")
    assert run("p = 1\n!echo $$OF_SHELL {p}")[1] == "s 1\n"
    assert run("p = 1\n!echo ${{OF_SHELL}} {p}")[1] == "s 1\n"


def test_the_command_is_found(run):
    assert run("!glmlora --version")[:2] == (0, f"{glmlora.__version__}\n")


def test_commands_that_fail_are_told(run):
    status, out, err = run("x = 1\n!exit 3", "y = !exit 4", "print(x)")
    assert (status, out) == (0, "1\n")  # as in IPython, what follows runs
    assert "n.ipynb: cell 1, line 2: `exit 3` ended with 3\n" in err
    assert err.endswith("commands that failed:\n  `exit 3` ended with 3\n  `exit 4` ended with 4\n")


@pytest.mark.parametrize(
    "texts, lines",
    [
        (["def f():\n    1 / 0", "\n\nx = 1\nf()"], [("2", 4, "f()"), ("1", 2, "1 / 0")]),
        (["!true \\\n  a\n\n1 / 0"], [("1", 4, "1 / 0")]),
        (["# a\n%%time\n\nx = 1\n1 / 0"], [("1", 5, "1 / 0")]),
        (["%%capture\n%%time\n1 / 0"], [("1", 3, "1 / 0")]),
        (["async def f():\n    1 / 0\nawait f()"], [("1", 3, "await f()"), ("1", 2, "1 / 0")]),
        (["x = 1\n%time 1 / 0"], [("1", 2, "%time 1 / 0")]),
        (["!true\nx = (1 / 0"], [("1", 2, "x = (1 / 0")]),
    ],
)
def test_a_traceback_has_the_cells_lines(run, reader, texts, lines):
    status, out, err = run(*texts, "print('never')")
    assert status == 1 and "never" not in out
    for cell, line, text in lines:
        assert f'File "n.ipynb[cell {cell}]", line {line}' in err
        assert f"\n    {text}\n" in err
    assert "glmlora" not in err and "asyncio" not in err, err


@pytest.mark.parametrize(
    "cell, last",
    [
        ("from transformers import Trainer", "glmlora.train"),
        ("import transformers\ntransformers.Trainer", "glmlora.train"),
        ("import modeling_chatglm", "from transformers import AutoModel"),
    ],
)
def test_what_a_stand_in_lacks_is_shown_at_the_cell(run, cell, last):
    status, _, err = run(cell)
    assert status == 1 and last in err.splitlines()[-1] and err.count('  File "') == 1


@pytest.mark.parametrize("cell, status, words", [
    ("import sys\nsys.exit(3)", 3, ""),
    ("exit()", 0, ""),
    ("import sys; sys.exit('no data')", 1, "no data\n"),
    ("raise KeyboardInterrupt", 130, "interrupted\n"),
])  # fmt: skip
def test_a_cell_that_ends_the_run(run, cell, status, words):
    found, out, err = run(cell, "print('never')")
    assert found == status and err.endswith(words) and not out
    assert ("cell 1 ends the run" in err) == (status != 130)


def test_a_script_keeps_its_traceback(tmp_path):
    """The command shows a script's exception as Python does, not as an error of its own."""
    path = tmp_path / "s.py"
    path.write_bytes(
        b"# -*- coding: gb18030 -*-\nx = '" + "好".encode("gb18030") + b"'\n\nraise ValueError(x)"
    )
    words = [sys.executable, "-m", "glmlora", "run", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and f'File "{path}", line 4' in done.stderr
    assert done.stderr.endswith("ValueError: 好\n") and "glmlora" not in done.stderr


def test_commands_in_a_script(tmp_path, capfd):
    """As Colab writes them into its .py: an .ipy file may have them."""
    text = "x = 1\n!echo {x}\n%time x + 1"
    for name, status in ("s.py", 1), ("s.ipy", 0):
        (tmp_path / name).write_text(text)
        assert compat.run(tmp_path / name) == status
        out, err = capfd.readouterr()
        assert ("SyntaxError" in err and "named .ipy" in err) == bool(status)
    assert out.startswith("1\nWall time") and out.endswith("\n2\n")


def test_annotations_of_a_script_are_its_own(tmp_path, capfd):
    path = tmp_path / "s.py"
    path.write_text("def f(a: int): pass\nprint(f.__annotations__)")
    assert compat.run(path) == 0
    assert capfd.readouterr().out == "{'a': <class 'int'>}\n"


@pytest.mark.parametrize(
    "child, number, status",
    [
        ("sleep 100", signal.SIGINT, 130),
        ("sh -c 'sleep 100; true' | cat", signal.SIGINT, 130),
        ("python -c 'import time; time.sleep(100)'", signal.SIGINT, 130),
        ("sleep 100", signal.SIGTERM, 143),
    ],
)
def test_a_signal_ends_the_run_and_its_programs(tmp_path, child, number, status):
    cells = [code(f"!echo $$$$ > pid; {child}"), code("print('never')")]
    (tmp_path / "n.ipynb").write_text(json.dumps({"nbformat": 4, "cells": cells}))
    words = [sys.executable, "-m", "glmlora", "run", "n.ipynb"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    run = subprocess.Popen(words, cwd=tmp_path, text=True, **pipes)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text().strip()):
        time.sleep(0.02)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (status, "")
    assert "Traceback" not in err or child.startswith("python")
    assert not os.path.exists(f"/proc/{pid.read_text().strip()}")


def test_a_signal_that_does_not_wake_is_seen(tmp_path):
    """Ctrl-C just before the wait for a program blocks, or in another thread."""
    program = """
import signal, threading, time
from glmlora.notebook import children

def interrupt():
    while not open("begun").read():
        time.sleep(0.02)
    time.sleep(0.2)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)

open("begun", "w")
threading.Thread(target=interrupt).start()
try:
    children.run(["sh", "-c", "echo 1 > begun; sleep 10; echo 1 > ended"])
except KeyboardInterrupt:
    print("interrupted")
"""
    words = [sys.executable, "-c", program]
    done = subprocess.run(
        words, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
    assert not (tmp_path / "ended").exists()


def test_magics_that_are_not_known_are_told_first(run):
    status, out, err = run("print(1)", "if False:\n    %tmeit 1", "%%capture\n%nosuch")
    assert status == 1 and out == "1\n"
    first = "[n.ipynb] the run may end in cell 2, line 2: the magic %tmeit is not supported (did"
    assert err.startswith(first)
    assert "cell 3, line 2: the magic %nosuch is not supported" in err


OWN_MAGICS = """
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class

@magics_class
class Own(Magics):
    @line_magic
    def twice(self, line):
        return line * 2

    @cell_magic
    def among(self, line, cell):
        return [cell, line in self.shell.user_ns]

def load_ipython_extension(ipython):
    ipython.register_magics(Own)
"""


def test_magics_of_the_notebook_itself(run, tmp_path):
    """By function, by class, and of an extension."""
    pytest.importorskip("IPython")
    (tmp_path / "own_magics.py").write_text(OWN_MAGICS)
    cell = "from IPython.core.magic import register_line_magic\n@register_line_magic\n"
    status, out, err = run(
        cell + "def thrice(line):\n    return line * 3",
        "%thrice a",
        "%load_ext own_magics",
        "%twice a",
        "%%among In\nb",
        OWN_MAGICS + "get_ipython().register_magics(Own)",
        "%load_ext no_such_extension",
    )
    assert (status, out) == (0, "'aaa'\n'aa'\n['b\\n', True]\n"), err
    assert "the extension no_such_extension is not loaded (No module named" in err
    assert "may end" not in err


def test_each_cell_begins_without_a_figure(run, tmp_path, monkeypatch):
    """As inline figures in Jupyter: the second picture has no line of the first."""
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    status, out, err = run(
        "import matplotlib.pyplot as plt\nplt.plot([1]);",
        "plt.plot([2]); print(len(plt.gca().lines))\nplt.show()\nplt.plot([3])\n"
        "print(len(plt.gca().lines))\nplt.show()",
        "plt.get_fignums()",
    )
    assert (status, out) == (0, "1\n1\n[]\n"), err
    assert err.count("n.ipynb: cell 2, line 2: figures are not shown here") == 1
    import matplotlib.pyplot

    assert matplotlib.pyplot.show.__module__ == "matplotlib.pyplot"
    assert "MPLBACKEND" not in os.environ


def test_a_notebook_that_runs_another(run, tmp_path):
    text = json.dumps({"nbformat": 4, "cells": [code("a = 1\na"), code("!true\n1 / 0")]})
    (tmp_path / "other.ipynb").write_text(text)
    status, out, err = run("b = 1\n%run other.ipynb")
    assert (status, out) == (1, "1\n")
    assert 'File "other.ipynb[cell 2]", line 2' in err and "\n    1 / 0\n" in err


def test_what_ipython_is_told_to_show(run, monkeypatch):
    shell = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell
    monkeypatch.setattr(shell, "ast_node_interactivity", "last_expr")
    cell = "from IPython.core.interactiveshell import InteractiveShell\nInteractiveShell."
    assert run(cell + "ast_node_interactivity = 'all'", "1\n2")[:2] == (0, "1\n2\n")
    setting = "ast_node_interactivity = 'last_expr_or_assign'"
    assert run(cell + setting, "x = 1\ny = 2")[:2] == (0, "2\n")


def test_ipythons_own_names(run):
    """`from IPython import get_ipython` and display, where IPython is installed."""
    pytest.importorskip("IPython")
    import IPython

    before = IPython.get_ipython
    cell = "from IPython import get_ipython as g\nfrom IPython.display import display, HTML\n"
    status, out, err = run(cell + "display(HTML('a'))\ng() is get_ipython()")
    assert (status, out) == (0, "<IPython.core.display.HTML object>\nTrue\n"), err
    assert IPython.get_ipython is before and not hasattr(__builtins__, "get_ipython")


OLD = {"cells": [{"cell_type": "code", "input": ["a\n", "b"], "language": "python"}]}


@pytest.mark.parametrize(
    "content, found",
    [
        ({"cells": [code("a\r\nb"), code(["c\n", "d"])]}, ["a\nb", "c\nd"]),
        ({"cells": [code(""), {"cell_type": "markdown", "source": "!x"}]}, [""]),
        ({"cells": [{"cell_type": "raw", "source": "!x"}, code("\ufeffx")]}, ["x"]),
        ({"nbformat": 3, "worksheets": [OLD]}, ["a\nb"]),
        ({"cells": [], "metadata": {"kernelspec": {"language": "python"}}}, []),
        ({"cells": [], "metadata": {"kernelspec": {"language": "R"}}}, "cells are R, expected Py"),
        ({"cells": [code(3)]}, "cell 1: its source is no text"),
        ({"cells": [7]}, "cell 1: expected an object"),
        ({"cells": {}}, "nbformat 4"),
        ({"nbformat": 2, "worksheets": []}, "nbformat 4"),
        ({"nbformat": "4", "cells": []}, "nbformat 4"),
    ],
)
def test_files(tmp_path, content, found):
    path = tmp_path / "n.ipynb"
    path.write_text("\ufeff" + json.dumps({"nbformat": 4} | content), encoding="utf-8")
    if isinstance(found, list):
        assert [cell.source for cell in cells.read_cells(path)] == found
    else:
        with pytest.raises(ValueError, match=found):
            cells.read_cells(path)


def test_tags_of_cells(run):
    """As nbclient: a cell that is to be skipped, and one that is to fail."""

    def tagged(text, tag):
        return code(text) | {"metadata": {"tags": [tag]}}

    found = [tagged("1", "skip-execution"), tagged("1 / 0", "raises-exception"), code("2")]
    status, out, err = run(cells=found)
    assert (status, out) == (0, "2\n") and "ZeroDivisionError" in err
