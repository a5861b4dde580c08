"""Compile the FlashAttention 4 variants of the kernel ``fa4`` without a GPU, and print registers, stack and spills.

vLLM's own Python code and ours run up to the launch; the tensors are fake, and the host part of the launch is not
compiled. This needs the packages that compile vLLM's FlashAttention 4, which only CUDA builds of vLLM require:

    pip install nvidia-cutlass-dsl quack-kernels        # beside torch and triton
    python tools/compile_fa4.py [--release 0.33.0] [--arch 90 100] [--head-size 64 128]

Exits with 1 when a variant does not compile or spills registers, with 0 and the reason if packages are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path

import get_vllm_python
import torch
from get_smollm2 import MakeError

NEEDED = {"cutlass": "nvidia-cutlass-dsl", "quack": "quack-kernels", "triton": "triton"}
"""Modules and the packages that provide them; triton includes the disassembler."""
TARGETS = {90: "sm_90a", 100: "sm_100a"}
MULTIPROCESSORS = {90: 132, 100: 148}
"""Of an H200 and a B200. FlashAttention 4 queries the GPU for it to size its grid."""
HEADS, KV_HEADS, ROW_BLOCKS, MAX_BLOCKS, PAGES = 32, 8, 64, 256, 4096
"""Sizes that do not trigger a recompilation of FlashAttention 4, except for the ratio of heads."""


def missing_packages() -> list[str]:
    return [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]


@dataclass(frozen=True)
class Code:
    registers: int
    stack: int
    """Bytes."""
    spills: int
    """Instructions that read or write local memory."""

    @classmethod
    def of(cls, cubin: Path) -> Code:
        spec = importlib.util.find_spec("triton")
        assert spec is not None and spec.origin is not None
        tool = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage, sass = (
            subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage
        return cls(int(found[1]), int(found[2]), len(re.findall(r"\b(?:STL|LDL)\b", sass)))


def find_flash_attention(vllm: Path) -> None:
    """Make ``import vllm.vllm_flash_attn.cute`` find the files of a release without importing anything else of vLLM,
    which needs compiled parts."""
    for name in ("vllm", "vllm.vllm_flash_attn"):
        module = types.ModuleType(name)
        module.__path__ = [str(vllm.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module


def fake_gpu(arch: int) -> None:
    """Patch the properties of GPU and tensors that FlashAttention 4 queries."""
    import cutlass

    class HardwareInfo:
        def get_device_multiprocessor_count(self) -> int:
            return MULTIPROCESSORS[arch]

    cutlass.utils.HardwareInfo = HardwareInfo
    torch.cuda.get_device_capability = lambda *device: divmod(arch, 10)  # type: ignore[assignment]
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment]


def compile_call(arch: int, head_size: int, folder: Path) -> Code:
    """Compile one call as ``kernels.fa4.attention`` makes it on this GPU.

    Args:
        folder: an empty folder into which the DSL writes the machine code.

    Raises:
        RuntimeError: there is no machine code.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from minference_vllm.kernels.fa4.attention import flash_attention_4
    from minference_vllm.kernels.fa4.block_lists import BlockLists
    from minference_vllm.kernels.fa4.limits import BLOCK

    attend = flash_attention_4()
    fake_gpu(arch)
    with FakeTensorMode():

        def integers(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.int32)

        memory = torch.empty(1, PAGES * BLOCK, KV_HEADS, 2 * head_size, dtype=torch.bfloat16)
        key, value = memory.split(head_size, -1)
        sizes = 1, HEADS, ROW_BLOCKS
        lists = BlockLists(integers(*sizes), integers(*sizes, 1), integers(*sizes), integers(*sizes, MAX_BLOCKS))
        batch, rows = 1, ROW_BLOCKS * BLOCK
        if arch >= 100:
            batch, rows, lists = ROW_BLOCKS, BLOCK, lists.by_row_block()
            key, value = (part.expand(batch, -1, -1, -1) for part in (key, value))
        query = torch.empty(batch, rows, HEADS, head_size, dtype=torch.bfloat16)
        try:
            attend(query, key, value, torch.empty_like(query), torch.empty(batch, HEADS, rows), lists, head_size**-0.5)
        except Exception as error:  # expected once the kernel is compiled: there is no GPU to launch it on
            stopped = f"{type(error).__name__}: {str(error).strip()}"
    cubins = list(folder.glob("**/*.cubin"))
    if len(cubins) != 1:
        raise RuntimeError(f"there are {len(cubins)} files of machine code; it ended with {stopped}")
    return Code.of(cubins[0])


def compile_alone(release: str, arch: int, head_size: int) -> int:
    """Compile one variant and print a line; returns the exit code. The DSL reads its environment once per process."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "CUTE_DSL_ARCH": TARGETS[arch],
            "FLASH_ATTENTION_ARCH": f"sm_{arch}",
            "CUTE_DSL_KEEP_CUBIN": "1",
            "CUTE_DSL_DUMP_DIR": folder,
        }
        find_flash_attention(get_vllm_python.default_folder(release) / "vllm")
        begin = time.perf_counter()
        try:
            code = compile_call(arch, head_size, Path(folder))
        except (ImportError, RuntimeError) as error:
            print(f"{TARGETS[arch]}, heads of {head_size}: does not compile: {error}")
            return 1
        print(
            f"{TARGETS[arch]}, heads of {head_size}, vLLM {release}: {code.registers} registers, stack of {code.stack} "
            f"bytes, {code.spills} instructions on local memory; {time.perf_counter() - begin:.1f} s"
        )
    return int(code.spills > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", default="0.33.0", help="of vLLM; its wheel is downloaded once")
    parser.add_argument("--arch", type=int, nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--head-size", type=int, nargs="+", default=[64, 128])
    args = parser.parse_args()
    missing = missing_packages()
    if missing:
        print(f"skipped: FlashAttention 4 is compiled by {' and '.join(missing)}, not installed here")
        return 0
    try:
        get_vllm_python.make(args.release, get_vllm_python.default_folder(args.release))
    except MakeError as error:
        print(f"skipped: {error}")
        return 0
    variants = [(arch, head_size) for arch in args.arch for head_size in args.head_size]
    if len(variants) == 1:
        return compile_alone(args.release, *variants[0])
    codes = []
    for arch, head_size in variants:
        call = [sys.executable, __file__, "--release", args.release, "--arch", str(arch), "--head-size", str(head_size)]
        codes.append(subprocess.run(call, check=False).returncode)
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
