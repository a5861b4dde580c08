"""From a pattern and scores to the keys that each query tile attends."""
