"""What every part stands on: chunks, tiles, pages, and the sparse index. No pattern, no kernel, no vLLM."""
