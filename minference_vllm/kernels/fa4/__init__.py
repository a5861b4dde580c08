"""Kernel ``fa4``: whole pages by FlashAttention 4's block-sparse path, the rest by our Triton kernel."""
