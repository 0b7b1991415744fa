"""Stand-ins for transformers and peft, and notebooks run untouched."""

import importlib
import importlib.util
import json
import subprocess
import sys
import textwrap

import pytest

import glmlora
from glmlora import compat


@pytest.fixture(autouse=True)
def clean_modules(monkeypatch):
    saved = {n: sys.modules.pop(n) for n in compat.STAND_INS if n in sys.modules}
    yield
    compat.uninstall()
    sys.modules.update(saved)


def notebook(path, *cells):
    body = [
        {"cell_type": "code", "source": textwrap.dedent(c).strip(), "metadata": {}, "outputs": []}
        for c in cells
    ]
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": body}))
    return path


def test_names_come_from_glmlora():
    compat.install()
    compat.install()
    from peft import LoraConfig, PeftModel
    from transformers import AutoModel, AutoTokenizer, GenerationConfig

    assert AutoModel is glmlora.AutoModel and PeftModel is glmlora.PeftModel
    assert AutoTokenizer is glmlora.AutoTokenizer and LoraConfig is glmlora.LoraConfig
    assert GenerationConfig is glmlora.GenerationConfig
    with pytest.raises(ImportError):
        from transformers import LlamaModel  # noqa: F401
    compat.uninstall()
    assert "peft" not in sys.modules


@pytest.mark.parametrize(
    "statement",
    [
        "from transformers.generation import GenerationConfig",
        "from transformers.generation.utils import GenerationConfig",
        "from transformers import PreTrainedModel, PreTrainedTokenizer, PreTrainedTokenizerFast",
        "from transformers.utils import logging; logging.get_logger(__name__).info('a')",
        "import transformers; transformers.logging.set_verbosity_error()",
        "import transformers.utils.logging as l; assert l.get_verbosity() >= 0",
        "from peft import PeftModelForCausalLM, AutoPeftModelForCausalLM, PeftConfig, PeftType",
        "from peft import prepare_model_for_int8_training, get_peft_model_state_dict",
        "from peft.tuners.lora import LoraConfig",
        "from peft.utils import set_peft_model_state_dict; import peft.peft_model",
        "from peft import *; LoraConfig(r=2)",
        "from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as M; "
        "assert M['chatglm'] == ['query_key_value']",
        "import os, transformers; assert os.path.exists(transformers.__file__)",
        "import transformers; assert 'AutoModel' in dir(transformers) and transformers.__spec__",
    ],
)
def test_names_that_notebooks_import(statement):
    compat.install()
    exec(statement, {"__name__": "__main__"})


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("from transformers import Trainer", "for transformers has no 'Trainer'.*glmlora.train"),
        ("from transformers import AutoTokeniser", "did you mean 'AutoTokenizer'.*offers AutoC"),
        ("from transformers import LlamaForCausalLM", "stand-in for transformers has no 'Llama"),
        ("import transformers.models.llama.modeling_llama", "transformers.models has no 'llama"),
        ("from transformers.trainer import Trainer", "has no 'trainer'; glmlora.train"),
        ("from transformers.generation.utils import Foo", "transformers.generation.utils has no"),
        ("from transformers import BitsAndBytesConfig, AutoModel", "load_in_4bit"),
        ("from peft import LoraConfg", "for peft has no 'LoraConfg' .did you mean 'LoraConfig'"),
        ("from peft import PromptEncoderConfig", "PrefixTuningConfig"),
        ("from peft.tuners.ia3 import IA3Config", "stand-in for peft.tuners has no 'ia3'"),
        ("import peft.nothing", "stand-in for peft has no 'nothing'"),
        ("from glmlora import AutoModl", "'glmlora' has no .*did you mean 'AutoModel'"),
        ("import glmlora.modelling", "'glmlora' has no name or module 'modelling'"),
    ],
)
def test_an_import_error_says_what_there_is(statement, words):
    compat.install()
    with pytest.raises(ImportError, match=words):
        exec(statement, {})


def test_packages_that_are_not_there(monkeypatch):
    compat.install()
    for name in ("torch", "bitsandbytes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [])  # so that torch is not found where it is installed
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(ModuleNotFoundError, match="torch is not.*glmlora needs none.*float16"):
        importlib.import_module("torch")
    with pytest.raises(ModuleNotFoundError, match="bitsandbytes is not.*load_in_4bit"):
        importlib.import_module("bitsandbytes")
    with pytest.raises(ModuleNotFoundError, match="No module named 'never_heard_of'"):
        importlib.import_module("never_heard_of")
    assert importlib.util.find_spec("torch") is None
    compat.uninstall()
    with pytest.raises(ModuleNotFoundError, match="No module named 'torch'"):
        importlib.import_module("torch")


def test_versions_that_notebooks_ask_for():
    compat.install()
    import peft
    import transformers

    assert transformers.__version__ == "4.30.2+glmlora" and peft.__version__ == "0.4.0+glmlora"


def test_stand_ins_can_be_looked_for():
    compat.install()
    assert importlib.util.find_spec("transformers").name == "transformers"
    assert importlib.util.find_spec("peft.tuners.lora") is not None
    assert importlib.util.find_spec("transformers.nothing") is None
    assert importlib.util.find_spec("glmlora.nothing") is None
    assert not hasattr(importlib.import_module("transformers"), "Trainer")
    with pytest.raises(AttributeError, match="did you mean 'AutoModel'"):
        glmlora.AutoModl  # noqa: B018
    assert not hasattr(glmlora, "AutoModl")


def test_the_real_package_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", type(sys)("peft"))
    with pytest.raises(RuntimeError, match="peft is imported already: restart"):
        compat.install()


def test_nothing_is_installed_by_import():
    code = "import glmlora, glmlora.compat, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_cells_share_a_namespace_and_show_values(tmp_path, capfd):
    path = notebook(
        tmp_path / "a.ipynb",
        "x = 20",
        "def f():\n    return x + 1\nf()",
        "f();",
        "%matplotlib inline\n!echo from the shell",
        "%%time\ny = f() + 1",
        "%%bash\necho $((1 + 2))",
        "if True:\n    print(__name__, y, '50%')",
    )
    assert compat.run(path) == 0
    out = capfd.readouterr().out
    assert out.startswith("21\nfrom the shell\nWall time:")
    assert out.endswith("3\n__main__ 22 50%\n")
    assert sys.modules["__main__"].__dict__.get("y") is None


def test_an_error_names_cell_and_line(tmp_path, capfd):
    path = notebook(tmp_path / "b.ipynb", "a = 1", "b = 2\nraise ValueError('wrong paper')", "c")
    assert compat.run(path) == 1
    err = capfd.readouterr().err
    assert 'File "b.ipynb[cell 2]", line 2' in err and "wrong paper" in err
    assert (
        "raise ValueError('wrong paper')" in err
        and "notebook.py" not in err
        and "compat.py" not in err
    )


@pytest.mark.parametrize(
    "cell, words",
    [
        (
            "x = 1\nif x:\n    %tmeit x",
            "cell 1, line 3: the magic %tmeit is not supported (did you mean '%timeit'?)",
        ),
        ("%%tiem\nb", "line 1: the magic %%tiem is not supported (did you mean '%%time'?)"),
        ("x = 1\n%%time\nx", "line 2: the magic %%time is one for a whole cell"),
        ("%%bash\nexit 3", "line 1: %%bash ended with 3"),
        ("%cd nowhere", "%cd nowhere: No such file or directory"),
        ("%run nothing.py", "%run nothing.py: no such file"),
        ("%timeit -x 1", "%timeit: unrecognized arguments: -x"),
        ("get_ipython().foo", "get_ipython().foo is not supported"),
        ("from google.colab import drive", "exists on Colab only"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path, capfd, cell, words):
    assert compat.run(notebook(tmp_path / "c.ipynb", cell)) == 1
    assert words in capfd.readouterr().err


def test_files_that_are_no_notebooks(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.ipynb"):
        compat.run(tmp_path / "nothing.ipynb")
    (tmp_path / "d.ipynb").write_text("{}")
    with pytest.raises(ValueError, match="nbformat 4"):
        compat.run(tmp_path / "d.ipynb")
    (tmp_path / "e.ipynb").write_text("no json")
    with pytest.raises(ValueError, match="e.ipynb"):
        compat.run(tmp_path / "e.ipynb")


def test_scripts(tmp_path, capfd):
    script = tmp_path / "s.py"
    script.write_text("import sys\nfrom peft import PeftModel\nprint(sys.argv[1:])\nsys.exit(4)\n")
    assert compat.run(script, ["a", "b"]) == 4
    assert capfd.readouterr().out == "['a', 'b']\n"
    assert "peft" not in sys.modules


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/dataset_info.json").write_text('{"p": {"file_name": "p.json"}}')
    (tmp_path / "xfg_train.sh").write_text(
        "python -c 'import sys, glmlora; print(sys.executable)' >> trained\nexit $STATUS\n"
    )
    return tmp_path


def test_training_follows_the_cell_that_writes_the_data(folder, monkeypatch):
    monkeypatch.setenv("STATUS", "0")
    path = notebook(
        folder / "n.ipynb",
        "import os\nassert not os.path.exists('trained')",
        "open('data/p.json', 'w').write('[1]')",
        "assert os.path.exists('trained')\nopen('data/p.json', 'w').write('[1, 2]')",
    )
    assert compat.run(path) == 0
    assert (folder / "trained").read_text() == sys.executable + "\n"


def test_training_is_left_to_a_cell_that_starts_it(folder, monkeypatch):
    monkeypatch.setenv("STATUS", "0")
    path = notebook(folder / "n.ipynb", "open('data/p.json', 'w').close()", "!sh xfg_train.sh")
    assert compat.run(path) == 0
    assert len((folder / "trained").read_text().splitlines()) == 1


def test_failed_training_stops_the_run(folder, monkeypatch, capfd):
    monkeypatch.setenv("STATUS", "7")
    path = notebook(folder / "n.ipynb", "open('data/p.json', 'w').close()", "open('late', 'w')")
    assert compat.run(path) == 7
    assert not (folder / "late").exists() and "ended with 7" in capfd.readouterr().err
