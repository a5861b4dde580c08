"""The vLLM side: backend, metadata builder and implementation classes, and the state of an engine process."""
