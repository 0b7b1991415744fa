"""Our signatures beside those of the libraries that users come from. Each parameter there works
here, means nothing here and is documented so, or is refused by name: the tables say which, and the
tests check it by calling.
"""

import importlib
import inspect
import re
import warnings

import numpy as np
import pytest
from tiny import tiny_model_dir

import glmlora
from glmlora import compat

STAND_INS = ("peft", "transformers")
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def names_of(function):
    """Names of a function's parameters, without self and the variadic ones."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind not in VARIADIC and p.name != "self"]


def load(directory):
    return glmlora.AutoModel.from_pretrained(directory)


def tensors(model):
    return {n: a.tobytes() for n, a in sorted(model.state_dict().items())}


def weights(model):
    return {n: np.asarray(a).tobytes() for n, a in sorted(model.state_dict().items())}


class Nothing:
    """A value that is taken and changes nothing."""

    def __init__(self, value):
        self.value = value


class Refused:
    """A value whose error names the parameter. usual: one that is taken, as it asks for nothing."""

    def __init__(self, value, usual=None):
        self.value, self.usual = value, usual


def check(theirs, table, call, document, same=None):
    """Every parameter of `theirs` stands in the table, and is here what the table says.

    table: name -> a value that works, Nothing or Refused. call(**keywords): our function, with what
    it needs besides; same(result): what must not change where a value means nothing.
    """
    assert set(names_of(theirs)) == set(table), "the table knows other parameters"
    usual = same(call()) if same else None
    for name, claim in table.items():
        if isinstance(claim, Refused):
            with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
                call(**{name: claim.value})
            if claim.usual is not None:
                call(**{name: claim.usual})
        elif isinstance(claim, Nothing):
            assert re.search(rf"\b{name}\b", document), f"{name}: means nothing, undocumented"
            found = call(**{name: claim.value})
            if same:
                assert same(found) == usual, name
        else:
            call(**{name: claim})


LORA = {
    "task_type": "CAUSAL_LM",
    "peft_type": "LORA",
    "auto_mapping": {"a": "b"},
    "peft_version": Nothing("0.1"),
    "base_model_name_or_path": "somewhere",
    "revision": "main",
    "inference_mode": True,
    "r": 3,
    "target_modules": "all-linear",
    "exclude_modules": ["dense"],
    "lora_alpha": 3,
    "lora_dropout": 0.5,
    "fan_in_fan_out": Nothing(True),  # false, with a warning
    "bias": Refused("all", "none"),
    "use_rslora": True,
    "modules_to_save": ["output_layer"],
    "init_lora_weights": "gaussian",
    "layers_to_transform": [1],
    "layers_pattern": Refused("layers", []),  # alone; works with layers_to_transform
    "rank_pattern": {"dense": 2},
    "alpha_pattern": {"dense": 2},
    "megatron_config": Nothing({"a": 1}),
    "megatron_core": Nothing("other"),
    "trainable_token_indices": Refused([1], []),
    "loftq_config": Nothing({"loftq_bits": 4}),
    "eva_config": Nothing({"rho": 2.0}),
    "corda_config": Nothing({"a": 1}),
    "lora_ga_config": Nothing({"a": 1}),
    "use_dora": True,
    "velora_config": Refused({"a": 1}),
    "alora_invocation_tokens": Refused([1]),
    "use_qalora": Refused(True, False),
    "qalora_group_size": Nothing(32),
    "monteclora_config": Refused({"a": 1}),
    "layer_replication": Refused([[0, 1]]),
    "runtime_config": Nothing({"ephemeral_gpu_offload": True}),
    "lora_bias": True,
    "target_parameters": Refused(["a"], []),
    "use_bdlora": Refused({"a": 1}),
    "arrow_config": Refused({"a": 1}),
    "kasa_config": Refused({"a": 1}),
    "ensure_weight_tying": Nothing(True),
}
PREFIX = {
    "task_type": "CAUSAL_LM",
    "peft_type": "PREFIX_TUNING",
    "auto_mapping": Nothing({"a": "b"}),
    "peft_version": Nothing("0.1"),
    "base_model_name_or_path": Nothing("somewhere"),
    "revision": Nothing("main"),
    "inference_mode": True,
    "num_virtual_tokens": 4,
    "token_dim": Nothing(32),
    "num_transformer_submodules": Nothing(1),
    "num_attention_heads": Nothing(4),
    "num_layers": Nothing(2),
    "modules_to_save": Refused(["a"], []),
    "init_weights": Refused("zero"),
    "encoder_hidden_size": Refused(9),
    "prefix_projection": True,
}
LOADING = {
    "autocast_adapter_dtype": Nothing(False),
    "ephemeral_gpu_offload": Nothing(True),
    "low_cpu_mem_usage": Nothing(True),
    "key_mapping": Refused({"a": "b"}, {}),
}


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model_dir(tmp_path_factory.mktemp("signatures"))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("signatures") / "adapter"
    config = glmlora.LoraConfig(r=2, init_lora_weights=False, base_model_name_or_path=str(base))
    glmlora.get_peft_model(load(base), config, seed=1).save_pretrained(path)
    return path


class TestPeft:
    """Against PEFT 0.21; a version with other parameters makes a test fail that says so."""

    def test_lora_config(self, peft):
        def call(**keywords):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fan_in_fan_out
                return glmlora.LoraConfig(**keywords)

        ours = glmlora.LoraConfig
        check(peft.LoraConfig, LORA, call, ours.__doc__, lambda config: config.to_dict())
        for name in ("r", "lora_alpha", "lora_dropout", "bias", "inference_mode", "use_rslora"):
            assert getattr(ours(), name) == getattr(peft.LoraConfig(), name), name

    def test_prefix_tuning_config(self, peft):
        def call(**keywords):
            return glmlora.PrefixTuningConfig(**{"num_virtual_tokens": 3, **keywords})

        document = glmlora.PrefixTuningConfig.__doc__
        check(peft.PrefixTuningConfig, PREFIX, call, document, lambda config: config.to_dict())

    def test_from_pretrained(self, peft, base, adapter):
        def call(**keywords):
            given = {"model": load(base), "model_id": adapter, **keywords}
            return glmlora.PeftModel.from_pretrained(**given)

        config = glmlora.LoraConfig.from_pretrained(adapter)
        table = {"model": load(base), "model_id": str(adapter), "adapter_name": "other"}
        table |= {"is_trainable": True, "config": config, **LOADING}
        ours = glmlora.PeftModel.from_pretrained
        check(peft.PeftModel.from_pretrained, table, call, ours.__doc__, tensors)
        assert names_of(ours)[: len(table)] == names_of(peft.PeftModel.from_pretrained)
        for name in ("torch_device", "torch_dtype", "dtype", "device_map"):
            assert name in ours.__doc__ and tensors(call(**{name: "cpu"})) == tensors(call())

    def test_load_adapter(self, peft, base, adapter):
        model = glmlora.PeftModel.from_pretrained(load(base), adapter)

        def call(**keywords):
            given = {"model_id": adapter, "adapter_name": f"a{len(model.peft_config)}", **keywords}
            model.load_adapter(**given)

        ours = glmlora.PeftModel.load_adapter
        table = {"model_id": str(adapter), "adapter_name": "other", "is_trainable": True}
        table |= {"torch_device": Nothing("cuda"), **LOADING}
        document = ours.__doc__ + glmlora.PeftModel.from_pretrained.__doc__
        check(peft.PeftModel.load_adapter, table, call, document)
        assert names_of(ours)[: len(table)] == names_of(peft.PeftModel.load_adapter)

    @pytest.mark.parametrize("make", ["get_peft_model", "PeftModel"])
    def test_making_a_model(self, peft, base, make):
        table = {
            "model": load(base),
            "peft_config": glmlora.LoraConfig(r=2),
            "adapter_name": "other",
            "autocast_adapter_dtype": Nothing(False),
            "low_cpu_mem_usage": Nothing(True),
        }
        if make == "get_peft_model":
            table |= {"mixed": Refused(True, False), "revision": "main"}

        def call(**keywords):
            given = {"model": load(base), "peft_config": glmlora.LoraConfig(r=2), **keywords}
            return getattr(glmlora, make)(**given, seed=1)

        theirs = getattr(peft, make)
        check(theirs, table, call, glmlora.get_peft_model.__doc__, tensors)
        own = names_of(getattr(glmlora, make))
        assert own[: len(table)] == names_of(theirs)

    def test_methods_of_the_wrapper(self, peft, base, adapter, tmp_path):
        model = glmlora.PeftModel.from_pretrained(load(base), adapter)
        theirs, ours = peft.PeftModel, glmlora.PeftModel
        number = iter(range(100))

        def add(**keywords):
            given = {"adapter_name": f"b{next(number)}", "peft_config": glmlora.LoraConfig()}
            model.add_adapter(**{**given, **keywords})

        table = {"adapter_name": "x", "peft_config": glmlora.LoraConfig(r=1)}
        meaningless = {"low_cpu_mem_usage": Nothing(True), "autocast_adapter_dtype": Nothing(False)}
        check(theirs.add_adapter, table | meaningless, add, ours.add_adapter.__doc__)
        table = {"adapter_name": "x", "inference_mode": True}

        def choose(**keywords):
            model.set_adapter(**{"adapter_name": "default", **keywords})

        check(theirs.set_adapter, table, choose, ours.set_adapter.__doc__)
        check(peft.LoraModel.set_adapter, table, choose, ours.set_adapter.__doc__)
        for kind in (theirs, peft.LoraModel):
            choose()
            check(
                kind.delete_adapter,
                {"adapter_name": "b0" if kind is theirs else "b1"},
                lambda adapter_name="b2": (
                    model.delete_adapter(adapter_name) if adapter_name in model.peft_config else 0
                ),
                ours.delete_adapter.__doc__,
            )

        def save(**keywords):
            model.save_pretrained(**{"save_directory": tmp_path / "s", **keywords})

        table = {
            "save_directory": str(tmp_path / "t"),
            "safe_serialization": False,
            "selected_adapters": ["default"],
            "save_embedding_layers": Refused(True, "auto"),
            "is_main_process": False,
            "path_initial_model_for_weight_conversion": Refused("x"),
        }
        check(theirs.save_pretrained, table, save, ours.save_pretrained.__doc__)

        def merge(**keywords):
            fresh = glmlora.PeftModel.from_pretrained(load(base), adapter)
            return fresh.merge_and_unload(**keywords)

        table = {"progressbar": Nothing(True), "safe_merge": True, "adapter_names": ["default"]}
        document = ours.merge_and_unload.__doc__
        check(peft.LoraModel.merge_and_unload, table, merge, document, weights)
        assert names_of(ours.merge_and_unload) == names_of(peft.LoraModel.merge_and_unload)

    def test_functions(self, peft, base, adapter):
        model = glmlora.PeftModel.from_pretrained(load(base), adapter)
        state = glmlora.get_peft_model_state_dict(model)
        table = {
            "model": model,
            "state_dict": state,
            "adapter_name": "default",
            "unwrap_compiled": Nothing(True),
            "save_embedding_layers": Refused(True, "auto"),
        }
        ours = glmlora.get_peft_model_state_dict
        check(
            peft.get_peft_model_state_dict,
            table,
            lambda **keywords: ours(**{"model": model, **keywords}),
            ours.__doc__,
            sorted,
        )
        table = {
            "model": model,
            "peft_model_state_dict": state,
            "adapter_name": "default",
            "ignore_mismatched_sizes": Refused(True, False),
            "low_cpu_mem_usage": Nothing(True),
        }
        ours = glmlora.set_peft_model_state_dict
        check(
            peft.set_peft_model_state_dict,
            table,
            lambda **keywords: ours(**{"model": model, "peft_model_state_dict": state, **keywords}),
            ours.__doc__,
        )
        table = {
            "model": load(base),
            "use_gradient_checkpointing": False,
            "gradient_checkpointing_kwargs": Nothing({"use_reentrant": False}),
            "auto_clear_cache": Nothing(False),
        }
        ours = glmlora.prepare_model_for_kbit_training
        check(
            peft.prepare_model_for_kbit_training,
            table,
            lambda **keywords: ours(**{"model": load(base), **keywords}),
            ours.__doc__,
        )

    def test_configs_and_models_from_a_folder(self, peft, base, adapter):
        ours = glmlora.PeftConfig.from_pretrained
        table = {"pretrained_model_name_or_path": str(adapter), "subfolder": ""}
        check(
            peft.PeftConfig.from_pretrained,
            table,
            lambda **k: ours(**{"pretrained_model_name_or_path": adapter, **k}),
            ours.__doc__,
        )
        ours = glmlora.AutoPeftModelForCausalLM.from_pretrained
        table = {
            "pretrained_model_name_or_path": str(adapter),
            "adapter_name": "other",
            "is_trainable": True,
            "config": glmlora.PeftConfig.from_pretrained(adapter),
            "revision": Nothing("main"),
            "import_allowlist": Nothing(["x"]),
        }
        check(
            peft.AutoPeftModelForCausalLM.from_pretrained,
            table,
            lambda **k: ours(**{"pretrained_model_name_or_path": adapter, **k}),
            ours.__doc__,
            tensors,
        )

    def test_every_method_is_here_or_refused_by_name(self, peft, base, adapter):
        torch = importlib.import_module("torch")
        model = glmlora.PeftModel.from_pretrained(load(base), adapter)
        there = {n for kind in (peft.PeftModel, peft.LoraModel) for n in dir(kind)}
        there -= set(dir(torch.nn.Module)) - {"generate", "parameters", "state_dict"}
        for name in sorted(n for n in there if not n.startswith("_")):
            if not hasattr(model, name):
                with pytest.raises(AttributeError, match=rf"PeftModel\.{name} is not supported"):
                    getattr(model, name)

    def test_every_name_is_here_or_refused_by_name(self, peft):
        names = [n for n in dir(peft) if not n.startswith("_")]
        saved = {n: m for n, m in importlib.sys.modules.items() if n.split(".")[0] in STAND_INS}
        for name in saved:
            del importlib.sys.modules[name]
        compat.install()
        try:
            for name in names:
                try:
                    exec(f"from peft import {name}", {})
                except ImportError as error:
                    assert f"glmlora's stand-in for peft has no '{name}'" in str(error)
        finally:
            compat.uninstall()
            importlib.sys.modules.update(saved)
