"""The kinds of head patterns, pattern files, and which file a model runs with. No torch."""
