"""Ways to execute a ``SparseIndex``. Each engine is one function ``run(query, cache, pages, index, scale, out)``."""
