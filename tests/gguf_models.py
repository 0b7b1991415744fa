"""Tiny models of every family that llama.cpp has an architecture for, with their tokenizers."""

import json
import shutil

import numpy as np
import tiny

import glmlora
from glmlora import families, load_state_dict
from glmlora.files.checkpoint import write_safetensors
from glmlora.tools.project import tiny_directory

SIZES = {"ffn_hidden_size": 64}  # rows of whole blocks everywhere
LAYOUT = {"intermediate_size": 64}
THINKS = "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
THINKS += "{% if add_generation_prompt %}<|assistant|>\n<think>{% endif %}"

# Each of these ids is followed by one of them, unless the layers object: greedy answers have
# margins that no rounding passes.
CYCLE = np.arange(265, 365)
BRANCHES = ("dense.w", "4h_to_h.w", "o_proj.w", "down_proj.w", "post_self_attn", "post_mlp")


def _pieces(folder, name, **more):
    place = tiny.tiny_model_dir(folder, _name_or_path=name, padded_vocab_size=512, **SIZES, **more)
    return tiny.tiny_tokenizer_dir(place)


def _copied(folder):
    shutil.copytree(tiny_directory(), folder / "glm-tiny")
    return folder / "glm-tiny"


MAKERS = {
    "tiny": _copied,
    "v2": lambda folder: _pieces(folder, "THUDM/chatglm2-6b-32k", rope_ratio=4),
    "v3": lambda folder: _pieces(folder, "THUDM/chatglm3-6b"),
    "g4": lambda folder: tiny.tiny_glm4_dir(folder, **SIZES),
    "hf": lambda folder: tiny.tiny_transformers_dir(folder, **LAYOUT),
    "edge": lambda folder: tiny.tiny_transformers_dir(
        folder, tie_word_embeddings=True, partial_rotary_factor=1.0, **LAYOUT
    ),
    "0414": lambda folder: tiny.tiny_transformers_dir(folder, model_type="glm4", **LAYOUT),
    "z1": lambda folder: tiny.tiny_transformers_dir(
        folder, model_type="glm4", attention_bias=False, template=THINKS, thinks=True, **LAYOUT
    ),
}


def made(folder, family):
    """A model directory of a family, float16."""
    place = MAKERS[family](folder)
    if family == "tiny":
        return place
    file = place / "model.safetensors"
    weights = {name: np.array(a) for name, a in load_state_dict(place).items()}
    names = [n for n in weights if "embed" in n or "output_layer" in n or "lm_head" in n]
    if len(names) == 2:
        embedding, output = (weights[n] for n in sorted(names, key=lambda n: "embed" not in n))
        output *= 0.2
        output[CYCLE] = embedding[np.roll(CYCLE, 7)]
    for name in weights:
        if any(word in name for word in BRANCHES):
            weights[name] *= 0.25
    write_safetensors(file, {name: a.astype(np.float16) for name, a in weights.items()})
    fields = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**fields, "torch_dtype": "float16"}))
    return place


def adapter_of(folder, place, **options):
    """An adapter with random tensors beside a model."""
    model = glmlora.AutoModel.from_pretrained(folder, compute_dtype="float32")
    names = list(families.of(model.config.family).linears)
    config = glmlora.LoraConfig(target_modules=names, r=4, lora_alpha=8, **options)
    peft = glmlora.get_peft_model(model, config)
    rng = np.random.default_rng(0)
    state = {n: rng.normal(0, 0.05, a.shape) for n, a in peft.adapter_state("default").items()}
    peft.set_adapter_state("default", {n: a.astype(np.float32) for n, a in state.items()})
    peft.save_pretrained(place)
    return place
