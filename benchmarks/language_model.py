"""A transformers language model with our attention, which reads a prompt chunk by chunk like a server.

The whole prompt runs through the model at once. Within each layer the attention of its chunks is computed one after the
other, so that a chunk attends the keys and values of earlier chunks that result from sparse attention in the layers
below. That is what chunked prefill computes, and what vLLM computes with these patterns.

Sizes: ``H`` query heads over ``HK`` KV heads, ``S`` tokens, ``D`` head size, ``R`` sampled rows.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from minference_vllm import PatternFile, Settings, SparseIndex, sparse_prefill
from minference_vllm.core.plan import Chunk, dense_reason
from minference_vllm.prefill.recall import sample_rows

PAGE = 128
"""vLLM's page size on CPUs."""
ROWS_AT_ONCE = 256
"""Rows whose logits over the vocabulary are computed at once."""

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Layer, query ``[H, S, D]``, keys and values ``[HK, S, D]``, scale -> ``[S, H, D]``."""


def dense(layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    out = scaled_dot_product_attention(
        query[None], keys[None], values[None], is_causal=True, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def masked(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Rows ``[H, n, D]`` over the keys that a bool mask ``[n, S]`` allows -> ``[n, H, D]``."""
    group = query.shape[0] // keys.shape[0]
    keys, values = (rows.repeat_interleave(group, 0)[None] for rows in (keys, values))
    return scaled_dot_product_attention(query[None], keys, values, attn_mask=mask, scale=scale)[0].transpose(0, 1)


class ChunkedPrefill:
    """Attention by patterns over a paged cache, with counts of computed pairs and errors against exact attention."""

    def __init__(self, patterns: PatternFile, chunk: int, settings: Settings, rows: int = 0) -> None:
        """
        Args:
            chunk: the server's ``max_num_batched_tokens``.
            settings: its ``min_context``, ``min_chunk`` and ``tile``.
            rows: number of rows per chunk to compare with exact attention.
        """
        self.patterns, self.chunk, self.settings, self.rows = patterns, chunk, settings, rows
        self.computed_pairs = self.pairs = 0.0
        """Query-key pairs of all layers and heads."""
        self.heads: dict[int, HeadSums] = {}
        """Layer -> sums of its heads, if ``rows`` is not 0."""
        self.compare_seconds = 0.0
        """Seconds spent on these comparisons."""

    @property
    def density(self) -> float:
        """Share of the prompt's query-key pairs that was computed, dense chunks included."""
        return self.computed_pairs / self.pairs

    def __call__(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        heads, length, dim = query.shape
        patterns = self.patterns.for_layer(layer, heads)
        query, out = query.transpose(0, 1), query.new_empty(length, heads, dim)
        key_cache, value_cache = in_pages(keys), in_pages(values)
        table = torch.arange(len(key_cache), dtype=torch.int32)[None]
        for begin in range(0, length, self.chunk):
            end = min(begin + self.chunk, length)
            chunk, pairs = Chunk(0, 0, begin, end), heads * (end * (end + 1) - begin * (begin + 1)) / 2
            self.pairs += pairs
            if dense_reason(chunk, self.settings.min_context, self.settings.min_chunk):
                visible = torch.arange(end) <= torch.arange(begin, end)[:, None]
                rows = query[begin:end].transpose(0, 1)
                out[begin:end] = masked(rows, keys[:, :end], values[:, :end], visible, scale)
                self.computed_pairs += pairs
                continue
            where = torch.tensor([0, end - begin]), torch.tensor([end])
            _, (index,) = sparse_prefill(
                query[begin:end], key_cache, value_cache, table, *where, patterns, scale,
                tile=self.settings.tile, out=out[begin:end], return_index=True,
            )  # fmt: skip
            self.computed_pairs += float(index.computed_pairs().sum())
            if self.rows:
                start = time.perf_counter()
                sums = self.heads.setdefault(layer, HeadSums(heads))
                sums.add(query[begin:end], keys[:, :end], values[:, :end], scale, index, out[begin:end], self.rows)
                self.compare_seconds += time.perf_counter() - start
        return out


def in_pages(rows: torch.Tensor) -> torch.Tensor:
    """``[HK, S, D]`` -> ``[pages, PAGE, HK, D]``, the last page padded with zeros."""
    kv_heads, length, dim = rows.shape
    pages = rows.new_zeros(-(-length // PAGE) * PAGE, kv_heads, dim)
    pages[:length] = rows.transpose(0, 1)
    return pages.unflatten(0, (-1, PAGE))


class HeadSums:
    """Errors of one layer's heads against exact attention over the same keys and values, on sampled rows."""

    def __init__(self, heads: int) -> None:
        self.rows = 0
        self.recalled, self.recalled_value, self.error, self.norm = torch.zeros(4, heads, dtype=torch.float64)

    def add(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        index: SparseIndex,
        out: torch.Tensor,
        count: int,
    ) -> None:
        """Add a chunk: query and out ``[chunk, H, D]``, keys and values ``[HK, S, D]`` up to the chunk's end."""
        rows = sample_rows(len(query), count, seed=index.tiling.context_len)
        positions = rows + index.tiling.context_len
        group = query.shape[1] // keys.shape[0]
        keys, values = (by_kv_head.repeat_interleave(group, 0) for by_kv_head in (keys, values))
        logits = query[rows].transpose(0, 1) @ keys.transpose(1, 2) * scale  # [H, R, S]
        logits.masked_fill_(torch.arange(keys.shape[1]) > positions[:, None], -torch.inf)
        weights = logits.softmax(-1)
        exact = weights @ values
        selected = index.tile_mask(torch.searchsorted(index.tiling.starts, positions, right=True) - 1)
        self.recalled += (weights * selected).sum((1, 2), dtype=torch.float64)
        # A key moves the output by its weight times the distance of its value from the output.
        moved = weights.mul_(torch.cdist(exact, values))
        total, kept = moved.sum(2), moved.mul_(selected).sum(2)
        self.recalled_value += torch.where(total > 0, kept / total, 1.0).sum(1, dtype=torch.float64)
        self.error += (out[rows].transpose(0, 1) - exact).double().square().sum((1, 2))
        self.norm += exact.double().square().sum((1, 2))
        self.rows += len(rows)


class Heads(NamedTuple):
    """All heads of a model, layer by layer, float64 ``[layers * H]`` each."""

    recall: torch.Tensor
    """Share of the exact weights on selected keys, mean over rows."""
    value_recall: torch.Tensor
    """The same, with each weight multiplied by the distance between the key's value and the row's exact output: the
    effect of leaving the key out. A sink with a large weight and a small value counts for little."""
    error: torch.Tensor
    """Norm of the output's error relative to that of the exact output."""

    @classmethod
    def of(cls, passes: Sequence[dict[int, HeadSums]]) -> Heads:
        """Combine the sums of one or more prompts."""
        layers = [[found[layer] for found in passes] for layer in sorted(passes[0])]

        def total(field: str) -> torch.Tensor:
            return torch.cat([torch.stack([getattr(sums, field) for sums in layer]).sum(0) for layer in layers])

        rows = sum(sums.rows for sums in layers[0])
        return cls(total("recalled") / rows, total("recalled_value") / rows, (total("error") / total("norm")).sqrt())


class Scores(NamedTuple):
    """Scores of some tokens of a prompt, by the model's predictions one row before."""

    loss: torch.Tensor
    """float64 ``[n]``, nats."""
    right: torch.Tensor
    """bool ``[n]``: the token was the likeliest."""


class LanguageModel:
    """A causal language model in float32, with full causal attention in every layer."""

    _numbers = itertools.count()

    def __init__(self, path: str, tokens: int) -> None:
        """
        Args:
            path: a folder, or a name on the Hugging Face hub.
            tokens: the longest prompt. Beyond the model's trained length, positions are stretched by YaRN.

        Raises:
            OSError: no such model.
            ValueError: its attention is not full causal attention, its logits are not the plain output layer's, or its
                positions are already scaled.
        """
        from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM

        self.attend: Attend = dense
        self.questions: Sequence[range] = ()
        name = f"language_bed_{next(self._numbers)}"
        AttentionInterface.register(name, self._attention)
        # Our attention is causal by itself.
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
        config = AutoConfig.from_pretrained(path)
        self.yarn = stretch(config, tokens)
        self.model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, attn_implementation=name
        ).eval()
        self.num_layers, self.num_heads = config.num_hidden_layers, config.num_attention_heads
        few = torch.arange(8) % config.vocab_size
        with torch.inference_mode():
            logits = self.model(few[None], use_cache=False).logits[0]
            if not torch.allclose(self._head(self._hidden(few)), logits, atol=1e-4):
                raise ValueError(f"{path}: its logits are not the output layer's own, so it cannot be scored here")

    def _attention(
        self, module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        for unknown in ("sliding_window", "softcap", "s_aux", "position_bias"):
            if kwargs.get(unknown) is not None:
                raise ValueError(
                    f"layer {module.layer_idx} uses {unknown}; only full causal attention is measured here"
                )
        query, keys, values, scale = query[0], keys[0], values[0], kwargs["scaling"]
        length = self.questions[0].start if self.questions else query.shape[1]
        out = [self.attend(module.layer_idx, query[:, :length], keys[:, :length], values[:, :length], scale)]
        if self.questions:
            mask = question_mask(length, self.questions)
            out.append(masked(query[:, length:], keys, values, mask, scale))
        return torch.cat(out)[None], None

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        positions = None if positions is None else positions[None]
        return self.model.base_model(ids[None], position_ids=positions, use_cache=False).last_hidden_state[0]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.get_output_embeddings()(hidden)

    @contextlib.contextmanager
    def _reading(self, attend: Attend, questions: Sequence[range]) -> Iterator[None]:
        self.attend, self.questions = attend, questions
        try:
            with torch.inference_mode():
                yield
        finally:
            self.attend, self.questions = dense, ()

    def score(
        self, ids: torch.Tensor, wanted: torch.Tensor, attend: Attend = dense, questions: Sequence[range] = ()
    ) -> Scores:
        """Read a prompt and score the predictions of some of its own tokens.

        Args:
            ids: int64 ``[S]``.
            wanted: int64 ``[n]``, positions in ``ids`` of the tokens to predict, from 1 on.
            attend: how the prompt is read.
            questions: consecutive ranges of ``ids`` up to its end. Each one continues the text before the first range,
                does not attend the other questions and is read densely, like a request that finds the prompt in the
                prefix cache and whose new tokens are fewer than ``min_chunk``.
        """
        with self._reading(attend, questions):
            hidden = self._hidden(ids, question_positions(len(ids), questions))
            losses, right = [], []
            for piece in wanted.split(ROWS_AT_ONCE):
                logits, answers = self._head(hidden[piece - 1]), ids[piece]
                losses.append(cross_entropy(logits, answers, reduction="none").double())
                right.append(logits.argmax(-1) == answers)
            return Scores(torch.cat(losses), torch.cat(right))


def question_positions(length: int, questions: Sequence[range]) -> torch.Tensor:
    """int64 ``[length]``: positions, with every question starting at the end of the prompt."""
    positions = torch.arange(length)
    for question in questions:
        positions[question.start : question.stop] = questions[0].start + torch.arange(len(question))
    return positions


def question_mask(prompt: int, questions: Sequence[range]) -> torch.Tensor:
    """bool ``[rows, S]``: the keys that the questions' rows attend, after a prompt of ``prompt`` tokens."""
    rows = torch.arange(prompt, questions[-1].stop)
    mask = torch.arange(questions[-1].stop) <= rows[:, None]
    for question in questions:
        mask[question.start - prompt : question.stop - prompt, prompt : question.start] = False
    return mask


def yarn(parameters: dict[str, Any], trained: int, factor: float) -> dict[str, Any]:
    """Entries of a configuration for ``factor`` times the positions that it was trained for.

    Args:
        parameters: its ``rope_parameters``.
    """
    stretched = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": trained}
    return {"max_position_embeddings": int(trained * factor), "rope_parameters": parameters | stretched}


def stretch(config: Any, tokens: int) -> int:
    """Extend a configuration to ``tokens`` positions by YaRN if needed; returns the factor, 1 if it was not needed."""
    trained = config.max_position_embeddings
    if tokens <= trained:
        return 1
    parameters = config.rope_parameters
    if parameters.get("rope_type", "default") != "default":
        raise ValueError(f"{tokens} tokens are above the model's {trained}, and its positions are already scaled")
    factor = 1 << (-(-tokens // trained) - 1).bit_length()
    for name, value in yarn(parameters, trained, factor).items():
        setattr(config, name, value)
    return factor
