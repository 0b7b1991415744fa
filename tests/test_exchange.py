"""Files exchanged with the libraries that users come from: torch, safetensors, peft, transformers.

They are not needed otherwise: where one is absent, its tests skip.
"""

import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY_CONFIG, tiny_model_dir

import glmlora
from glmlora import LoraConfig, PeftModel, get_peft_model
from glmlora.families import Family
from glmlora.task import Task

torch = pytest.importorskip("torch", reason="torch is not installed: exchange is not tested")
V = TINY_CONFIG["padded_vocab_size"]
ATOL = 1e-4


@pytest.fixture
def directory(tmp_path):
    return tiny_model_dir(tmp_path)


@pytest.fixture(scope="module")
def reference():
    """golden/reference.py, the families in plain torch under the checkpoints' names."""
    from conftest import SHARED

    file = SHARED / "golden" / "reference.py"
    if not file.is_file():
        pytest.skip("../shared/golden is absent: it is not part of the project")
    spec = importlib.util.spec_from_file_location("golden_reference", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["golden_reference"] = module
    spec.loader.exec_module(module)
    return module


def load(directory, **kwargs):
    return glmlora.AutoModel.from_pretrained(directory, **kwargs)


def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, V, (2, 10))
    return {"input_ids": ids, "labels": np.where(np.arange(10) < 4, -100, ids)}


def ours(model):
    return model(batch()["input_ids"]).logits


def theirs(model):
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # the adapter is in it; peft passes names it does not take
    with torch.no_grad():
        out = model(torch.tensor(batch()["input_ids"]))
    return out.logits.float().numpy()


def trained(model, steps=3):
    opt = glmlora.AdamW(model, lr=1e-2)
    for _ in range(steps):
        model.backward(**batch())
        opt.step()
    return model


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("size", ["10GB", "9KB"])
def test_torch_opens_our_bin_files(directory, tmp_path, dtype, size):
    model = load(directory).to(dtype)
    model.save_pretrained(tmp_path / "bin", safe_serialization=False, max_shard_size=size)
    found = {}
    for file in sorted((tmp_path / "bin").glob("*.bin")):
        found.update(torch.load(file, weights_only=True))
    want = model.state_dict()
    assert set(found) == set(want)
    for n, t in found.items():
        assert str(t.dtype) == f"torch.{dtype}"
        assert np.array_equal(t.float().numpy(), want[n].astype(np.float32)), n


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_opens_our_files(directory, tmp_path, dtype):
    load_file = pytest.importorskip("safetensors.torch").load_file
    model = load(directory).to(dtype)
    model.save_pretrained(tmp_path / "safe")
    found, want = load_file(tmp_path / "safe" / "model.safetensors"), model.state_dict()
    assert set(found) == set(want)
    for n, t in found.items():
        assert str(t.dtype) == f"torch.{dtype}"
        assert np.array_equal(t.float().numpy(), want[n].astype(np.float32)), n


def test_we_open_what_torch_and_safetensors_write(directory, tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = load(directory)
    for kind, cast in (
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
    ):
        state = {n: torch.tensor(a).to(cast) for n, a in model.state_dict().items()}
        for name, write in (
            ("pytorch_model.bin", lambda f, state=state: torch.save(state, f)),
            ("model.safetensors", lambda f, state=state: save_file(state, f)),
        ):
            target = tmp_path / f"{kind}-{name}"
            target.mkdir()
            (target / "config.json").write_text((directory / "config.json").read_text())
            write(target / name)
            again = load(target)
            assert again.dtype == kind
            for n, a in again.state_dict().items():
                assert np.array_equal(a.astype(np.float32), state[n].float().numpy()), n


def test_weights_given_as_torch_tensors(directory):
    model = load(directory)
    state = {n: torch.tensor(a) * 2 for n, a in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(np.array_equal(a, state[n].numpy()) for n, a in model.state_dict().items())
    ids = torch.tensor(batch()["input_ids"])
    assert np.array_equal(model(input_ids=ids).logits, ours(model))
    assert load(directory, torch_dtype=torch.float16).dtype == "float16"
    assert load(directory).to(torch.bfloat16).dtype == "bfloat16"


def test_the_reference_computes_the_same(reference, directory):
    assert np.abs(theirs(reference.load(directory)) - ours(load(directory))).max() < ATOL


SETTINGS = [
    {"r": 8, "lora_alpha": 32.0, "lora_dropout": 0.1},
    {"r": 4, "lora_alpha": 8, "target_modules": list(Family.linears), "use_rslora": True},
    {"r": 4, "target_modules": ["query_key_value", "output_layer"]},
    {"r": 4, "target_modules": ["dense"], "rank_pattern": {"layers.1.self_attention.dense": 2}},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("safe", [True, False])
def test_peft_loads_our_adapter(reference, directory, tmp_path, settings, safe):
    peft = pytest.importorskip("peft")
    model = trained(
        get_peft_model(load(directory), LoraConfig(task_type="CAUSAL_LM", **settings), seed=1)
    )
    model.set_prompt_template("vendored")  # a file that PEFT does not look at
    model.save_pretrained(tmp_path / "a", safe_serialization=safe)
    other = peft.PeftModel.from_pretrained(reference.load(directory), str(tmp_path / "a")).eval()
    assert np.abs(theirs(other) - ours(model)).max() < ATOL
    assert np.abs(theirs(other) - ours(load(directory))).max() > 0.01  # the adapter does something
    loaded = {n for n, _ in other.named_parameters() if "lora" in n}
    assert {n.replace(".default", "") for n in loaded} == set(model.state_dict())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("safe", [True, False])
def test_we_load_pefts_adapter(reference, directory, tmp_path, settings, safe):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = {"target_modules": ["query_key_value"], **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    other = peft.get_peft_model(reference.load(directory), config).eval()
    for n, p in other.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    other.save_pretrained(str(tmp_path / "b"), safe_serialization=safe)
    model = PeftModel.from_pretrained(load(directory), tmp_path / "b")
    assert np.abs(theirs(other) - ours(model)).max() < ATOL
    assert np.abs(theirs(other) - ours(load(directory))).max() > 0.01
    # trained on here, and read by peft again
    model = PeftModel.from_pretrained(load(directory), tmp_path / "b", is_trainable=True)
    trained(model).save_pretrained(tmp_path / "c")
    again = peft.PeftModel.from_pretrained(reference.load(directory), str(tmp_path / "c")).eval()
    assert np.abs(theirs(again) - ours(model)).max() < ATOL
    merged = again.merge_and_unload()
    assert np.abs(theirs(merged) - ours(model.merge_and_unload())).max() < ATOL


def glm_names(state, config):
    """A ChatGLM2 state dict under the names of transformers' Glm classes."""
    out = {
        "model.embed_tokens.weight": state["transformer.embedding.word_embeddings.weight"],
        "model.norm.weight": state["transformer.encoder.final_layernorm.weight"],
        "lm_head.weight": state["transformer.output_layer.weight"],
    }
    D = config.kv_channels
    sizes = [config.num_attention_heads * D] + [config.multi_query_group_num * D] * 2
    cuts = np.cumsum(sizes)[:-1]
    for i in range(config.num_layers):
        here, there = f"transformer.encoder.layers.{i}.", f"model.layers.{i}."
        for kind in ("weight", "bias"):
            fused = state[f"{here}self_attention.query_key_value.{kind}"]
            for name, part in zip("qkv", np.split(fused, cuts), strict=True):
                out[f"{there}self_attn.{name}_proj.{kind}"] = part
        for a, b in (
            ("self_attention.dense", "self_attn.o_proj"),
            ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
            ("mlp.dense_4h_to_h", "mlp.down_proj"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
        ):
            out[f"{there}{b}.weight"] = state[f"{here}{a}.weight"]
    return {n: torch.tensor(np.ascontiguousarray(a, np.float32)) for n, a in out.items()}


def test_lora_plus_as_peft_has_it(reference, directory, tmp_path):
    """Three updates by peft's optimiser and by ours from the same adapter: the same weights."""
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    config = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    model = get_peft_model(load(directory), config, seed=1)
    model.save_pretrained(tmp_path / "a")
    other = peft.PeftModel.from_pretrained(
        reference.load(directory), str(tmp_path / "a"), is_trainable=True
    )
    settings = {"lr": 1e-3, "loraplus_lr_ratio": 16}
    their_step = create_loraplus_optimizer(
        other, torch.optim.AdamW, loraplus_weight_decay=0.1, **settings
    )
    our_step = glmlora.AdamW(model, weight_decay=0.1, **settings)
    tensors = {n: torch.tensor(v) for n, v in batch().items()}
    for _ in range(3):
        logits = other.get_base_model()(tensors["input_ids"]).logits[:, :-1]
        labels = tensors["labels"][:, 1:]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        their_step.step()
        their_step.zero_grad()
        model.backward(**batch())
        our_step.step()
    found = model.state_dict()
    for n, value in other.named_parameters():
        if ".lora_" in n:
            same = found[n.replace(".default", "")]
            assert np.abs(same - value.detach().numpy()).max() < 1e-4, n


def test_a_merged_directory_loads_in_transformers(directory, tmp_path):
    transformers = pytest.importorskip("transformers")
    adapter = LoraConfig(r=4, lora_alpha=16, target_modules=list(Family.linears))
    merged = trained(get_peft_model(load(directory), adapter, seed=1)).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", safe_serialization=False)
    stored = torch.load(tmp_path / "merged" / "pytorch_model.bin", weights_only=True)
    config = merged.config
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["hidden_size"] == 32
    glm = transformers.GlmForCausalLM(
        transformers.GlmConfig(
            vocab_size=config.padded_vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.multi_query_group_num,
            head_dim=config.kv_channels,
            rms_norm_eps=config.layernorm_epsilon,
            max_position_embeddings=config.seq_length,
            attention_bias=True,
            partial_rotary_factor=0.5,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    ).eval()
    state = {n: t.float().numpy() for n, t in stored.items()}
    glm.load_state_dict(glm_names(state, config), strict=True)
    assert np.abs(theirs(glm) - ours(merged)).max() < ATOL
    ids = torch.tensor(batch()["input_ids"])
    want = glm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    ).numpy()
    assert np.array_equal(merged.generate(ids.numpy(), max_new_tokens=12, eos_token_id=[]), want)
    for beams, penalty in ((2, 1.0), (3, 1.0), (4, 3.0)):
        ends = [t for t in range(V) if t % 5 > penalty]
        settings = dict(
            max_new_tokens=8,
            num_beams=beams,
            eos_token_id=ends,
            pad_token_id=1,
            length_penalty=penalty,
        )
        want = glm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_return_sequences=beams,
            **settings,
        ).numpy()
        found = merged.generate(ids.numpy(), num_return_sequences=beams, **settings)
        assert np.array_equal(found, want)


def test_prefix_files_open_in_torch(directory, tmp_path):
    config = glmlora.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True)
    model = trained(get_peft_model(load(directory), config, seed=0))
    glmlora.save_prefix(model, tmp_path / "p")
    state = torch.load(tmp_path / "p" / "pytorch_model.bin", weights_only=True)
    want = model.state_dict()
    assert set(state) == set(want)
    assert all(np.array_equal(t.numpy(), want[n]) for n, t in state.items())
    # and a file that torch wrote, tensors passed as THUDM's documentation does
    config = glmlora.AutoConfig.from_pretrained(directory, pre_seq_len=3, prefix_projection=True)
    again = load(directory, config=config)
    prefix = "transformer.prefix_encoder."
    again.transformer.prefix_encoder.load_state_dict(
        {n[len(prefix) :]: t for n, t in state.items()}
    )
    assert np.array_equal(ours(again), ours(model))


CODE = {
    "configuration_toy.py": """
from transformers import PretrainedConfig

class ToyConfig(PretrainedConfig):
    model_type = "chatglm"
""",
    "modeling_toy.py": """
import torch
from transformers import PreTrainedModel
from .configuration_toy import ToyConfig

class Toy(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = torch.nn.Module()
        size = config.padded_vocab_size, config.hidden_size
        self.transformer.embedding = torch.nn.Module()
        self.transformer.embedding.word_embeddings = torch.nn.Embedding(*size)
        self.transformer.output_layer = torch.nn.Linear(*size[::-1], bias=False)
        self.post_init()

    def _init_weights(self, module):
        pass
""",
    "tokenization_toy.py": """
from transformers import PreTrainedTokenizer

class ToyTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}

    def __init__(self, vocab_file=None, **kwargs):
        self.vocab_file = vocab_file
        super().__init__(**kwargs)

    vocab_size = 9

    def get_vocab(self):
        return {}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return 3

    def _convert_id_to_token(self, index):
        return "x"
""",
}
CODE_MAP = {"AutoConfig": "configuration_toy.ToyConfig", "AutoModel": "modeling_toy.Toy"}


@pytest.mark.parametrize("kind", ["saved", "sharded", "merged", "full", "bin"])
def test_transformers_opens_our_folders(tmp_path, kind):
    """By the base's own code, which is copied, with the base's own settings of generation."""
    transformers = pytest.importorskip("transformers")
    from training import model_dir, run

    base, out = Path(model_dir(tmp_path)), tmp_path / "out"
    for name, text in CODE.items():
        (base / name).write_text(text)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": CODE_MAP}))
    auto_map = {"AutoTokenizer": ["tokenization_toy.ToyTokenizer", None]}
    (base / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": auto_map, "tokenizer_class": "ToyTokenizer"})
    )
    (base / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.25}')
    model = load(base, family="v2")
    if kind == "full":
        run(str(base), out, finetuning_type="full", max_steps=1, family="chatglm2")
        model = load(out)
    else:
        if kind == "merged":
            model = get_peft_model(model, LoraConfig(r=2)).merge_and_unload()
        size = "40KB" if kind == "sharded" else "10GB"
        model.save_pretrained(out, max_shard_size=size, safe_serialization=kind != "bin")
    trust = {"trust_remote_code": True}
    theirs = transformers.AutoModel.from_pretrained(out, **trust)
    for name, tensor in theirs.state_dict().items():
        assert np.array_equal(tensor.float().numpy(), model.state_dict()[name]), name
    assert transformers.AutoTokenizer.from_pretrained(out, **trust).vocab_file == str(
        out / "tokenizer.model"
    )
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.top_p == 0.25 and generation.do_sample is True
    # what transformers saves again opens here
    theirs.config.save_pretrained(tmp_path / "again")
    again = glmlora.AutoConfig.from_pretrained(tmp_path / "again", family="v2")
    assert again.arch() == model.config.arch()


def test_torch_files_without_checksums_and_with_shared_tensors(directory, tmp_path):
    state = {n: torch.tensor(a) for n, a in load(directory).state_dict().items()}
    output = "transformer.output_layer.weight"
    state["lm_head.weight"] = state[output]  # one storage, two names
    state["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4)
    state = {f"module.{n}": t for n, t in state.items()}
    config = torch.utils.serialization.config.save
    config.compute_crc32 = False
    try:
        torch.save(state, tmp_path / "pytorch_model.bin")
    finally:
        config.compute_crc32 = True
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    assert np.array_equal(ours(load(tmp_path)), ours(load(directory)))


def test_a_model_that_safetensors_saved_with_tied_weights(directory, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    model = torch.nn.Module()
    weights = {n: torch.tensor(a) for n, a in load(directory).state_dict().items()}
    names = ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight")
    weights[names[1]] = weights[names[0]]
    for name, tensor in weights.items():
        *path, leaf = name.split(".")
        place = model
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    place = model.transformer
    place.output_layer.weight = place.embedding.word_embeddings.weight
    library.save_model(model, str(tmp_path / "model.safetensors"))
    assert len(library.load_file(tmp_path / "model.safetensors")) == len(weights) - 1
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    state = load(tmp_path).state_dict()
    assert np.array_equal(state[names[1]], weights[names[0]].numpy())


def test_every_keyword_of_transformers_is_known(tmp_path):
    """Those in its signatures, and those that its code takes out of its keyword arguments."""
    transformers = pytest.importorskip("transformers")
    from training import model_dir
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    folder = model_dir(tmp_path, _name_or_path="THUDM/chatglm2-6b")
    model, tokenizer = load(folder), glmlora.AutoTokenizer.from_pretrained(folder)
    base = transformers.PreTrainedTokenizerBase
    for call, *theirs in (
        (
            lambda **given: load(folder, **given),
            _BaseAutoModelClass.from_pretrained,
            transformers.PreTrainedModel.from_pretrained,
        ),
        (
            lambda **given: glmlora.AutoConfig.from_pretrained(folder, **given),
            transformers.AutoConfig.from_pretrained,
            transformers.PretrainedConfig.from_pretrained,
            transformers.PretrainedConfig._get_config_dict,
        ),
        (
            lambda **given: glmlora.AutoTokenizer.from_pretrained(folder, **given),
            transformers.AutoTokenizer.from_pretrained,
            base.from_pretrained,
        ),
        (
            lambda **given: model.save_pretrained(tmp_path / "m", **given),
            transformers.PreTrainedModel.save_pretrained,
        ),
        (
            lambda **given: model.config.save_pretrained(tmp_path / "c", **given),
            transformers.PretrainedConfig.save_pretrained,
        ),
        (
            lambda **given: tokenizer.save_pretrained(tmp_path / "t", **given),
            base.save_pretrained,
        ),
    ):
        names = set()
        for function in theirs:
            function = inspect.unwrap(getattr(function, "__func__", function))
            taken = r'kwargs\.(?:pop|get)\(\s*"([a-z]\w*)"'
            names |= set(re.findall(taken, inspect.getsource(function)))
            parameters = inspect.signature(function).parameters.values()
            names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        names -= {"cls", "self", "pretrained_model_name_or_path", "save_directory"}
        assert len(names) > 2
        for name in names:
            call(**{name: "5GB" if name == "max_shard_size" else None})


def test_peft_goes_on_with_our_card(reference, directory, tmp_path):
    """Its own save changes the head of the card that training wrote, and keeps the rest; ours then
    leaves it alone.
    """
    peft = pytest.importorskip("peft")
    task = Task("/m: x", "Judge: ", "{title}", ["title"], ["0", "1"], 60)
    ours = get_peft_model(glmlora.AutoModel.from_pretrained(directory), LoraConfig(r=2), seed=1)
    ours.task = task
    ours.save_pretrained(tmp_path / "a")
    body = (tmp_path / "a" / "README.md").read_text().partition("\n---\n")[2]
    other = peft.PeftModel.from_pretrained(reference.load(directory), str(tmp_path / "a"))
    other.save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    found = pytest.importorskip("huggingface_hub").ModelCard(card)
    assert found.data.library_name == "peft" and "lora" in found.data.tags
    assert set(body.splitlines()) <= set(card.splitlines())
    ours.save_pretrained(tmp_path / "a")
    assert (tmp_path / "a" / "README.md").read_text() == card
