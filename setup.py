"""Build glmlora._core from csrc/; flags per file suffix, so a baseline machine can import what
newer ones run faster.

Where a GPU answers (nvidia-smi), the CUDA library for it is built too, by nvcc or NVRTC, whichever
is there, and goes into the wheel; where neither is, it is said how to get one, and the rest is
installed. GLMLORA_BUILD_CUDA=0 leaves the library out; lib (by nvcc) or lib12 (by NVRTC) builds
it for all GPUs, on any machine, or fails; FILE.so takes one that is there."""

import contextlib
import glob
import os
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# what is built for, which _PYTHON_HOST_PLATFORM names where another machine builds
PLATFORM = sysconfig.get_platform()
X86 = PLATFORM.endswith(("x86_64", "amd64"))
# a Python of both processors of macOS builds for those that ARCHFLAGS names
ARM64 = PLATFORM.endswith(("aarch64", "arm64")) or os.environ.get("ARCHFLAGS") == "-arch arm64"
# One module for every CPython from 3.10 on; the free-threaded ones have no stable ABI yet.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")
# -std=c11 turns contraction off and -O2 leaves loops scalar: kernel files say what they need.
KERNEL = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
AVX512_BF16 = AVX512 + ["-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"]
SUFFIX_FLAGS = {
    "_generic.c": KERNEL,
    "_avx2.c": KERNEL + ["-mavx2", "-mfma", "-mf16c"],
    "_avxvnni.c": KERNEL + ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "_avx512.c": KERNEL + AVX512,
    "_avx512vnni.c": KERNEL + AVX512 + ["-mavx512vnni"],
    "_avx512bf16.c": KERNEL + AVX512_BF16,
    "_amx.c": KERNEL + AVX512_BF16 + ["-mamx-tile", "-mamx-int8"],
    "_neon.c": KERNEL,
    "_neon_dotprod.c": KERNEL + ["-march=armv8.2-a+dotprod"],
    "_neon_i8mm.c": KERNEL + ["-march=armv8.2-a+dotprod+i8mm"],
    "_neon_bf16.c": KERNEL + ["-march=armv8.2-a+dotprod+i8mm+bf16"],
}
STRICT = [
    "-std=c11",
    "-D_GNU_SOURCE",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Werror",
    # clang's, where it leaves one of many copies of a loop as it is: slower by little, and right
    "-Wno-pass-failed",
]


def compile_one(source, target, words):
    """(source, what the compiler said if it failed). The command is kept beside an object that is
    complete, and only there. The object is as old as the beginning: the next build sees what is
    edited meanwhile."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.remove(target + ".command")
    begun = time.time()
    ran = subprocess.run(words, stderr=subprocess.PIPE, text=True)
    if ran.returncode:
        return source, ran.stderr
    os.utime(target, (begun, begun))
    with open(target + ".command", "w") as f:
        f.write("\n".join(words))
    return source, ""


def run_jobs(jobs):
    """Compile on all cores, the longest first, a line a file. CompileError with gcc's words."""
    jobs.sort(key=lambda job: not job[0].startswith("csrc/cpu/kernels_"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = [pool.submit(compile_one, *job) for job in jobs]
        for done, ready in enumerate(as_completed(running), 1):
            source, error = ready.result()
            print(f"[{done:2}/{len(jobs)}] {source}", flush=True)
            if error:
                pool.shutdown(cancel_futures=True)
                raise CompileError(f"{source}:\n{error}")


def up_to_date(target, words):
    """Whether `words` made `target` of the files as they are now."""
    try:
        with open(target + ".command") as f:
            if f.read() != "\n".join(words):
                return False
        with open(target.removesuffix("o") + "d") as f:
            names = f.read().replace("\\\n", " ").split(":", 1)[1].split()
        made = os.stat(target).st_mtime
        return all(os.stat(name).st_mtime <= made for name in names)
    except OSError:
        return False


def takes(compiler, flags):
    words = [*compiler, *flags, "-x", "c", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(words).returncode == 0


def as_zig_has_it(flags):
    """-march=armv8.2-a+.. is gcc's and clang's."""
    return [f.replace("-march=armv8.2-a", "-mcpu=generic") for f in flags]


def without_what_the_compiler_lacks(sources, compiler):
    """The sources less the kernels of instruction sets that the compiler does not know, which is
    told; the module tells it too (`glmlora doctor`, and when a model is loaded)."""
    kept = list(sources)
    if any("zig" in word for word in compiler):
        SUFFIX_FLAGS.update({suffix: as_zig_has_it(f) for suffix, f in SUFFIX_FLAGS.items()})
    for suffix, flags in SUFFIX_FLAGS.items():
        left = [source for source in sources if source.endswith(suffix)]
        if suffix == "_generic.c" or not left or takes(compiler, flags):
            continue
        kept = [source for source in kept if source not in left]
        print(
            f"WARNING: {compiler[0]} does not take {' '.join(flags)}: built without {left[0]}; "
            "processors that have this set compute slower. A newer gcc or clang has it (CC=..)",
            file=sys.stderr,
        )
    return kept


def gpu_here():
    """Whether an NVIDIA GPU answers, and what is built is for this machine."""
    if "_PYTHON_HOST_PLATFORM" in os.environ:
        return False
    try:
        words = ["nvidia-smi", "-L"]
        return not subprocess.run(words, capture_output=True, timeout=60).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


class BuildPerFile(build_ext):
    """build_ext that adds flags by file suffix and compiles in parallel what changed: a file is
    compiled again when it or a header it includes (the compiler lists them beside the object) is
    newer, or its command is another one."""

    def build_extensions(self):
        self.force = True  # the link is short, and one that was interrupted looks done
        if not sanitize:  # pip would give a folder of its own to every editable build
            tag = f"{sys.implementation.cache_tag}{sys.abiflags}-{PLATFORM}"
            self.build_temp = os.path.join("build", "objects", tag)
        [ext] = self.extensions
        ext.sources = without_what_the_compiler_lacks(ext.sources, self.compiler.compiler_so)
        jobs = []

        def collect(obj, src, ext, cc_args, extra, pp_opts):
            added = [f for end, flags in SUFFIX_FLAGS.items() if src.endswith(end) for f in flags]
            words = [*self.compiler.compiler_so, *cc_args, "-MMD", src, "-o", obj]
            # the generic kernels stand for the others where threads are watched
            told = [] if THREADS and added and not src.endswith("_generic.c") else sanitize[:1]
            jobs.append((src, obj, [*words, *extra, *added, *told, *sanitize[1:]]))

        compile_all = self.compiler.compile

        def compile_changed(*args, **kwargs):
            objects = compile_all(*args, **kwargs)
            run_jobs([job for job in jobs if not up_to_date(*job[1:])])
            return objects

        self.compiler._compile, self.compiler.compile = collect, compile_changed
        super().build_extensions()
        self.keep_only(self.get_ext_fullpath("glmlora._core"))
        self.add_cuda(os.environ.get("GLMLORA_BUILD_CUDA") or ("0" if sanitize else "here"))

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        self.keep_only(self.get_ext_fullpath("glmlora._core"))

    @staticmethod
    def keep_only(module):
        """Remove what earlier builds called otherwise: Python might import it before this one."""
        for other in glob.glob(os.path.join(os.path.dirname(module), "_core.*.so")):
            if os.path.basename(other) != os.path.basename(module):
                os.remove(other)

    def add_cuda(self, how):
        """The CUDA library beside the module; in a checkout it is found where it is built."""
        if how == "0" or (how == "here" and not gpu_here()):
            return
        library = how
        if not how.endswith(".so"):
            words = [sys.executable, "cuda/build.py", how]
            print(f"CUDA: {' '.join(words[1:])} takes a few minutes the first time", flush=True)
            ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            last = ran.stdout.strip().rpartition("\n")[2]
            if ran.returncode and how != "here":
                raise CompileError(f"{' '.join(words)}:\n{ran.stdout}")
            if ran.returncode:
                print(f"CUDA: no library, glmlora computes on the CPU: {last}", file=sys.stderr)
                return
            library = last
        folder = os.path.dirname(os.path.abspath(self.get_ext_fullpath("glmlora._core")))
        self.copy_file(library, os.path.join(folder, os.path.basename(library)))


sources = sorted(glob.glob("csrc/*.c") + glob.glob("csrc/*/*.c"))
sources = [s for s in sources if X86 or "/kernels_a" not in s]
sources = [s for s in sources if ARM64 or "/kernels_neon" not in s]
# last: the kernels at -O3, or with their variables described, take five times as long to compile
THREADS = os.environ.get("GLMLORA_SANITIZE") == "thread"
sanitize = ["-fsanitize=" + ("thread" if THREADS else "address,undefined")]
sanitize += ["-fno-omit-frame-pointer", "-g1", "-O1"]
sanitize = sanitize if os.environ.get("GLMLORA_SANITIZE") else []
core = Extension(
    "glmlora._core",
    sources=sources,
    depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*/*.h")),
    include_dirs=[numpy.get_include(), "csrc"],
    extra_compile_args=STRICT + ["-O2", "-g0"],
    extra_link_args=(sanitize[:1] if sanitize else [])
    + (["-pthread"] if sys.platform != "darwin" else []),
    libraries=["m"],
    py_limited_api=STABLE_ABI,
    define_macros=[("Py_LIMITED_API", "0x030A0000")] if STABLE_ABI else [],
)

setup(
    ext_modules=[core],
    cmdclass={"build_ext": BuildPerFile},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if STABLE_ABI else {},
)
