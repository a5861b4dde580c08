"""``Remainder``: what the query tiles of a chunk leave out, as one key and one value each."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Remainder(NamedTuple):
    """See ``prefill.remainder``. ``H`` query heads of size ``D``, ``T`` query tiles; float32, contiguous."""

    key: torch.Tensor
    """``[H, T, D]``."""
    value: torch.Tensor
    """``[H, T, D]``."""
    bias: torch.Tensor
    """``[H, T]``: added to a row's scaled product with the key; -inf where a tile leaves nothing out."""
