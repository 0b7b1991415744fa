"""chat and stream_chat: arguments, prompts, answers, histories, streaming, the cache."""

import gc
import inspect
import queue
import threading

import numpy as np
import pytest
from tiny import tiny_model_dir, tiny_tokenizer_dir

import glmlora
from glmlora import tell
from glmlora.families import prompt, rounds
from glmlora.generation import cache, scheduler
from glmlora.generation import chat as chats
from glmlora.generation.cache import CachedRow

VOCABULARY = 640
SAMPLING = dict(temperature=1.5, top_k=0, top_p=1.0)


def made(tmp_path_factory, family):
    directory = tiny_model_dir(
        tmp_path_factory.mktemp(family),
        padded_vocab_size=VOCABULARY,
        seq_length=512,
        _name_or_path=f"THUDM/chatglm{family[1]}-6b",
    )
    tiny_tokenizer_dir(directory)
    model = glmlora.AutoModel.from_pretrained(directory)
    return model, glmlora.AutoTokenizer.from_pretrained(directory, trust_remote_code=True)


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    return made(tmp_path_factory, "v2")


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    return made(tmp_path_factory, "v3")


class Scripted:
    """A logits processor that makes the model say given ids, in order."""

    def __init__(self, ids, vocabulary=VOCABULARY):
        self.ids, self.said, self.vocabulary = list(ids), 0, vocabulary

    def __call__(self, context, scores):
        out = np.full_like(scores, -50.0)
        out[0, self.ids[self.said]] = 50.0
        self.said += 1
        return out


def said(tokenizer, text, end=2):
    return [*tokenizer.text_ids(text), end]


def test_chat_returns_text_and_a_new_history(v2):
    model, tokenizer = v2
    history = [("Q", "A")]
    script = Scripted(said(tokenizer, " It is 1. \n"))
    response, told = model.chat(tokenizer, "你好", history=history, logits_processor=[script])
    assert response == "It is 1."
    assert told == [("Q", "A"), ("你好", "It is 1.")] and isinstance(told[1], tuple)
    assert history == [("Q", "A")]
    response, told = model.chat(
        tokenizer, "a", logits_processor=[Scripted(said(tokenizer, "[[训练时间]]"))]
    )
    assert (response, told) == ("2023年", [("a", "2023年")])


def test_chat_asks_with_the_families_prompt(v2, v3):
    for (model, tokenizer), history in (
        (v2, [["q", "a"], ("q2", 3)]),
        (v3, [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]),
    ):
        seen = []

        def look(context, scores, seen=seen):
            seen.append(context[0].tolist())
            return scores

        model.chat(tokenizer, "你好", history, logits_processor=[look], max_new_tokens=1)
        assert seen == [prompt.chat_ids(tokenizer, "你好", history)]


def test_positional_arguments_and_defaults(v2, v3, monkeypatch):
    found = []
    real = chats._settings

    def spy(model, tokenizer, fields, config=None):
        found.append(dict(fields))
        return real(model, tokenizer, {**fields, "max_new_tokens": 1}, config)

    monkeypatch.setattr(chats, "_settings", spy)
    for (model, tokenizer), role in ((v2, ()), (v3, ("user",))):
        model.chat(tokenizer, "a")
        assert {k: found[-1][k] for k in ("max_length", "num_beams", "do_sample")} == {
            "max_length": 8192,
            "num_beams": 1,
            "do_sample": True,
        }
        assert found[-1]["top_p"] == found[-1]["temperature"] == 0.8
        model.chat(tokenizer, "a", [], *role, 500, 1, False, 0.7, 0.95, None)
        assert found[-1]["max_length"] == 500 and found[-1]["do_sample"] is False
        assert (found[-1]["top_p"], found[-1]["temperature"]) == (0.7, 0.95)
        out = list(
            model.stream_chat(tokenizer, "a", [], *role, None, 500, False, 0.7, 0.95, None, True)
        )
        assert found[-1]["max_length"] == 500 and all(len(o) == 3 for o in out)
        with pytest.raises(TypeError, match="positional"):
            model.chat(tokenizer, "a", [], *role, 500, 1, False, 0.7, 0.95, None, 3)
        with pytest.raises(TypeError, match="'max_length' twice"):
            model.chat(tokenizer, "a", [], *role, 500, max_length=3)
        settings = real(model, tokenizer, {})
        assert settings.top_k == 50 and settings.repetition_penalty == 1.0


def test_unknown_and_bad_arguments(v2):
    model, tokenizer = v2
    with pytest.raises(TypeError, match="max_new_token'"):
        model.chat(tokenizer, "a", max_new_token=3)
    with pytest.raises(TypeError, match="query"):
        model.chat(tokenizer, None)
    with pytest.raises(ValueError, match="temperature"):
        model.chat(tokenizer, "a", temperature=-1)
    with pytest.raises(ValueError, match=r"history\[0\]"):
        model.chat(tokenizer, "a", history=["b"])
    with pytest.raises(ValueError, match=r"max_length: prompt of \d+ tokens.*max_length is 5"):
        model.chat(tokenizer, "a", max_length=5)
    with pytest.raises(ValueError, match=r"prompt of \d+ tokens.*512"):
        model.chat(tokenizer, "word " * 600)
    for name in ("max_new_token", "num_beam"):
        stream = model.stream_chat(tokenizer, "a", **{name: 3})  # nothing runs yet
        assert inspect.isgenerator(stream)
        with pytest.raises(TypeError, match=name):
            next(stream)
    with pytest.raises(TypeError, match="past_key_values"):
        next(model.stream_chat(tokenizer, "a", past_key_values=[1]))


def test_greedy_chat_is_generate(v2):
    model, tokenizer = v2
    ids = prompt.chat_ids(tokenizer, "你好")
    out = model.generate([ids], max_new_tokens=30, eos_token_id=2)[0, len(ids) :]
    want = rounds.process_response(tokenizer.decode(out))
    assert model.chat(tokenizer, "你好", max_new_tokens=30, temperature=0)[0] == want
    assert model.chat(tokenizer, "你好", max_new_tokens=30, do_sample=False)[0] == want
    cold = model.chat(tokenizer, "你好", max_new_tokens=30, temperature=0.001)[0]
    assert cold == want
    beams = model.chat(tokenizer, "你好", max_new_tokens=5, num_beams=3, do_sample=False)[0]
    by_generate = model.generate([ids], max_new_tokens=5, num_beams=3, eos_token_id=2)
    assert beams == tokenizer.decode(by_generate[0, len(ids) :]).strip()


def test_a_full_answer_keeps_its_last_token(v2, v3):
    for model, tokenizer in (v2, v3):
        ids = tokenizer.text_ids("title 12345")
        script = Scripted([*ids, 2])
        response, _ = model.chat(tokenizer, "a", logits_processor=[script], max_new_tokens=len(ids))
        assert response == "title 12345"


def test_seed_and_history_of_calls(v2):
    model, tokenizer = v2
    settings = dict(max_new_tokens=20, **SAMPLING)
    glmlora.set_seed(3)
    first = [model.chat(tokenizer, "a", **settings)[0] for _ in range(3)]
    assert len(set(first)) == 3
    model.chat(tokenizer, "something longer " * 5, max_new_tokens=2)
    glmlora.set_seed(3)
    assert [model.chat(tokenizer, "a", **settings)[0] for _ in range(3)] == first
    one = model.chat(tokenizer, "a", seed=5, **settings)
    assert one == model.chat(tokenizer, "a", seed=5, **settings)
    stream = list(model.stream_chat(tokenizer, "a", seed=5, **settings))
    assert one[0].startswith(stream[-1][0])  # a half character at the very end is not shown


def test_stream_yields_the_whole_text_so_far(v2):
    model, tokenizer = v2
    ids = said(tokenizer, "a 你好 b")
    stream = list(model.stream_chat(tokenizer, "x", logits_processor=[Scripted(ids)]))
    texts = [t for t, _ in stream]
    assert texts[-1] == "a 你好 b" and texts[-2] == texts[-1]  # the end shows the last text again
    assert all(b.startswith(a) for a, b in zip(texts, texts[1:], strict=False))
    assert [h for _, h in stream] == [[("x", t)] for t in texts]


def test_stream_holds_back_half_characters(v2):
    model, tokenizer = v2
    wave = tokenizer.text_ids("\N{WAVING HAND SIGN}")
    assert len(wave) > 4  # bytes
    script = Scripted([*wave, *tokenizer.text_ids("ok")[1:], 2])
    texts = [t for t, _ in model.stream_chat(tokenizer, "x", logits_processor=[script])]
    assert not any("\ufffd" in t for t in texts)
    assert texts[0] == "\N{WAVING HAND SIGN}"
    cut = list(
        model.stream_chat(tokenizer, "x", logits_processor=[Scripted(wave)], max_new_tokens=3)
    )
    assert cut == []


def full_ids(tokenizer, first, answer_ids, second):
    ids = prompt.chat_ids(tokenizer, first) + answer_ids
    return ids + prompt.stream_ids(tokenizer, second, 2)


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_past_key_values(family, request):
    model, tokenizer = request.getfixturevalue(family)
    answer = tokenizer.text_ids("one two three")
    script = Scripted([*answer, 2])
    *_, (text, history, past) = model.stream_chat(
        tokenizer, "x", logits_processor=[script], return_past_key_values=True
    )
    assert text == "one two three"
    want = full_ids(tokenizer, "x", answer, "y")
    held = past.rows.cache.lengths[0]
    assert held == len(want) - len(prompt.stream_ids(tokenizer, "y", 2))  # without the end id
    seen = []

    def look(context, scores):
        seen.append(context[0].tolist())
        return scores

    settings = dict(max_new_tokens=8, do_sample=False, return_past_key_values=True)
    *_, (text, _, later) = model.stream_chat(
        tokenizer, "y", history, past_key_values=past, logits_processor=[look], **settings
    )
    assert seen[0] == want
    alone = model.generate([want], max_new_tokens=8, eos_token_id=chats.end_ids(model, tokenizer))
    assert later.ids[len(want) :] == [
        i for i in alone[0, len(want) :] if i not in chats.end_ids(model, tokenizer)
    ]
    # The first past is still good, although the cache went on meanwhile.
    *_, (again, _, _) = model.stream_chat(tokenizer, "y", history, past_key_values=past, **settings)
    assert again == text


def test_a_loop_left_early_goes_on_with_what_was_shown(v2):
    model, tokenizer = v2
    answer = tokenizer.text_ids("one two three four")
    stream = model.stream_chat(
        tokenizer, "x", logits_processor=[Scripted([*answer, 2])], return_past_key_values=True
    )
    for text, history, past in stream:  # noqa: B007
        if len(text) > 6:
            break
    stream.close()
    shown = past.ids[len(prompt.chat_ids(tokenizer, "x")) :]
    assert tokenizer.decode(shown).strip() == text
    assert past.rows.cache.lengths[0] == len(past.ids) - 1  # the last shown token is not in it
    seen = []

    def look(context, scores):
        seen.append(context[0].tolist())
        return scores

    list(
        model.stream_chat(
            tokenizer, "y", history, past_key_values=past, logits_processor=[look], max_new_tokens=1
        )
    )
    assert seen[0] == full_ids(tokenizer, "x", shown, "y")


def test_history_without_a_cache_sends_everything(v2):
    model, tokenizer = v2
    seen = []

    def look(context, scores):
        seen.append(context[0].tolist())
        return scores

    history = [("q", "a")]
    list(
        model.stream_chat(
            tokenizer,
            "y",
            history,
            logits_processor=[look],
            max_new_tokens=1,
            return_past_key_values=True,
        )
    )
    assert seen[0] == prompt.chat_ids(tokenizer, "y", history)


def test_a_cache_of_other_weights_or_another_model_is_refused(v2, v3):
    model, tokenizer = v2
    *_, (_, _, past) = model.stream_chat(
        tokenizer, "x", max_new_tokens=5, return_past_key_values=True, do_sample=False
    )
    other, other_tokenizer = v3
    with pytest.raises(ValueError, match="another model"):
        next(other.stream_chat(other_tokenizer, "y", past_key_values=past))
    peft = glmlora.get_peft_model(model, glmlora.LoraConfig(r=2, init_lora_weights=False), seed=0)
    try:
        with pytest.raises(RuntimeError, match="weights changed"):
            list(model.stream_chat(tokenizer, "y", past_key_values=past, max_new_tokens=2))
        model.chat(tokenizer, "y", max_new_tokens=2)  # the model's own cache starts anew
    finally:
        peft.unload()


def test_roles_and_tools_of_chatglm3(v3):
    model, tokenizer = v3
    end = tokenizer.get_command("<|user|>")
    script = Scripted(said(tokenizer, "\n fine", end))
    history = [{"role": "system", "content": "s"}]
    response, told = model.chat(tokenizer, "x", history, logits_processor=[script])
    assert response == "fine" and len(history) == 1
    assert told[1:] == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "metadata": "", "content": "fine"},
    ]
    tools = [{"role": "system", "content": "s", "tools": [{"name": "find"}]}]
    call = "find\n```python\ntool_call(a=1)\n```"
    observation = tokenizer.get_command("<|observation|>")
    script = Scripted(said(tokenizer, call, observation))
    response, told = model.chat(tokenizer, "x", tools, logits_processor=[script])
    assert response == {"name": "find", "parameters": {"a": 1}}
    script = Scripted(said(tokenizer, "\n done"))
    response, told = model.chat(
        tokenizer, "42", told, role="observation", logits_processor=[script]
    )
    assert response == "done" and told[-2] == {"role": "observation", "content": "42"}
    evil = "find\n```python\ntool_call(a=__import__('os').getcwd())\n```"
    script = Scripted(said(tokenizer, evil, observation))
    response, _ = model.chat(tokenizer, "x", tools, logits_processor=[script])
    assert response["name"] == "find" and "content" in response
    with pytest.raises(ValueError, match="role"):
        model.chat(tokenizer, "x", role="robot")
    streamed = list(
        model.stream_chat(
            tokenizer, "x", tools, logits_processor=[Scripted(said(tokenizer, call, observation))]
        )
    )
    assert streamed[-1][0] == {"name": "find", "parameters": {"a": 1}}


def test_chat_prints_nothing(v2, capfd):
    model, tokenizer = v2
    model.chat(tokenizer, "a", max_new_tokens=3)
    list(model.stream_chat(tokenizer, "a", max_new_tokens=3))
    out, err = capfd.readouterr()
    assert out == "" and err == ""


def test_an_opening_is_computed_once(v2, monkeypatch):
    """A second turn, and a fresh question that begins alike, feed only what is new, also where the
    cache must grow; after the weights changed everything is fed again."""
    model, tokenizer = v2
    monkeypatch.setattr(cache, "CAPACITY_STEP", 1)
    monkeypatch.setattr(scheduler, "ROOM", (4, 1 << 20))
    fed = []

    def count(rows, which, choose=False, extend=CachedRow.extend):
        fed.append(sum(len(rows.ids[r]) - rows.held[r] for r in which))
        return extend(rows, which, choose)

    monkeypatch.setattr(CachedRow, "extend", count)
    settings = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": []}
    opening = "a long opening that is the same in every question, word by word: "

    def ask(query, history=()):
        fed.clear()
        answer, after = model.chat(tokenizer, query, list(history), **settings)
        return answer, after, fed[0]

    length = len(tokenizer(opening)["input_ids"])
    _, after, first = ask(opening + "one")
    assert first >= length
    answer, _, second = ask(opening + "and another")
    assert second < first - length / 2
    _, _, turn = ask("next", after)
    assert turn < first
    model.cached_row = None
    assert ask(opening + "and another")[0] == answer
    model.core.enable_lora(True)  # other weights, as far as the cache knows
    again, _, anew = ask(opening + "and another")
    assert anew > length and again == answer


def test_many_chats_use_one_cache(v2):
    model, tokenizer = v2

    def ask(n):
        for i in range(n):
            model.chat(tokenizer, f"question {i}", max_new_tokens=2, temperature=0.01)

    ask(3)
    cache, objects = model.cached_row.cache, len(gc.get_objects())
    allocations = model.core.allocations
    ask(200)
    gc.collect()
    assert model.cached_row.cache is cache
    assert model.core.allocations == allocations
    assert len(gc.get_objects()) - objects < 200
    stream = model.stream_chat(tokenizer, "x", max_new_tokens=5)
    next(stream)
    assert model.cached_row is None  # whoever streams owns it
    model.chat(tokenizer, "in between", max_new_tokens=2)
    stream.close()
    assert model.cached_row is not None


def test_the_cache_is_no_larger_than_needed(v2):
    model, tokenizer = v2
    model.cached_row = None
    model.chat(tokenizer, "x", do_sample=False, max_new_tokens=3)
    assert model.cached_row.cache.capacity == 256


def test_chat_through_peft(v2):
    model, tokenizer = v2
    before = model.chat(tokenizer, "x", max_new_tokens=6, do_sample=False)
    peft = glmlora.get_peft_model(model, glmlora.LoraConfig(r=2), seed=0).half().float().eval()
    try:
        assert peft.chat(tokenizer, "x", history=[], max_new_tokens=6, do_sample=False) == before
        assert (
            list(peft.stream_chat(tokenizer, "x", max_new_tokens=6, do_sample=False))[-1] == before
        )
        own = model.generation_config
        peft.generation_config = glmlora.GenerationConfig(max_new_tokens=2, eos_token_id=[])
        assert peft.generate([[5, 6]]).shape == (1, 4)
        peft.generation_config = own
    finally:
        peft.unload()


def test_a_prefix_may_come_after_a_chat(tmp_path):
    directory = tiny_model_dir(tmp_path, padded_vocab_size=VOCABULARY)
    tokenizer = glmlora.AutoTokenizer.from_pretrained(tiny_tokenizer_dir(directory))
    model = glmlora.AutoModel.from_pretrained(directory)
    config = glmlora.PrefixTuningConfig(num_virtual_tokens=3, init_std=3.0)
    glmlora.save_prefix(glmlora.get_peft_model(model, config, seed=0), tmp_path / "p")
    other = glmlora.AutoModel.from_pretrained(directory)
    before = other.chat(tokenizer, "x", max_new_tokens=8, do_sample=False)
    glmlora.load_prefix(other, tmp_path / "p")
    assert other.chat(tokenizer, "x", max_new_tokens=8, do_sample=False) != before


def test_a_fresh_prefix_is_noticed_once(tmp_path):
    directory = tiny_model_dir(tmp_path, padded_vocab_size=VOCABULARY)
    tokenizer = glmlora.AutoTokenizer.from_pretrained(tiny_tokenizer_dir(directory))
    config = glmlora.AutoConfig.from_pretrained(directory, pre_seq_len=4)
    model = glmlora.AutoModel.from_pretrained(directory, config=config)
    for ask in (
        lambda: model.chat(tokenizer, "x", max_new_tokens=1),
        lambda: list(model.stream_chat(tokenizer, "x", max_new_tokens=1)),
        lambda: model.generate([[5]], max_new_tokens=1),
        lambda: list(model.stream_generate([[5]], max_new_tokens=1)),
    ):
        model.prefix_is_fresh = True
        with pytest.warns(UserWarning, match="prefix") as found:
            ask()
        assert [w.filename for w in found] == [__file__]
        ask()


def test_batch_chat_gives_what_chat_gives(v2, v3):
    queries = [f"{'Order. ' * 9}Paper {i}: {'x ' * (7 * i % 11)}" for i in range(7)]
    for model, tokenizer in (v2, v3):
        for kwargs in (dict(temperature=0), dict(seed=3, **SAMPLING), SAMPLING):
            kwargs = {"max_new_tokens": 9, **kwargs}
            glmlora.set_seed(11)
            alone = [model.chat(tokenizer, q, history=[], **kwargs)[0] for q in queries]
            for at_once in (16, 3):
                glmlora.set_seed(11)
                assert model.batch_chat(tokenizer, queries, at_once=at_once, **kwargs) == alone
        assert model.batch_chat(tokenizer, []) == []
        beams = model.batch_chat(tokenizer, queries[:2], num_beams=2, do_sample=False)
        assert beams[1] == model.chat(tokenizer, queries[1], num_beams=2, do_sample=False)[0]
        with pytest.raises(TypeError, match="query"):
            model.batch_chat(tokenizer, ["a", 3])
        with pytest.raises(TypeError, match="temperatur"):
            model.batch_chat(tokenizer, ["a"], temperatur=1)


def test_what_the_last_chat_began_with_is_not_computed_again(v2, monkeypatch):
    model, tokenizer = v2
    opening = "Order. " * 30
    fed = []
    original = CachedRow.extend

    def count(self, rows, choose=False):
        fed.append(sum(len(self.ids[r]) - self.held[r] for r in rows))
        return original(self, rows, choose)

    settings = dict(temperature=0, max_new_tokens=1)
    model.cached_row = None
    want = model.chat(tokenizer, opening + "B", **settings)[0]
    model.cached_row = None
    monkeypatch.setattr(CachedRow, "extend", count)
    model.chat(tokenizer, opening + "A", **settings)
    assert model.chat(tokenizer, opening + "B", **settings)[0] == want
    assert fed[0] > 50 and fed[1] < 20
    model.requires_grad_(True)
    model.prepare_training()  # the weights are other ones as far as the cache knows
    model.requires_grad_(False)
    model.chat(tokenizer, opening + "B", **settings)
    assert fed[2] == fed[0]
    model.cached_row = None


def test_signatures_name_every_argument(v2):
    model, _ = v2
    fields = set(glmlora.GenerationConfig().to_dict())
    fields |= set(
        "generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn".split()
    )
    for method, own in (
        (model.chat, "tokenizer query history positional role streamer"),
        (model.batch_chat, "tokenizer queries at_once role"),
        (
            model.stream_chat,
            "tokenizer query history positional role past_key_values return_past_key_values",
        ),
        (
            model.generate,
            "input_ids attention_mask position_ids streamer tokenizer inputs past_key_values",
        ),
    ):
        shown = inspect.signature(method).parameters
        assert set(shown) == fields | set(own.split()), method
    defaults = {n: p.default for n, p in inspect.signature(model.chat).parameters.items()}
    assert defaults["max_length"] == 8192 and defaults["top_p"] == 0.8 and defaults["top_k"] == 50
    assert model.chat.__name__ == "chat" and "One turn" in model.chat.__doc__


def test_chats_start_from_the_models_settings(v2, v3, monkeypatch):
    for model, tokenizer in (v2, v3):
        config = glmlora.GenerationConfig(max_new_tokens=3, eos_token_id=[], repetition_penalty=1.3)
        monkeypatch.setattr(model, "generation_config", config)
        asked = chats._settings(model, tokenizer, {"temperature": 0.3})
        assert asked.repetition_penalty == 1.3 and asked.temperature == 0.3
        assert asked.eos == chats.end_ids(model, tokenizer)
        ids = prompt.chat_ids(tokenizer, "x")
        ends = set(chats.end_ids(model, tokenizer))
        steps = len(list(model.stream_chat(tokenizer, "x", do_sample=False)))
        for settings, most in (({}, 3), ({"max_new_tokens": 2}, 2)):
            model.chat(tokenizer, "x", do_sample=False, **settings)
            said = model.cached_row.ids[0][len(ids) :]
            assert len(said) == most or ends & set(said)
        assert steps <= 3
        own = glmlora.GenerationConfig(max_new_tokens=1)
        model.chat(tokenizer, "x", do_sample=False, generation_config=own)
        assert len(model.cached_row.ids[0]) == len(ids) + 1
        config.eos_token_id = [5]
        assert chats._settings(model, tokenizer, {}).eos == [*chats.end_ids(model, tokenizer), 5]
        batch = model.batch_chat(tokenizer, ["x"], do_sample=False)
        assert batch == [model.chat(tokenizer, "x", do_sample=False)[0]]


@pytest.mark.parametrize(
    ("method", "given", "error", "message"),
    [
        ("chat", {"histroy": []}, TypeError, "chat: .*'histroy' .did you mean 'history'"),
        ("chat", {"rol": "user"}, TypeError, "did you mean 'role'"),
        ("chat", {"role": "system"}, ValueError, "role: ChatGLM2 knows only 'user', got 'system'"),
        ("chat", {"stop": ["a"]}, TypeError, "did you mean 'stop_strings'"),
        ("chat", {"num_return_sequences": 2}, ValueError, "num_return_sequences.*use generate"),
        ("chat", {"return_dict_in_generate": True}, ValueError, "return_dict.*use generate"),
        ("chat", {"typical_p": 0.5}, ValueError, "typical_p"),
        ("chat", {"generation_config": {}}, TypeError, "generation_config"),
        ("chat", {"num_beams": 2, "streamer": glmlora.BaseStreamer()}, ValueError, "beams"),
        ("stream_chat", {"past_key_value": 1}, TypeError, "stream_chat.*'past_key_values'"),
        ("stream_chat", {"streamer": None}, TypeError, "stream_chat.*'streamer'"),
        ("batch_chat", {"at_once": 0}, ValueError, "at_once: expected a whole number from 1"),
        ("batch_chat", {"at_onc": 1}, TypeError, "batch_chat.*'at_once'"),
    ],
)
def test_names_and_values_that_chats_refuse(v2, method, given, error, message):
    model, tokenizer = v2
    if "streamer" in given and given["streamer"]:
        given["streamer"].end = lambda: None
    asked = ["x"] if method == "batch_chat" else "x"
    with pytest.raises(error, match=message):
        for _ in getattr(model, method)(tokenizer, asked, max_new_tokens=1, **given):
            pass


def test_arguments_in_the_wrong_place(v2):
    model, tokenizer = v2
    with pytest.raises(TypeError, match="queries: expected a list of texts, got one text"):
        model.batch_chat(tokenizer, "abc")
    for other in (None, "chatglm2-6b"):
        for ask in (model.chat, lambda *given: next(model.stream_chat(*given))):
            with pytest.raises(TypeError, match="tokenizer: expected what AutoTokenizer"):
                ask(other, "x")


def test_chats_tell_what_has_no_effect(v2, monkeypatch, recwarn):
    model, tokenizer = v2
    monkeypatch.setattr(tell, "_told", set())
    for _ in range(2):
        model.chat(tokenizer, "x", do_sample=False, temperature=0.1, max_new_tokens=1)
        model.chat(tokenizer, "x", max_length=100, max_new_tokens=1, length_penalty=2.0)
        list(model.stream_chat(tokenizer, "x", num_beams=2, max_new_tokens=1))
    assert [str(w.message) for w in recwarn] == [
        "chat: temperature: no effect without do_sample=True",
        "chat: length_penalty: no effect with num_beams=1",
        "chat: max_length: no effect beside max_new_tokens",
        "stream_chat: num_beams: no effect, tokens are shown as they are chosen",
    ]
    assert {w.filename for w in recwarn} == {__file__}
    model.chat(tokenizer, "x", do_sample=False, max_new_tokens=1)
    for other in ({"max_new_tokens": 3}, None):
        with pytest.raises(TypeError, match=f"generation_config: .*got {type(other).__name__}"):
            model.generation_config = other


def test_criteria_and_stop_strings_end_an_answer(v2):
    model, tokenizer = v2
    ids = said(tokenizer, "one two three four")
    settings = {"stop_strings": ["o three", "xyz"]}
    for answer in (
        model.chat(tokenizer, "x", logits_processor=[Scripted(ids)], **settings),
        list(model.stream_chat(tokenizer, "x", logits_processor=[Scripted(ids)], **settings))[-1],
    ):
        assert answer[0] == "one two three"
    ends = glmlora.StopStringCriteria(tokenizer, "o three")
    for text, ended in (("one two three", True), ("one two three four", False), ("three", False)):
        row = np.array([[*tokenizer.text_ids(text)]])
        assert ends(row, None).tolist() == [ended], text
    first = len(prompt.chat_ids(tokenizer, "x")) + 2
    answer, _ = model.chat(
        tokenizer,
        "x",
        logits_processor=[Scripted(ids)],
        stopping_criteria=[lambda row, scores: row.shape[1] == first],
    )
    assert answer == tokenizer.decode(ids[:2]).strip()


# Streamers


def test_text_streamers_print_what_is_said(v2, capsys):
    model, tokenizer = v2
    wave = tokenizer.text_ids("a \N{WAVING HAND SIGN} b")
    shown = []

    class Kept(glmlora.TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            shown.append((text, stream_end))

    ids = np.array([tokenizer.encode("the prompt")])
    settings = {"max_new_tokens": len(wave), "eos_token_id": []}
    for streamer in (Kept(tokenizer, skip_prompt=True), Kept(tokenizer)):
        shown.clear()
        script = Scripted(wave)
        out = model.generate(ids, streamer=streamer, logits_processor=[script], **settings)
        text = "".join(t for t, _ in shown)
        skip = streamer.skip_prompt
        assert text == tokenizer.decode(out[0, ids.shape[1] :] if skip else out[0])
        assert [end for _, end in shown] == [False] * (len(shown) - 1) + [True]
        assert not any("\ufffd" in t for t, _ in shown)
    printed = glmlora.TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    for _ in range(2):  # it can be used again
        model.chat(tokenizer, "x", logits_processor=[Scripted([*wave, 2])], streamer=printed)
        assert capsys.readouterr().out == "a \N{WAVING HAND SIGN} b\n"
    with pytest.raises(ValueError, match="one row, got 2"):
        model.generate(np.repeat(ids, 2, axis=0), streamer=printed, **settings)
    with pytest.raises(ValueError, match="expected one row of ids, got 2"):
        printed.put(np.ones((2, 3), int))


def test_another_thread_reads_what_is_generated(v2):
    model, tokenizer = v2
    ids = np.array([tokenizer.encode("the prompt")])
    settings = {"max_new_tokens": 20, "eos_token_id": []}
    want = tokenizer.decode(model.generate(ids, **settings)[0, ids.shape[1] :])
    failed = []
    for given in (settings, {"max_new_tokens": 10_000}, {"max_new_token": 3}):
        streamer = glmlora.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)

        def work(given=given, streamer=streamer):
            try:
                model.generate(ids, streamer=streamer, **given)
            except (ValueError, TypeError) as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        text = "".join(streamer)  # ends where generation fails, too
        thread.join()
        assert text == (want if given is settings else "")
    assert len(failed) == 2
    with pytest.raises(queue.Empty):
        next(glmlora.TextIteratorStreamer(tokenizer, timeout=0.01))
