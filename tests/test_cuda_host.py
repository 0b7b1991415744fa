"""The host side of the CUDA library beside its ops, on the emulator: several GPUs and a thread's
current one, faults that are told late and GLMLORA_CUDA_CHECK=1.
What the emulator reads from the environment it reads once, so each has a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
from emulator import built, needs_compiler

pytestmark = needs_compiler
ROOT = Path(__file__).resolve().parent.parent
START = """
    import ctypes, sys
    import numpy as np
    import glmlora
    from glmlora import _core
    from glmlora.model import device as devices

    runtime = ctypes.CDLL({runtime!r})
    runtime.emu_reports.restype = ctypes.c_uint64
    now, flags, text = ctypes.c_int(-1), ctypes.c_uint(), ctypes.create_string_buffer(400)
    ids = np.arange(3, 33).reshape(2, 15)

    def load(device):
        return glmlora.AutoModel.from_pretrained({directory!r}, device=device)

    def current():
        runtime.cudaGetDevice(ctypes.byref(now))
        return now.value

    def has_context(device):
        runtime.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(now))
        return bool(now.value)

    def train(model):
        glmlora.set_seed(1)
        config = glmlora.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["query_key_value"])
        adapted = glmlora.get_peft_model(model, config)
        optimizer = glmlora.AdamW(adapted, lr=1e-2)
        losses = []
        for _ in range(3):
            losses.append(round(adapted.backward(input_ids=ids, labels=ids), 4))
            optimizer.step()
        return losses, model.generate(ids[:1], max_new_tokens=5, eos_token_id=[]).tolist()
"""
END = """
    assert runtime.emu_reports(text, ctypes.c_size_t(400)) == 0, text.value
"""


@pytest.fixture
def directory(tmp_path):
    return tiny.tiny_model_dir(tmp_path, dtype="F16")


def run(directory, script, **env):
    """What a script prints, in a process with the emulator for its GPUs."""
    library = built()
    start = START.format(runtime=str(library.with_name("libcuda_emu.so")), directory=str(directory))
    env = {"GLMLORA_CUDA_LIBRARY": str(library), "EMU_DEVICES": "2"} | env
    done = subprocess.run(
        [sys.executable, "-c", "".join(map(textwrap.dedent, (start, script, END)))],
        env=os.environ | env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_two_gpus_in_one_process(directory):
    """Each model computes on its own, and moves to the other."""
    script = """
        assert devices.info("emu")["count"] == 2
        assert [devices.info(f"emu:{i}")["name"] for i in (0, 1)] == ["emulator", "emulator 1"]
        first, second = load("emu:0"), load("emu:1")
        want = train(load("emu"))
        assert train(first) == train(second) == want
        logits = second(ids).logits
        assert second.to("emu:0").device == "emu:0"
        assert np.array_equal(second(ids).logits, logits)
        try:
            load("emu:2")
        except ValueError as error:
            assert "this machine has 2 CUDA devices" in str(error)
    """
    run(directory, script)


def test_a_process_a_gpu(directory):
    """CUDA_VISIBLE_DEVICES chooses it, and its number is 0 there."""
    script = """
        found = devices.info("emu")
        print(found["count"], found["name"], train(load("emu")))
    """
    said = [run(directory, script, CUDA_VISIBLE_DEVICES=str(i)) for i in (0, 1)]
    assert said[0].startswith("1 emulator ([") and said[1].startswith("1 emulator 1 ([")
    assert said[0].split("(")[1] == said[1].split("(")[1]
    script = """
        found = devices.info("emu")
        print(found["count"], found["why"])
    """
    assert run(directory, script, CUDA_VISIBLE_DEVICES="").startswith("0 no GPU can be used: ")


def test_the_current_device_of_the_thread_is_left_as_it_was(directory):
    """Another library uses GPU 1 while the models are on GPU 0, and the other way round."""
    script = """
        for theirs, ours in ((1, "emu:0"), (0, "emu:1")):
            assert runtime.cudaSetDevice(theirs) == 0
            model = load(ours)
            assert current() == theirs
            train(model)
            assert current() == theirs
            cache = model.core.cache(1, 10, 0)
            assert current() == theirs
            model.to("emu:1" if ours == "emu:0" else "emu:0")
            assert current() == theirs
            model.cpu().to(ours)
            assert current() == theirs
            del model, cache
            assert current() == theirs
            devices.info("emu:0"), devices.info("emu:1")
            assert current() == theirs
    """
    run(directory, script)


def test_a_gpu_that_nobody_uses_gets_no_context(directory):
    """The first one is every thread's current device, used or not."""
    script = """
        train(load("emu:1"))
        assert has_context(1) and not has_context(0)
    """
    run(directory, script)


@pytest.mark.parametrize(
    "capability, backend",
    [(60, None), (70, "float32"), (75, "float16"), (80, "bfloat16"), (120, "bfloat16")],
)
def test_what_each_generation_computes_in(tmp_path, capability, backend):
    """A P100 nothing, a V100 float32, a T4 float16 whatever the weights are stored in."""
    directory = tiny.tiny_model_dir(tmp_path, dtype="BF16")
    script = """
        import warnings
        warnings.simplefilter("ignore")
        model = load("emu")
        print(model.core.backend, devices.info("emu")["why"])
        train(model)
    """
    said = run(directory, script, EMU_CAPABILITY=str(capability))
    if backend:
        assert said == f"emu:0/{backend} \n"
    else:
        assert said.startswith("cpu") and "emulator of capability 6.0 is not among by g++" in said


FAULT = """
    faults = ctypes.CDLL({faults!r})
    model = load("emu")
    for _ in range(3):
        model(ids)
    faults.faults_set(b"cudaStreamSynchronize", {at}, 700)
    try:
        model(ids)
        print("no error")
    except RuntimeError as error:
        print(error)
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    flags = ["-O1", "-w", "-shared", "-fPIC", "-o", library, ROOT / "tests" / "faults.c", "-ldl"]
    subprocess.run(["gcc", *map(str, flags)], check=True)
    return library


def test_faults_of_kernels(faults, directory):
    """Without the check the first call that waits tells them, and says so; with it each launch is
    waited for, and named."""
    env = {"LD_PRELOAD": str(faults), "FAULTS_RUNTIME": str(built().with_name("libcuda_emu.so"))}
    said = run(directory, FAULT.format(faults=str(faults), at=1), **env)
    assert "(error 700); an op before it may be at fault: GLMLORA_CUDA_CHECK=1 names it" in said
    named = []
    for at in (1, 9, 17):
        script = FAULT.format(faults=str(faults), at=at)
        said = run(directory, script, GLMLORA_CUDA_CHECK="1", **env)
        assert "GLMLORA_CUDA_CHECK" not in said and "(error 700)" in said
        named.append(said.split(": ")[1])
    assert named[0] == "embedding_forward, launch 1 of it in this call", named
    assert len(set(named)) == 3 and all(", launch " in name for name in named), named


def test_the_check_changes_no_result(directory):
    script = "    print(train(load('emu')))\n"
    assert run(directory, script) == run(directory, script, GLMLORA_CUDA_CHECK="1")
