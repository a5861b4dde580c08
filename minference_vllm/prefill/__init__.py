"""One chunk, from its queries to its attention output: select, index, run."""
