"""Threads that share the core: each with a model of its own, several with one, and what all of a
process share: backends, the pool, mapped files, signals. Whatever they do, each call has the right
numbers or says that the model is busy.

`make wheels-check` runs this without a GIL, `make tsan` under ThreadSanitizer.
"""

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from test_core import STEP, add_lora, batch, interrupted_in, make_model
from test_trust import finish
from tiny import tiny_model_dir

import glmlora
from glmlora import _core
from glmlora.tools import plan as planning

BUSY = "busy in another thread"
TINY = str(Path(glmlora.__file__).parent / "tiny")
LAYER = "transformer.encoder.layers.0.self_attention.query_key_value"


@pytest.fixture(autouse=True)
def often():
    """Where there is a GIL, threads hand it on as often as they can."""
    before, threads = sys.getswitchinterval(), _core.get_num_threads()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)
    _core.set_num_threads(threads)


def at_once(*functions, timeout=30):
    """What each function returns, called in a thread of its own, all beginning together; the first
    error of any."""
    gate, results, errors = threading.Barrier(len(functions)), [None] * len(functions), []

    def work(i):
        try:
            gate.wait()
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


def for_a_while(function, seconds=0.25):
    """A function that calls `function` over and over; how often it answered, and how often it was
    refused because the model is busy."""

    def work():
        answers = refusals = 0
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                function()
                answers += 1
            except RuntimeError as error:
                assert BUSY in str(error)
                refusals += 1
        return answers, refusals

    return work


# Models of their own


def trained(seed):
    """Losses, logits and tokens of a model that is trained and asked."""
    model, rng = make_model(), np.random.default_rng(seed)
    names = add_lora(model)
    model.set_trainable(names)
    losses = []
    for _ in range(4):
        losses += [model.backward(*batch(rng), dropout_seed=seed), model.step(**STEP)]
    cache, token, tokens = model.cache(1, 40), 5, []
    for _ in range(20):
        [token] = model.next(cache, [0], [token], [1])
        tokens.append(int(token))
    return losses, [model.read(n).tobytes() for n in names], tokens


@pytest.mark.parametrize("threads", [2, 4])
def test_each_thread_with_its_own_model(threads):
    alone = [trained(seed) for seed in range(threads)]
    together = at_once(*(lambda seed=seed: trained(seed) for seed in range(threads)))
    assert together == alone


def test_models_come_and_go_in_threads():
    want = make_model(layers=1).forward([1, 2, 3], [3])[0]

    def once():
        model = make_model(layers=1)
        cache = model.cache(1, 8)
        model.extend(cache, [0], [1, 2], [2])
        assert np.array_equal(model.forward([1, 2, 3], [3])[0], want)
        del model  # the cache goes last
        gc.collect()

    for answers, _ in at_once(*[for_a_while(once)] * 4):
        assert answers


def test_training_while_another_model_chats():
    def train():
        base, rng = glmlora.AutoModel.from_pretrained(TINY), np.random.default_rng(1)
        model = glmlora.get_peft_model(base, glmlora.LoraConfig(r=2, lora_dropout=0.0))
        base.prepare_training()
        for name in base.core.trainable():  # what it begins with is drawn for the whole process
            value = rng.normal(0, 0.1, base.core.shape(name)).astype(np.float32)
            base.core.write(name, value)
        ids = rng.integers(3, 500, (2, 12))
        optimizer = glmlora.AdamW(model, lr=1e-2)
        losses = []
        for _ in range(8):
            losses.append(model.backward(ids, labels=ids))
            optimizer.step()
        return losses

    def chat():
        model = glmlora.AutoModel.from_pretrained(TINY)
        tokenizer, answers = glmlora.AutoTokenizer.from_pretrained(TINY), []
        for _ in range(4):
            answer, _ = model.chat(tokenizer, "what is a cell", do_sample=False, max_new_tokens=9)
            answers.append(answer)
        return answers

    alone = train(), chat()
    assert tuple(at_once(train, chat)) == alone


# One model


@pytest.mark.parametrize("threads", [2, 4])
def test_one_model_in_many_threads(threads):
    """Every kind of call, those that change the model and those that look at it, all at once."""
    model = make_model(layers=1)
    cache = model.cache(2, 200)
    output = "transformer.output_layer.weight"
    array = np.array(model.read(output))
    want = model.forward([1, 2, 3], [3])[0]
    A, B = (np.zeros(s, np.float32) for s in ((4, 64), (model.shape(LAYER + ".weight")[0], 4)))
    adapter = [LAYER + ".lora_A.weight", LAYER + ".lora_B.weight"]

    def forward():
        assert np.array_equal(model.forward([1, 2, 3], [3])[0], want)

    def train():
        try:
            model.add_lora(LAYER, A, B, 1.0, 0.0)  # adds nothing, so the numbers stay
            names = [n for n in adapter if n in model.names()]
            if len(names) == 2:
                model.set_trainable(names)
                model.backward([1, 2, 3], [3], [0, 1], [2, 3])
                model.zero_grad()
            model.set_trainable([])
            model.remove_lora()
        except (ValueError, RuntimeError) as error:  # another one trains it, or removed it
            words = BUSY, "no weight", "being trained", "nothing is trainable"
            assert any(word in str(error) for word in words)

    def look():
        names = model.names()
        assert len(names) - len(set(names)) == 0 and output in names
        for name in model.trainable() + adapter:
            try:
                shape, value = model.shape(name), model.read(name)
                assert shape == value.shape or name in adapter
            except ValueError as error:
                assert "no weight" in str(error)
        assert model.dtype(output) == "F32" and not model.missing()
        assert model.steps == 0 and model.backend.startswith("cpu")

    def bind():
        model.bind(output, array.copy(), "F32")

    def generate():
        try:
            model.extend(cache, [0, 1], [1, 2, 1], [2, 1])
            lengths = cache.lengths
            assert len(lengths) == 2 and cache.rows == 2
            cache.reorder([1, 0])
        except (ValueError, RuntimeError) as error:  # full, or filled before a change
            text = str(error)
            if BUSY in text:
                raise
            assert "do not fit" in text or "weights changed" in text
        for row in range(2):
            cache.rewind(row, 0)

    jobs = [forward, train, look, bind, generate]
    chosen = [lambda: [job() for job in jobs]] + [jobs[i % 5] for i in range(threads - 1)]
    done = at_once(*(for_a_while(job, 0.4) for job in chosen))
    assert sum(answers for answers, _ in done)
    model.set_trainable([])
    model.remove_lora()
    forward()


def test_moments_are_no_refusal():
    """Only a computation refuses: calls that look, or change a table, wait for each other."""
    model = make_model(layers=1)

    def look():
        model.names(), model.trainable(), model.shape(LAYER + ".weight")
        model.enable_lora(True)
        model.zero_grad()

    done = at_once(*[for_a_while(look, 0.2)] * 4)
    assert all(answers and not refusals for answers, refusals in done)


def test_weights_change_their_shape_while_they_are_read():
    model = make_model(layers=1)
    out = model.shape(LAYER + ".weight")[0]
    name = LAYER + ".lora_A.weight"

    def adapt():
        for rank in (1, 64):
            A, B = np.full((rank, 64), rank, np.float32), np.zeros((out, rank), np.float32)
            model.add_lora(LAYER, A, B, 1.0, 0.0)

    def read():
        value = model.read(name)
        assert (value == len(value)).all()

    adapt()
    for answers, _ in at_once(for_a_while(adapt), for_a_while(read), for_a_while(read)):
        assert answers


def test_a_tokenizer_that_threads_share():
    tokenizer = glmlora.AutoTokenizer.from_pretrained(TINY)
    texts = [f"title:T{i} 你好 1990 " * (i % 5 + 1) for i in range(20)]
    want = [tokenizer.encode(text) for text in texts]

    def work():
        for text, ids in zip(texts, want, strict=True):
            assert tokenizer.encode(text) == ids
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()
        batch = tokenizer(texts[:3], padding=True)
        assert [len(row) for row in batch["input_ids"]] == [max(map(len, want[:3]))] * 3

    at_once(*[work] * 4)


# What a process shares


def test_the_same_files_at_once(tmp_path):
    """Mapped by each, and given back by each."""
    directory = str(tiny_model_dir(tmp_path))
    x = np.arange(3, 9)[None]
    want = glmlora.AutoModel.from_pretrained(directory)(x).logits

    def mapped():
        with open("/proc/self/maps") as maps:
            return sum(directory in line for line in maps)

    def load():
        for _ in range(5):
            model = glmlora.AutoModel.from_pretrained(directory)
            assert np.array_equal(model(x).logits, want)

    at_once(*[load] * 4)
    gc.collect()
    assert not mapped()


def test_backends_are_made_once():
    """In a process that has none yet: whoever asks first makes it, and all get that one."""
    out = finish(
        """
        from test_core import make_model
        from test_threads import at_once
        from glmlora import _core
        import numpy as np
        def work():
            _core.set_num_threads(3)
            value = _core.convert(np.ones(50000, np.float32), "F32", "F16")
            tables = [_core.op_table(name)["be"] for name in ("cpu", "cpu:generic", "plan")]
            return tables, _core.get_num_threads(), bool((value == 1).all())
        first, *others = at_once(*[work] * 4)
        print(first[1:], all(other == first for other in others))
        """
    )
    assert out == "(3, True) True\n"


def test_conversions_in_threads():
    """Functions that need no model, beside one that computes."""
    rng, model = np.random.default_rng(3), make_model(layers=1)
    data = batch(rng, 8)
    array = rng.normal(size=(64, 4096)).astype(np.float32)
    half, want = array.astype(np.float16), model.forward(*data[:2])[0]
    integers, scale = _core.quantize(array, "F32", 8)

    def convert():
        assert np.array_equal(_core.convert(array, "F32", "F16"), half)

    def quantize():
        got = _core.quantize(array, "F32", 8)
        assert np.array_equal(got[0], integers) and np.array_equal(got[1], scale)

    def forward():
        assert np.array_equal(model.forward(*data[:2])[0], want)

    jobs = convert, convert, quantize, forward
    for answers, _ in at_once(*(for_a_while(job) for job in jobs)):
        assert answers


def test_the_number_of_threads_changes_while_models_compute():
    models, data = [make_model(), make_model()], batch(np.random.default_rng(4), 6)
    want = models[0].forward(*data[:2])[0]
    numbers = iter(range(1, 10**9))

    def forward(model):
        assert np.array_equal(model.forward(*data[:2])[0], want)

    def change():
        _core.set_num_threads(next(numbers) % 5 + 1)
        assert 1 <= _core.get_num_threads() <= 5
        time.sleep(0.001)

    jobs = [lambda model=model: forward(model) for model in models]
    for answers, _ in at_once(*(for_a_while(job) for job in [*jobs, change])):
        assert answers


def test_plans_in_threads(tmp_path):
    """They count on one backend."""
    directory = tiny_model_dir(tmp_path, num_layers=1)
    kinds = [dict(method="lora", device="cuda"), dict(method="chat", device="cpu")]
    kinds += [dict(method="full", device="cpu"), dict(method="lora", device="cuda", batch=4)]

    def figures(kind):
        result = planning.plan(directory, seq=32, **kind)
        return result.activations, result.scratch, result.flops, result.calls

    alone = [figures(kind) for kind in kinds]
    assert at_once(*(lambda kind=kind: figures(kind) for kind in kinds)) == alone


def test_other_backends_are_for_one_thread_at_a_time():
    """A model is bound, freed and counted while another computes on the same backend."""
    model = make_model("ref_f32", layers=1)
    want = model.forward([1, 2, 3], [3])[0]
    array = np.array(model.read("transformer.output_layer.weight"))

    def forward():
        assert np.array_equal(model.forward([1, 2, 3], [3])[0], want)

    def others():
        other = make_model("ref_f32", layers=1)
        other.set_trainable(other.names()[:2])
        other.zero_grad()

    def plans():
        other = make_model("plan", layers=1)
        other.bind("transformer.output_layer.weight", array, "F32")
        other.forward([1, 2, 3], [3])
        assert other.counts()["live"] > 0

    done = at_once(*(for_a_while(job) for job in (forward, others, plans, plans)))
    assert all(answers for answers, _ in done)


def test_ctrl_c_ends_the_main_thread_only():
    """The other goes on and has the right numbers."""
    model, other = make_model(), make_model()
    data = batch(np.random.default_rng(5), 8)
    want = other.forward(*data[:2])[0]
    results, ready, over = [], threading.Event(), threading.Event()

    def work():
        while not over.is_set():
            results.append(np.array_equal(other.forward(*data[:2])[0], want))
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        ready.wait(10)
        before = len(results)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(10**6):
                model.forward(*data[:2])
        while len(results) < before + 2:
            time.sleep(0.01)
    finally:
        over.set()
        thread.join(10)
    assert all(results)
    assert np.array_equal(model.forward(*data[:2])[0], want)


def test_ctrl_c_while_it_waits_for_another_model():
    """What waits has not begun: its model is free afterwards."""
    other = make_model(layers=8, hidden=512, ffn=1024, heads=8, head_dim=64, kv_heads=2)
    model, started = make_model(layers=1), threading.Event()

    def long_call():
        started.set()
        other.forward(np.zeros(2000, np.int32), np.full(20, 100, np.int32), rows=[0])

    thread = threading.Thread(target=long_call)
    thread.start()
    started.wait()
    time.sleep(0.02)
    interrupted_in(model.forward, [1, 2], [2])
    assert thread.is_alive()
    thread.join(30)
    assert model.forward([1, 2], [2])[0].shape == (2, 300)


@pytest.mark.skipif(
    "libtsan" in os.environ.get("LD_PRELOAD", ""),
    reason="ThreadSanitizer allows no new threads in the child of a process with threads",
)
def test_children_forked_while_threads_compute():
    out = finish(
        """
        import os, threading, warnings
        import numpy as np
        from glmlora import _core
        from test_core import make_model
        warnings.simplefilter("ignore")  # that a process with threads forks
        models = [make_model(layers=1) for _ in range(3)]
        want = models[0].forward([1, 2, 3], [3])[0]
        array = np.ones((64, 4096), np.float32)
        def compute(model):
            while True:
                model.forward([1, 2, 3], [3])
        def convert():
            while True:
                _core.convert(array, "F32", "F16")
        for model in models[1:]:
            threading.Thread(target=compute, args=(model,), daemon=True).start()
        threading.Thread(target=convert, daemon=True).start()
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                right = []
                def work():
                    model = make_model(layers=1)
                    right.append(np.array_equal(model.forward([1, 2, 3], [3])[0], want))
                    right.append((_core.convert(array, "F32", "F16") == 1).all())
                threads = [threading.Thread(target=work) for _ in range(3)]
                [thread.start() for thread in threads]
                [thread.join() for thread in threads]
                right.append(np.array_equal(models[0].forward([1, 2, 3], [3])[0], want))
                os._exit(0 if right == [True] * 7 else 1)
            assert os.waitpid(pid, 0)[1] == 0
        print("right", flush=True)
        os._exit(0)
        """
    )
    assert out == "right\n"


def test_nothing_here_turns_the_gil_on():
    if not hasattr(sys, "_is_gil_enabled") or os.environ.get("PYTHON_GIL") != "0":
        pytest.skip("a Python with a GIL, or PYTHON_GIL is not 0")
    assert not sys._is_gil_enabled()
    out = finish("import sys, glmlora._core; print(sys._is_gil_enabled())", PYTHON_GIL="")
    assert out == "False\n"
