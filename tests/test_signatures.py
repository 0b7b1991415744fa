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
from tiny import tiny_model_dir, tiny_tokenizer_dir

import glmlora
from glmlora import compat
from glmlora.generation.unsupported import NOTHING, REFUSED

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
    "modules_to_save": Refused(["output_layer"], []),
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
    "use_dora": Refused(True, False),
    "velora_config": Refused({"a": 1}),
    "alora_invocation_tokens": Refused([1]),
    "use_qalora": Refused(True, False),
    "qalora_group_size": Nothing(32),
    "monteclora_config": Refused({"a": 1}),
    "layer_replication": Refused([[0, 1]]),
    "runtime_config": Nothing({"ephemeral_gpu_offload": True}),
    "lora_bias": Refused(True, False),
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


# transformers


# Values that are tried where one of a name's own is needed; others get `1`.
VALUES = {
    "bad_words_ids": [[9]],
    "early_stopping": True,
    "eos_token_id": 2,
    "force_words_ids": [[9]],
    "max_new_tokens": 3,
    "num_return_sequences": 1,
    "stop_strings": "zz",
    "suppress_tokens": [9],
    "begin_suppress_tokens": [9],
    "tokenizer_kwargs": {"a": 1},
    "sequence_bias": [[[9], 1.0]],
    "guidance_scale": 1.5,
    "diversity_penalty": 0.5,
    "typical_p": 0.5,
    "encoder_repetition_penalty": 1.5,
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "padding_side": "right",
    "chat_template": "{{ messages }}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tiny_model_dir(tmp_path_factory.mktemp("signatures"), padded_vocab_size=640)
    tiny_tokenizer_dir(directory)
    return glmlora.AutoModel.from_pretrained(directory)


@pytest.fixture(scope="module")
def tokenizer(model):
    return glmlora.AutoTokenizer.from_pretrained(model.name_or_path, family="v3")


def check_parameters(call, peer, refused, works):
    """Every name of `peer` is in one of the two, and what is refused is refused by name."""
    unknown = peer - refused - works
    assert not unknown, f"neither works nor is refused: {sorted(unknown)}"
    for name in sorted(peer & refused):
        with pytest.raises((ValueError, TypeError), match=name):
            call(**{name: VALUES.get(name, 1)})


class TestTransformers:
    @pytest.fixture(autouse=True)
    def peer(self):
        self.peer = pytest.importorskip("transformers", reason="transformers is not installed")

    def test_fields_of_generation_config(self, model):
        known = set(glmlora.GenerationConfig().to_dict())
        fields = {n for n in vars(self.peer.GenerationConfig()) if not n.startswith("_")}
        assert not known & (NOTHING | set(REFUSED)) and not NOTHING & set(REFUSED)
        check_parameters(glmlora.GenerationConfig, fields, set(REFUSED), NOTHING | known)
        for name in fields & NOTHING:
            glmlora.GenerationConfig(**{name: "anything"})
        neutral = self.peer.GenerationConfig().to_dict()
        neutral = {n: v for n, v in neutral.items() if not n.startswith("_")}
        ids = np.array([[5, 6]])
        given = {**neutral, "max_new_tokens": 3, "eos_token_id": [2]}
        wanted = model.generate(ids, max_new_tokens=3, eos_token_id=[2])
        assert np.array_equal(model.generate(ids, **given), wanted)

    def test_defaults_of_generation_config(self):
        config = self.peer.GenerationConfig
        if not hasattr(config, "_get_default_generation_params"):
            pytest.skip("an older transformers, which has them in the constructor")
        own = glmlora.GenerationConfig().to_dict()
        for name, value in config._get_default_generation_params().items():
            if name in own and name != "max_length":  # which is told where it is missing
                assert own[name] == value, name
            elif name in REFUSED:
                assert value in REFUSED[name][0], name

    def test_parameters_of_generate(self, model):
        works = set(inspect.signature(model.generate).parameters) | NOTHING

        def call(**given):
            return model.generate([[5, 6]], max_new_tokens=1, **given)

        peer = set(names_of(self.peer.GenerationMixin.generate))
        check_parameters(call, peer, set(REFUSED), works)
        for name in peer & NOTHING:
            call(**{name: None})

    @pytest.mark.parametrize(
        "name", ["__call__", "encode", "decode", "batch_decode", "pad", "apply_chat_template"]
    )
    def test_parameters_of_tokenizers(self, tokenizer, name):
        from glmlora.encoding import DecodeOptions, EncodeOptions, TemplateOptions

        refused = {
            "decode": DecodeOptions,
            "batch_decode": DecodeOptions,
            "apply_chat_template": TemplateOptions,
        }.get(name, EncodeOptions)
        refused = set(refused.__annotations__) - {"verbose"}
        given = {
            "decode": [[5]],
            "batch_decode": [[[5]]],
            "pad": [{"input_ids": [5]}],
            "apply_chat_template": [[{"role": "user", "content": "a"}]],
        }.get(name, ["a"])
        method = getattr(tokenizer, name)
        works = set(names_of(method)) | {"verbose"}
        check_parameters(
            lambda **options: method(*given, **options),
            set(names_of(getattr(self.peer.PreTrainedTokenizer, name))),
            refused,
            works - {"padding_side"},
        )

    def test_members_of_tokenizers(self, tokenizer):
        absent = {  # of the public ones; what they would be for
            *("push_to_hub", "register_for_auto_class", "pretrained_vocab_files_map"),  # the hub
            *("convert_added_tokens", "convert_to_native_format", "clean_up_tokenization"),
            *("slow_tokenizer_class", "vocab_files_names", "added_tokens_decoder"),
            *("added_tokens_encoder", "pad_token_type_id", "max_len_single_sentence"),
            *("max_len_sentences_pair", "prepare_for_tokenization", "truncate_sequences"),
            *("create_token_type_ids_from_sequences", "save_chat_templates", "save_vocabulary"),
            *("get_chat_template", "encode_message_with_chat_template", "parse_response"),
            *("get_response_parser", "SPECIAL_TOKENS_ATTRIBUTES", "prepare_seq2seq_batch"),
            *("as_target_tokenizer", "sanitize_special_tokens", "extra_special_tokens"),
        }
        public = {n for n in dir(self.peer.PreTrainedTokenizer) if not n.startswith("_")}
        missing = {n for n in public - absent if not hasattr(tokenizer, n)}
        assert not missing, missing

    @pytest.mark.parametrize(
        "name",
        [
            *("TextStreamer", "TextIteratorStreamer", "StoppingCriteria", "StoppingCriteriaList"),
            *("LogitsProcessor", "LogitsProcessorList", "MaxLengthCriteria", "MaxTimeCriteria"),
            *("EosTokenCriteria", "StopStringCriteria"),
        ],
    )
    def test_classes_take_what_theirs_take(self, name):
        own, theirs = getattr(glmlora, name), getattr(self.peer, name)
        assert set(names_of(theirs.__init__)) <= set(names_of(own.__init__))


BEAMS = {"num_beams": 3}
LOOPS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "least": {"min_length": 12, "bad_words_ids": [[81], [85, 85]]},
    "beams": BEAMS,
    "early": {**BEAMS, "early_stopping": True, "num_return_sequences": 2},
    "never": {**BEAMS, "early_stopping": "never", "length_penalty": 2.0},
    "shorter": {**BEAMS, "early_stopping": "never", "length_penalty": -1.0},
    "suppressed": {**BEAMS, "suppress_tokens": [4, 81], "begin_suppress_tokens": [28, 85]},
    "renormalized": {**BEAMS, "suppress_tokens": list(range(40)), "renormalize_logits": True},
    "ended": {**BEAMS, "forced_eos_token_id": 8, "min_new_tokens": 4},
    "allowed": {**BEAMS, "prefix_allowed_tokens_fn": lambda row, ids: [7 + row, 20, 21, 40]},
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A model, and one of transformers whose scores are its."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    peer = pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.modeling_outputs import CausalLMOutput

    own = glmlora.AutoModel.from_pretrained(tiny_model_dir(tmp_path_factory.mktemp("loops")))

    class Config(peer.PretrainedConfig):
        model_type = "loops"

    class Model(peer.PreTrainedModel, peer.GenerationMixin):
        config_class = Config

        def __init__(self):
            super().__init__(Config(num_hidden_layers=1))
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **kwargs):
            scores = own(input_ids.numpy(), use_cache=False).logits
            return CausalLMOutput(logits=torch.tensor(scores))

        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            return {"input_ids": input_ids}

    return own, Model()


class TestLoops:
    """transformers' own loops over this package's scores give the same ids."""

    @pytest.mark.parametrize("name", LOOPS)
    def test_ids_and_scores(self, theirs, name):
        import torch

        own, peer = theirs
        given = {"max_new_tokens": 10, "pad_token_id": 95, "return_dict_in_generate": True}
        given |= {"output_scores": "num_beams" not in LOOPS[name], **LOOPS[name]}
        for seed, ends in ((0, list(range(40, 60))), (1, list(range(0, 90, 3)))):
            ids = np.random.default_rng(seed).integers(3, 95, (2, 6))
            found = own.generate(ids, eos_token_id=ends, **given)
            more = {} if given["output_scores"] else {"output_scores": True}
            want = peer.generate(torch.tensor(ids), eos_token_id=ends, **given | more)
            assert np.array_equal(found.sequences, want.sequences.numpy())
            if more:
                near = found.sequences_scores - want.sequences_scores.numpy()
                assert np.abs(near).max() < 1e-4
                continue
            for step, (a, b) in enumerate(zip(found.scores, want.scores, strict=True)):
                going = ~np.isin(found.sequences[:, 6 : 6 + step], ends).any(axis=1)
                assert np.allclose(a[going], b.numpy()[going], atol=1e-3)
