"""What type checkers make of a user's script: mypy and pyright, both at their strictest, against
the package as `make` installs it and against an installed wheel. Only the script is checked: what
it calls must be declared in full, and what does not exist must be an error.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from wheels import install

pytest.importorskip("mypy", reason="mypy is not installed")
pytest.importorskip("pyright", reason="pyright is not installed")

GOOD = """
from pathlib import Path
from typing import Any

import glmlora
import numpy as np

glmlora.set_seed(1)
directory = Path("model")
tokenizer = glmlora.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
config = glmlora.AutoConfig.from_pretrained(directory, pre_seq_len=8)
print(config.num_layers, config.pre_seq_len)
model = glmlora.AutoModel.from_pretrained(directory, config=config, device="auto").half().cuda()
lora = glmlora.LoraConfig(
    task_type=glmlora.TaskType.CAUSAL_LM, r=8, lora_alpha=32, target_modules=["query_key_value"]
)
fields: dict[str, Any] = {"r": 8}
print(lora, glmlora.LoraConfig(**fields))

peft_model = glmlora.get_peft_model(model, lora).train().to("cpu")
peft_model.print_trainable_parameters()
optimizer = glmlora.AdamW(peft_model, lr=1e-4)
ids = np.array([[3, 4, 5]])
loss: float = peft_model.backward(input_ids=ids, labels=ids)
norm: float = optimizer.step()
scores = peft_model(ids, labels=ids).logits
peft_model.save_pretrained("out")
tuned = glmlora.PeftModel.from_pretrained(model, Path("out")).eval()
new_ids: np.ndarray = tuned.generate(ids, max_new_tokens=5)
with tuned.disable_adapter():
    print(tuned.config.num_layers, tuned.device.type, tuned.dtype, tuned.training)
base = tuned.merge_and_unload().quantize(4, group_size=32)
base.save_pretrained("merged")
weights: dict[str, np.ndarray] = base.state_dict()
encoder = glmlora.get_peft_model(base, glmlora.PrefixTuningConfig(num_virtual_tokens=8))
glmlora.save_prefix(glmlora.load_prefix(encoder, "prefix"), "prefix")

arguments = glmlora.TrainingArguments(output_dir="out", learning_rate=1e-4, num_train_epochs=1)
glmlora.train("model", "data.csv", output_dir="out", lora_rank=8, plot_loss=False)
classifier = glmlora.LoraClassifier("model", threshold="f1", validation=0.1, folds=5)
proba: np.ndarray = classifier.fit([{"title": "a"}], [1]).predict_proba([{"title": "a"}])
classifier.save(Path("out"))
print(glmlora.LoraClassifier.load("out").predict(["a"]).shape)
weight: float = glmlora.vote_weight([1], proba, np.ones((1, 2)) / 2, labels=classifier.classes_)
"""

CHAT = """
import glmlora

tokenizer = glmlora.AutoTokenizer.from_pretrained("model")
model = glmlora.AutoModel.from_pretrained("model")
peft_model = glmlora.get_peft_model(model, glmlora.LoraConfig())
response, history = peft_model.chat(tokenizer, "Hello", temperature=0.01)
response, history = peft_model.chat(tokenizer, "and?", history=history, max_length=100)
response, history = model.chat(tokenizer, "and?", history)
print(peft_model.batch_chat(tokenizer, [response, "and?"], do_sample=False)[0])
for text, turns in peft_model.stream_chat(tokenizer, "Hello", history=[]):
    print(text, len(turns))
streamer = glmlora.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=5)
criteria = glmlora.StoppingCriteriaList([glmlora.MaxLengthCriteria(9)])
ids = tokenizer("Hello", truncation=True, max_length=9, return_tensors="pt").input_ids
model.generate(ids, streamer=streamer, stopping_criteria=criteria, bad_words_ids=[[5]])
model.chat(tokenizer, "Hello", stop_strings=["."], generation_config=model.generation_config)
tokenizer.batch_encode_plus(["a"], padding=True, pad_to_multiple_of=8)
tokenizer.truncation_side, tokenizer.model_max_length = "left", 5
answer: str = tokenizer.decode(ids[0], skip_special_tokens=True)
past = model(ids).past_key_values
model(ids, past_key_values=past, use_cache=True)
reveal_type(peft_model.chat(tokenizer, "x"))
"""

START = """
import glmlora

tokenizer = glmlora.AutoTokenizer.from_pretrained("model")
model = glmlora.AutoModel.from_pretrained("model")
peft_model = glmlora.get_peft_model(model, glmlora.LoraConfig(r=8))
"""
# a line each, and each must be an error
WRONG = (
    "peft_model.chta",
    "glmlora.trian",
    'glmlora.AutoModel.from_pretrained("model", devise="cpu")',
    "glmlora.LoraConfig(lora_alpah=8)",
    "model.quantize(4, group_sze=32)",
    'peft_model.half().to("cpu").mrege_and_unload()',
    "peft_model.backward(inptu_ids=[[1]])",
    "peft_model.chat(tokenizer, 2)",
    'peft_model.chat(tokenizer, "x", stop_string="a")',
    'tokenizer("x", pading=True)',
    "model.generate([[1]], bad_word_ids=[[5]])",
    'glmlora.train("model", "data.csv", lora_rnk=8)',
    'glmlora.TrainingArguments(output_dir="out", learning_rate="x")',
)


@pytest.fixture(scope="module", params=["editable", "wheel"])
def findings(request, tmp_path_factory):
    """{checker: [(file, line, severity, message)]} of the scripts, for one way to install."""
    if os.environ.get("GLMLORA_SANITIZED"):
        pytest.skip("types do not depend on the build")
    place = tmp_path_factory.mktemp(request.param)
    python = Path(sys.executable)
    if request.param == "wheel":
        python = installed(request.getfixturevalue("wheel"), place / "venv")
    scripts = place / "scripts"
    scripts.mkdir()
    (scripts / "good.py").write_text(GOOD)
    (scripts / "talk.py").write_text(CHAT)
    (scripts / "wrong.py").write_text(START + "\n".join(WRONG) + "\n")
    (scripts / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    return {"mypy": mypy(python, scripts), "pyright": pyright(python, scripts)}


def installed(wheel, venv):
    """A new environment's interpreter, with the wheel installed and this one's packages behind."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    [site] = venv.glob("lib/python*/site-packages")
    install(wheel, site)
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")  # NumPy's
    python = venv / "bin/python"
    where = subprocess.run(
        [python, "-c", "import glmlora; print(glmlora.__file__)"],
        cwd=venv,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(str(site))
    return python


def check(words, scripts):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    words = [sys.executable, "-m", *words]
    done = subprocess.run(words, cwd=scripts, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def mypy(python, scripts):
    out = check(["mypy", "--strict", "--python-executable", str(python), "."], scripts)
    line = re.compile(r"(\S+\.py):(\d+): (error|note): (.*)")
    assert "checked 3 source files" in out, out
    return [(m[1], int(m[2]), m[3], m[4]) for m in map(line.match, out.splitlines()) if m]


def pyright(python, scripts):
    report = json.loads(check(["pyright", "--outputjson", "--pythonpath", str(python)], scripts))
    assert report["summary"]["filesAnalyzed"] == 3, report
    return [
        (Path(d["file"]).name, d["range"]["start"]["line"] + 1, d["severity"], d["message"])
        for d in report["generalDiagnostics"]
    ]


def errors(found, name):
    return [
        f"{name}:{line}: {text}"
        for file, line, kind, text in found
        if (file, kind) == (name, "error")
    ]


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_a_script_is_fine(findings, checker):
    assert not errors(findings[checker], "good.py")


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_chatting_is_fine(findings, checker):
    assert not errors(findings[checker], "talk.py")


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_an_answer_is_text_and_a_history(findings, checker):
    [text] = [t for file, _, _, t in findings[checker] if file == "talk.py" and "tuple[" in t]
    assert "tuple[str, list[Any]]" in text


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
@pytest.mark.parametrize("line", WRONG)
def test_a_slip_is_an_error(findings, checker, line):
    number = START.count("\n") + WRONG.index(line) + 1
    lines = {at for file, at, kind, _ in findings[checker] if (file, kind) == ("wrong.py", "error")}
    assert number in lines
    assert min(lines) > START.count("\n")  # the lines before are fine
