"""Sparse attention of one chunk: select keys, build the index, run the kernel."""
