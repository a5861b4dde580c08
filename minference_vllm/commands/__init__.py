"""The command line tool ``minference-vllm``, one file a command."""
