"""Build glmlora._core from csrc/; flags per file suffix, so a baseline machine can import what
newer ones run faster.

GLMLORA_BUILD_CUDA=lib (by nvcc) or lib12 (by NVRTC 12.9) also builds the CUDA library and puts it
into the wheel; GLMLORA_BUILD_CUDA=FILE.so takes one that is there. Nothing else needs either."""

import glob
import os
import platform
import subprocess
import sys

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

X86 = platform.machine() in ("x86_64", "AMD64")
# -std=c11 turns contraction off and -O2 leaves loops scalar: kernel files say what they need.
KERNEL = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
SUFFIX_FLAGS = {
    "_generic.c": KERNEL,
    "_avx2.c": KERNEL + ["-mavx2", "-mfma", "-mf16c"],
    "_avx512.c": KERNEL + AVX512,
    "_avx512bf16.c": KERNEL + AVX512 + ["-mavx512bf16", "-mavx512vnni", "-mavx512vbmi"],
}
STRICT = [
    "-std=c11",
    "-D_GNU_SOURCE",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Werror",
]


class BuildPerFile(build_ext):
    """build_ext that adds flags by file suffix and skips instruction sets of other machines."""

    def build_extensions(self):
        compile_one = self.compiler._compile

        def _compile(obj, src, ext, cc_args, extra, pp_opts):
            added = [
                f for suffix, flags in SUFFIX_FLAGS.items() if src.endswith(suffix) for f in flags
            ]
            compile_one(obj, src, ext, cc_args, extra + added + sanitize, pp_opts)

        self.compiler._compile = _compile
        super().build_extensions()
        self.add_cuda(os.environ.get("GLMLORA_BUILD_CUDA", ""))

    def add_cuda(self, how):
        """The CUDA library beside the module, where it is asked for."""
        if not how:
            return
        library = how
        if not how.endswith(".so"):
            words = [sys.executable, "cuda/build.py", how]
            told = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
            library = told.split()[-1]
        folder = os.path.dirname(os.path.abspath(self.get_ext_fullpath("glmlora._core")))
        self.copy_file(library, os.path.join(folder, os.path.basename(library)))


sources = sorted(glob.glob("csrc/*.c") + glob.glob("csrc/*/*.c"))
if not X86:
    sources = [s for s in sources if not s.endswith(("_avx2.c", "_avx512.c", "_avx512bf16.c"))]
# last: the kernels at -O3, or with their variables described, take five times as long to compile
sanitize = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1", "-O1"]
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
)

setup(ext_modules=[core], cmdclass={"build_ext": BuildPerFile})
