"""Ways to run attention under a ``SparseIndex``, a folder each, named as the setting ``kernel`` names them."""
