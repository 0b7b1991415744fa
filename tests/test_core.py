"""The C module as a guest in a Python process: threads, signals, forks, memory, wrong arguments."""

import _thread
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from glmlora import _core, families
from glmlora.families.family import PLAIN_ARCH

ARCH = PLAIN_ARCH | dict(
    layers=3,
    hidden=64,
    ffn=96,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=300,
    max_positions=512,
    rotary_dim=8,
    eps=1e-5,
    rope_base=10000.0,
    rope_divisor=1.0,
    qkv_bias=1,
    prefix_input=2 * 3 * 2 * 16,
)


def make_model(backend="cpu", **changes):
    rng = np.random.default_rng(1)
    model = _core.Model(ARCH | changes, backend, names=families.default().tensor_names)
    for name, shape in model.shapes().items():
        value = rng.normal(0.0, 0.3, shape) + (len(shape) == 1)
        model.bind(name, value.astype(np.float32), "F32")
    return model


def add_lora(model, dropout=0.1):
    rng = np.random.default_rng(2)
    names = []
    for layer in range(ARCH["layers"]):
        module = f"transformer.encoder.layers.{layer}.self_attention.query_key_value"
        out, inp = model.shape(module + ".weight")
        A = rng.normal(0, 0.1, (4, inp)).astype(np.float32)
        B = rng.normal(0, 0.1, (out, 4)).astype(np.float32)
        model.add_lora(module, A, B, 2.0, dropout)
        names += [module + ".lora_A.weight", module + ".lora_B.weight"]
    return names


def batch(rng, n_segments=3, length=40):
    lengths = rng.integers(2, length, n_segments).astype(np.int32)
    ids = rng.integers(0, ARCH["vocab"], lengths.sum()).astype(np.int32)
    rows = (np.cumsum(lengths) - 2).astype(np.int32)
    return ids, lengths, rows, ids[rows + 1]


STEP = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)


def test_hidden_states_of_some_layers():
    """The same bits as beside all layers' and the logits; no layer runs above the last of them."""
    ids, lengths, _, _ = batch(np.random.default_rng(3))
    model, counted = make_model(), make_model("plan")
    _, every = model.forward(ids, lengths, hidden_states=True)
    for layers in ([0, 1, 2, 3], [0], [1], [0, 2], [3], []):
        got = model.hidden_states(ids, lengths, layers)
        assert got.dtype == np.float32 and got.shape == (len(layers), len(ids), ARCH["hidden"])
        np.testing.assert_array_equal(got, every[layers])
        counted.counts()
        counted.hidden_states(ids, lengths, layers)
        calls = counted.counts()["calls"]
        attention = sum(n for op, n in calls.items() if op.endswith("attention_forward"))
        assert attention == (layers[-1] if layers else 0)
    for layers, place in (([4], 0), ([-1], 0), ([1, 1], 1), ([2, 0], 1)):
        message = rf"layers\[{place}\]: expected ascending numbers from 0 to 3, got {layers[place]}"
        with pytest.raises(ValueError, match=message):
            model.hidden_states(ids, lengths, layers)


@pytest.mark.parametrize("half", (0, 1))
def test_the_rotary_table_reaches_every_position(half):
    """Its rows are computed when they are needed: near ones first and far ones at once alike."""
    ids, lengths = np.array([5, 9, 20], np.int32), np.array([3], np.int32)
    near, far = (make_model(max_positions=3000, half_rope_table=half) for _ in range(2))
    starts = (0, 1022, 2046, 2997)
    each = [near.forward(ids, lengths, np.arange(p, p + 3, dtype=np.int32)) for p in starts]
    alone = far.forward(ids, lengths, np.arange(2997, 3000, dtype=np.int32))
    np.testing.assert_array_equal(each[-1][0], alone[0])
    for logits, _ in each[: 1 if half else None]:  # only distances count, before rounding
        np.testing.assert_allclose(logits, each[0][0], atol=2e-3)


def test_no_allocation_in_training_steps_and_decode_steps():
    model = make_model()
    model.set_trainable(add_lora(model))
    model.reserve(200, 4, 8, True)
    rng = np.random.default_rng(3)
    before = model.allocations
    for _ in range(6):
        model.backward(*batch(rng, 4))
        model.backward(*batch(rng, 2))
        model.step(**STEP)
    assert model.allocations == before
    cache = model.cache(2, 100)
    model.extend(cache, [0, 1], batch(rng, 1, 30)[0][:20], [10, 10])
    before = model.allocations
    for i in range(20):
        model.extend(cache, [0, 1], [i, i + 1], [1, 1])
    assert model.allocations == before
    choice = {"temperature": 0.8, "top_k": 9, "repetition_penalty": 1.2, "suppress": [2]}
    for i in range(20):
        draws = np.full((2, 3), i, np.uint64)
        context = np.arange(2 * (i + 1), dtype=np.int32)
        choice |= {"draws": draws, "context": context, "context_lengths": [i + 1, i + 1]}
        model.next(cache, [0, 1], [i, i + 1], [1, 1], choice=choice)
        before = before if i else model.allocations
    assert model.allocations == before


def test_a_smaller_batch_takes_no_more_than_was_reserved():
    """With fewer tokens more layers fit into the budget, but not beyond the memory taken."""
    model = make_model()
    model.set_trainable(add_lora(model))
    most = model.plan(200, 2, 4, True, 1 << 30)
    least = model.plan(200, 2, 4, True, 1)
    assert most["kept_layers"] > least["kept_layers"]
    budget = (most["activations"] + least["activations"]) // 2
    model.reserve(200, 2, 4, True, budget)
    before = model.allocations
    ids = np.ones(200, np.int32)
    for n in (100, 99, 98, 90, 70, 50, 30, 10):
        rows = np.array([n - 2, 2 * n - 2], np.int32)
        model.backward(ids[: 2 * n], [n, n], rows, ids[:2])
    assert model.allocations == before


@pytest.mark.parametrize("threads", [2, 3])
def test_same_bits_for_any_thread_count(threads):
    results = []
    try:
        for n in (1, threads):
            _core.set_num_threads(n)
            model = make_model()
            names = add_lora(model)
            model.set_trainable(names)
            rng = np.random.default_rng(4)
            losses = []
            for _ in range(5):
                losses.append(model.backward(*batch(rng)))
                losses.append(model.step(**STEP))
            logits, _ = model.forward(*batch(rng)[:2])
            results.append((losses, logits, [model.read(n) for n in names]))
    finally:
        _core.set_num_threads(2)
    assert results[0][0] == results[1][0]
    assert np.array_equal(results[0][1], results[1][1])
    assert all(np.array_equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))


def test_prefill_equals_decode_bit_for_bit():
    model = make_model()
    ids = np.random.default_rng(5).integers(0, ARCH["vocab"], 90).astype(np.int32)
    one = model.cache(1, 90)
    whole = model.extend(one, [0], ids, [90])
    many = model.cache(1, 90)
    for i in ids:
        last = model.extend(many, [0], [i], [1])
    assert np.array_equal(whole, last)


def test_a_row_does_not_depend_on_its_batch():
    model = make_model()
    rng = np.random.default_rng(6)
    ids, lengths, _, _ = batch(rng, 5)
    together, _ = model.forward(ids, lengths)
    ends = np.cumsum(lengths)
    for start, end in zip(ends - lengths, ends, strict=True):
        alone, _ = model.forward(ids[start:end], [end - start])
        assert np.array_equal(alone, together[start:end])


def test_shared_prefix_equals_repeated_prefix():
    model = make_model()
    rng = np.random.default_rng(7)
    prefix = rng.integers(0, ARCH["vocab"], 70).astype(np.int32)
    tails = [rng.integers(0, ARCH["vocab"], n).astype(np.int32) for n in (3, 9)]
    cache = model.cache(2, 20, 70)
    model.extend_shared(cache, prefix)
    shared = model.extend(cache, [0, 1], np.concatenate(tails), [3, 9])
    for row, tail in enumerate(tails):
        alone = model.cache(1, 90)
        ids = np.concatenate([prefix, tail])
        assert np.allclose(shared[row], model.extend(alone, [0], ids, [len(ids)])[0], atol=1e-5)
    with pytest.raises(RuntimeError, match="already holds"):
        model.extend_shared(cache, prefix[:1])


def test_rewind_and_reorder():
    model = make_model()
    ids = np.arange(12, dtype=np.int32)
    cache = model.cache(2, 20)
    model.extend(cache, [0, 1], np.concatenate([ids, ids[::-1]]), [12, 12])
    first = model.extend(cache, [0], [7], [1])
    cache.rewind(0, 12)
    assert cache.lengths == [12, 12]
    assert np.array_equal(first, model.extend(cache, [0], [7], [1]))
    cache.rewind(0, 12)
    cache.reorder([1, 0])
    assert np.array_equal(first, model.extend(cache, [1], [7], [1]))
    with pytest.raises(ValueError, match="cannot rewind"):
        cache.rewind(0, 13)


def test_a_cache_of_old_weights_is_refused():
    model = make_model()
    cache = model.cache(1, 20)
    model.extend(cache, [0], [1, 2, 3], [3])
    add_lora(model)
    with pytest.raises(RuntimeError, match="weights changed"):
        model.extend(cache, [0], [4], [1])
    cache.rewind(0, 0)
    model.extend(cache, [0], [4], [1])


def test_merge_equals_adapter():
    model = make_model()
    names = add_lora(model)
    ids, lengths, _, _ = batch(np.random.default_rng(8))
    before, _ = model.forward(ids, lengths)
    model.merge_lora()
    assert not set(names) & set(model.names())
    after, _ = model.forward(ids, lengths)
    assert np.allclose(before, after, atol=2e-4)


def test_micro_batches_add_up():
    """8x1, 4x2 and 1x8 rows, dropout on: one gradient."""
    ids, lengths, rows, targets = batch(np.random.default_rng(9), 8)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    gradients = []
    for size in (8, 4, 2, 1):
        model = make_model()
        names = add_lora(model, dropout=0.3)
        model.set_trainable(names)
        for i in range(0, 8, size):
            a, b = starts[i], starts[i + size]
            model.backward(
                ids[a:b], lengths[i : i + size], rows[i : i + size] - a, targets[i : i + size]
            )
        gradients.append(np.concatenate([model.read(n, "grad").ravel() for n in names]))
    for other in gradients[1:]:
        assert np.abs(gradients[0] - other).max() < 1e-5 * np.abs(gradients[0]).max()


def test_second_thread_gets_an_error():
    model = make_model(layers=8, hidden=512, ffn=1024, heads=8, head_dim=64, kv_heads=2)
    ids = np.zeros(1000, np.int32)
    lengths = np.full(10, 100, np.int32)
    started, errors = threading.Event(), []

    def long_call():
        started.set()
        model.forward(ids, lengths, rows=[0])

    thread = threading.Thread(target=long_call)
    thread.start()
    started.wait()
    while thread.is_alive():
        try:
            model.forward(ids[:1], [1])
        except RuntimeError as error:
            errors.append(str(error))
            break
    thread.join()
    assert errors and "busy in another thread" in errors[0]
    model.forward(ids[:1], [1])


def test_two_models_in_two_threads():
    models = [make_model(), make_model()]
    ids, lengths, _, _ = batch(np.random.default_rng(10))
    want, _ = models[0].forward(ids, lengths)
    got = [None, None]

    def run(i):
        for _ in range(20):
            got[i], _ = models[i].forward(ids, lengths)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert np.array_equal(got[0], want) and np.array_equal(got[1], want)


def run_child(code, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.path.dirname(__file__),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )


def test_ctrl_c_stops_a_long_call():
    """The call would take minutes; the child ends by KeyboardInterrupt and its model works
    afterwards."""
    child = run_child(
        """
        import numpy as np
        from test_core import make_model
        model = make_model(layers=24, hidden=256, ffn=2048, heads=8, head_dim=32, kv_heads=2,
                           max_positions=4096)
        print("ready", flush=True)
        try:
            for _ in range(100000):
                model.forward(np.zeros(20000, np.int32), np.full(10, 2000, np.int32), rows=[0])
        except KeyboardInterrupt:
            model.forward(np.zeros(2, np.int32), [2])
            print("interrupted", flush=True)
        """
    )
    assert child.stdout.readline() == "ready\n"
    threading.Event().wait(0.3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert out == "interrupted\n", err


def interrupted_in(function, *args):
    """Calls with a SIGINT pending that Python has not seen yet: the core is the first to look."""
    calls = itertools.chain(
        map(_thread.interrupt_main, [signal.SIGINT]), itertools.starmap(function, [args])
    )
    with pytest.raises(KeyboardInterrupt):
        list(calls)


@pytest.mark.parametrize("trained_before", [False, True])
def test_ctrl_c_in_set_trainable_changes_nothing(trained_before):
    """Not the weights either, of which some are copied into memory that is then given up."""
    model = make_model("ref_f32")
    names, data = sorted(model.names()), batch(np.random.default_rng(3))
    if trained_before:
        model.set_trainable(names[:3])
        model.backward(*data)
        model.step(**STEP)
        model.backward(*data)
    before = [model.read(name) for name in names]
    moments = [model.read(name, "exp_avg") for name in model.trainable()]
    trained = model.trainable()
    interrupted_in(model.set_trainable, names[2:])
    assert model.trainable() == trained
    assert all(map(np.array_equal, before, [model.read(name) for name in names]))
    assert all(map(np.array_equal, moments, [model.read(name, "exp_avg") for name in trained]))
    model.set_trainable(names[2:])
    assert all(map(np.array_equal, before, [model.read(name) for name in names]))
    assert not any(
        model.read(name, part).any() for name in names[2:] for part in ("grad", "exp_avg")
    )


def test_ctrl_c_waits_for_the_end_of_a_step_and_a_merge():
    """Half a step, or half a merge, would be other weights without a word."""
    data, found = batch(np.random.default_rng(3)), []
    for interrupt in (False, True):
        model = make_model("ref_f32")
        model.set_trainable(add_lora(model, 0.0))
        model.backward(*data)
        if interrupt:
            interrupted_in(model.step, *STEP.values())
            interrupted_in(model.merge_lora)
        else:
            model.step(**STEP)
            model.merge_lora()
        found.append([model.read(name) for name in sorted(model.names())])
    assert all(map(np.array_equal, *found))


def test_forked_children_compute():
    model = make_model()
    ids, lengths, _, _ = batch(np.random.default_rng(11))
    want, _ = model.forward(ids, lengths)
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            got, _ = model.forward(ids, lengths)
            os._exit(0 if np.array_equal(got, want) else 1)
        assert os.waitpid(pid, 0)[1] == 0
    assert np.array_equal(model.forward(ids, lengths)[0], want)


def test_threads_follow_omp_num_threads():
    for value, expected in (("3", "3"), ("2,4", "2")):
        out = subprocess.run(
            [sys.executable, "-c", "from glmlora import _core; print(_core.get_num_threads())"],
            env=os.environ | {"OMP_NUM_THREADS": value, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        assert out.stdout.strip() == expected, out.stderr
    for bad in (0, -1, 5000):
        with pytest.raises(ValueError, match="threads"):
            _core.set_num_threads(bad)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda m: m.forward([0, 300], [2]), ValueError, "token id 300 is outside the vocabulary"),
        (lambda m: m.forward([-1], [1]), ValueError, "token id -1"),
        (lambda m: m.forward([1, 2], [3]), ValueError, "sum is 3 but there are 2"),
        (lambda m: m.forward([1, 2], [2, 0]), ValueError, "at least 1 token"),
        (lambda m: m.forward([], []), ValueError, "empty"),
        (lambda m: m.forward([1.5], [1]), TypeError, "expected integers"),
        (lambda m: m.forward([1 << 40], [1]), ValueError, "does not fit int32"),
        (lambda m: m.forward([1] * 513, [513]), ValueError, "512 positions"),
        (lambda m: m.forward([1], [1], positions=[512]), ValueError, r"positions\[0\]: 512"),
        (lambda m: m.forward([1, 2], [2], rows=[1, 0]), ValueError, "ascending"),
        (lambda m: m.loss([1, 2], [2], [0], [300]), ValueError, "label 300"),
        (lambda m: m.loss([1, 2], [2], [], []), ValueError, "no label is left"),
        (lambda m: m.loss([1, 2], [2], [0], [1, 2]), ValueError, "targets: expected 1"),
        (lambda m: m.backward([1, 2], [2], [0], [1]), RuntimeError, "nothing is trainable"),
        (lambda m: m.step(**STEP), RuntimeError, "nothing is trainable"),
        (lambda m: m.read("nonsense"), ValueError, "no weight 'nonsense'"),
        (lambda m: m.set_trainable(["nonsense"]), ValueError, "no weight 'nonsense'"),
        (lambda m: m.cache(0, 1), ValueError, "rows >= 1"),
        (lambda m: m.cache(1, 513), ValueError, "512 positions"),
        (lambda m: m.extend(m.cache(1, 4), [0], [1] * 5, [5]), ValueError, "do not fit"),
        (lambda m: m.extend(m.cache(2, 4), [0, 0], [1, 2], [1, 1]), ValueError, "named twice"),
        (lambda m: m.plan(0, 1, 1, True), ValueError, "plan"),
        (
            lambda m: _core.Model({}, names=families.default().tensor_names),
            ValueError,
            "'layers' is missing",
        ),
        (lambda m: make_model(kv_heads=3), ValueError, "not a multiple"),
        (lambda m: make_model(backend="cuda:99"), ValueError, "backend 'cuda:99/float32': "),
        (lambda m: _core.lr_factor("zigzag", 0, 0, 1), ValueError, "zigzag"),
        (lambda m: _core.warp_logits(np.zeros(3, np.float32), -1, 0, 1), ValueError, "temperature"),
        (lambda m: _core.sample(np.zeros(3, np.float32), 1, 0, 2, 0, 0, 0), ValueError, "top_p"),
    ],
)
def test_wrong_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call(make_model())


OWN_NAMES = {
    "word_embeddings": "wte",
    "final_layernorm": "norm",
    "output_layer": "head",
    "layer": "h.{}%s%n",
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    "query_key_value": "qkv",
    "dense": "out",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
    "prefix_encoder": "prefix",
}


def test_a_model_has_the_names_it_was_given():
    model = _core.Model(ARCH | {"layers": 1}, "cpu", names=OWN_NAMES)
    layer = "h.0%s%n."
    of_layer = "norm1.weight qkv.weight qkv.bias out.weight norm2.weight up.weight down.weight"
    inside = [layer + name for name in of_layer.split()]
    assert list(model.shapes()) == ["wte.weight", *inside, "norm.weight", "head.weight"]
    A, B = np.zeros((2, 64), np.float32), np.zeros((128, 2), np.float32)
    model.add_lora(layer + "qkv", A, B, 1.0, 0.0)
    assert model.names()[-2:] == [layer + "qkv.lora_A.weight", layer + "qkv.lora_B.weight"]
    prefix = np.zeros((3, 2 * 32), np.float32)
    model.set_prefix({"prefix.embedding.weight": prefix}, 0.0)
    assert model.names()[-1] == "prefix.embedding.weight"
    with pytest.raises(ValueError, match=r"expected prefix\.embedding\.weight and"):
        model.set_prefix({"embedding.weight": prefix}, 0.0)


@pytest.mark.parametrize(
    "changes, error, words",
    [
        ({"dense": None}, TypeError, "names: dense: expected a str, got NoneType"),
        ({"dense": "a\0b"}, ValueError, "names: dense: has a null character"),
        ({"dense": ""}, ValueError, "names dense: is empty"),
        ({"dense": "a" * 90}, ValueError, "names dense: with layer it is longer than 84 bytes"),
        ({"dense": "up"}, ValueError, "names dense and dense_h_to_4h: both are 'up'"),
        ({"layer": "h.0"}, ValueError, "names layer: expected one {} for the layer's number"),
        ({"layer": "{}.{}"}, ValueError, "names layer: expected one {} for the layer's number"),
        ({"experts": "e"}, ValueError, "names: expected 11 keys, got 12"),
    ],
)
def test_wrong_names(changes, error, words):
    with pytest.raises(error, match=words):
        _core.Model(ARCH, "cpu", names=OWN_NAMES | changes)
    few = {key: name for key, name in OWN_NAMES.items() if key != "layer"}
    with pytest.raises(ValueError, match="names: key 'layer' is missing"):
        _core.Model(ARCH, "cpu", names=few)
    with pytest.raises(TypeError, match="needs the keyword argument names"):
        _core.Model(ARCH, "cpu")


def test_wrong_weights():
    model = _core.Model(ARCH, names=families.default().tensor_names)
    name = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
    with pytest.raises(ValueError, match=r"expected shape \(64, 96\)"):
        model.bind(name, np.zeros((96, 64), np.float32), "F32")
    with pytest.raises(ValueError, match="expected a C-contiguous array of float16"):
        model.bind(name, np.zeros((64, 96), np.float32), "F16")
    with pytest.raises(ValueError, match="no weight of that name"):
        model.bind("transformer.nothing", np.zeros((64, 96), np.float32), "F32")
    with pytest.raises(RuntimeError, match="weights are not bound, the first is transformer.emb"):
        model.forward([1], [1])
    assert len(model.missing()) == len(model.shapes())


def test_non_finite_values_stop_with_layer_and_row():
    model = make_model()
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    weight = np.full((64, 96), np.nan, np.float32)
    model.bind(name, weight, "F32")
    with pytest.raises(FloatingPointError, match="layer 1 yields NaN or infinity: row 0"):
        model.loss([1, 2, 3], [3], [1], [3])
    cache = model.cache(1, 10)
    with pytest.raises(FloatingPointError, match="layer 1"):
        model.extend(cache, [0], [1, 2], [2])
    assert cache.lengths == [0]
    embedding = np.zeros((300, 64), np.float32)
    embedding[7] = np.inf
    model.bind("transformer.embedding.word_embeddings.weight", embedding, "F32")
    with pytest.raises(FloatingPointError, match="embedding holds NaN or infinity: row 1 of the"):
        model.loss([1, 2, 3, 7, 4], [2, 3], [0, 3], [3, 3])


def test_non_finite_gradient_changes_nothing():
    model = make_model()
    names = add_lora(model)
    model.set_trainable(names)
    model.backward([1, 2, 3], [3], [1], [3])
    huge = np.full(model.shape(names[1]), 1e38, np.float32)
    model.write(names[1], huge)
    with pytest.raises(FloatingPointError):
        model.backward([1, 2, 3], [3], [1], [3])
        model.step(**STEP)
    assert model.steps == 0 and np.array_equal(model.read(names[1]), huge)


def test_memory_that_is_not_there_is_an_error():
    model = make_model()
    with pytest.raises(MemoryError, match="bytes"):
        model.cache(1 << 20, 512, 0)
    with pytest.raises(MemoryError, match="MiB"):
        model.reserve(1 << 29, 1, 1 << 29, True)
    model.forward([1], [1])


def test_objects_are_freed_in_any_order():
    model = make_model()
    cache = model.cache(1, 8)
    model.extend(cache, [0], [1], [1])
    del model
    assert cache.lengths == [1]
    with pytest.raises(TypeError):
        type(cache)()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits anonymous memory")
def test_a_model_larger_than_its_memory_trains_and_answers(tmp_path):
    """Mapped weights stream: a process that may have less memory of its own than half of them
    computes a step and an answer, with the pages given back to the system in between."""
    script = """
        import re, resource, sys
        sys.path[:0] = sys.argv[1:3]
        from pathlib import Path
        import numpy as np
        from six_b import make
        sizes = dict(
            num_layers=6, hidden_size=1024, ffn_hidden_size=3072, kv_channels=64,
            num_attention_heads=16, padded_vocab_size=4096,
        )
        folder = Path(sys.argv[3])
        make(folder, **sizes)
        import glmlora
        from glmlora import _core
        from glmlora.model import quantization
        model = glmlora.AutoModel.from_pretrained(folder)
        mapped = sum(t.nbytes for t in model.stored_tensors())
        config = glmlora.LoraConfig(r=4, target_modules=["query_key_value"])
        trained = glmlora.get_peft_model(model, config)
        ids = np.arange(3, 67)[None]

        def run():
            answer = model.generate(ids, max_new_tokens=3, do_sample=False)
            loss = trained.backward(input_ids=ids, labels=ids)
            trained.zero_grad()
            return answer.tolist(), loss

        def data():
            return 1024 * int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1])

        _core.convert(np.zeros(1 << 22, np.float32), "F32", "F16")  # starts every thread
        limit = data() + mapped // 2
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            np.ones(mapped, np.uint8)
        except MemoryError:
            pass
        else:
            raise SystemExit("the limit holds nothing back")
        first = run()
        for tensor in model.stored_tensors():
            _core.drop_pages(tensor.data)
        assert run() == first
        print(mapped)
    """
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), here,
         os.path.join(here, os.pardir, "benchmarks"), str(tmp_path)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 100e6
