"""generate: the token loop, its settings, batches, beams, and what is refused."""

import re
import threading
from itertools import product

import numpy as np
import pytest
from tiny import TINY_CONFIG, tiny_model_dir

import glmlora
from glmlora import seeds, tell
from glmlora.generation import cache, generate, scheduler
from glmlora.generation.cache import CachedRow
from glmlora.generation.config import GenerationConfig, Settings
from glmlora.generation.scheduler import Scheduler, Scores, limits_of
from glmlora.generation.unsupported import NOTHING, REFUSED

V = TINY_CONFIG["padded_vocab_size"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tiny_model_dir(tmp_path_factory.mktemp("generation"))
    return glmlora.AutoModel.from_pretrained(directory)


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(3, V, (1, length))


def padded(prompts):
    width = max(p.shape[1] for p in prompts)
    ids = np.zeros((len(prompts), width), np.int64)
    for row, p in enumerate(prompts):
        ids[row, width - p.shape[1] :] = p[0]
    return ids, (np.arange(width)[None] >= width - np.array([[p.shape[1]] for p in prompts]))


def greedy_by_forward(model, ids, steps):
    ids = np.array(ids)
    for _ in range(steps):
        ids = np.concatenate((ids, model(ids).logits[:, -1].argmax(-1)[:, None]), axis=1)
    return ids


def test_greedy_equals_repeated_forward(model):
    ids = prompt(7)
    out = model.generate(ids, max_new_tokens=20, eos_token_id=[])
    assert out.dtype == np.int64
    assert np.array_equal(out, greedy_by_forward(model, ids, 20))
    assert np.array_equal(
        model.generate(ids, max_new_tokens=20, eos_token_id=[], do_sample=True, temperature=0), out
    )
    assert np.array_equal(model.generate(ids, max_length=27, eos_token_id=[]), out)
    assert np.array_equal(model.generate(ids.tolist(), max_new_tokens=20, eos_token_id=[]), out)


def test_many_steps_in_one_call_are_those_of_single_calls(model):
    """They stop after an end id of any row, at the limit, and when the clock moves."""
    core, ones = model.core, np.ones(2, np.int32)
    ids = prompt(10)[0].astype(np.int32)

    def begun():
        cache = core.cache(2, 48)
        return cache, core.next(cache, [0, 1], ids, [3, 7])

    cache, last = begun()
    single = [last := core.next(cache, [0, 1], last, ones) for _ in range(30)]
    end = single[20][1]
    cache, last = begun()
    several = []
    while len(several) < 30:
        found = core.go_on(cache, [0, 1], last, ones, min(9, 30 - len(several)), [end])
        assert 1 <= len(found) <= 9 and not (found[:-1] == end).any()
        several += list(found)
        last = found[-1]
    assert np.array_equal(several, single)
    assert cache.lengths == [33, 37]
    with pytest.raises(ValueError, match="most, ids: expected 1 or more and an id for each"):
        core.go_on(cache, [0, 1], last, ones, 0, [])
    with pytest.raises(ValueError, match="an id for each of 1 rows, got 1 and 2"):
        core.go_on(cache, [0], last, [2], 1, [])
    with pytest.raises(ValueError, match="do not fit"):
        for _ in range(40):
            core.go_on(cache, [0, 1], last, ones, 40, [])


@pytest.mark.parametrize("rows", [1, 3])
def test_generate_ends_where_its_stream_does(model, rows):
    """Which takes a step at a time. The end id is one that comes on the way."""
    ids = np.concatenate([prompt(5, seed) for seed in range(rows)])
    free = model.generate(ids, max_new_tokens=40, eos_token_id=[])
    for place in (5, 6, 20, 44):
        settings = dict(max_new_tokens=40, eos_token_id=int(free[-1, place]))
        *_, streamed = model.stream_generate(ids, **settings)
        assert np.array_equal(model.generate(ids, **settings), streamed)


def test_prefill_equals_decoding_one_by_one(model):
    ids = prompt(20)[0].tolist()
    at_once = CachedRow(model, 1, 40)
    at_once.ids[0] = ids
    one_by_one = CachedRow(model, 1, 40)
    logits = model([ids]).logits[0]
    for n in range(1, len(ids) + 1):
        one_by_one.ids[0] = ids[:n]
        scores = one_by_one.extend([0])
        assert np.abs(scores[0] - logits[n - 1]).max() < 1e-4
    assert np.abs(at_once.extend([0]) - scores).max() < 1e-4
    assert np.abs(at_once.extend([0]) - scores).max() < 1e-4  # nothing new: the last token again


def test_become_keeps_what_is_shared(model):
    row = CachedRow(model, 1, 40)
    row.ids[0] = [5, 6, 7, 8]
    row.extend([0])
    row.become(0, [5, 6, 9])
    assert row.held == [2] and row.cache.lengths[0] == 2
    fresh = CachedRow(model, 1, 40)
    fresh.ids[0] = [5, 6, 9]
    assert np.abs(row.extend([0]) - fresh.extend([0])).max() < 1e-5


def test_chunks_and_grown_caches_do_not_show(model, monkeypatch):
    ids, steps = prompt(30), 40
    want = model.generate(ids, max_new_tokens=steps, eos_token_id=[])
    monkeypatch.setattr(cache, "CHUNK", 7)
    monkeypatch.setattr(scheduler, "ROOM", (3, 10, 20))
    monkeypatch.setattr(cache, "CAPACITY_STEP", 4)
    assert np.array_equal(model.generate(ids, max_new_tokens=steps, eos_token_id=[]), want)


@pytest.fixture
def fed(monkeypatch):
    """Tokens fed to the core by each call of CachedRow.extend."""
    counts = []

    def count(rows, which, choose=False, extend=CachedRow.extend):
        counts.append(sum(len(rows.ids[r]) - rows.held[r] for r in which))
        return extend(rows, which, choose)

    monkeypatch.setattr(CachedRow, "extend", count)
    return counts


def test_a_cache_that_grows_keeps_what_it_holds(model, monkeypatch, fed):
    monkeypatch.setattr(scheduler, "ROOM", (3, 10, 20))
    monkeypatch.setattr(cache, "CAPACITY_STEP", 4)
    g = GenerationConfig(eos_token_id=[])
    ends = []
    for capacity in (8, 128):
        rows = CachedRow(model, 2, capacity, [7, 8, 9])
        requests = Scheduler(rows, Scores(g, None))
        for row in (prompt(5), prompt(3, seed=2)):
            requests.submit([7, 8, 9, *row[0].tolist()], 14)
        fed.clear()
        for _ in requests.run():
            pass
        assert fed == [8] + [2] * 13
        assert rows.cache.capacity >= 18
        ends.append(rows.ids)
    assert ends[0] == ends[1]
    with pytest.raises(ValueError, match="at most the model's .* positions, got 100000"):
        rows.cache.grow(100_000)


@pytest.mark.parametrize("sample", [False, True])
def test_a_row_of_a_batch_equals_the_row_alone(model, sample):
    prompts = [prompt(n, seed=n) for n in (3, 11, 1, 6)]
    settings = dict(max_new_tokens=25, do_sample=sample, temperature=1.3, top_k=0, seed=3)
    ids, mask = padded(prompts)
    out = model.generate(ids, attention_mask=mask, eos_token_id=list(range(40)), **settings)
    assert np.array_equal(out[:, : ids.shape[1]], ids)
    lengths = set()
    for row, p in enumerate(prompts):
        # The row's random stream is its number, so it is asked for in its place.
        others = [prompt(4, seed=50 + i) for i in range(row)]
        alone_ids, alone_mask = padded([*others, p])
        alone = model.generate(
            alone_ids, attention_mask=alone_mask, eos_token_id=list(range(40)), **settings
        )[row, alone_ids.shape[1] :]
        new = out[row, ids.shape[1] :]
        n = min(len(new), len(alone))
        assert np.array_equal(new[:n], alone[:n]) and not new[n:].any() and not alone[n:].any()
        lengths.add(int(np.count_nonzero(new)))
    assert len(lengths) > 1  # rows ended at different times, and were filled with the pad id 0
    ragged = [p[0].tolist() for p in prompts]
    again = model.generate(ragged, eos_token_id=list(range(40)), **settings)
    assert np.array_equal(again, out)


def test_end_ids_and_lengths(model):
    ids = prompt(5)
    free = model.generate(ids, max_new_tokens=30, eos_token_id=[])[0, 5:]
    end = int(free[10])
    first = int(np.flatnonzero(free == end)[0])
    out = model.generate(ids, max_new_tokens=30, eos_token_id=end)[0, 5:]
    assert np.array_equal(out, free[: first + 1])
    later = model.generate(ids, max_new_tokens=30, eos_token_id=[end, 1], min_length=25)[0, 5:]
    assert len(later) >= 20 and end not in later[:20]
    only = model.generate(ids, max_new_tokens=30, eos_token_id=list(range(V - 1)), min_length=25)
    assert only.shape[1] == 26 and set(only[0, 5:25]) == {V - 1}
    assert only[0, 25] == model(only[:, :25]).logits[0, -1].argmax() != V - 1
    assert model.generate(ids, eos_token_id=[]).shape[1] == TINY_CONFIG["seq_length"]
    assert model.generate(ids, max_length=9, max_new_tokens=2, eos_token_id=[]).shape[1] == 7


def test_sampling_repeats_with_a_seed_and_varies_without(model):
    ids = np.repeat(prompt(6), 3, axis=0)
    settings = dict(max_new_tokens=12, do_sample=True, temperature=1.5, top_k=0, eos_token_id=[])
    a = model.generate(ids, seed=5, **settings)
    assert np.array_equal(a, model.generate(ids, seed=5, **settings))
    assert not np.array_equal(a, model.generate(ids, seed=6, **settings))
    assert not np.array_equal(a[0], a[1])  # each row has a stream of its own
    glmlora.set_seed(1)
    b, c = model.generate(ids, **settings), model.generate(ids, **settings)
    assert not np.array_equal(b, c)
    glmlora.set_seed(1)
    assert np.array_equal(model.generate(ids, **settings), b)
    assert np.array_equal(model.generate(ids, **settings), c)
    threads = glmlora.get_num_threads()
    try:
        glmlora.set_num_threads(1)
        assert np.array_equal(a, model.generate(ids, seed=5, **settings))
    finally:
        glmlora.set_num_threads(threads)


def test_sampling_follows_the_distribution(model):
    ids = prompt(4)
    logits = model(ids).logits[0, -1]
    from glmlora import _core

    want = _core.warp_logits(logits, 1.0, 5, 0.9)
    out = model.generate(
        ids,
        max_new_tokens=1,
        do_sample=True,
        top_k=5,
        top_p=0.9,
        seed=1,
        num_return_sequences=2000,
        eos_token_id=[],
    )
    found = np.bincount(out[:, -1], minlength=V) / 2000
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(want))
    assert np.abs(found - want).max() < 5 * np.sqrt(0.25 / 2000)


def test_narrow_settings_are_greedy(model):
    ids = prompt(4)
    greedy = model.generate(ids, max_new_tokens=10, eos_token_id=[])
    for narrow in ({"top_k": 1}, {"top_p": 0}, {"temperature": 1e-4}, {"top_p": 1e-6}):
        out = model.generate(ids, max_new_tokens=10, eos_token_id=[], do_sample=True, **narrow)
        assert np.array_equal(out, greedy), narrow


def test_num_return_sequences_repeats_each_prompt_in_order(model):
    ids, mask = padded([prompt(3), prompt(5, 1)])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        num_return_sequences=3,
        do_sample=True,
        temperature=2.0,
        seed=0,
        eos_token_id=[],
    )
    assert out.shape == (6, 11)
    assert np.array_equal(out[:, :5], np.repeat(ids, 3, axis=0))
    assert len({tuple(r) for r in out[:, 5:].tolist()}) == 6
    same = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, num_return_sequences=2, eos_token_id=[]
    )
    assert np.array_equal(same[0], same[1]) and np.array_equal(same[2], same[3])


def test_penalty_and_bans(model):
    ids = prompt(5)
    plain = model.generate(ids, max_new_tokens=40, eos_token_id=[])[0]
    pairs = list(zip(plain[:-1], plain[1:], strict=True))
    assert len(set(pairs)) < len(pairs)  # it repeats itself
    banned = model.generate(ids, max_new_tokens=40, eos_token_id=[], no_repeat_ngram_size=2)[0]
    pairs = list(zip(banned[:-1], banned[1:], strict=True))
    assert len(set(pairs)) == len(pairs)
    strong = model.generate(ids, max_new_tokens=40, eos_token_id=[], repetition_penalty=1e6)[0]
    assert len(set(strong.tolist())) == len(strong)


def test_logits_processors(model):
    ids, calls = prompt(5), []

    def only_even(context, scores):
        calls.append((context.shape, scores.shape, context.dtype, scores.dtype))
        scores = scores.copy()
        scores[:, 1::2] = -np.inf
        return scores

    def not_four(context, scores):
        scores[:, 4] = -np.inf
        return scores

    out = model.generate(
        ids, max_new_tokens=8, eos_token_id=[], logits_processor=[only_even, not_four]
    )
    assert not (out[0, 5:] % 2).any() and 4 not in out[0, 5:]
    assert calls[3] == ((1, 8), (1, V), np.dtype(np.int64), np.dtype(np.float32))
    with pytest.raises(FloatingPointError, match="token 5"):
        model.generate(ids, max_new_tokens=2, logits_processor=[lambda i, s: s * np.nan])
    with pytest.raises(ValueError, match="no token is allowed"):
        model.generate(ids, max_new_tokens=2, logits_processor=[lambda i, s: s - np.inf])
    with pytest.raises(ValueError, match=r"shape \(1, 96\)"):
        model.generate(ids, max_new_tokens=2, logits_processor=[lambda i, s: s[:, :3]])
    with pytest.raises(TypeError, match="functions"):
        model.generate(ids, max_new_tokens=2, logits_processor=[3])


def test_stream_generate(model):
    ids, mask = padded([prompt(3), prompt(5, 1)])
    steps = list(model.stream_generate(ids, attention_mask=mask, max_new_tokens=6, eos_token_id=[]))
    assert [s.shape for s in steps] == [(2, 5 + k) for k in range(1, 7)]
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, eos_token_id=[])
    assert np.array_equal(steps[-1], out)
    assert all(np.array_equal(out[:, : s.shape[1]], s) for s in steps)


def log_probabilities(model, ids, length):
    scores = model(ids).logits[:, length - 1 : -1].astype(np.float64)
    logp = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return np.take_along_axis(logp, ids[:, length:, None], -1)[..., 0].sum(-1)


def test_as_many_beams_as_answers_find_the_best_answer(tmp_path):
    directory = tiny_model_dir(tmp_path, padded_vocab_size=12)
    model = glmlora.AutoModel.from_pretrained(directory)
    ids = np.array([[3, 4, 5]])
    every = np.array([[3, 4, 5, *rest] for rest in product(range(12), repeat=3)])
    best = every[log_probabilities(model, every, 3).argmax()]
    out = model.generate(ids, max_new_tokens=3, num_beams=144, eos_token_id=[])
    assert np.array_equal(out[0], best)
    ranked = model.generate(
        ids, max_new_tokens=3, num_beams=8, num_return_sequences=4, eos_token_id=[]
    )
    found = log_probabilities(model, ranked, 3)
    assert list(found) == sorted(found, reverse=True) and len({tuple(r) for r in ranked}) == 4
    greedy = model.generate(ids, max_new_tokens=3, eos_token_id=[])
    assert found[0] >= log_probabilities(model, greedy, 3)[0]


def test_beams_prefer_by_mean_log_probability_and_end(model):
    ids, mask = padded([prompt(3), prompt(6, 1)])
    ends = list(range(0, V, 3))
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, num_beams=4, eos_token_id=ends
    )
    for row, new in enumerate(out[:, 6:].tolist()):
        stop = next((i for i, t in enumerate(new) if t in ends), len(new))
        assert not any(new[stop + 1 :])  # pad id after the end
        alone = model.generate(
            ids[row : row + 1],
            attention_mask=mask[row : row + 1],
            max_new_tokens=12,
            num_beams=4,
            eos_token_id=ends,
        )[0, 6:].tolist()
        assert alone == new[: len(alone)]
    sampled = [
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            num_beams=3,
            do_sample=True,
            temperature=2.0,
            seed=s,
            eos_token_id=[],
        ).tolist()
        for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature.*-0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature"),
        ({"temperature": "1"}, ValueError, "temperature"),
        ({"top_p": 1.5}, ValueError, "top_p.*1.5"),
        ({"top_p": -0.1}, ValueError, "top_p"),
        ({"top_k": -1}, ValueError, "top_k"),
        ({"top_k": 2.5}, ValueError, "top_k"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty"),
        ({"no_repeat_ngram_size": -1}, ValueError, "no_repeat_ngram_size"),
        ({"num_beams": 0}, ValueError, "num_beams"),
        ({"num_beams": 2, "num_return_sequences": 3}, ValueError, "num_return_sequences"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 124}, ValueError, "5 tokens and 124 new ones exceed .* 128 positions"),
        ({"max_length": 5}, ValueError, "prompt of 5 tokens.*max_length is 5"),
        ({"eos_token_id": 96}, ValueError, "eos_token_id: 96"),
        ({"seed": 1.5}, ValueError, "seed"),
        ({"max_new_token": 3}, TypeError, "max_new_token'"),
        ({"attention_mask": [[1, 1]]}, ValueError, "attention_mask"),
        ({"position_ids": [[1, 2, 3, 4, 5]]}, ValueError, "position_ids: expected 0, 1"),
        ({"generation_config": {"top_k": 3}}, TypeError, "generation_config"),
        ({"attention_mask": GenerationConfig()}, TypeError, "by name"),
        ({"inputs": [[1]]}, TypeError, "inputs"),
        ({"do_sample": "no"}, ValueError, "do_sample: expected True or False, got 'no'"),
        ({"early_stopping": "ever"}, ValueError, "early_stopping.*'never'.*'ever'"),
        ({"temperature": "hot"}, ValueError, "temperature"),
        ({"min_p": 2}, ValueError, "min_p"),
        ({"max_time": 0}, ValueError, "max_time"),
        ({"bad_words_ids": [3]}, ValueError, "bad_words_ids"),
        ({"bad_words_ids": [[]]}, ValueError, "bad_words_ids"),
        ({"eos_token_id": "</s>"}, ValueError, "eos_token_id: expected ids, got '</s>'"),
        ({"suppress_tokens": [99]}, ValueError, "suppress_tokens: 99"),
        ({"forced_eos_token_id": "a"}, ValueError, "forced_eos_token_id"),
        ({"stop_strings": 3}, ValueError, "stop_strings"),
        ({"stop_strings": ["a"]}, ValueError, "stop_strings.*tokenizer"),
        ({"stopping_criteria": [3]}, TypeError, "stopping_criteria"),
        ({"prefix_allowed_tokens_fn": 3}, TypeError, "prefix_allowed_tokens_fn"),
        ({"streamer": 3}, TypeError, "streamer"),
        ({"typical_p": 0.5}, ValueError, "typical_p: is not supported"),
        ({"num_beam_groups": 2}, ValueError, "num_beam_groups"),
        ({"assistant_model": "m"}, ValueError, "assistant_model"),
        ({"past_key_values": [1]}, TypeError, "past_key_values"),
        ({"logits_procesor": []}, TypeError, "generate.*logits_procesor.*'logits_processor'"),
    ],
)
def test_bad_settings(model, settings, error, message):
    with pytest.raises(error, match=message):
        model.generate(prompt(5), **settings)


def test_bad_prompts(model):
    for ids, message in (
        (None, "None"),
        ([[1, 96]], "id 96 at row 0, column 1"),
        ([[1] * 128], "prompt of 128 tokens.*128"),
        (np.zeros((1, 0), int), "shape"),
        ([["a"]], "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(ids, max_new_tokens=1)
    for ids, message in (({"input_ids": [[1]]}, r"\*\*encoding"), ("text", "the tokenizer")):
        for call in (model, lambda given: model.generate(given, max_new_tokens=1)):
            with pytest.raises(TypeError, match=f"input_ids: .*{message}"):
                call(ids)


def test_generation_config(model, tmp_path):
    config = glmlora.GenerationConfig(max_new_tokens=3, eos_token_id=[])
    assert model.generate(prompt(4), generation_config=config).shape == (1, 7)
    assert model.generate(prompt(4), generation_config=config, max_new_tokens=2).shape == (1, 6)
    assert config.max_new_tokens == 3
    with pytest.raises(TypeError, match="tempreature.*did you mean .temperature"):
        glmlora.GenerationConfig(tempreature=1)
    with pytest.raises(TypeError, match="tempreature"):
        config.update(tempreature=1)
    assert repr(config) == "GenerationConfig(max_new_tokens=3, eos_token_id=[])"
    known = {k: str(v) for k, v in glmlora.GenerationConfig.__annotations__.items()}
    assert known == {k: v.__forward_arg__ for k, v in Settings.__annotations__.items()}
    directory = tiny_model_dir(tmp_path)
    (directory / "generation_config.json").write_text(
        '{"max_new_tokens": 2, "eos_token_id": [], "transformers_version": "4.40", "top_p": null}'
    )
    other = glmlora.AutoModel.from_pretrained(directory)
    assert other.generate(prompt(4)).shape == (1, 6)
    assert other.generation_config.top_p == 1.0


def test_settings_of_the_models_config(tmp_path, monkeypatch, recwarn):
    """Older programs write them into config.json, and scripts set them there afterwards."""
    monkeypatch.setattr(tell, "_told", set())
    directory = tiny_model_dir(tmp_path, max_new_tokens=2, num_beams=0, do_sample=False)
    model = glmlora.AutoModel.from_pretrained(directory, family="v2", eos_token_id=[])
    assert model.generate(prompt(4)).shape == (1, 6)
    assert [str(w.message)[:45] for w in recwarn] == [
        "config.json: is not used: num_beams: expected"
    ]
    recwarn.clear()
    (directory / "generation_config.json").write_text('{"eos_token_id": 2, "max_new_tokens": 3}')
    model = glmlora.AutoModel.from_pretrained(directory, family="v2", eos_token_id=5)
    assert (model.generation_config.eos_token_id, model.generation_config.max_new_tokens) == (5, 3)
    recwarn.clear()
    model.config.use_cache, model.config.eos_token_id = False, 5
    assert not recwarn.list
    model.config.temperature, model.config.num_layers = 0.5, 9
    assert [str(w.message) for w in recwarn] == [
        "config.temperature: no effect on a model that is built; set "
        "model.generation_config.temperature",
        "config.num_layers: no effect on a model that is built; set it before",
    ]


def test_integers_are_temperatures(model):
    a = model.generate(prompt(4), max_new_tokens=5, do_sample=True, temperature=1, seed=2)
    b = model.generate(prompt(4), max_new_tokens=5, do_sample=True, temperature=1.0, seed=2)
    assert np.array_equal(a, b)


def test_the_global_generator_is_safe_to_share():
    glmlora.set_seed(7)
    taken, lock = [], threading.Lock()

    def take():
        for _ in range(50):
            seed = seeds.next_seed()
            with lock:
                taken.append(seed)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(taken)) == 200
    with pytest.raises(TypeError, match="seed"):
        glmlora.set_seed("1")


# Batches: places that are filled again, openings that are computed once


def settings(**fields):
    found = GenerationConfig(pad_token_id=0, **fields)
    found.check(V)
    return found


def completed(model, prompts, g, **kwargs):
    limits = limits_of(model, [len(p) for p in prompts], g)
    draws = [(7, row) for row in range(len(prompts))]
    change = Scores(g, None)
    ready = generate.complete(model, prompts, limits, change, draws, **kwargs)
    found = {number: request.new for number, request in ready}
    assert sorted(found) == list(range(len(prompts)))
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("opening", [0, 1, 23])
@pytest.mark.parametrize("sample", [False, True])
def test_places_are_filled_again_and_answers_are_those_of_rows_alone(model, opening, sample):
    rng = np.random.default_rng(4)
    start = rng.integers(3, V, opening).tolist()
    prompts = [start + rng.integers(3, V, rng.integers(1, 30)).tolist() for _ in range(11)]
    prompts[3] = list(prompts[8])  # twice the same
    ends = list(range(40, 70))  # about one token in four: answers end at different times
    g = settings(max_new_tokens=12, eos_token_id=ends, do_sample=sample)
    alone = []
    for row, p in enumerate(prompts):
        limits = limits_of(model, [len(p)], g)
        change = Scores(g, None)
        alone.append(next(generate.complete(model, [p], limits, change, [(7, row)]))[1].new)
    assert len({len(a) for a in alone}) > 2
    for at_once in (1, 2, 4, 16):
        assert completed(model, prompts, g, at_once=at_once) == alone
    if not sample:
        whole = model.generate(prompts, max_new_tokens=12, eos_token_id=ends)
        width = max(map(len, prompts))
        for row, answer in enumerate(alone):
            assert whole[row, width : width + len(answer)].tolist() == answer
            assert (whole[row, width + len(answer) :] == 0).all()


def test_scores_in_a_batch_have_the_bits_of_a_row_alone(model):
    rng = np.random.default_rng(5)
    start = rng.integers(3, V, 19).tolist()
    tails = [rng.integers(3, V, n).tolist() for n in (1, 50, 7)]
    together = CachedRow(model, 3, 64, start)
    for row, tail in enumerate(tails):
        together.become(row, start + tail)
    scores = together.extend(range(3))
    for row, tail in enumerate(tails):
        single = CachedRow(model, 1, 80)
        single.become(0, start + tail)
        assert np.array_equal(single.extend([0])[0], scores[row])


def test_a_batch_outgrows_its_cache(model, monkeypatch):
    prompts = [prompt(n, seed=n)[0].tolist() for n in (3, 9, 20)]
    g = settings(max_new_tokens=40, eos_token_id=[])
    want = completed(model, prompts, g)
    monkeypatch.setattr(scheduler, "ROOM", (2, 1 << 20))
    monkeypatch.setattr(cache, "CAPACITY_STEP", 1)
    assert completed(model, prompts, g) == want
    assert completed(model, prompts, g, at_once=2) == want


def test_few_rows_at_once_where_memory_is_short(model, monkeypatch):
    prompts = [prompt(5, seed=n)[0].tolist() for n in range(6)]
    g = settings(max_new_tokens=4, eos_token_id=[])
    want = completed(model, prompts, g)
    monkeypatch.setattr(generate, "CACHE_BYTES", 1)
    made = []

    def seen(model, rows, *args):
        made.append(rows)
        return CachedRow(model, rows, *args)

    monkeypatch.setattr(generate, "CachedRow", seen)
    assert completed(model, prompts, g) == want and made == [1]


# The arguments of transformers' generate


@pytest.fixture
def anew(monkeypatch):
    """What is told once is told again."""
    monkeypatch.setattr(tell, "_told", set())


def new_ids(model, **settings):
    settings = {"max_new_tokens": 12, "eos_token_id": [], **settings}
    return model.generate(prompt(5), **settings)[0, 5:].tolist()


def test_tokens_that_are_suppressed_or_forced(model):
    plain = new_ids(model)
    first, second = plain[:2]
    assert first not in new_ids(model, suppress_tokens=[first])
    begun = new_ids(model, begin_suppress_tokens=[first])
    assert begun[0] != first and new_ids(model, begin_suppress_tokens=[V - 1]) == plain
    words = new_ids(model, bad_words_ids=[[first, second]])
    assert words[0] == first and (first, second) not in zip(words, words[1:], strict=False)
    assert first not in new_ids(model, bad_words_ids=[[second, 3], [first]])
    assert new_ids(model, bad_words_ids=[[first]], eos_token_id=first) == [first]  # an end id
    assert new_ids(model, forced_eos_token_id=7)[:-1] == plain[:-1]
    assert new_ids(model, forced_eos_token_id=[7], eos_token_id=7)[-1] == 7
    only = model.generate([[3]], forced_bos_token_id=8, max_new_tokens=3, eos_token_id=[])
    assert only[0, 1] == 8
    assert model.generate(bos_token_id=3, max_new_tokens=1)[0, 0] == 3
    ends = {"eos_token_id": plain[0], "max_new_tokens": 6}
    assert len(new_ids(model, **ends)) == 1
    for least in ({"min_new_tokens": 4}, {"min_length": 9}, {"min_length": 3, "min_new_tokens": 4}):
        found = new_ids(model, **ends, **least)
        assert len(found) >= 4 and plain[0] not in found[:4]
    both = new_ids(model, **ends, min_length=11, min_new_tokens=1)
    assert both == new_ids(model, **ends, min_new_tokens=1) != new_ids(model, **ends, min_length=11)


@pytest.mark.parametrize("beams", [1, 3])
def test_allowed_tokens_and_criteria_see_each_row(model, beams):
    ids, mask = padded([prompt(3), prompt(5, 1)])
    seen = []

    def allowed(row, context):
        seen.append((row, len(context)))
        return [10, 11] if row else [20, 21]

    settings = {"attention_mask": mask, "eos_token_id": [], "num_beams": beams}
    out = model.generate(ids, max_new_tokens=4, prefix_allowed_tokens_fn=allowed, **settings)
    assert set(out[0, 5:]) <= {20, 21} and set(out[1, 5:]) <= {10, 11}
    assert {(0, 3), (1, 5)} <= set(seen)

    def third(input_ids, scores, **kwargs):
        assert input_ids.shape[0] == 1 and scores is None
        return input_ids.shape[1] == 6

    out = model.generate(ids, max_new_tokens=9, stopping_criteria=[third], **settings)
    assert out.shape[1] == 8 and not out[1, 6:].any()  # 3 new ones, and 1 with padding behind
    lists = glmlora.StoppingCriteriaList([glmlora.MaxLengthCriteria(6)])
    again = model.generate(ids, max_new_tokens=9, stopping_criteria=lists, **settings)
    assert np.array_equal(again, out)
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn.*row 0"):
        model.generate(ids, prefix_allowed_tokens_fn=lambda r, c: [], max_length=9, **settings)


def test_classes_of_transformers(model):
    plain = new_ids(model)
    assert new_ids(model, stopping_criteria=glmlora.EosTokenCriteria(plain[2])) == plain[:3]
    late = glmlora.MaxTimeCriteria(0.1, initial_timestamp=0)
    assert new_ids(model, stopping_criteria=late) == plain[:1]
    assert new_ids(model, max_time=1e-9) == plain[:1] and new_ids(model, max_time=60) == plain

    class Never(glmlora.LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, plain[0]] = -np.inf
            return scores

    for processors in (Never(), [Never()], glmlora.LogitsProcessorList([Never()])):
        assert plain[0] not in new_ids(model, logits_processor=processors)
    with pytest.raises(NotImplementedError, match="LogitsProcessor has no __call__"):
        new_ids(model, logits_processor=[glmlora.LogitsProcessor()])


def test_least_probability(model):
    best = model(prompt(5)).logits[0, -1].argmax()
    draws = {"do_sample": True, "top_k": 0, "temperature": 2.0, "num_return_sequences": 40}
    draws |= {"max_new_tokens": 1, "seed": 3}
    assert set(model.generate(prompt(5), min_p=1.0, **draws)[:, -1]) == {best}
    many = model.generate(prompt(5), **draws)
    few = model.generate(prompt(5), min_p=0.3, **draws)
    scores = model(prompt(5)).logits[0, -1] / 2
    chances = np.exp(scores - scores.max())
    assert chances[few[:, -1]].min() >= 0.3 > chances[many[:, -1]].min()


def test_what_is_returned_beside_the_ids(model):
    ids, mask = padded([prompt(3), prompt(5, 1)])
    end = int(model.generate(prompt(3), max_new_tokens=2)[0, -1])
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    given = {"attention_mask": mask, "eos_token_id": end, "max_new_tokens": 4}
    out = model.generate(ids, suppress_tokens=[7], **kept, **given)
    assert np.array_equal(
        out.sequences,
        model.generate(
            ids, attention_mask=mask, suppress_tokens=[7], eos_token_id=end, max_new_tokens=4
        ),
    )
    assert list(out.keys()) == ["sequences", "scores", "logits", "past_key_values"]
    assert len(out.scores) == len(out["logits"]) == 4 and out[0] is out.sequences
    assert out.scores[0].shape == (2, V) and out.scores[0][0, 7] == -np.inf < out.logits[0][0, 7]
    assert np.abs(out.logits[0] - model(ids, attention_mask=mask).logits[:, -1]).max() < 1e-4
    last = out.scores[3][0]  # the row has ended: its pad id alone is left
    assert last[0] == 0 and np.isneginf(last[1:]).all()
    sampled = model.generate(prompt(4), do_sample=True, top_k=3, max_new_tokens=2, **kept)
    assert [np.isfinite(s).sum() for s in sampled.scores] == [3, 3]
    assert np.isfinite(sampled.logits[0]).all()
    beams = model.generate(
        prompt(4),
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=3,
        eos_token_id=[],
        return_dict_in_generate=True,
    )
    want = log_probabilities(model, beams.sequences, 4) / 3
    assert np.abs(beams.sequences_scores - want).max() < 1e-4


def test_beams_that_never_stop_early(model):
    """The best answer that a complete search finds is missed where the search stops early."""
    ends, scores = list(range(0, V, 2)), {}
    for early in (True, False, "never"):
        scores[early] = [
            model.generate(
                prompt(3, seed),
                num_beams=2,
                eos_token_id=ends,
                max_new_tokens=20,
                early_stopping=early,
                length_penalty=3.0,
                return_dict_in_generate=True,
            ).sequences_scores[0]
            for seed in range(12)
        ]
    assert np.sum(scores["never"]) > np.sum(scores[False]) > np.sum(scores[True])


# Padding, limits, and settings without effect


def test_padding_without_a_mask_is_inferred_and_told_once(model, anew):
    prompts = [prompt(3), prompt(5, 1)]
    ids, mask = padded(prompts)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=5, eos_token_id=[])
    with pytest.warns(UserWarning, match="pad id 0.*attention_mask") as found:
        assert np.array_equal(model.generate(ids, max_new_tokens=5, eos_token_id=[]), want)
    assert [w.filename for w in found] == [__file__]
    model.generate(ids, max_new_tokens=5, eos_token_id=[])  # not told again
    text = model.generate(ids, max_new_tokens=5, eos_token_id=0)  # the pad id ends answers
    plain = model.generate(ids, attention_mask=np.ones_like(ids), max_new_tokens=5, eos_token_id=0)
    assert np.array_equal(text, plain) and not np.array_equal(text, want)
    inside = [[5, 0, 6]]
    with pytest.warns(UserWarning, match="pad id 0 stands between other ids.*read as text"):
        found = model.generate(inside, max_new_tokens=2)
    masked = model.generate(inside, attention_mask=[[1, 1, 1]], max_new_tokens=2)
    assert np.array_equal(found, masked)
    with pytest.warns(UserWarning, match="reads these ids as text"):
        assert np.array_equal(
            model(ids).logits, model(ids, attention_mask=np.ones_like(ids)).logits
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token_id": []}, "neither max_new_tokens nor max_length .* 128 positions"),
        (
            {"max_new_tokens": 2, "temperature": 0.5},
            "temperature: no effect without do_sample",
        ),
        ({"max_new_tokens": 2, "length_penalty": 2.0}, "length_penalty: .* num_beams=1"),
        ({"max_new_tokens": 2, "output_scores": True}, "output_scores: .*return_dict"),
        ({"max_new_tokens": 2, "max_length": 9}, "max_length: no effect beside max_new_tokens"),
    ],
)
def test_what_has_no_effect_is_told_once(model, anew, recwarn, settings, message):
    for ask in (model.generate, lambda *a, **s: list(model.stream_generate(*a, **s))):
        recwarn.clear()
        for _ in range(2):
            ask(prompt(4), **settings)
        assert len(recwarn) == 1
        assert recwarn[0].filename == __file__ and re.search(message, str(recwarn[0].message))


def test_streams_tell_that_they_have_no_beams(model, anew):
    with pytest.warns(UserWarning, match="stream_generate: num_beams: no effect"):
        list(model.stream_generate(prompt(4), max_new_tokens=1, num_beams=2))
    places = [[0, 0, 1, 2]]
    ids = [[0, 5, 6, 7]]
    given = {"attention_mask": [[0, 1, 1, 1]], "max_new_tokens": 2}
    out = model.generate(ids, position_ids=places, **given)
    assert np.array_equal(out, model.generate(ids, **given))


def test_neutral_values_are_silent(model, recwarn):
    names = {**{n: v[0][-1] for n, v in REFUSED.items()}, **dict.fromkeys(NOTHING)}
    settings = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **names}
    assert model.generate(prompt(4), max_new_tokens=2, **settings).shape == (1, 6)
    config = GenerationConfig(max_new_tokens=2, **names)
    assert "typical_p" not in config.to_dict() and not len(recwarn)


def test_a_config_refuses_names_that_do_nothing(tmp_path, recwarn):
    config = GenerationConfig()
    with pytest.raises(AttributeError, match="max_new_token.*mean 'max_new_tokens'"):
        config.max_new_token = 3
    with pytest.raises(ValueError, match="typical_p"):
        config.typical_p = 0.5
    config.cache_implementation = "static"
    config.update(max_new_tokens=7, eos_token_id=np.array([1, 2]), top_k=None)
    config.save_pretrained(tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again.max_new_tokens == 7 and again.eos == [1, 2] and not len(recwarn)
    assert GenerationConfig.from_pretrained(tmp_path, top_k=3).top_k == 3
    assert GenerationConfig.from_dict(again.to_dict(), seed=3).seed == 3
    (tmp_path / "generation_config.json").write_text(
        '{"max_new_tokens": 3, "typical_p": 0.5, "temperature": "hot", "repetition_penality": 2, '
        '"cache_implementation": "static", "_from_model_config": true}'
    )
    with pytest.warns(UserWarning, match="generation_config.json") as found:
        again = GenerationConfig.from_pretrained(tmp_path)
    assert again.max_new_tokens == 3 and again.temperature == 1.0
    assert [w.filename for w in found] == [__file__]
    for name in ("typical_p", "temperature", "repetition_penality.*repetition_penalty"):
        assert re.search(name, str(found[0].message))
    assert "static" not in str(found[0].message)


# A loop of one's own


def test_past_key_values_in_a_loop(model):
    ids, mask = padded([prompt(3), prompt(6, 1)])
    want = model.generate(ids, attention_mask=mask, max_new_tokens=6, eos_token_id=[])
    out = model(ids, attention_mask=mask, use_cache=True)
    whole = ids
    for _ in range(6):
        following = out.logits[:, -1].argmax(-1)[:, None]
        whole = np.concatenate((whole, following), axis=1)
        mask = np.concatenate((mask, np.ones_like(following)), axis=1)
        before, out = (
            out,
            model(following, past_key_values=out.past_key_values, attention_mask=mask),
        )
        assert out.logits.shape == (2, 1, V)
        full = model(whole, attention_mask=mask).logits[:, -1:]
        assert np.abs(out.logits - full).max() < 1e-4
    assert np.array_equal(whole, want)
    branch = model(whole[:, -1:], past_key_values=before.past_key_values)  # an earlier one again
    assert np.array_equal(branch.logits, out.logits)
    assert out.past_key_values.get_seq_length() == whole.shape[1]


def test_several_tokens_follow_what_is_past(model):
    ids = prompt(9)
    full = model(ids)
    past = model(ids[:, :4]).past_key_values
    places = np.arange(4, 9)[None]
    out = model(ids[:, 4:], past_key_values=past, position_ids=places, return_dict=False)
    assert np.abs(out[0] - full.logits[:, 4:]).max() < 1e-4
    last = model(ids[:, 8:], past_key_values=model(ids[:, :8]).past_key_values)
    assert np.abs(last.logits - full.logits[:, 8:]).max() < 1e-4
    made = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, eos_token_id=[])
    after = model(made.sequences[:, -1:], past_key_values=made.past_key_values)
    assert np.abs(after.logits - model(made.sequences).logits[:, -1:]).max() < 1e-4
    assert model(ids, use_cache=False).past_key_values is None
    again = model.generate(ids, past_key_values=past, max_new_tokens=3, eos_token_id=[])
    assert np.array_equal(again, made.sequences)


def test_the_past_follows_the_weights(model):
    ids = prompt(9)
    past = model(ids[:, 7:8], past_key_values=model(ids[:, :7]).past_key_values).past_key_values
    peft = glmlora.get_peft_model(model, glmlora.LoraConfig(r=2, init_lora_weights=False), seed=0)
    try:
        out = peft(ids[:, 8:], past_key_values=past)
        assert np.abs(out.logits - peft(ids).logits[:, 8:]).max() < 1e-4
        with peft.disable_adapter():
            plain = peft(ids[:, 8:], past_key_values=past)
            assert np.abs(plain.logits - model(ids).logits[:, 8:]).max() < 1e-4
        assert np.abs(plain.logits - out.logits).max() > 1e-3
    finally:
        peft.unload()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"attention_mask": [[1, 1]]}, ValueError, r"attention_mask: .*\(1, 5\).*\(1, 2\)"),
        ({"attention_mask": [[0, 1, 1, 1, 1]]}, ValueError, "row 0 has 4 ids"),
        ({"position_ids": [[0]]}, ValueError, "position_ids: expected 4"),
        ({"labels": [[5]]}, ValueError, "past_key_values.*labels"),
        ({"input_ids": [[5], [6]]}, ValueError, "holds 1 rows, got 2"),
        ({"input_ids": [[96]]}, ValueError, "id 96"),
        ({"past_key_values": ((1,),)}, TypeError, "past_key_values"),
        ({"input_ids": [[5] * 125]}, ValueError, "129 tokens.*128"),
    ],
)
def test_what_does_not_follow_the_past(model, given, error, message):
    past = model(prompt(4)).past_key_values
    with pytest.raises(error, match=message):
        model(**{"input_ids": [[5]], "past_key_values": past, **given})
    with pytest.raises(ValueError, match="do not begin with what it holds"):
        model.generate(prompt(3, 7), past_key_values=past, max_new_tokens=1)
