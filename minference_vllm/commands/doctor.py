"""What is installed, which kernels can run on this machine, and whether vLLM knows the backend.

Every line begins with ok, with -- (not here, and serving does without it) or with !! (serving does not work), and says
what to do about it. Exit code 1 when serving with the attention backend minference would not work.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
from collections.abc import Iterator
from typing import Literal, NamedTuple

from minference_vllm import __version__

SERVE = "vllm serve MODEL --attention-backend minference"


class Finding(NamedTuple):
    state: Literal["ok", "--", "!!"]
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state}  {self.subject:18} {self.text}"
        return f"{line}\n{'':23}{self.remedy}" if self.remedy else line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(args: argparse.Namespace) -> int:
    findings = []
    with vllm_is_quiet():
        for finding in examine():
            print(finding, flush=True)
            findings.append(finding)
    problems = [finding.subject for finding in findings if finding.state == "!!"]
    print()
    if problems:
        print(f"Serving with minference does not work here: {', '.join(problems)}.")
        return 1
    print(f"Ready: {SERVE}")
    return 0


@contextlib.contextmanager
def vllm_is_quiet() -> Iterator[None]:
    """Keep other packages' log lines out of our output, unless VLLM_LOGGING_LEVEL is set.

    Logging is disabled globally, since newer versions of vLLM set up their loggers after they have logged.
    """
    before = logging.root.manager.disable
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def examine() -> Iterator[Finding]:
    """All findings, except those that need something that is missing."""
    yield Finding("ok", "python", platform.python_version())
    yield Finding("ok", "minference-vllm", __version__)
    torch = package("torch", "!!", "see vllm")
    vllm = vllm_version()
    yield from (torch, vllm, package("triton", "--", "comes with PyTorch for NVIDIA GPUs"))
    yield package("transformers", "!!", "comes with vLLM")
    yield package("matplotlib", "--", "needed to plot: pip install 'minference-vllm[plot]'")
    if torch.state != "ok" or vllm.state != "ok":
        return
    try:
        yield from device()
        findings = backend()
        platform_found = next(findings)
        yield platform_found
        yield from findings
        if platform_found.state == "ok":
            yield from kernels()
    except Exception as error:
        # Importing a vLLM built for another torch or another machine can raise anything.
        reason = f"cannot be used: {type(error).__name__}: {error}"
        yield Finding("!!", "vllm", reason, "reinstall a vLLM that is built for this machine and this torch")


def package(name: str, missing: Literal["--", "!!"], remedy: str) -> Finding:
    try:
        return Finding("ok", name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(missing, name, "not installed", remedy)


def vllm_version() -> Finding:
    from minference_vllm.backend.compat import NEWEST, OLDEST, check_vllm

    install = (
        f"pip install 'vllm>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}'; "
        "without a GPU: python tools/install_engine.py, from a checkout"
    )
    found = package("vllm", "!!", install)
    if found.state != "ok":
        if importlib.util.find_spec("vllm"):
            found = found._replace(text="not installed as a distribution, which the vllm command asks for its version")
        return found
    try:
        return found._replace(text=check_vllm())
    except RuntimeError as error:
        return Finding("!!", "vllm", str(error), install)


def device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        yield Finding("ok", "device", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}")
        return
    units = {
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    described = ", ".join(name if there else f"no {name}" for name, there in units.items())
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok", "device", f"CPU: {platform.machine()}, {capability}, {described}; {os.cpu_count()} threads")
    if bfloat16_is_slow():
        yield Finding("--", "bfloat16", "products take many times as long as float32's here: try --dtype float32")
    if units["AMX"]:
        yield Finding("--", "min_context", "with AMX dense attention is fast, and sparse pays later: try 16384")
    else:
        yield Finding("--", "min_context", "without AMX dense attention is slow, and sparse pays sooner: try 4096")


def bfloat16_is_slow() -> bool:
    """Whether models run on a CPU without AVX-512, which multiplies bfloat16 many times more slowly than float32."""
    import torch

    return torch.backends.cpu.get_cpu_capability() == "AVX2" and not torch.cuda.is_available()


def backend() -> Iterator[Finding]:
    """vLLM's platform, and the class that our backend's name resolves to."""
    from minference_vllm.backend import compat
    from minference_vllm.backend.registration import make_name_known

    try:
        vllms = compat.vllm_platform()
    except RuntimeError as error:
        # Two plugins each provide a platform.
        yield Finding("!!", "platform", str(error), "name minference and the one to keep in VLLM_PLUGINS")
        return
    name = compat.platform_name(vllms)
    if not (vllms.is_cpu() or vllms.is_cuda()):
        remedy = "minference has kernels for no other device"
        if vllms.is_unspecified():
            remedy = "vLLM found no device of the kind that it was built for: install the vLLM built for this machine"
        elif not name.startswith("vllm."):
            remedy = "leave the plugin that brings it out: VLLM_PLUGINS=minference"
        yield Finding("!!", "platform", f"{name}: neither CPU nor CUDA", remedy)
        return
    yield Finding("ok", "platform", name)
    try:
        make_name_known()
    except RuntimeError as error:
        yield Finding("!!", "attention backend", str(error))
        return
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins", name="minference")
    if not plugins or not allowed("minference"):
        yield Finding("!!", "attention backend", "vLLM does not load our plugin", plugin_remedy("minference"))
        return
    path = compat.resolved_class()
    if path is None:
        leave_out = "uninstall it, or leave it out with VLLM_PLUGINS=minference"
        yield Finding("!!", "attention backend", "another plugin has taken vLLM's slot for custom backends", leave_out)
        return
    module, _, class_name = path.rpartition(".")
    # On a GPU the class is chosen now.
    chosen = getattr(importlib.import_module(module), class_name)
    yield Finding("ok", "attention backend", f"minference is {chosen.__module__}.{chosen.__qualname__}")


def allowed(plugin: str) -> bool:
    """Whether the environment lets vLLM load the plugin."""
    names = os.environ.get("VLLM_PLUGINS")
    return names is None or plugin in names.split(",")


def plugin_remedy(plugin: str) -> str:
    if not allowed(plugin):
        return f"VLLM_PLUGINS={os.environ['VLLM_PLUGINS']} leaves {plugin} out: add it, or unset the variable"
    return "install the package into this environment: pip install . from a checkout"


def kernels() -> Iterator[Finding]:
    """Each kernel that runs an index, and the reason if it cannot run here."""
    import torch

    from minference_vllm.backend import compat, gpu_parent
    from minference_vllm.kernels import choice_cache
    from minference_vllm.kernels.native import library

    if compat.vllm_platform().is_cuda():
        parent, why = gpu_parent.choose_gpu_parent(*gpu_parent.this_gpu())
        if parent == "FLASH_ATTN":
            yield Finding("ok", "kernel block_table", "vLLM's FlashAttention kernel")
        else:
            yield Finding("--", "kernel block_table", why)
        yield gpu_fa4() if parent == "FLASH_ATTN" else Finding("--", "kernel fa4", why)
        yield Finding("--", "kernel native", "runs on CPUs")
        yield gpu_triton()
        if parent == "FLASH_ATTN":
            kept = choice_cache.default_folder()
            yield Finding("ok", "kernel auto", f"the fastest for each layer, timed when vLLM starts; kept in {kept}")
        return
    yield cpu_block_table()
    yield Finding("--", "kernel fa4", "needs an NVIDIA GPU")
    reason = library.unavailable_reason()
    builds = {"bf16": library.instructions(), "float32": library.instructions(torch.float32)}
    served = " and ".join(f"{dtype} ({found})" for dtype, found in builds.items() if found)
    yield Finding("--" if reason else "ok", "kernel native", reason or f"our kernels for {served}")
    yield Finding("--", "kernel triton", "needs an NVIDIA GPU (for tests: TRITON_INTERPRET=1)")


def gpu_fa4() -> Finding:
    import torch

    from minference_vllm.kernels.fa4 import limits

    reason = limits.unsupported_gpu_reason(torch.cuda.get_device_capability()) or limits.unavailable_reason()
    served = f"vLLM's FlashAttention 4, block-sparse, where --block-size is {limits.BLOCK}"
    return Finding("--" if reason else "ok", "kernel fa4", reason or served)


def gpu_triton() -> Finding:
    try:
        importlib.import_module("minference_vllm.triton_kernels.attention")
    except ImportError as error:
        return Finding("!!", "kernel triton", str(error), "install the triton that belongs to your PyTorch")
    return Finding("ok", "kernel triton", "our fused kernel")


def cpu_block_table() -> Finding:
    import torch

    from minference_vllm.kernels.block_table import cpu_ops

    layout = cpu_ops.layout_for(torch.bfloat16, 128, 128)
    if layout is None:
        return Finding("!!", "kernel block_table", "vLLM's CPU kernel keeps pages in a layout that is not known here")
    return Finding("ok", "kernel block_table", f"vLLM's own kernel; pages of layout {layout!r}")
