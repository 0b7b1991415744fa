"""Rows with adapters of their own in one call, rows copied from others, and requests that come and
go while others run: each answers as alone."""

import numpy as np
import pytest
from tiny import tiny_model_dir

import glmlora
from glmlora.generation.cache import CHUNK, CachedRow
from glmlora.generation.config import GenerationConfig
from glmlora.generation.scheduler import Scheduler, Scores, by_doubling

KINDS = {
    "plain": [{"r": 2}, {"r": 5, "lora_alpha": 3}],
    "dora": [{"use_dora": True}, {"lora_bias": True}, {}],
    "all": [{"target_modules": ["dense", "dense_h_to_4h", "dense_4h_to_h", "output_layer"]}, {}],
}


def adapted(path, fields, seed):
    """A model with one fresh adapter whose numbers are random, and how to attach it again."""
    model = glmlora.AutoModel.from_pretrained(path).eval()
    model = glmlora.get_peft_model(model, glmlora.LoraConfig(**fields), seed=seed)
    rng = np.random.default_rng(seed)
    for name in model.adapter_names:
        model.core.write(name, rng.normal(0, 0.4, model.core.shape(name)).astype(np.float32))
    return model


def keep(core, model):
    """The same adapter put aside in another core."""
    model._fetch()
    adapter = model._adapters[model.active_adapter]
    for module, (_, scale) in adapter.targets.items():
        parts = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector")
        A, B, *more = [adapter.tensors.get(f"{module}.{part}") for part in parts]
        core.add_lora(module, A, B, scale, 0.0, *more)
    return core.keep_lora()


def scores(core, adapter, ids):
    cache = core.cache(1, 64)
    if adapter:
        cache.adapt(0, adapter)
    return core.extend(cache, [0], np.array(ids, np.int32), np.array([len(ids)], np.int32))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_adapters_of_their_own_are_as_alone(tmp_path, kind):
    """Bit for bit: prefilled in one ragged call, decoded in one, and after the rows were reordered;
    with no adapter too."""
    path = tiny_model_dir(tmp_path)
    alone = [adapted(path, fields, seed) for seed, fields in enumerate(KINDS[kind], 1)]
    base = glmlora.AutoModel.from_pretrained(path).eval()
    cores = [base.core, *(model.core for model in alone)]
    together = glmlora.AutoModel.from_pretrained(path).eval().core
    numbers = [0, *(keep(together, model) for model in alone)]
    assert numbers == list(range(len(cores)))
    order = [*numbers[1:], 0, *numbers[1:]]  # runs of one row, and a base row between
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 90, size=n).tolist() for n in range(3, 3 + len(order))]
    cache = together.cache(len(order), 64)
    for row, number in enumerate(order):
        cache.adapt(row, number)
    flat = np.array([i for p in prompts for i in p], np.int32)
    found = together.extend(
        cache, range(len(order)), flat, np.array([len(p) for p in prompts], np.int32)
    )
    for row, number in enumerate(order):
        np.testing.assert_array_equal(found[row], scores(cores[number], 0, prompts[row]))
    different = {found_row.tobytes() for found_row in (scores(c, 0, [5, 6, 7]) for c in cores)}
    assert len(different) == len(cores)  # the adapters do something
    cache.reorder(np.arange(len(order), dtype=np.int32)[::-1].copy())
    more = np.array([7 + row for row in range(len(order))], np.int32)
    after = together.extend(cache, range(len(order)), more, np.ones(len(order), np.int32))
    for row, (number, prompt) in enumerate(zip(order[::-1], prompts[::-1], strict=True)):
        np.testing.assert_array_equal(after[row], scores(cores[number], 0, [*prompt, more[row]]))


def test_a_shared_prefix_has_the_adapter_of_all_rows(tmp_path):
    path = tiny_model_dir(tmp_path)
    model = adapted(path, {}, 1)
    core = glmlora.AutoModel.from_pretrained(path).core
    number = keep(core, model)
    rows = CachedRow(type("M", (), {"core": core, "config": model.config})(), 2, 16, [5, 6], number)
    rows.become(1, [5, 6, 7, 8], number)
    np.testing.assert_array_equal(rows.extend([1])[0], scores(model.core, 0, [5, 6, 7, 8]))
    with pytest.raises(RuntimeError, match="the shared prefix was made with number 1"):
        rows.cache.adapt(0, 0)


def test_what_cannot_be_kept_is_told(tmp_path):
    model = adapted(tiny_model_dir(tmp_path), {}, 1)
    model.set_trainable(model.adapter_names)
    model._base._apply_trainable()
    with pytest.raises((RuntimeError, ValueError), match="train"):
        model.core.keep_lora()
    model.set_trainable([])
    model._base._apply_trainable()
    assert model.core.keep_lora() == 1
    with pytest.raises(RuntimeError, match="no adapter is attached"):
        model.core.keep_lora()
    cache = model.core.cache(2, 8)
    with pytest.raises(ValueError, match="expected 0 to 1, those that are kept, got 2"):
        cache.adapt(0, 2)
    model.core.extend(cache, [0], np.array([5], np.int32), np.array([1], np.int32))
    with pytest.raises(RuntimeError, match="row 0 already holds 1 tokens"):
        cache.adapt(0, 1)
    cache.adapt(1, 1)
    with pytest.raises(RuntimeError, match="row 0 has adapter 0, row 1 has 1"):
        cache.copy(0, 1, 1)
    with pytest.raises(ValueError, match="row 0 holds 1 tokens, cannot copy 2"):
        cache.copy(0, 1, 2)


def scheduled(path, rows, capacity=128):
    model = glmlora.AutoModel.from_pretrained(path).eval()
    change = Scores(GenerationConfig(eos_token_id=[]))
    return model, Scheduler(CachedRow(model, rows, capacity), change, by_doubling, in_pieces=True)


def alone(path, prompt, limit, **settings):
    model = glmlora.AutoModel.from_pretrained(path).eval()
    found = model.generate([prompt], max_new_tokens=limit, eos_token_id=[], **settings)
    return found[0, len(prompt) :].tolist()


def test_requests_come_and_go_while_others_run(tmp_path):
    """A cancelled one leaves its row to one that waits; settings are each one's own; and a
    prompt that begins as another row's is copied from there."""
    path = tiny_model_dir(tmp_path)
    _, scheduler = scheduled(path, 2)
    rng = np.random.default_rng(3)
    first, second, third, later = (rng.integers(3, 90, size=40).tolist() for _ in range(4))
    third = [*first[:36], *third[:4]]
    drawn = Scores(GenerationConfig(eos_token_id=[], do_sample=True, temperature=0.7, top_k=9))
    a = scheduler.submit(first, 30)
    b = scheduler.submit(second, 30)
    c = scheduler.submit(third, 9, (11, 0), change=drawn)
    gone = scheduler.submit(later, 9)
    for _ in range(5):
        scheduler.step()
    scheduler.cancel(b)
    scheduler.cancel(gone)
    list(scheduler.run())
    assert a.new == alone(path, first, 30)
    assert b.new == alone(path, second, 30)[:5] and gone.new == []
    assert c.reused == 36  # of row 0, which another request has
    assert c.new == alone(path, third, 9, do_sample=True, temperature=0.7, top_k=9, seed=11)
    again = scheduler.submit([*first, *a.new, 5], 3)
    list(scheduler.run())
    assert again.reused == 69  # what was answered in that row, but for its last token
    assert again.new == alone(path, [*first, *a.new, 5], 3)
    assert scheduler.free == 2


def test_a_long_prompt_lets_others_go_on(tmp_path):
    path = tiny_model_dir(tmp_path, seq_length=4 * CHUNK)
    _, scheduler = scheduled(path, 2, 4 * CHUNK)
    rng = np.random.default_rng(4)
    short, long = rng.integers(3, 90, size=5).tolist(), rng.integers(3, 90, size=3 * CHUNK).tolist()
    a = scheduler.submit(short, 20)
    scheduler.step()
    b = scheduler.submit(long, 2)
    counts = [(a.index, b.index) for _ in range(3) if scheduler.step() is not None]
    assert counts == [(2, 0), (3, 0), (4, 1)]
    list(scheduler.run())
    assert a.new == alone(path, short, 20) and b.new == alone(path, long, 2)
