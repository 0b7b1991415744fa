"""What the core does when others change what it uses: arrays written to by other threads, code that
runs in the middle of a call, files that change, memory and threads that cannot be had."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import training
from emulator import needs_compiler
from test_core import ARCH, add_lora, make_model, run_child

OUTPUT = "transformer.output_layer.weight"


def finish(code, timeout=60, arguments=(), **environment):
    """What a child prints that runs the code; it must end by itself."""
    child = run_child(code, *arguments, **environment)
    try:
        out, err = child.communicate(timeout=timeout)
    finally:
        child.kill()  # where it hangs
    assert child.returncode == 0, (child.returncode, out, err[-2000:])
    return out


# Arrays


@pytest.mark.parametrize("array", ["ids", "both"])
def test_index_arrays_that_a_thread_writes_to(array):
    """Right and wrong numbers by turns: each call answers or refuses."""
    finish(
        """
        import os, threading, time
        import numpy as np
        from test_core import make_model
        model = make_model(layers=1)
        I = lambda *a: np.array(a, np.int32)
        cache, draws = model.cache(2, 400), np.zeros((2, 3), np.uint64)
        ids, positions, rows, lengths = np.ones(200, np.int32), I(*range(200)), I(5, 9), I(100, 100)
        parents, both, context = I(1, 0), I(0, 1), np.ones(400, np.int32)
        def write(array):
            right = array.copy()
            while True:
                for wrong in (1 << 30, -(1 << 30)):
                    array[:] = wrong
                    array[:] = right
        each = dict(ids=ids, positions=positions, rows=rows, lengths=lengths, parents=parents,
                    both=both, context=context)
        array = each[os.environ["ARRAY"]]
        threading.Thread(target=write, args=(array,), daemon=True).start()
        choice = dict(draws=draws, temperature=0.5, context=context, context_lengths=I(200, 200),
                      repetition_penalty=1.2, no_repeat_ngram_size=2)
        calls = [
            lambda: model.forward(ids, lengths, positions, rows),
            lambda: model.loss(ids, lengths, rows, both),
            lambda: model.extend(cache, both, ids, lengths),
            lambda: model.next(cache, both, ids, lengths, choice=choice),
            lambda: cache.reorder(parents),
        ]
        answers, end = 0, time.monotonic() + 0.6
        while time.monotonic() < end:
            for call in calls:
                try:
                    call()
                    answers += 1
                except ValueError:
                    pass
                for row in range(2):
                    cache.rewind(row, 0)
        print(answers, flush=True)
        os._exit(0)
        """,
        ARRAY=array,
    )


def test_integers_of_other_types_are_copied_before_they_are_checked():
    model = make_model()

    ids = np.arange(4, dtype=np.int64)
    want, _ = model.forward(np.arange(4, dtype=np.int32), [4])
    assert np.array_equal(model.forward(ids, [4])[0], want)
    assert np.array_equal(model.forward(np.arange(8, dtype=np.int32)[::2] // 2, [4])[0], want)


def test_a_move_to_where_the_model_is_changes_nothing():
    model = make_model()
    mine = np.full(model.shape(OUTPUT), 0.01, np.float32)
    model.bind(OUTPUT, mine, "F32")
    before = sys.getrefcount(mine)
    model.move("cpu", [])
    assert sys.getrefcount(mine) == before
    with pytest.raises(ValueError, match="same type"):
        model.move("ref_f64", [])
    with pytest.raises(RuntimeError, match="lies with its caller"):
        model.move("ref_f32", [])
    assert sys.getrefcount(mine) == before


def test_a_bind_that_is_refused_leaves_what_was_bound():
    model = make_model()
    mine = np.full(model.shape(OUTPUT), 0.01, np.float32)
    model.bind(OUTPUT, mine, "F32")
    want, _ = model.forward([1, 2], [2])
    before = sys.getrefcount(mine)
    with pytest.raises(ValueError, match="expected shape"):
        model.bind(OUTPUT, np.zeros((3, 3), np.float32), "F32")
    assert sys.getrefcount(mine) == before
    assert np.array_equal(model.forward([1, 2], [2])[0], want)
    model.bind(OUTPUT, mine + 1, "F32")
    assert sys.getrefcount(mine) < before


def test_a_bind_without_memory_for_an_object_keeps_the_arrays():
    testcapi = pytest.importorskip("_testcapi", reason="this Python has no hooks for tests")
    model = make_model()
    want, _ = model.forward([1, 2], [2])
    new = np.full(model.shape(OUTPUT), 0.01, np.float32)
    for number in range(12):
        testcapi.set_nomemory(number, number + 1)
        try:
            model.bind(OUTPUT, new, "F32")
            bound = True
        except MemoryError:
            bound = False
        finally:
            testcapi.remove_mem_hooks()
        gc.collect()
        junk = [np.full(model.shape(OUTPUT), 9, np.float32) for _ in range(20)]
        logits, _ = model.forward([1, 2], [2])
        assert np.array_equal(logits, want) != bound, number
        del junk
        if bound:
            model.bind(OUTPUT, np.array(make_weight()), "F32")
            want, _ = model.forward([1, 2], [2])


def make_weight():
    return np.random.default_rng(5).normal(0, 0.3, (ARCH["vocab"], ARCH["hidden"])).astype("f4")


def test_a_conversion_that_changes_the_dict_it_came_from():
    model = make_model()
    cache = model.cache(1, 20)

    class Clears:
        def __array__(self, dtype=None, copy=None):
            choice.clear()
            gc.collect()
            return np.ones(3, np.int64)

    choice = {
        "suppress": Clears(),
        "draws": np.zeros((1, 3), np.uint64),
        "context": Clears(),
        "context_lengths": [3],
        "min_length": 9,
    }
    assert model.next(cache, [0], [1], [1], choice=choice).shape == (1,)


# Code that runs in the middle


def test_a_model_cannot_be_used_from_within_a_computation_of_its_thread():
    """A signal handler that does so would wait for itself."""
    out = finish(
        """
        import signal
        import numpy as np
        from test_core import make_model
        other = make_model()
        model = make_model(layers=24, hidden=256, ffn=2048, heads=8, head_dim=32, kv_heads=2)
        said = []
        def handler(number, frame):
            for m in (model, other):
                try:
                    m.forward([1], [1])
                except RuntimeError as error:
                    said.append(str(error))
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            while True:
                model.forward(np.zeros(5000, np.int32), np.full(10, 500, np.int32), rows=[0])
        except KeyboardInterrupt:
            pass
        print(said)
        print(model.forward([1], [1])[0].shape == other.forward([1], [1])[0].shape)
        """
    )
    assert "busy" in out and "a model computes in this thread" in out and "True" in out


def test_caches_of_a_model_that_is_gone_give_their_memory_back():
    probe = make_model("plan")

    def cycle():
        model = make_model("plan")
        things = [model.cache(1, 100), model]
        model.cache(1, 50)
        things.append(things)

    gc.collect()
    before = probe.counts()["live"]
    for _ in range(3):
        cycle()
    gc.collect()
    assert probe.counts()["live"] == before


def test_threads_that_share_a_model_and_the_pool():
    """Of two threads on one model each call answers or says that the model is busy, and what needs
    no model (conversions, bindings of another) computes beside it."""
    shared, other = make_model(), make_model()
    add_lora(other)
    values = np.random.default_rng(1).normal(size=(300, 300)).astype(np.float32)
    ids = np.arange(60, dtype=np.int32)
    want = shared.forward(ids, [60])[0]
    from glmlora import _core

    half = _core.convert(values, "F32", "F16")
    wrong = []

    def run(kind):
        for _ in range(30):
            try:
                if kind == "model":
                    got = shared.forward(ids, [60])[0]
                    same = np.array_equal(got, want)
                elif kind == "convert":
                    same = np.array_equal(_core.convert(values, "F32", "F16"), half)
                else:
                    other.bind(OUTPUT, np.zeros(other.shape(OUTPUT), np.float32), "F32")
                    same = True
            except RuntimeError as error:
                same = "busy" in str(error)
            if not same:
                wrong.append(kind)

    threads = [
        threading.Thread(target=run, args=(k,))
        for k in ("model", "model", "convert", "convert", "bind")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_conversion_beside_a_long_computation_does_not_answer_its_signals():
    """It uses the same threads and holds the interpreter's lock, which the computation's poll for
    Ctrl-C takes."""
    finish(
        """
        import threading
        import numpy as np
        from glmlora import _core
        from test_core import make_model
        model = make_model(layers=30, hidden=128, head_dim=32, ffn=256)
        values = np.random.default_rng(1).normal(size=(400, 400)).astype(np.float32)
        want, wrong, over = _core.convert(values, "F32", "F16"), [], threading.Event()
        def convert():
            while not over.is_set():
                if not np.array_equal(_core.convert(values, "F32", "F16"), want):
                    wrong.append(1)
        thread = threading.Thread(target=convert)
        thread.start()
        for _ in range(10):
            model.forward(np.zeros(400, np.int32), [400], rows=[0])
        over.set()
        thread.join()
        assert not wrong
        """,
        timeout=400 if "GLMLORA_SANITIZED" in os.environ else 40,
    )


# Files

FILES = """
    import os, sys
    import numpy as np
    import glmlora
    from training import model_dir
    from pathlib import Path

    def uses():
        for name, call in dict(
            forward=lambda: model(input_ids=ids),
            generate=lambda: model.generate(ids, max_new_tokens=3),
            backward=lambda: adapted.backward(input_ids=ids, labels=ids),
            merge=lambda: adapted.merge_and_unload(),
            state_dict=lambda: [v.sum() for v in model.state_dict().values()],
            read=lambda: [p.numpy() for _, p in model.named_parameters()],
            half=lambda: model.half(),
            quantize=lambda: model.quantize(8),
            save=lambda: model.save_pretrained(folder + "/saved"),
            save_bin=lambda: model.save_pretrained(folder + "/saved", safe_serialization=False),
            train_all=lambda: model.requires_grad_(True).backward(input_ids=ids, labels=ids),
        ).items():
            yield name, call

    folder = model_dir(Path(sys.argv[1]))
    file = folder + "/model.safetensors"
    ids = np.arange(3, 23).reshape(2, 10)
    for number, (name, _) in enumerate(list(uses())):
        if not (child := os.fork()):
            held = glmlora.load_state_dict(file)
            model = glmlora.AutoModel.from_pretrained(folder)
            config = glmlora.LoraConfig(r=2, target_modules=["query_key_value"])
            adapted = glmlora.get_peft_model(model, config)
            if sys.argv[2] == "shorter":
                os.truncate(file, 5000)
            else:
                size, old = os.path.getsize(file), os.stat(file)
                with open(file, "r+b") as f:
                    f.seek(size // 2)
                    f.write(bytes(1000))
                os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns + 1))
            try:
                list(uses())[number][1]()
                print(name, "answered")
            except OSError as error:
                print(name, "refused", file in str(error))
            except BaseException as error:
                print(name, repr(error))
            for value in held.values():
                assert value.size == 0 or np.isfinite(value).all()
            adapted.save_pretrained(folder + "/adapter")  # what was trained is not lost
            sys.stdout.flush()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status:
            print(name, "died", status)
        model_dir(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("change", ["shorter", "other bytes"])
def test_a_weights_file_that_changes_is_an_error_that_names_it(tmp_path, change):
    said = finish(FILES, arguments=[str(tmp_path), change]).split("\n")[:-1]
    assert len(said) == 11
    assert {line.partition(" ")[2] for line in said} == {"refused True"}, said


def test_a_file_that_shrinks_in_the_middle_of_a_call(tmp_path):
    """And while it is parsed; faults elsewhere end the process as before."""
    out = finish(
        """
        import os, sys, threading, time
        import numpy as np
        from glmlora import _core
        from test_core import make_model
        path = sys.argv[1]
        values = np.random.default_rng(0).normal(size=(8000, 256)).astype("f4")
        name = "transformer.output_layer.weight"
        for delay in (0.001, 0.01, 0.03):
            values.tofile(path)
            with open(path, "rb") as f:
                mapped = _core.map_file(f.fileno(), path)
            model = make_model(vocab=8000, hidden=256, head_dim=64, layers=1)
            model.bind(name, mapped.view("f4").reshape(values.shape), "F32")
            model.forward([1], [1])
            threading.Timer(delay, os.truncate, (path, 4096)).start()
            try:
                while True:
                    model.forward(np.ones(60, np.int32), [60])
            except OSError as error:
                print(path in str(error), flush=True)
            del mapped
        import signal
        seen = []
        signal.signal(signal.SIGBUS, lambda *_: seen.append(1))
        model = make_model()
        os.kill(os.getpid(), signal.SIGBUS)
        print(seen)
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        if not os.fork():
            values.tofile(path)
            foreign = np.memmap(path, "f4", "r")
            os.truncate(path, 4096)
            _core.convert(foreign, "F32", "F16")
            os._exit(0)
        print(os.wait()[1] & 127 == signal.SIGBUS)
        """,
        arguments=[str(tmp_path / "weights")],
    )
    assert out.split() == ["True"] * 3 + ["[1]", "True"]


def test_a_file_that_is_replaced_stays_in_use(tmp_path):
    """Saving over the folder that a model came from renames new files to the old names."""
    import glmlora

    folder = training.model_dir(tmp_path)
    model = glmlora.AutoModel.from_pretrained(folder)
    want = model(input_ids=[[5, 6, 7]]).logits
    model.save_pretrained(folder)
    assert np.array_equal(model(input_ids=[[5, 6, 7]]).logits, want)


def test_copies_that_would_not_fit_stay_views_with_a_warning(tmp_path, monkeypatch):
    import glmlora
    from glmlora import _core

    folder = training.model_dir(tmp_path)
    want = glmlora.load_state_dict(folder)
    assert not any(_core.check_mapped(a) for a in want.values())
    monkeypatch.setattr(_core, "memory_available", lambda: 1000)
    with pytest.warns(UserWarning, match="load_state_dict: a copy takes .* must not change"):
        views = glmlora.load_state_dict(folder)
    assert all(_core.check_mapped(a) for a in views.values())
    assert all(np.array_equal(views[name], want[name]) for name in want)


# Memory and threads

FAULTS = """
    import ctypes, json, os, sys, time
    from pathlib import Path
    import numpy as np
    import glmlora, training

    faults = ctypes.CDLL(sys.argv[1])
    folder = training.model_dir(Path(sys.argv[2]))
    ids, here = np.arange(3, 23).reshape(2, 10), {}

    def load():
        here["model"] = glmlora.AutoModel.from_pretrained(folder)

    def step():
        config = glmlora.LoraConfig(r=2, target_modules=["query_key_value"])
        here["adapted"] = glmlora.get_peft_model(here["model"], config)
        loss = here["adapted"].backward(input_ids=ids, labels=ids)
        glmlora.AdamW(here["adapted"], lr=1e-3).step()
        return loss

    def logits():
        return here["model"](input_ids=ids).logits

    def decode():
        model = here["model"]
        chosen = model.generate(ids[:1], max_new_tokens=4, do_sample=True, eos_token_id=[])
        large = glmlora._core.convert(np.ones(1 << 20, "f4"), "F32", "F16")  # for every thread
        return chosen.tolist(), float(logits().sum()), float(large.sum())

    def save():
        here["adapted"].save_pretrained(sys.argv[2] + "/adapter")
        here["model"].save_pretrained(sys.argv[2] + "/model")
        here["adapted"].merge_and_unload().half().quantize(8)

    def train_all():
        here["model"].requires_grad_(True).backward(input_ids=ids, labels=ids)
        here["model"].requires_grad_(False)

    phases = [load, step, decode, train_all, save]

    def outcome(kind, number, at, rest):
        "Of phase `number`, in which call `at` fails; and of the model afterwards."
        reader, writer = os.pipe()
        if not (child := os.fork()):
            faults.faults_set(kind, at, rest)
            begun = time.process_time()
            try:
                said = ["answer", repr(phases[number]())]
            except MemoryError as error:
                said = ["memory", str(error)]
            except BaseException as error:
                said = ["wrong", repr(error)]
            seen = faults.faults_seen()
            faults.faults_set(0, 0, 0)
            if "model" in here:
                assert np.isfinite(logits()).all()
            said += [seen, time.process_time() - begun]
            os.write(writer, json.dumps(said).encode())
            os._exit(0)
        os.close(writer)
        with open(reader, "rb") as f:
            text = f.read()
        died = os.waitpid(child, 0)[1]
        return ["died", died, 0, 0] if died else json.loads(text)

    for kind in (1, 2, 4):
        total = 0
        glmlora.set_seed(1)
        for number, phase in enumerate(phases):
            want = outcome(kind, number, 0, 0)
            assert want[0] == "answer", want
            for at in range(1, want[2] + 1):
                got = outcome(kind, number, at, at % 2)  # alone, and with all that follow, by turns
                where = (phase.__name__, at, got)
                assert got[0] in ("answer", "memory") and got[3] < 5, where
                assert got[0] == "memory" or got[1] == want[1], where
                assert got[0] == "answer" or " bytes" in got[1], where
                total += 1
            phase()
        print(total)
"""


@needs_compiler
def test_memory_and_threads_that_cannot_be_had(tmp_path):
    """Each of the core's calls for them fails in turn, alone and with all that follow: MemoryError
    that says how many bytes, or the same answer; and the model answers afterwards."""
    faults = tmp_path / "faults.so"
    source = os.path.join(os.path.dirname(__file__), "faults_memory.c")
    flags = ["-O1", "-w", "-shared", "-fPIC", "-o", str(faults), source, "-ldl"]
    subprocess.run(["gcc", *flags], check=True)
    out = finish(
        FAULTS, 300, [str(faults), str(tmp_path)], LD_PRELOAD=str(faults),
        PYTHONWARNINGS="ignore", OMP_NUM_THREADS="2",
    )  # fmt: skip
    memory, mappings, threads = map(int, out.split())
    assert memory > 40 and mappings and threads


def test_python_objects_that_cannot_be_had():
    """Each allocation of Python's fails in turn in each method of a model and of a cache."""
    testcapi = pytest.importorskip("_testcapi", reason="this Python has no hooks for tests")
    model = make_model()
    names = add_lora(model)
    model.set_trainable(names)
    cache = model.cache(2, 60)
    value, weight = model.read(names[0]), make_weight()
    prefix = {"transformer.prefix_encoder.embedding.weight": np.ones((2, 3 * 2 * 32), "f4")}
    ids, both, zero = np.arange(4), np.array([0, 1]), np.zeros((2, 3), np.uint64)
    choice = {"draws": zero, "temperature": 1.0, "context": ids, "context_lengths": [2, 2]}
    A, B = np.ones((2, ARCH["hidden"]), "f4"), np.ones((ARCH["hidden"], 2), "f4")
    module = "transformer.encoder.layers.0.self_attention.dense"
    calls = {
        "shapes": model.shapes,
        "names": model.names,
        "missing": model.missing,
        "trainable": model.trainable,
        "shape": lambda: model.shape(OUTPUT),
        "forward": lambda: model.forward(ids, [2, 2], hidden_states=True),
        "loss": lambda: model.loss(ids, [2, 2], [0, 2], [1, 3]),
        "backward": lambda: model.backward(ids, [2, 2], [0, 2], [1, 3]),
        "plan": lambda: model.plan(4, 2, 2, True),
        "read": lambda: model.read(names[0], "grad"),
        "write": lambda: model.write(names[0], value),
        "set_trainable": lambda: model.set_trainable(names[:2]),
        "bind": lambda: model.bind(OUTPUT, weight, "F32"),
        "cache": lambda: model.cache(2, 10, 5),
        "next": lambda: model.next(cache, both, ids, [2, 2], choice=choice),
        "go_on": lambda: model.go_on(cache, both, ids[:2], [1, 1], 1, [3]),
        "reorder": lambda: cache.reorder([1, 0]),
        "lengths": lambda: cache.lengths,
        "remove": lambda: model.set_trainable([]),
        "add_lora": lambda: model.add_lora(module, A, B, 1.0, 0.0),
        "set_prefix": lambda: model.set_prefix(prefix, 0.0),
        "Model": make_bare,
    }
    failed = 0
    for name, call in calls.items():
        for number in range(200):
            testcapi.set_nomemory(number, number + 1)
            try:
                call()
                done = True
            except MemoryError:
                done = False
            finally:
                testcapi.remove_mem_hooks()
            assert np.isfinite(model.forward([1, 2], [2])[0]).all(), (name, number)
            if done:
                break
        assert done, name
        failed += number
    assert failed > 20


def make_bare():
    from glmlora import _core, families

    return _core.Model(ARCH, "cpu", names=families.default().tensor_names)
