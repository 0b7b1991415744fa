"""Adapters exchanged with peft on transformers' own classes of the layouts `glm` and `glm4`.

torch, transformers and peft are not needed otherwise: where one is absent, these tests skip.
"""

import json

import numpy as np
import pytest
from conftest import SHARED
from test_layouts import IDS, KINDS, LINEARS, write

import glmlora
from glmlora import LoraConfig, PeftModel, get_peft_model

torch = pytest.importorskip("torch", reason="torch is not installed: exchange is not tested")
peft = transformers = None
ATOL = 1e-4
GOLDEN = SHARED / "golden"
FIXTURES = ["hf-glm-tiny", "glm-edge-tiny", "glm4-32b-0414-tiny"]  # with an adapter of peft's
NAMES = [module.rpartition(".")[2] for module in LINEARS]


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """Imported when a test begins, not when it is collected: where they are, other tests of the
    process cannot have this package's modules of their names."""
    global peft, transformers
    peft = pytest.importorskip("peft", reason="peft is not installed: exchange is not tested")
    transformers = pytest.importorskip("transformers")


@pytest.fixture(params=KINDS)
def directory(request, tmp_path):
    return write(tmp_path / "base", request.param)


def kind_of(directory):
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return "tied" if config["tie_word_embeddings"] else config["model_type"]


def load(directory):
    return glmlora.AutoModel.from_pretrained(directory)


def theirs(directory, adapter=None):
    """transformers' model in float32, with the adapter of a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert type(model).__name__ in ("GlmForCausalLM", "Glm4ForCausalLM")
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    return model


def logits(model, ids=IDS):
    if not isinstance(model, torch.nn.Module):
        return model(ids).logits
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.float().numpy()


def trained(model, steps=3):
    optimizer = glmlora.AdamW(model, lr=1e-2)
    for _ in range(steps):
        model.backward(IDS, labels=IDS)
        optimizer.step()
    return model


SETTINGS = {
    "usual": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 4, "target_modules": "all-linear", "use_rslora": True},
    "head": {"r": 4, "target_modules": ["lm_head", "k_proj"]},
    "excluded": {"r": 2, "target_modules": NAMES, "exclude_modules": ["layers.1.mlp.down_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"o_proj": 5},
    },
}


EMBEDDINGS = {"modules_to_save": ["lm_head", "embed_tokens"]}
VARIANTS = {
    "dora": {"r": 4, "lora_alpha": 8, "target_modules": NAMES, "use_dora": True},
    "dora head": {"r": 4, "target_modules": ["lm_head", "q_proj"], "use_dora": True},
    "rsdora": {"r": 4, "target_modules": ["k_proj"], "use_dora": True, "use_rslora": True},
    "bias": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "saved": {"r": 4, "target_modules": ["q_proj"], **EMBEDDINGS},
    "saved norm": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
    "dora saved": {"r": 4, "target_modules": ["v_proj"], "use_dora": True, **EMBEDDINGS},
}
SETTINGS |= VARIANTS


@pytest.mark.parametrize("settings", SETTINGS)
def test_peft_reads_what_we_trained(directory, tmp_path, settings):
    config = LoraConfig(task_type="CAUSAL_LM", **SETTINGS[settings])
    model = trained(get_peft_model(load(directory), config, seed=1))
    model.save_pretrained(tmp_path / "adapter")
    other = theirs(directory, tmp_path / "adapter")
    assert np.abs(logits(other) - logits(model)).max() < ATOL
    assert np.abs(logits(other) - logits(theirs(directory))).max() > 0.01
    theirs_again = peft.get_peft_model_state_dict(other, save_embedding_layers=False)
    assert set(theirs_again) == set(model.state_dict())
    if kind_of(directory) == "tied" and settings in ("bias", "head", "dora head"):
        return  # a linear without bias, an output layer that is the embeddings: not merged
    merged = other.merge_and_unload()
    assert np.abs(logits(merged) - logits(model.merge_and_unload())).max() < ATOL


@pytest.mark.parametrize("settings", SETTINGS)
def test_we_read_what_peft_made(directory, tmp_path, settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **SETTINGS[settings])
    other = peft.get_peft_model(theirs(directory), config).eval()
    for name, parameter in other.named_parameters():
        if parameter.requires_grad and ("magnitude" in name or "modules_to_save" in name):
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
    if kind_of(directory) == "tied" and EMBEDDINGS.items() <= SETTINGS[settings].items():
        both = [p for n, p in other.named_parameters() if "modules_to_save" in n]
        both[1].data = both[0].data
    other.save_pretrained(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(load(directory), tmp_path / "adapter")
    assert np.abs(logits(other) - logits(model)).max() < ATOL
    assert np.abs(logits(other) - logits(load(directory))).max() > 0.01


@pytest.mark.parametrize("settings", VARIANTS)
def test_gradients_are_those_of_peft(directory, tmp_path, settings):
    config = LoraConfig(task_type="CAUSAL_LM", **VARIANTS[settings])
    model = trained(get_peft_model(load(directory), config, seed=1))
    model.save_pretrained(tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(
        theirs(directory), str(tmp_path / "adapter"), is_trainable=True
    )
    loss = model.backward(IDS, labels=IDS)
    ids = torch.tensor(IDS)
    found = other(input_ids=ids, labels=ids).loss
    found.backward()
    assert abs(float(found.detach()) - loss) < 1e-5
    compared = 0
    for name, own in model.named_gradients().items():
        module = name.removeprefix("base_model.model.")
        at = {n: p.grad.numpy() for n, p in other.named_parameters() if p.grad is not None}
        names = [n for n in at if plain(n) == module]
        if kind_of(directory) == "tied" and module == "model.embed_tokens.weight":
            names += [n for n in at if plain(n) == "lm_head.weight"]  # the sum
        wanted = sum(at[n] for n in names)
        assert names and np.abs(own - wanted).max() < 1e-5, name
        compared += len(names)
    assert compared == len(at)


BEGINNINGS = {
    "pissa": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]},
    "olora": {"r": 4, "target_modules": ["down_proj"], "use_rslora": True},
}


@pytest.mark.parametrize("how", BEGINNINGS)
def test_an_adapter_that_took_a_part_of_the_base(directory, tmp_path, how):
    """As PEFT stores it, and converted, in both directions."""
    model = get_peft_model(load(directory), LoraConfig(init_lora_weights=how, **BEGINNINGS[how]))
    model.save_pretrained(tmp_path / "begun")
    wanted = logits(trained(model))
    model.save_pretrained(tmp_path / "ours")
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "begun"
    )
    assert np.abs(wanted - logits(load(directory))).max() > 0.01
    for folder in ("ours", "plain"):
        assert np.abs(logits(theirs(directory, tmp_path / folder)) - wanted).max() < ATOL
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=how, **BEGINNINGS[how])
    other = peft.get_peft_model(theirs(directory), config).eval()
    other.save_pretrained(str(tmp_path / "first"))
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    other.save_pretrained(str(tmp_path / "theirs"))
    wanted = logits(other)
    other.save_pretrained(
        str(tmp_path / "their plain"), path_initial_model_for_weight_conversion=tmp_path / "first"
    )
    for folder in ("theirs", "their plain"):
        found = PeftModel.from_pretrained(load(directory), tmp_path / folder)
        assert np.abs(logits(found) - wanted).max() < ATOL


@pytest.mark.parametrize("settings", ["all", "dora", "bias"])
def test_lora_plus_is_that_of_peft(directory, tmp_path, settings):
    from peft.optimizers import create_loraplus_optimizer

    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **SETTINGS[settings])
    if settings == "bias":  # half of a key's bias changes nothing: its gradient is rounding
        config.target_modules = ["q_proj", "v_proj"]
    model = get_peft_model(load(directory), config, seed=1)
    model.save_pretrained(tmp_path / "a")
    other = peft.PeftModel.from_pretrained(
        theirs(directory), str(tmp_path / "a"), is_trainable=True
    )
    rates = {"lr": 1e-3, "loraplus_lr_ratio": 16}
    their_step = create_loraplus_optimizer(other, torch.optim.AdamW, **rates)
    our_step = glmlora.AdamW(model, **rates)
    ids = torch.tensor(IDS)
    for _ in range(3):
        other(input_ids=ids, labels=ids).loss.backward()
        their_step.step()
        their_step.zero_grad()
        model.backward(IDS, labels=IDS)
        our_step.step()
    found = {n.removeprefix("base_model.model."): a for n, a in model.state_dict().items()}
    compared = 0
    for name, value in other.named_parameters():
        if value.requires_grad:
            assert np.abs(found[plain(name)] - value.detach().numpy()).max() < 2e-4, name
            compared += 1
    assert compared == len(found)


def plain(name):
    for part in ("base_model.model.", ".default", ".modules_to_save"):
        name = name.replace(part, "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


@pytest.mark.parametrize("name", FIXTURES)
def test_the_golden_adapters_are_those_of_peft(name):
    """What the fixtures' folder `adapter/` holds gives what peft gives with it today."""
    base = GOLDEN / name
    if not (base / "adapter").is_dir():
        pytest.skip("../shared/golden is absent: it is not part of the project")
    ids = np.load(base / "golden.npz")["single/input_ids"]
    other = theirs(base, base / "adapter")
    model = PeftModel.from_pretrained(load(base).float(), base / "adapter")
    assert np.abs(logits(other, ids) - logits(model, ids)).max() < ATOL
    assert np.abs(logits(other, ids) - logits(theirs(base), ids)).max() > 0.01
