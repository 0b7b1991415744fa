"""Names and loops against the installed transformers: every parameter of its generation and
tokenizers works here, means nothing, or is refused by name, and each claim is tried. A release that
brings a new one fails here until somebody decides what it is.
"""

import inspect

import numpy as np
import pytest
from tiny import tiny_model_dir, tiny_tokenizer_dir

import glmlora
from glmlora.generation.unsupported import NOTHING, REFUSED

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


def parameters(function):
    """Names of a function's parameters, without self, *args and **kwargs."""
    found = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name for p in found if p.kind not in kinds and p.name != "self"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tiny_model_dir(tmp_path_factory.mktemp("signatures"), padded_vocab_size=640)
    tiny_tokenizer_dir(directory)
    return glmlora.AutoModel.from_pretrained(directory)


@pytest.fixture(scope="module")
def tokenizer(model):
    return glmlora.AutoTokenizer.from_pretrained(model.name_or_path, family="v3")


def check(call, peer, refused, works):
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
        check(glmlora.GenerationConfig, fields, set(REFUSED), NOTHING | known)
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

        peer = parameters(self.peer.GenerationMixin.generate)
        check(call, peer, set(REFUSED), works)
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
        works = parameters(method) | {"verbose"}
        check(
            lambda **options: method(*given, **options),
            parameters(getattr(self.peer.PreTrainedTokenizer, name)),
            refused,
            works - {"padding_side"},
        )

    def test_names_of_tokenizers(self, tokenizer):
        absent = {  # of the public ones; what they would be for
            *("push_to_hub", "register_for_auto_class", "pretrained_vocab_files_map"),  # the hub
            *("convert_added_tokens", "convert_to_native_format", "clean_up_tokenization"),
            *("slow_tokenizer_class", "vocab_files_names", "added_tokens_decoder"),
            *("added_tokens_encoder", "pad_token_type_id", "max_len_single_sentence"),
            *("max_len_sentences_pair", "prepare_for_tokenization", "truncate_sequences"),
            *("create_token_type_ids_from_sequences", "save_chat_templates", "save_vocabulary"),
            *("encode_message_with_chat_template", "parse_response"),
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
        assert parameters(theirs.__init__) <= parameters(own.__init__)


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
