"""Fuzzing of every reader, in one process: whatever bytes a file holds, reading it ends in a value
or in a ValueError or OSError that names the file, within ten seconds.

    python tests/fuzz.py                                      every reader, 2,000 inputs each
    python tests/fuzz.py tables adapter --inputs 2000000 --seed 3
    python tests/fuzz.py torch --guided --inputs 2000000      led by coverage (needs atheris)

Each reader has a sound folder of files; an input is that folder with one file struck by a grammar
that knows its form, so that damage lies behind the checks of lengths, checksums and syntax too.
What fails is kept below build/fuzz and printed with the seed; the input of a crash is what lies in
the folder glmlora-fuzz-PID-READER, in memory (/dev/shm) where that has a GiB free, else in TMPDIR.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "fuzz"
SLOW = 10  # seconds that no input may take
Edit = Callable[[random.Random, bytes], bytes]
Read = Callable[[Path], Any]


# How a file is struck, by its form

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    10**40,
)
WORDS = (
    *NUMBERS,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    None,
    True,
    False,
    "",
    "0",
    "F32",
    "BF16",
    "\ud800",
    "\0",
    "a" * 300,
    "../x",
    "/etc/passwd",
    "(a+)+$",
    "<|user|>",
    "{{ 1 }}",
    [],
    {},
    [[False]],
    [1, 2],
    {"": 0},
    "\u202e",
    "1e9999",
)
PIECES = (
    b"\0",
    b"\xff",
    b"\xff" * 8,
    b"\0" * 8,
    b"\n",
    b"\r",
    b'"',
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\xb1\xea",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"PK\x03\x04",
    b"(",
    b".",
    b"R",
    b"'",
    b"\\",
    b"1e999",
    b"NaN",
)


def strike_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four edits anywhere: set, insert, remove, repeat, cut."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        new = rng.choice(PIECES) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 9))
        match rng.randrange(6):
            case 0:
                data = data[:at] + new + data[at + len(new) :]
            case 1:
                data = data[:at] + new + data[at:]
            case 2:
                data = data[:at] + data[at + rng.randrange(1, 40) :]
            case 3:
                data = data[:at] + data[at // 2 : at // 2 + 40] * rng.choice((1, 1, 3)) + data[at:]
            case 4:
                data = (
                    data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
                    if at < len(data)
                    else data
                )
            case 5:
                data = data[:at] if rng.random() < 0.3 else data + new
    return data


def _word(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(WORDS))


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from _paths(value[i], (*path, i))


def _strike_value(rng: random.Random, root: Any) -> Any:
    path = rng.choice(list(_paths(root)))
    if not path:
        return rng.choice((root, [root], {"a": root}, _word(rng)))
    holder = root
    for key in path[:-1]:
        holder = holder[key]
    old, key = holder[path[-1]], path[-1]
    match rng.randrange(7):
        case 0 | 1 | 2:
            holder[key] = _word(rng)
        case 3:
            holder[key] = [old]
        case 4:
            holder[key] = old + rng.choice((-1, 1, 1 << 40)) if type(old) is int else str(old)
        case 5:
            del holder[key]
        case 6 if isinstance(holder, dict):
            holder[rng.choice([*holder, "x", "family", "__class__", ""])] = holder.pop(key)
        case _:
            holder[key] = {"x": old}
    return root


def strike_json(rng: random.Random, data: bytes) -> bytes:
    """Values, keys and shapes of a JSON text that stays one; at times deep nests, names given
    twice, plain bytes.
    """
    chance = rng.random()
    if chance < 0.15:
        return strike_bytes(rng, data)
    if chance < 0.17:
        depth = rng.choice((100, 990, 3000, 100_000))
        nest = (
            b"[" * depth + b"]" * depth
            if rng.random() < 0.5
            else b'{"a":' * depth + b"0" + b"}" * depth
        )
        return data.rstrip()[:-1] + b',"deep":' + nest + b"}"
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return strike_bytes(rng, data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _strike_value(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if chance < 0.2 and text.startswith(b"{"):
        return b'{"model_type": 3, "r": 1, "": 2, ' + text[1:]
    return text


def strike_lines(rng: random.Random, data: bytes) -> bytes:
    """JSON, an object a line: one of them struck, or the lines."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    lines[at] = (
        strike_json(rng, lines[at])
        if lines[at] and rng.random() < 0.8
        else strike_bytes(rng, lines[at])
    )
    return (b"\n" if rng.random() < 0.8 else b"\r\n").join(lines)


def strike_table(rng: random.Random, data: bytes) -> bytes:
    """A csv: cells, quotes, separators, line ends and the character set."""
    match rng.randrange(8):
        case 0:
            text = data.decode("utf-8", "replace")
            return text.encode(
                rng.choice(("gb18030", "utf-16", "utf-16-be", "utf-8-sig", "utf-32", "cp1252")),
                "replace",
            )
        case 1:
            return data.replace(b",", rng.choice((b";", b"\t", b",,", b", ", b'","')))
        case 2:
            return data.replace(
                b"\n", rng.choice((b"\r", b"\r\n", b"\n\n", b",\n", b'"\n', b"\0\n"))
            )
        case 3:
            at = rng.randrange(len(data) + 1)
            return (
                data[:at]
                + rng.choice((b'"', b'""', b"x" * 200_000, b",", b"\n", b"=1+1", b"'"))
                + data[at:]
            )
        case _:
            return strike_bytes(rng, data)


def strike_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header as JSON under a length that fits again, or the bytes."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.35 or not 2 <= length <= len(data) - 8:
        return strike_bytes(rng, data)
    header = strike_json(rng, data[8 : 8 + length])
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


CODES = (
    b"\x80\x95.X\x8cUTJKM\x8aGN\x88\x89(}])t\x85\x86\x87suaeqrhj\x94c\x93QRbio0210NBC"
    b"\x8d\x8e\x96\x97\x98\x8f\x90\x91\x92"
)
STEPS = (
    b"K\1",
    b"q\0",
    b"h\0",
    b"h\1",
    b"\x8c\1k",
    b"ctorch\nSize\n",
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"\x8c\x07storage",
    b"\x8c\1" + b"0",
    b"ctorch\nfloat32\n",
    b"K\2\x85",
    b"\x89}tR",
    b"cposix\nsystem\n",
    b"cbuiltins\neval\n",
    b"\x8c\x08builtins\x8c\x04exec\x93",
    b"ios\nsystem\n",
    b"(",
    b"t",
    b"R",
    b"}",
    b"s",
)


def strike_pickle(rng: random.Random, data: bytes) -> bytes:
    """A pickle: operations put in, taken out and made up."""
    if rng.random() < 0.4:
        return strike_bytes(rng, data)
    steps = [
        rng.choice(STEPS) if rng.random() < 0.6 else bytes([rng.choice(CODES)])
        for _ in range(rng.randrange(1, 30))
    ]
    if rng.random() < 0.5:
        return b"\x80\x02" + b"".join(steps) + b"."
    at = rng.randrange(len(data) + 1)
    return data[:at] + b"".join(steps[: rng.choice((1, 2, 5))]) + data[at:]


def strike_torch(rng: random.Random, data: bytes) -> bytes:
    """A torch file: its pickle under a checksum that fits again, the zip's fields, or the bytes."""
    if not data.startswith(b"PK"):
        return strike_pickle(rng, data)
    if rng.random() < 0.35:
        at = data.rfind(rng.choice((b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04"))) + rng.randrange(
            46
        )
        new = rng.choice((b"\0", b"\xff", b"\1", b"\xff\xff\xff\xff", b"\x08\0", rng.randbytes(4)))
        return data[:at] + new + data[at + len(new) :]
    if rng.random() < 0.2:
        return strike_bytes(rng, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # not a sound zip any more (guided runs strike what was struck)
        return strike_bytes(rng, data)
    for name in members:
        if name.endswith("data.pkl"):
            members[name] = strike_pickle(rng, members[name])
    if rng.random() < 0.1 and members:
        name = rng.choice(list(members))
        members[rng.choice((name + "x", "../" + name, "/" + name, "a/data/9"))] = members.pop(name)
    packed = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(packed, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    return packed.getvalue()


def edit_of(name: str) -> Edit:
    """How a file of this name is struck."""
    for ending, edit in {
        ".json": strike_json,
        ".jsonl": strike_lines,
        ".csv": strike_table,
        ".safetensors": strike_safetensors,
        ".bin": strike_torch,
        ".pt": strike_torch,
    }.items():
        if name.endswith(ending):
            return edit
    return strike_bytes


# The readers


@dataclass
class Target:
    """A sound folder, which of its files are struck, and how the folder is read.

    session(body) calls body(read) where reading is possible: for a checkpoint, in the middle of a
    run.
    """

    folder: dict[str, bytes]
    struck: list[str]
    session: Callable[[Callable[[Read], None]], None]


def _plain(read: Read) -> Callable[[Callable[[Read], None]], None]:
    return lambda body: body(read)


def _touch(value: Any) -> None:
    """Read every value of what was accepted: a wrong mapping would show here."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif hasattr(item, "numpy") and hasattr(item, "dtype"):
            item.numpy().tobytes()


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def _weights() -> dict[str, Any]:
    import numpy as np

    from glmlora.files.checkpoint import to_bf16

    return {
        "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": to_bf16(np.ones((2, 5))),
        "c": np.array(3, np.int64),
        "d": np.zeros((0, 2), np.int8),
    }


def safetensors(place: Path) -> Target:
    """Weights in the safetensors form."""
    from glmlora.files.checkpoint import load_state_dict, write_safetensors

    write_safetensors(place / "m.safetensors", _weights(), {"format": "pt"})
    return Target(
        _contents(place),
        ["m.safetensors"],
        _plain(lambda f: _touch(load_state_dict(f / "m.safetensors"))),
    )


def torch(place: Path) -> Target:
    """Weights in torch's two forms: a zip with a pickle, and the older stream."""
    from test_checkpoint import state, stream, tensor

    from glmlora.files.checkpoint import read_torch, write_torch

    write_torch(place / "m.bin", _weights())
    (place / "older.pt").write_bytes(stream(state(tensor())))

    def read(folder: Path) -> None:
        _touch(read_torch(folder / "m.bin"))
        _touch(read_torch(folder / "older.pt"))

    return Target(_contents(place), ["m.bin", "older.pt"], _plain(read))


def index(place: Path) -> Target:
    """Shards of a model and the index that names them."""
    from glmlora.files.checkpoint import load_checkpoint, save_sharded

    save_sharded(place, _weights(), max_shard_size=60)
    files = _contents(place)
    return Target(files, sorted(files, reverse=True), _plain(lambda f: _touch(load_checkpoint(f))))


def _tiny() -> Path:
    import glmlora

    return Path(glmlora.__file__).parent / "tiny"


def config(place: Path) -> Target:
    """What a model directory says of itself: config.json, generation_config.json."""
    import glmlora

    model = glmlora.AutoModel.from_pretrained(_tiny())
    files = {"config.json": (_tiny() / "config.json").read_bytes()}
    generation = {
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.9,
        "eos_token_id": [2, 5],
        "max_length": 40,
        "pad_token_id": 0,
        "repetition_penalty": 1.1,
        "transformers_version": "4.30.2",
        "num_beams": 1,
    }
    files["generation_config.json"] = json.dumps(generation).encode()
    weights = _tiny() / "model.safetensors"
    del model

    def read(folder: Path) -> None:
        link = folder / weights.name
        if not link.is_symlink():
            link.symlink_to(weights)
        model = glmlora.AutoModel.from_pretrained(folder)
        if model.config.seq_length > 8:
            model.generate([[5, 6]], max_new_tokens=1, num_beams=1)

    return Target(files, ["config.json", "generation_config.json"], _plain(read))


def tokenizer(place: Path) -> Target:
    """A tokenizer's files: the vocabulary, its settings, its special tokens."""
    import glmlora

    files = {
        name: (_tiny() / name).read_bytes() for name in ("tokenizer.model", "tokenizer_config.json")
    }
    files["special_tokens_map.json"] = json.dumps(
        {"pad_token": "<unk>", "additional_special_tokens": ["<|user|>"]}
    ).encode()
    files["added_tokens.json"] = b'{"<|user|>": 64795}'

    def read(folder: Path) -> None:
        tokenizer = glmlora.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("title: 深度学习", return_tensors=None)["input_ids"]
        tokenizer.decode(ids)
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])

    return Target(files, [*sorted(files), "tokenizer_config.json"], _plain(read))


def ice_text(place: Path) -> Target:
    """ChatGLM-6B's vocabulary, to whose first release pieces are added."""
    import tiny_chatglm

    import glmlora

    folder = tiny_chatglm.tiny_ice_text_dir(place / "ice", first=True)
    names = ["ice_text.model", "tokenizer_config.json"]

    def read(folder: Path) -> None:
        tokenizer = glmlora.AutoTokenizer.from_pretrained(folder)
        tokenizer.decode(tokenizer("title:  深度学习\n")["input_ids"])
        tokenizer.text_offsets("title:  深度学习\n")

    files = {name: (folder / name).read_bytes() for name in names}
    return Target(files, [*names, names[0]], _plain(read))


def adapter(place: Path) -> Target:
    """An adapter's settings and tensors, and those of a prefix beside them."""
    import glmlora

    model = glmlora.AutoModel.from_pretrained(_tiny())
    tuned = glmlora.get_peft_model(
        model, glmlora.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", lora_dropout=0.1)
    )
    tuned.save_pretrained(place)
    base = tuned.unload()
    files = _contents(place)

    def read(folder: Path) -> None:
        tuned = glmlora.PeftModel.from_pretrained(base, folder)
        tuned.unload()

    return Target(files, ["adapter_config.json", "adapter_model.safetensors"], _plain(read))


def tables(place: Path) -> Target:
    """Tables of a competition and records of a job: csv, json, one object a line."""
    from glmlora.files.rows import read_rows
    from glmlora.training.records import records_from

    rows = [
        {
            "instruction": "judge",
            "input": f'a, {i} "quoted"\nsecond 深',
            "output": str(i % 2),
            "history": [["q", "a"]],
        }
        for i in range(4)
    ]
    (place / "a.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (place / "b.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n", encoding="utf-8")
    cells = "\n".join(f'{i},"a ""b"" {i}","深度\n学习",{i % 2}' for i in range(4))
    (place / "c.csv").write_text("uuid,title,abstract,label\n" + cells + "\n", encoding="utf-8")
    talk = [
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "system": "s",
            "tools": "[]",
        }
    ] * 2
    (place / "d.json").write_text(json.dumps(talk), encoding="utf-8")

    def read(folder: Path) -> None:
        for name in ("a.json", "b.jsonl", "d.json"):
            records_from(folder / name)
        read_rows(folder / "c.csv")

    return Target(_contents(place), ["a.json", "b.jsonl", "c.csv", "c.csv", "d.json"], _plain(read))


def checkpoint(place: Path) -> Target:
    """A checkpoint of a run: state, moments and adapter, read by the run that resumes from it."""
    import training

    from glmlora.training.checkpoints import Checkpoints

    base = training.model_dir(place)
    out = place / "out"
    settings = {"num_train_epochs": 1, "save_steps": 2, "max_steps": 3}
    training.run(base, out, **settings)
    files = _contents(out / "checkpoint-2")
    names = [
        n
        for n in (
            "rng_state.json",
            "trainer_state.json",
            "optimizer.safetensors",
            "adapter_model.safetensors",
            "adapter_config.json",
        )
        if n in files
    ]

    def session(body: Callable[[Read], None]) -> None:
        made: list[Checkpoints] = []
        build = Checkpoints.__init__

        def remembered(self: Checkpoints, *args: Any, **given: Any) -> None:
            build(self, *args, **given)
            made.append(self)

        class Inside:
            def on_step_end(self, state: Any) -> None:
                if state.global_step == 1:
                    body(lambda folder: made[-1].restore(folder, state))
                    raise StopIteration

        Checkpoints.__init__ = remembered  # type: ignore[method-assign]
        try:
            with contextlib.suppress(StopIteration), contextlib.redirect_stdout(io.StringIO()):
                training.run(base, place / "again", callbacks=[Inside()], **settings)
        finally:
            Checkpoints.__init__ = build  # type: ignore[method-assign]

    return Target(files, names, session)


TARGETS: dict[str, Callable[[Path], Target]] = {
    f.__name__: f
    for f in (
        *(safetensors, torch, index, config, tokenizer, ice_text, adapter, tables, checkpoint),
    )
}


# One input, many inputs


class Failure(Exception):
    """An input that was not read as it should be."""


def _too_slow(*_: Any) -> None:
    raise Failure(f"took longer than {SLOW} s")


def check(read: Read, folder: Path) -> str:
    """Read a struck folder; "read" or "refused". Failure for any other end."""
    signal.setitimer(signal.ITIMER_REAL, SLOW)
    try:
        read(folder)
        return "read"
    except (ValueError, OSError) as error:
        message = str(error)
        if str(folder) not in message and not any(p.name in message for p in folder.iterdir()):
            raise Failure(f"{type(error).__name__} names no file: {message[:200]}") from error
        return "refused"
    except Failure:
        raise
    except Exception as error:
        raise Failure("".join(traceback.format_exception(error))[-1500:]) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(
    name: str, inputs: int, seed: int, place: Path, quiet: bool = False
) -> tuple[dict[str, int], list[str]]:
    """Strike and read `inputs` times: counts of what came of it, and one failure of each kind."""
    import glmlora

    (place / "sound").mkdir(parents=True, exist_ok=True)
    target = TARGETS[name](place / "sound")
    folder = place / "struck"
    folder.mkdir(exist_ok=True)
    counts = {"read": 0, "refused": 0, "failed": 0}
    failures: dict[str, str] = {}

    def body(read: Read) -> None:
        for file, content in target.folder.items():
            (folder / file).write_bytes(content)
        read(folder)  # sound as it is, or the run means nothing
        began = told = time.monotonic()
        for number in range(inputs):
            rng = random.Random(f"{seed} {number}")
            file = rng.choice(target.struck)
            (folder / file).write_bytes(edit_of(file)(rng, target.folder[file]))
            try:
                counts[check(read, folder)] += 1
            except Failure as failure:
                counts["failed"] += 1
                kind = re.sub(r"\d+|'[^']*'", "_", str(failure))[-300:]
                if kind not in failures and len(failures) < 30:
                    keep = KEPT / f"{name}-{seed}-{number}"
                    shutil.rmtree(keep, ignore_errors=True)
                    shutil.copytree(folder, keep, symlinks=True)
                    failures[kind] = (
                        f"{name}: input {number} of seed {seed} ({file} in {keep}): {failure}"
                    )
            (folder / file).write_bytes(target.folder[file])
            now = time.monotonic()
            if not quiet and now - told > 60:
                told = now
                print(
                    f"{name}: {number + 1} of {inputs}, {number / (now - began):.0f} a second, "
                    f"{counts['failed']} failed so far",
                    flush=True,
                )

    signal.signal(signal.SIGALRM, _too_slow)
    glmlora.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target.session(body)
    return counts, list(failures.values())


def guided(name: str, inputs: int, seed: int, place: Path) -> None:
    """The same, led by the coverage of the package's Python code (libFuzzer through atheris)."""
    import atheris

    with atheris.instrument_imports(include=["glmlora"]):
        import glmlora  # noqa: F401

        (place / "sound").mkdir(parents=True, exist_ok=True)
        target = TARGETS[name](place / "sound")
    folder, corpus = place / "struck", place / "corpus"
    folder.mkdir()
    corpus.mkdir()
    for number, file in enumerate(target.struck):
        (corpus / f"sound-{number}").write_bytes(bytes([number]) + target.folder[file])
    struck = target.struck

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        number = data[0] % len(struck) if data else 0
        return bytes([number]) + edit_of(struck[number])(rng, data[1:])[: max_size - 1]

    def body(read: Read) -> None:
        for file, content in target.folder.items():
            (folder / file).write_bytes(content)

        def one(data: bytes) -> None:
            file = struck[data[0] % len(struck)] if data else struck[0]
            (folder / file).write_bytes(data[1:])
            check(read, folder)
            (folder / file).write_bytes(target.folder[file])

        signal.signal(signal.SIGALRM, _too_slow)
        KEPT.mkdir(parents=True, exist_ok=True)
        atheris.Setup(
            [
                sys.argv[0],
                f"-runs={inputs}",
                f"-seed={seed}",
                "-max_len=20000",
                f"-artifact_prefix={KEPT}/{name}-",
                "-handle_alrm=0",
                "-print_final_stats=1",
                str(corpus),
            ],
            one,
            custom_mutator=mutate,
        )
        atheris.Fuzz()

    warnings.simplefilter("ignore")
    target.session(body)


def memory() -> Path:
    """Where files are written fastest."""
    shm = Path("/dev/shm")
    roomy = shm.is_dir() and shutil.disk_usage(shm).free >= 1 << 30
    return shm if roomy else Path(tempfile.gettempdir())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("readers", nargs="*", choices=[*TARGETS, []], help="which (default: all)")
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guided", action="store_true", help="led by coverage; one reader")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    failed = 0
    for name in given.readers or TARGETS:
        place = memory() / f"glmlora-fuzz-{os.getpid()}-{name}"
        shutil.rmtree(place, ignore_errors=True)
        began = time.monotonic()
        if given.guided:
            guided(name, given.inputs, given.seed, place)
        counts, failures = run(name, given.inputs, given.seed, place)
        for failure in failures:
            print(f"FAILED {failure}", flush=True)
        failed += len(failures)
        told = ", ".join(f"{n} {what}" for what, n in counts.items())
        print(f"{name}: {told}, {time.monotonic() - began:.0f} s", flush=True)
        shutil.rmtree(place, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
