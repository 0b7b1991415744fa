"""Breaks the kernels on purpose: does the suite notice?

    python cuda/mutate.py                 every mutant; fails when one survives
    python cuda/mutate.py --sample 12     so many, drawn with a fixed seed
    python cuda/mutate.py --list          what there is
    python cuda/mutate.py WORD..          those whose line in the list has one of the words

A mutant is a barrier or a fence taken out, a bounds test of device code that is wider by one, or a
place where the context of a segment is not looked at. All of them are compiled into one checked
build, each behind a switch that the emulator holds (emu_mutant); a process for each throws its
switch and runs the cases of tests/test_cuda.py for the ops of that file until one fails.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import CUDA, OUT, ROOT

import build

BARRIER = re.compile(r"__(?:syncthreads|syncwarp|threadfence)\(\);")
SEEN = re.compile(r"(?<=seen_by\()(\w+(?:\.\w+)?)(?=, )|(?<=min\()(\w+\.context)\b")
COMPARISON = re.compile(r"(?<= )(<|<=|>|>=) (?=[-\w(*])")

# Comparisons of values and choices that change no result, not bounds: what is on the line.
VALUES = re.compile(
    r"top > most|most > 0|> fabs\(|word < m\.threshold|wq / qq > most|DECODE_TOKENS|GLM_EXPECT"
    r"|i < \*at|h < NH && i >= rotary_dim"  # the first of equals; what stays as it is
    r"|top_k < r\.V|equal \* each < total"
    r"|r0 < [at]\.R|c0 (<|>=) a\.wide|bool second = "  # that cut nothing off when they are equal
    # where one more has nothing to do, or does what is not looked at
    r"|int common = |if \(next < w\.end\)|first < runs; first|chunk < chunks; chunk"
    r"|v0 < (r\.)?V; v0 \+=|threadIdx\.x >> 5\) < busy|mass\[i\] >= needed\("
)
CONSTANT = re.compile(r"^[\s(]*[A-Z0-9]+(\s*[-+*/]\s*[A-Z0-9]+)*\b")
# Lower bounds, and upper bounds that reject: wider is one less.
LOWER = re.compile(r"(>= (begin|from|0\b|c\.top_k)|<= begin|< begin)")

# What every file includes is tested by the ops of these.
LAUNCH = ("adamw", "elementwise", "norm", "linear")
# Ops that have kernels for products in 16 bits
NARROW = ("attention", "linear", "adapted", "swiglu_linear", "swiglu_mlp", "self_attention")
NARROW += ("rmsnorm_swiglu", "rmsnorm_rope")
# What is launched under the name of its caller's op.
FOR_OTHERS = {
    "few_quantized": ("linear_forward", "adapted_forward", "linear_swiglu_forward"),
    "adapter": ("linear_forward", "linear_backward_input", "linear_backward_weight")
    + ("self_attention_forward",),
}


def ops_of(file: Path) -> set[str]:
    """Ops that reach the kernels of a file: those that it defines, or names where it launches; of a
    header those of the files that include it."""
    if file.stem == "launch":
        return set().union(*(ops_of(CUDA / f"{name}.cu") for name in LAUNCH))
    if file.stem in FOR_OTHERS:
        return set(FOR_OTHERS[file.stem])
    named = r'(?:"|extern "C" void glm_cuda_)(\w+)'
    found = set(re.findall(named, file.read_text()))
    for user in CUDA.glob("*.cu*"):
        if f'#include "{file.name}"' in user.read_text():
            found |= ops_of(user)
    return found


@dataclass
class Mutant:
    file: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}: {self.what}"


def device_lines(text: str) -> list[bool]:
    """Which lines are device code: not those between #ifdef GLM_HOST and its #endif."""
    found, depth = [], 0
    for line in text.splitlines():
        if depth and line.startswith("#if"):
            depth += 1
        elif depth and line.startswith("#endif"):
            depth -= 1
        elif line.startswith("#ifdef GLM_HOST"):
            depth = 1
        found.append(not depth and not line.startswith("#"))
    return found


def is_bound(line: str, match: re.Match[str], unrolled: bool) -> bool:
    """A comparison with an extent that is known at run time, or with a loop's end."""
    if VALUES.search(line) or unrolled and line.lstrip().startswith("for"):
        return False
    if "/*" in line[: match.start()] or line.startswith(" *"):  # a comment
        return False
    left, right = line[: match.start()], line[match.end() :]
    if re.match(r"-?\d+\b(?! \*)", right):  # a literal
        return False
    word = re.search(r"[\w.\])]+ $", left)
    return not (word and re.fullmatch(r"[A-Z]+ ", word[0]) and CONSTANT.match(right))


def mutated(file: Path, mutants: list[Mutant]) -> str:
    """The file with what mutants of it change behind switches; adds them to the list."""
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    for at, device in enumerate(device_lines(text)):
        line = lines[at]
        if not device:
            continue

        def add(what: str, at: int = at) -> int:
            mutants.append(Mutant(file, at + 1, what))
            return len(mutants) - 1

        def barrier(match: re.Match[str]) -> str:
            return f"if (!emu_mutant({add('without ' + match[0])})) {match[0]}"

        def bound(match: re.Match[str], line: str = line, at: int = at) -> str:
            unrolled = lines[at - 1].strip().rstrip("\\").strip() == "#pragma unroll"
            if not is_bound(line, match, unrolled):
                return match[0]
            around = line[max(0, match.start() - 24) : match.end() + 24].strip()
            lower = LOWER.match(line[match.start() :]) is not None
            sign = "-" if lower else ""
            return f"{match[0]}{sign}emu_mutant({add(f'{around!r} {sign or chr(43)}1')}) + "

        def causal(match: re.Match[str], line: str = line) -> str:
            if VALUES.search(line):
                return match[0]
            switch = f"emu_mutant({add('causal: ' + match[0])})"
            if match[2]:
                return f"{switch} ? 0 : {match[2]}"
            fields = "begin count shared_begin shared_count past_begin past_count".split()
            without = ", ".join(f"{match[1]}.{field}" for field in fields)
            return f"{switch} ? glm_segment{{{without}, 0}} : {match[1]}"

        # the bounds first: a barrier's switch holds none
        lines[at] = SEEN.sub(causal, BARRIER.sub(barrier, COMPARISON.sub(bound, line)))
    return "".join(lines)


def prepare() -> tuple[list[Mutant], Path]:
    """The mutants and the library that holds them."""
    mutants: list[Mutant] = []
    folder = OUT / "mutants" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(p for p in CUDA.iterdir() if p.suffix in (".cu", ".cuh", ".c", ".h")):
        device = file.suffix in (".cu", ".cuh")
        text = mutated(file, mutants) if device else file.read_text()
        to = folder / file.name
        if not to.exists() or to.read_text() != text:
            to.write_text(text)
    return mutants, folder


def cases(file: Path) -> list[tuple]:
    """Checks of tests/test_cuda.py for the ops of a file, small ones first."""
    import test_cuda
    import test_ops

    found, ops = [], ops_of(file)
    for op, called in test_ops.ops_by_case().items():
        if not called & ops:
            continue
        found += test_cuda.checks(op)
        if op.startswith(NARROW):  # bfloat16 has the same source ..
            found += test_cuda.checks(op, "float16")
        if op == "self_attention_backward":  # .. but here, where gradients are 16 bits in it
            found += test_cuda.checks(op, "bfloat16")
    return sorted(found, key=lambda check: check.cost)


def noticed(number: int, checks: list) -> str:
    """What the suite says to a mutant; empty when it says nothing. In a process of its own."""
    from emulator import emulator

    emulator().mutant(number)
    reached = False
    for check in checks:
        signal.setitimer(signal.ITIMER_PROF, 30)  # one that runs on ends the process
        try:
            check.run("emu")
        except Exception as error:
            return f"{check}: {str(error).splitlines()[0][:150] if str(error) else error!r}"
        reached = reached or emulator().reached(number)
    return "" if reached else "NOT REACHED"


def reaching(check: Any, numbers: list[int]) -> set[int]:
    """The mutants whose places a check comes by. It is run as often as their lists have it: of two
    calls in a row one has its arrays on the 16-byte grid, where other kernels may do the work."""
    from emulator import emulator

    emulator().mutant(-1)
    for _ in range(numbers.count(numbers[0])):
        check.run("emu")
    return {n for n in numbers if emulator().reached(n)}


def reached(checks: dict[int, list], jobs: int) -> dict[int, list]:
    """Of the checks of each mutant those that come by its place: each check is run for all mutants
    at once, all in so many processes."""
    each: dict[str, tuple[Any, list[int]]] = {}
    for n, own in checks.items():
        for check in own:
            each.setdefault(str(check), (check, []))[1].append(n)
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        found = dict(zip(each, pool.starmap(reaching, each.values()), strict=True))
    return {n: [check for check in own if n in found[str(check)]] for n, own in checks.items()}


def child(number: int, checks: list, pipe: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        text = noticed(number, checks)
    except BaseException:
        text = "NOT RUN: " + traceback.format_exc()
    os.write(pipe, text.encode()[:4000])
    os._exit(0)


def run(numbers: list[int], mutants: list[Mutant], jobs: int = 2) -> list[int]:
    """Survivors."""
    of = {file: cases(file) for file in {mutants[n].file for n in numbers}}
    checks = {n: of[mutants[n].file] for n in numbers}
    if len(numbers) > 12:  # else it costs more than it saves
        checks = reached(checks, jobs)
    waiting, running, survivors = list(numbers), {}, []
    while waiting or running:
        while waiting and len(running) < jobs:
            n = waiting.pop(0)
            read, write = os.pipe()
            pid = os.fork()
            if not pid:
                os.close(read)
                child(n, checks[n], write)
            os.close(write)
            running[pid] = n, read, time.monotonic()
        pid, status = os.wait()
        n, read, since = running.pop(pid)
        text = os.read(read, 4000).decode() if status == 0 else f"the process ended ({status})"
        os.close(read)
        if not text or text.startswith("NOT "):
            survivors.append(n)
        verdict = text or "SURVIVED"
        print(f"{n} {mutants[n]} [{time.monotonic() - since:.1f} s] {verdict}", flush=True)
    return survivors


def main(words: list[str]) -> int:
    mutants, folder = prepare()
    numbers = list(range(len(mutants)))
    if words[:1] == ["--list"]:
        print("\n".join(f"{n} {m}" for n, m in enumerate(mutants)))
        return 0
    if words[:1] == ["--sample"]:
        numbers = sorted(random.Random(1).sample(numbers, int(words[1])))
    elif words:
        numbers = [n for n in numbers if any(w in f"{n} {mutants[n]}" for w in words)]
    library = build.emu(True, folder, "mutants")
    os.environ["GLMLORA_CUDA_LIBRARY"] = str(library)
    sys.path.insert(0, str(ROOT / "tests"))
    survivors = run(numbers, mutants)
    for n in survivors:
        print(f"survived: {n} {mutants[n]}")
    noticed = len(numbers) - len(survivors)
    print(f"{noticed} of {len(numbers)} mutants noticed ({len(mutants)} in all)")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
