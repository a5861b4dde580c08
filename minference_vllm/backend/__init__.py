"""vLLM's classes: platform, backend, metadata builder and implementation. Nothing else in the package imports vLLM,
except for the kernel calls in ``engines/cpu_kernel.py`` and ``engines/flash.py``."""
