"""Our CPU kernels (``csrc/cpu``): attention, the remainder and scores."""
