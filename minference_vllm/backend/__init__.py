"""vLLM's classes: backend, metadata builder and implementation, and what an engine process knows."""
