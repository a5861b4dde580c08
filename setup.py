"""Packaging of minference-vllm; the metadata lives in pyproject.toml. This file only builds ``csrc``.

``csrc/cpu`` is a plain shared library without Python or torch headers, loaded with ctypes. It is optional: where it
does not compile (no compiler, another processor family) pip prints one warning and the package works through vLLM's
own kernels.
"""

from setuptools import Extension, setup

AVX512_BF16 = [f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16")]

setup(
    ext_modules=[
        Extension(
            "minference_vllm._cpu_kernels",
            sources=["csrc/cpu/sparse_attention.cpp", "csrc/cpu/estimate.cpp"],
            depends=["csrc/cpu/avx512bf16.h", "csrc/cpu/cache.h", "csrc/cpu/tiles.h"],
            # gcc's own intrinsics headers trip -Wmaybe-uninitialized.
            extra_compile_args=["-std=c++20", "-O3", "-fopenmp", "-Wno-maybe-uninitialized", "-mfma", *AVX512_BF16],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
