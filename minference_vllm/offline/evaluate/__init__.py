"""What a pattern costs a model in accuracy, and what it gains: the scored tasks of ``minference-vllm evaluate``."""
