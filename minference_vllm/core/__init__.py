"""Types that all parts share: chunks, tiles, pages and the sparse index. Independent of patterns, kernels and vLLM."""
