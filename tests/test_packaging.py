"""What an installed glmlora imports, exports and weighs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
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


def module_symbols(which):
    if shutil.which("nm") is None or os.environ.get("GLMLORA_SANITIZED"):
        pytest.skip("needs nm and a plain build")
    words = ["nm", "-D", which, _core.__file__]
    table = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in table.splitlines()}


def test_only_the_module_is_exported():
    assert module_symbols("--defined-only") - {"_init", "_fini"} == {"PyInit__core"}


# Of CPython's names with an underscore, those of the stable ABI of 3.10 (Misc/stable_abi.toml).
STABLE_PRIVATE = {
    *("_PyArg_ParseTupleAndKeywords_SizeT", "_PyArg_ParseTuple_SizeT", "_Py_BuildValue_SizeT"),
    *("_Py_Dealloc", "_Py_NoneStruct", "_Py_TrueStruct", "_Py_FalseStruct"),
}


@pytest.mark.skipif(bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="no stable ABI here")
def test_one_module_serves_every_python():
    """Only the stable ABI of 3.10. Public names outside it do not compile: Py_LIMITED_API hides
    them; a header's macro may still call a private one."""
    assert Path(_core.__file__).name == "_core.abi3.so"
    private = {name for name in module_symbols("--undefined-only") if name.startswith("_Py")}
    assert private <= STABLE_PRIVATE
    folder = Path(_core.__file__).parent
    assert [path.name for path in folder.glob("_core*.so")] == ["_core.abi3.so"]


def test_python_h_comes_before_any_header_of_the_system():
    """Python.h defines what those read; clang, which builds the wheels, refuses the other order."""
    ours = {f'#include "{name}.h"' for name in ("module", "convert", "run")}
    for path in sorted((ROOT / "csrc/python").glob("*.c")):
        lines = path.read_text().splitlines()
        first = next(line for line in lines if line.startswith("#include"))
        assert " ".join(first.split()[:2]) in ours, f"{path.name}: {first}"


def test_typed_and_versioned():
    package = Path(glmlora.__file__).parent
    assert (package / "py.typed").exists() and (package / "_core.pyi").exists()
    assert f'version = "{glmlora.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_a_wheel_for_others_has_equal_bytes_and_says_what_is_inside(tmp_path, wheel, monkeypatch):
    """However its entries are ordered and dated, as another build's would be."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "portable"))
    import build

    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / wheel.name
    with zipfile.ZipFile(other, "w") as archive:
        for name in reversed(files):
            archive.writestr(zipfile.ZipInfo(name, (2001, 2, 3, 4, 5, 6)), files[name])
    packed = [
        build.packed(path, "x86_64", tmp_path / str(i), 1_700_000_000)
        for i, path in enumerate((wheel, other))
    ]
    assert packed[0].read_bytes() == packed[1].read_bytes()
    with zipfile.ZipFile(packed[0]) as archive:
        made = {name: archive.read(name) for name in archive.namelist()}
    info = f"glmlora-{glmlora.__version__}.dist-info"
    bill = json.loads(made[f"{info}/sboms/glmlora.cdx.json"])
    named = {part["name"]: part for part in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX" and bill["metadata"]["component"]["name"] == "glmlora"
    for need in ("numpy>=1.26", "tqdm>=4.60", "sentencepiece>=0.1.99"):
        assert named[need]["scope"] == "required"
    module = f"glmlora/{Path(_core.__file__).name}"
    assert named[module]["hashes"][0]["content"] == hashlib.sha256(made[module]).hexdigest()
    listed = {line.split(",")[0] for line in made[f"{info}/RECORD"].decode().splitlines()}
    assert listed == set(made) == {*files, f"{info}/sboms/glmlora.cdx.json"}
    install(packed[0], tmp_path / "site")  # pip checks RECORD's form


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
        *(f"serving/page/{path.name}" for path in (ROOT / "glmlora/serving/page").iterdir()),
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
