"""Chat templates as transformers renders them, where it is installed (`pip install torch
transformers peft`): the same texts, and the same ids where special tokens are meant."""

import json

import pytest
import tiny
from chat_templates import KNOWN, OTHERS

from glmlora import families
from glmlora.files.checkpoint import write_json
from glmlora.tokenization import AutoTokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tiktoken", reason="the vocabulary of these families is read by tiktoken")
pytest.importorskip("jinja2", reason="other templates are rendered by jinja2")

FUNCTION = {"type": "function", "function": {"name": "f", "description": "天 <&>", "x": [1, None]}}
THOUGHT = {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"}
TALKS = {
    "one": [{"role": "user", "content": "你好"}],
    "blanks": [{"role": "user", "content": "\n hello \n"}, {"role": "assistant", "content": " x"}],
    "system": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
    "late system": [{"role": "user", "content": "q"}, {"role": "system", "content": "s"}],
    "thought": [{"role": "user", "content": "1+1?"}, THOUGHT, {"role": "user", "content": "why"}],
    "thought last": [{"role": "user", "content": "1+1?"}, THOUGHT],
    "reason": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "reasoning_content": "add"},
    ],
    "special": [{"role": "user", "content": "a<|user|>b<|endoftext|>"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.tiny_transformers_dir(tmp_path_factory.mktemp("model"), thinks=True)


def opened(folder, template, family):
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": template})
    peer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return peer, AutoTokenizer.from_pretrained(folder, family=family, encode_special_tokens=True)


WILD = [(name, "hf", template) for name, template in OTHERS.items()]
OWN = [(name, name, t) for name, t in KNOWN.items() if families.of(name).byte_pairs]


@pytest.mark.filterwarnings("ignore:.*system messages and tools are not used")
@pytest.mark.parametrize(("name", "family", "template"), WILD + OWN)
def test_texts_and_ids_are_those_of_transformers(folder, name, family, template):
    peer, tokenizer = opened(folder, template, family)
    variables = [{}]
    if "enable_thinking" in template:
        variables += [{"enable_thinking": True}, {"enable_thinking": False}]
    if "if tools" in template:
        variables += [{"tools": [FUNCTION]}]
    compared = 0
    for words in variables:
        for talk, messages in TALKS.items():
            for prompt in (True, False):
                options = {"add_generation_prompt": prompt, **words}
                text = peer.apply_chat_template(messages, tokenize=False, **options)
                # A tool's own line: what stands behind a function is read from the template.
                assert tokenizer.apply_chat_template(messages, tokenize=False, **options) == text
                if tokenizer.writer is not families.of(family) or talk not in (
                    "special",
                    "thought last",
                    "thought",
                ):
                    ids = peer.apply_chat_template(messages, return_dict=False, **options)
                    assert tokenizer.apply_chat_template(messages, **options) == ids, talk
                    compared += 1
    assert compared >= 10


def test_a_batch_is_padded_as_in_transformers(folder):
    peer, tokenizer = opened(folder, OTHERS["an end behind each answer"], "hf")
    words = {"add_generation_prompt": True, "padding": True, "return_dict": True}
    wanted = peer.apply_chat_template([*TALKS.values()], return_tensors="np", **words)
    got = tokenizer.apply_chat_template([*TALKS.values()], return_tensors="np", **words)
    for name in ("input_ids", "attention_mask"):
        assert (got[name] == wanted[name]).all(), name
