"""generate: the token loop, its settings, batches, beams, and what is refused."""

import threading
from itertools import product

import numpy as np
import pytest
from tiny import TINY_CONFIG, tiny_model_dir

import glmlora
from glmlora import seeds
from glmlora.generation import cache, generate, scheduler
from glmlora.generation.cache import CachedRow
from glmlora.generation.config import GenerationConfig, Settings
from glmlora.generation.scheduler import Scheduler, Scores, limits_of

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
        ({"generation_config": {"top_k": 3}}, TypeError, "generation_config"),
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
