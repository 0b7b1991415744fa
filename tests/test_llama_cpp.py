"""llama.cpp reads what `glmlora export` writes: the same ids, logits and greedy answers."""

import json
import shutil

import gguf_models
import numpy as np
import pytest
import tiny

import glmlora
from glmlora import cli, families
from glmlora.tools.gguf_export import export
from glmlora.tools.gguf_import import import_gguf

pytest.importorskip("gguf", reason="files are written by the gguf package")
pytest.importorskip("tiktoken", reason="GLM-4's vocabulary is read by tiktoken")
llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")

TEXTS = ["title: Insulin and  sleep,\n\n12345", "晚上睡不着应该怎么办 — a café", " "]
STEPS = 64
# llama.cpp rounds what a matrix is multiplied by to float16 (Q8_0, Q4_0: to 8 bits), ours does not.
ROUNDING = {"f16": 0.004, "q8_0": 0.06, "q4_0": 0.06}  # of the largest logit


def opened(file, **options):
    return llama_cpp.Llama(
        str(file),
        n_ctx=256,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        verbose=False,
        type_k=0,  # F32
        type_v=0,
        **options,
    )


def model_of(folder):
    return glmlora.AutoModel.from_pretrained(folder, compute_dtype="float32")


def prompt_of(tokenizer, text):
    special = [tokenizer.special_tokens[name] for name in tokenizer._family.prefix_tokens]
    return special + tokenizer.encode(text, add_special_tokens=False)


def logits_of(model, ids):
    return np.array(model.forward(np.array([ids], np.int32)).logits)[0]


def theirs(llama, ids):
    llama.reset()
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)])


def greedy(llama, ids):
    scores, found = theirs(llama, ids)[-1], []
    for _ in range(STEPS):
        found.append(int(scores.argmax()))
        llama.eval(found[-1:])
        scores = llama.scores[llama.n_tokens - 1]
    return found


def our_greedy(model, ids):
    """Ids, and by how much each was better than the second."""
    cache, found, margins = None, [], []
    row = list(ids)
    for _ in range(STEPS):
        out = model.forward(np.array([row], np.int32), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        first, second = np.sort(np.array(out.logits)[0, -1])[::-1][:2]
        margins.append(first - second)
        row = [int(np.array(out.logits)[0, -1].argmax())]
        found += row
    return found, min(margins)


def check(folder, file, form="f16", texts=TEXTS):
    model = model_of(folder)
    tokenizer = glmlora.AutoTokenizer.from_pretrained(folder)
    llama = opened(file)
    for number, text in enumerate(texts):
        ids = prompt_of(tokenizer, text)
        prefix = "".join(tokenizer._family.prefix_tokens)
        got = llama.tokenize((prefix + text).encode(), add_bos=False, special=True)
        assert got == ids
        if ids and number < len(TEXTS):
            ours, other = logits_of(model, ids), theirs(llama, ids)
            assert np.abs(ours - other).max() < ROUNDING[form] * np.abs(ours).max()
    return model, tokenizer, llama


@pytest.mark.parametrize("family", gguf_models.MAKERS)
def test_ids_logits_and_64_greedy_tokens_are_ours(tmp_path, family):
    folder, file = gguf_models.made(tmp_path, family), tmp_path / "model.gguf"
    export(folder, file, "f16")
    model, tokenizer, llama = check(folder, file)
    ids = prompt_of(tokenizer, TEXTS[0])
    ours, margin = our_greedy(model, ids)
    largest = np.abs(logits_of(model, ids)).max()
    assert margin > ROUNDING["f16"] * largest / 4, "what rounding may change proves nothing"
    assert greedy(llama, ids) == ours
    text = llama.detokenize(ours).decode("utf-8", "replace")
    assert text.strip() == tokenizer.decode(ours).strip()


@pytest.mark.parametrize("form", ["q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["tiny", "0414"])
def test_logits_of_quantized_files_are_those_of_the_numbers_in_them(tmp_path, family, form):
    folder, file = gguf_models.made(tmp_path, family), tmp_path / "model.gguf"
    export(folder, file, form)
    import_gguf(file, tmp_path / "again")
    model = model_of(tmp_path / "again")
    assert model.config.quantization_bit == (4 if form == "q4_0" else 0)
    check(tmp_path / "again", file, form)


@pytest.mark.parametrize("name", ["tokenizer-chatglm2", "tokenizer-glm4-tiny"])
def test_published_vocabularies_cut_texts_alike(tmp_path, shared, name):
    tokens = shared / "golden" / name
    v3 = name == "tokenizer-chatglm2"
    size = {"padded_vocab_size": 65024 if v3 else 1024}
    own = "THUDM/chatglm3-6b" if v3 else "THUDM/glm-4-9b-chat"
    folder = tiny.tiny_model_dir(tmp_path, dtype="F16", _name_or_path=own, num_layers=1, **size)
    shutil.copy(tokens / "tokenizer.model", folder)
    if not v3:
        shutil.copy(tokens / "tokenizer_config.json", folder)
    export(folder, tmp_path / "model.gguf", "f16")
    texts = [case["text"] for case in json.loads((tokens / "golden.json").read_text())["cases"]]
    check(folder, tmp_path / "model.gguf", texts=[t for t in texts if "\0" not in t][:60])


@pytest.mark.parametrize("family", ["v2", "0414"])
def test_adapters_merged_and_beside_the_model(tmp_path, family):
    folder = gguf_models.made(tmp_path, family)
    first = families.of(family).linears[0]
    patterns = {"rank_pattern": {first: 2}, "alpha_pattern": {first: 16}}
    adapter = gguf_models.adapter_of(folder, tmp_path / "adapter", **patterns)
    files = [tmp_path / name for name in ("base.gguf", "merged.gguf", "adapter.gguf")]
    export(folder, files[0], "f16")
    export(folder, files[1], "f16", adapter=adapter)
    assert (
        cli.main(
            ["export", "--model", str(folder), "--adapter", str(adapter), "--adapter-only"]
            + ["--output", str(files[2])]
        )
        == 0
    )
    ids = list(range(300, 320))
    base, tuned = model_of(folder), glmlora.PeftModel.from_pretrained(model_of(folder), adapter)
    wanted, largest = logits_of(tuned, ids), np.abs(logits_of(base, ids)).max()
    assert np.abs(wanted - logits_of(base, ids)).max() > 0.05 * largest
    for llama in (opened(files[1]), opened(files[0], lora_path=str(files[2]))):
        assert np.abs(theirs(llama, ids) - wanted).max() < ROUNDING["f16"] * largest
