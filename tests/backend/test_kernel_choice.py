"""The setting ``auto`` on a GPU, from vLLM's builder to the kernel that serves a batch.

As in ``test_warmup.py`` this file is both the test and, run as a script, the process with Triton's interpreter. There
the CPU stands in for a GPU (``tools/rehearsal.py``), and a fake clock with the times of the case for its events.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
LAYER = "layers of bfloat16 over bfloat16, 8 heads over 2 of size 64, pages of 64"


def lines_of(case: dict[str, Any], *words: str) -> list[str]:
    return [line for line in case["lines"] if all(word in line for word in words)]


def test_the_fastest_serves(interpreted: dict[str, Any]) -> None:
    case = interpreted["timed"]
    assert case["kernels"] == ["block_table"] * 2, "two layers, timed once"
    assert case["calls"] == {"triton": 10, "block_table": 10}
    (line,) = lines_of(case, "minference: kernel 'block_table' 2.00 ms, 'triton' 4.00 ms (2.00 times as long)", LAYER)
    assert "timed in " in line
    assert case["summary"].endswith("vLLM's FlashAttention kernel (kernel 'block_table')"), "before it is said"
    (key,) = case["keys"]
    assert key["gpu"] == "no GPU (a rehearsal)" and key["chunk_len"] == 256 and key["seq_len"] == 1024
    assert {"torch", "triton", "vllm", "minference-vllm", "layer", "tile"} <= set(key)
    assert case["right"], "a batch is served by it"


def test_the_next_start_times_nothing(interpreted: dict[str, Any]) -> None:
    case = interpreted["kept"]
    assert case["kernels"] == ["block_table"] * 2 and not case["calls"]
    assert lines_of(case, "'block_table' 2.00 ms", "timed at an earlier start, kept in ")
    assert not interpreted["again"]["calls"] and not lines_of(interpreted["again"], "earlier start"), "said once"


def test_other_patterns_of_requests_run_by_the_layers_kernel(interpreted: dict[str, Any]) -> None:
    assert interpreted["again"]["asked"] == ["block_table"]


def test_a_broken_file_is_replaced(interpreted: dict[str, Any]) -> None:
    case = interpreted["broken file"]
    assert case["kernels"] == ["triton"] * 2 and case["calls"] == {"triton": 10, "block_table": 10}
    assert len(lines_of(case, ".json is ignored")) == 1
    assert case["keys"]


def test_a_named_kernel_is_never_timed(interpreted: dict[str, Any]) -> None:
    for name in ("triton", "block_table"):
        case = interpreted[f"named {name}"]
        assert case["kernels"] == [name] * 2 and not case["calls"] and not case["keys"]


def test_a_kernel_that_fails_is_left_out(interpreted: dict[str, Any]) -> None:
    case = interpreted["fails"]
    assert case["kernels"] == ["triton"] * 2 and "block_table" not in case["calls"]
    assert lines_of(case, "kernel 'block_table' is left out for", LAYER, "RuntimeError: FlashAttention is not built")
    assert not case["keys"], "the next start tries again"
    assert lines_of(interpreted["fails while memory is measured"], "kernel 'block_table' is left out for")
    assert not interpreted["fails while memory is measured"]["calls"]


def test_the_start_fails_where_no_kernel_is_left(interpreted: dict[str, Any]) -> None:
    error = interpreted["both fail"]["error"]
    assert "no kernel runs layers of bfloat16 over bfloat16" in error
    assert "kernel 'triton': RuntimeError: no triton; kernel 'block_table': RuntimeError: FlashAttention is" in error


def test_without_time_the_first_serves(interpreted: dict[str, Any]) -> None:
    case = interpreted["no time"]
    assert case["kernels"] == ["triton"] * 2 and not case["calls"] and not case["keys"]
    assert lines_of(case, "kernel 'triton', untimed", "until the time for it was used up")


def test_without_memory_the_first_serves(interpreted: dict[str, Any]) -> None:
    case = interpreted["no memory"]
    assert case["kernels"] == ["triton"] * 2 and not case["keys"]
    assert lines_of(case, "are not timed to the end: all is taken")


def test_layers_that_only_our_kernel_knows_are_not_timed(interpreted: dict[str, Any]) -> None:
    assert interpreted["soft cap"]["kernels"] == ["triton"] * 2 and not interpreted["soft cap"]["calls"]
    assert interpreted["over Triton"]["kernels"] == ["triton"] * 2 and not interpreted["over Triton"]["calls"]


def test_nothing_is_timed_where_no_chunk_is_sparse(interpreted: dict[str, Any]) -> None:
    assert interpreted["short prompts"]["kernels"] == ["triton"] * 2 and not interpreted["short prompts"]["calls"]


def test_all_that_may_serve_take_their_memory(interpreted: dict[str, Any]) -> None:
    trial = interpreted["memory"]["trial"]
    assert interpreted["memory"]["taken"] == [["triton", trial], ["block_table", trial]]
    assert interpreted["memory of the one that is known"]["taken"] == [["block_table", 0]]


def interpret() -> None:
    sys.path.append(str(Path(__file__).parents[2] / "tools"))
    import rehearsal
    import torch

    gpu = torch.device("cuda")  # after ``pretend`` this would be the CPU
    rehearsal.pretend()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        cases = Cases(Path(folder), patch, gpu)
        for name in (name for name in dir(cases) if name.startswith("case_")):
            found |= getattr(cases, name)()
    print(json.dumps(found))


class Cases:
    """The cases. Each starts without chosen kernels and with its own cache."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, device: Any) -> None:
        from minference_vllm.backend import gpu

        self.folder, self.patch, self.device = folder, patch, device
        patch.setattr(gpu, "warm_up", lambda *arguments: None)

    def start(
        self,
        cache: str,
        times: dict[str, float] | None = None,
        settings: dict[str, Any] | None = None,
        parent: str = "FlashAttention",
        forget: bool = True,
        seconds: float = 1e9,
        max_len: int = 1024,
        before: Callable[[pytest.MonkeyPatch, Any], None] = lambda patch, layer: None,
        after: Callable[[Any, Any], dict[str, Any]] = lambda layer, builder: {},
    ) -> dict[str, Any]:
        """The kernels that a builder of two layers chooses.

        Args:
            cache: name of the cache's folder.
            times: milliseconds that each kernel takes.
            forget: forget earlier choices, as a new process would.
            before: called with the layer before the builder is made.
        """
        from gpu_layer import Layer, Parent
        from layer_inputs import make_known

        from minference_vllm.backend import kernel_choice, sparse_prefill
        from minference_vllm.kernels import choice_cache
        from minference_vllm.kernels.autotune import Budget

        lines: list[str] = []
        calls: dict[str, int] = {}
        taken = times or {"triton": 1.0, "block_table": 2.0}

        def clock(run: Any) -> float:
            name = run.args[2].name
            calls[name] = calls.get(name, 0) + 1
            return taken[name] / 1000

        def log(message: str, *values: object) -> None:
            lines.append(message % values)

        with self.patch.context() as patch:
            if forget:
                kernel_choice._chosen.clear()
                kernel_choice._left_out.clear()
                choice_cache._warn_once.cache_clear()
            place = self.folder / cache
            patch.setenv("VLLM_CACHE_ROOT", str(place))
            patch.setattr(kernel_choice, "gpu_clock", lambda device: clock)
            patch.setattr(kernel_choice, "_budget", Budget(seconds))
            for level in ("info", "warning"):
                patch.setattr(kernel_choice.logger, level, log)
            patch.setattr(choice_cache.logger, "warning", log)
            patch.setattr(sparse_prefill.logger, "info_once", log, raising=False)
            layer = Layer(
                self.folder, patch, Parent(parent), [(300, 400), (20, 30)],
                patterns=[{"kind": "vertical_slash", "vertical": 40, "slash": 110}] * 8,
                settings={"kernel": "auto"} | (settings or {}),
            )  # fmt: skip
            layer.config.model_config.max_model_len = max_len
            layer.config.scheduler_config.max_num_batched_tokens = 256
            second = layer.make_layer(0)
            result: dict[str, Any] = {}
            try:
                before(patch, layer)
                second.impl.logits_soft_cap = layer.impl.logits_soft_cap
                names = make_known(patch, [layer.layer, second])
                builder = layer.parent.our_builder(layer.spec, names, layer.config, self.device)
                result["kernels"] = [one.impl.sparse_layer.kernel.name for one in builder.sparse_layers]
                result["summary"] = builder._kernels()
                result |= after(layer, builder)
            except RuntimeError as error:
                result["error"] = str(error)
            keys = [key for key, _ in choice_cache.stored(place / "minference" / "kernels")]
            return result | {"calls": calls, "lines": lines, "keys": keys}

    def case_choices(self) -> dict[str, Any]:
        from layer_inputs import assert_right

        from minference_vllm.backend.request_patterns import Asked
        from minference_vllm.patterns.file import PatternFile
        from minference_vllm.patterns.kinds import AShape

        def serve(layer: Any, builder: Any) -> dict[str, Any]:
            layer.parent.theirs.get_scheduler_metadata = lambda **sizes: None
            metadata = builder.build(0, layer.common())
            assert [chunk.request for chunk, _ in metadata.sparse] == [0]
            assert_right(layer, layer.run(metadata), [0])
            return {"right": True}

        def ask(layer: Any, builder: Any) -> dict[str, Any]:
            asked = Asked("a_shape(16, 64)", patterns=PatternFile(default=AShape(sink=16, local=64)))
            layer.impl.prepare_asked(asked, layer.layer, layer.spec, layer.config.model_config.dtype, builder.device)
            return {"asked": [layer.impl.layer_for(asked.name).kernel.name]}

        slow_triton = {"triton": 2.0, "block_table": 1.0}
        found = {"timed": self.start("first", slow_triton, after=serve), "kept": self.start("first")}
        found["again"] = self.start("first", forget=False, after=ask)
        (path,) = (self.folder / "first" / "minference" / "kernels").iterdir()
        path.write_text("{")
        found["broken file"] = self.start("first")
        for name in ("triton", "block_table"):
            found[f"named {name}"] = self.start("named", settings={"kernel": name})
        return found

    def case_limits(self) -> dict[str, Any]:
        import torch

        from minference_vllm.backend import kernel_choice

        def soft_cap(patch: pytest.MonkeyPatch, layer: Any) -> None:
            layer.impl.logits_soft_cap = 30.0

        def no_memory(patch: pytest.MonkeyPatch, layer: Any) -> None:
            def run_trial(*arguments: Any) -> None:
                raise torch.OutOfMemoryError("all is taken")

            patch.setattr(kernel_choice, "run_trial", run_trial)

        return {
            "no time": self.start("no time", seconds=0.0),
            "no memory": self.start("no memory", before=no_memory),
            "soft cap": self.start("soft cap", before=soft_cap),
            "over Triton": self.start("over Triton", parent="TritonAttention"),
            "short prompts": self.start("short prompts", max_len=256),
        }

    def case_failures(self) -> dict[str, Any]:
        from vllm.v1.attention.backends import fa_utils

        from minference_vllm.backend import kernel_choice
        from minference_vllm.kernels.kernel import Kernel

        def no_flash(patch: pytest.MonkeyPatch, layer: Any) -> None:
            def attend(**arguments: Any) -> None:
                raise RuntimeError("FlashAttention is not built for this GPU")

            patch.setattr(fa_utils, "flash_attn_varlen_func", attend)

        def neither(patch: pytest.MonkeyPatch, layer: Any) -> None:
            def attend(*arguments: Any) -> None:
                raise RuntimeError("no triton")

            no_flash(patch, layer)
            able = kernel_choice.choose.candidates

            def candidates(*arguments: Any) -> list[Kernel]:
                from dataclasses import replace

                return [
                    replace(kernel, run=attend) if kernel.name == "triton" else kernel for kernel in able(*arguments)
                ]

            patch.setattr(kernel_choice.choose, "candidates", candidates)

        def measured(patch: pytest.MonkeyPatch, layer: Any) -> None:
            no_flash(patch, layer)
            self.measure(patch, layer)

        return {
            "fails": self.start("fails", before=no_flash),
            "both fail": self.start("both fail", before=neither),
            "fails while memory is measured": self.start("measured", before=measured),
        }

    def case_memory(self) -> dict[str, Any]:
        from minference_vllm.backend import warmup
        from minference_vllm.prefill import kernel_trial

        found: dict[str, Any] = {}

        def watched(name: str) -> Callable[[pytest.MonkeyPatch, Any], None]:
            def before(patch: pytest.MonkeyPatch, layer: Any) -> None:
                taken: list[list[Any]] = []
                held: list[int] = []
                import torch

                empty = torch.empty

                def watched_empty(*sizes: Any, **options: Any) -> Any:
                    if options.get("dtype") is torch.uint8 and len(sizes) == 1 and isinstance(sizes[0], int):
                        held.append(sizes[0])
                        return None
                    return empty(*sizes, **options)

                def attend(inputs: Any, patterns: Any, kernel: Any, *others: Any) -> None:
                    taken.append([kernel.name, held[-1]])

                patch.setattr(torch, "empty", watched_empty)
                patch.setattr(warmup, "attend_chunk", attend)
                self.measure(patch, layer)
                patch.setattr(torch, "empty", empty)
                found[name] = {"taken": taken, "trial": kernel_trial.MEMORY}

            return before

        self.start("memory", {"triton": 2.0, "block_table": 1.0}, before=watched("memory"))
        self.start("memory", before=watched("memory of the one that is known"))
        return found

    def measure(self, patch: pytest.MonkeyPatch, layer: Any) -> None:
        """What a layer does while vLLM measures memory."""
        from minference_vllm.backend import warmup

        patch.setattr(warmup, "_profiled", {})
        patch.setattr(warmup, "MEMORY_LIMIT", 1)
        patch.setattr(warmup.family_of(warmup.WIDEST), "selection_bytes", lambda *sizes: 1)
        layer.layer.get_kv_cache_spec = lambda config: layer.spec
        warmup.take_memory(layer.layer, layer.config, 256, self.device)


if __name__ == "__main__":
    interpret()
