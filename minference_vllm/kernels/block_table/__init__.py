"""vLLM's own paged kernels, driven with an index as block tables."""
