"""What an installed glmlora imports, exports and weighs."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from wheels import install

import glmlora
from glmlora import _core

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = ["torch", "transformers", "peft", "pandas", "datasets", "safetensors"]
LATE = ["sentencepiece", "matplotlib", "tqdm", "IPython"]


def child(code, cwd=None, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "code, names",
    [
        ("import glmlora", FORBIDDEN + LATE),
        ("from glmlora import *", FORBIDDEN + LATE),
        (
            "import glmlora; from glmlora.tools.project import tiny_directory as d;"
            "m = glmlora.AutoModel.from_pretrained(d());"
            "t = glmlora.AutoTokenizer.from_pretrained(d()); m.chat(t, 'Hello')",
            FORBIDDEN,
        ),
        (
            "import glmlora, tempfile; from glmlora.tools.project import tiny_directory as d;"
            "glmlora.train(str(d()), [dict(instruction='a', input='b', output='1')],"
            "output_dir=tempfile.mkdtemp(), plot_loss=False)",
            FORBIDDEN,
        ),
    ],
)
def test_imports_none_of_the_heavy_packages(code, names):
    result = child(f"{code}\nimport sys\nprint([n for n in {names} if n in sys.modules])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_only_the_module_is_exported():
    if shutil.which("nm") is None or os.environ.get("GLMLORA_SANITIZED"):
        pytest.skip("needs nm and a plain build")
    table = subprocess.run(
        ["nm", "-D", "--defined-only", _core.__file__], capture_output=True, text=True
    ).stdout
    names = {line.split()[-1] for line in table.splitlines()} - {"_init", "_fini"}
    assert names == {"PyInit__core"}


def test_typed_and_versioned():
    package = Path(glmlora.__file__).parent
    assert (package / "py.typed").exists() and (package / "_core.pyi").exists()
    assert f'version = "{glmlora.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_wheel(tmp_path, wheel):
    """Small, complete, and installable with the network off."""
    assert wheel.stat().st_size < 20e6
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "tiny/model.safetensors",
        "tiny/tokenizer.model",
        "template/xfg.ipynb",
        "template/xfg_train.sh",
        "template/train_bash.py",
        "_core.pyi",
        "py.typed",
    ):
        assert f"glmlora/{name}" in names
    assert {n.split("/")[0].split("-")[0] for n in names} == {"glmlora"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "glmlora").rglob("*.py")}
    assert modules <= set(names), modules - set(names)
    target = install(wheel, tmp_path / "site")
    code = "import glmlora; print(glmlora.__file__); glmlora.cli.main(['--version'])"
    paths = os.pathsep.join([str(target), *(p for p in sys.path if "site-packages" in p)])
    result = child("import glmlora.cli; " + code, cwd=tmp_path, PYTHONPATH=paths)
    assert result.stdout.splitlines() == [
        str(target / "glmlora/__init__.py"),
        glmlora.__version__,
    ], result.stderr
