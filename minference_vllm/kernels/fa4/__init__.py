"""Kernel ``fa4``: whole pages by FlashAttention 4's block-sparse path, what is left by our Triton kernel."""
