"""Packaging of minference-vllm; the metadata lives in pyproject.toml. This file names the packages and builds ``csrc``.

``csrc/cpu`` is a plain shared library without Python or torch headers, loaded with ctypes, and built once for each
family of x86 processors; ``kernels/native/library.py`` loads the one that fits the machine. All builds are optional: if
one does not compile (no compiler, an old one, another architecture), pip prints a warning, and the package uses another
build or vLLM's own kernels.
"""

from copy import copy
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCES = (
    "interface",
    "sparse_attention",
    "remainder",
    "estimate",
    "key_codes",
    "low_rank",
    "representatives",
    "score_bins",
)
# Top-level folders that are installed below our own package, so that they shadow no other module.
OUTSIDE = {
    "minference_vllm.pattern_configs": "pattern_configs",
    "minference_vllm.triton_kernels": "triton_kernels",
}
AVX512_BF16 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni", "bf16")]
INSTRUCTIONS = {
    "amx": [*AVX512_BF16, *(f"-mamx-{part}" for part in ("tile", "int8", "bf16"))],
    "avx512bf16": AVX512_BF16,
    # float16 conversions (F16C) are a separate extension, available on every processor with AVX2.
    "avx2": ["-mavx2", "-mf16c"],
}


class BuildExtensions(build_ext):
    """A separate object folder per family: all are built from the same sources, with ``-j`` at the same time."""

    def build_extension(self, ext: Extension) -> None:
        alone = copy(self)
        alone.build_temp = str(Path(self.build_temp, ext.name))
        build_ext.build_extension(alone, ext)


setup(
    packages=sorted({*find_packages(include=["minference_vllm", "minference_vllm.*"]), *OUTSIDE}),
    package_dir=OUTSIDE,
    cmdclass={"build_ext": BuildExtensions},
    ext_modules=[
        Extension(
            f"minference_vllm._cpu_kernels_{name}",
            sources=[f"csrc/cpu/{source}.cpp" for source in SOURCES],
            depends=[str(header) for header in sorted(Path("csrc/cpu").glob("*.h"))],
            # gcc's own intrinsics headers trip -Wmaybe-uninitialized.
            extra_compile_args=["-std=c++20", "-O3", "-fopenmp", "-Wno-maybe-uninitialized", "-mfma", *flags],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
        for name, flags in INSTRUCTIONS.items()
    ],
)
