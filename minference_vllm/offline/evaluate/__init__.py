"""What a pattern does to a model's text, and what it gains: the scored tasks of ``minference-vllm evaluate``."""
