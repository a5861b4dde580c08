"""The command line tool ``minference-vllm``, one file per command."""
