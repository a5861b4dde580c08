"""The commands of ``minference-vllm``, one per module: its options (``add_arguments``) and what it does (``run``)."""
