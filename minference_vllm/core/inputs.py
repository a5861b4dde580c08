"""``Inputs``: the inputs of the attention of one chunk in one layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from minference_vllm.core.page_means import PageMeans
from minference_vllm.core.paged_cache import PagedCache
from minference_vllm.core.plan import Chunk


@dataclass(frozen=True)
class Inputs:
    """Sizes: ``H`` query heads of size ``D``, ``N`` pages of ``B`` tokens in the sequence."""

    query: torch.Tensor
    """``[chunk, H, D]``, contiguous within a head; the last row is the sequence's last token."""
    cache: PagedCache
    """The layer's cache; the chunk's own keys and values are already in it."""
    pages: torch.Tensor
    """int64 ``[N]``, contiguous: the physical page of each logical block, ``N = ceil(seq_len / B)``."""
    chunk: Chunk
    scale: float
    """Softmax scale."""
    softcap: float = 0.0
    """Scores ``s`` become ``softcap * tanh(s / softcap)``; 0: no cap."""
    sinks: torch.Tensor | None = None
    """``[H]``: logit of each head's attention sink, which takes part in the softmax with a value of zero. Scores ignore
    it, since it scales the weights of all keys of a row alike."""
    window: int = 0
    """Maximum number of keys that a row sees, itself included; 0: all before it."""
    first_key: int = 0
    """Position in the request of key 0, see ``in_window``. Positions in ``chunk`` are relative to it."""
    page_means: PageMeans | None = None
    """The layer's page means, if they are kept from chunk to chunk; None: they are computed when needed."""

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        cache: PagedCache,
        block_table: torch.Tensor,
        chunk: Chunk,
        scale: float,
        softcap: float = 0.0,
        sinks: torch.Tensor | None = None,
        page_means: PageMeans | None = None,
    ) -> Inputs:
        """From a row of the block table (int64), which may be longer than the sequence."""
        pages = block_table[: -(-chunk.seq_len // cache.block_size)].contiguous()
        return cls(query, cache, pages, chunk, scale, softcap, sinks, page_means=page_means)

    @classmethod
    def of_rows(
        cls, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, block_size: int
    ) -> Inputs:
        """From keys and values as rows, ``[HK, S, D]``, which are copied into consecutive pages."""
        heads, length, dim = keys.shape
        missing = -length % block_size

        def paged(rows: torch.Tensor) -> torch.Tensor:
            padded = torch.nn.functional.pad(rows, (0, 0, 0, missing))
            return padded.view(heads, -1, block_size, dim).transpose(0, 1).contiguous()

        cache = PagedCache(paged(keys), paged(values), "rows")
        pages = torch.arange(len(cache.key), device=keys.device)
        return cls(query, cache, pages, Chunk(0, 0, length - len(query), length), scale)

    def in_window(self, window: int, tile: int) -> Inputs:
        """The same inputs in a layer with a sliding window of ``window`` keys, the row itself included.

        Keys before the first row's window are dropped: no row sees them, and vLLM may have given their pages to another
        request.

        Args:
            tile: rows per query tile, whole pages. Tiles still begin at multiples of it in the prompt.
        """
        size, chunk = self.cache.block_size, self.chunk
        oldest = max(0, chunk.context_len - window + 1)
        first_key = oldest // tile * tile
        pages = self.pages[first_key // size :].clone()
        # Up to a tile of pages still lies before the window. Some estimates read them before they are masked.
        gone = (oldest - first_key) // size
        pages[:gone] = pages[gone]
        own = replace(chunk, context_len=chunk.context_len - first_key, seq_len=chunk.seq_len - first_key)
        return replace(self, pages=pages, chunk=own, window=window, first_key=first_key)

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.cache.num_kv_heads
