"""Our CPU kernels (``csrc/cpu``): attention and scores."""
