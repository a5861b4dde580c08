"""Triton kernels with their launchers.

Installed as ``minference_vllm.triton_kernels``: the bare name belongs to OpenAI's MoE kernels, which vLLM looks for.
"""

# From the root of a checkout ``python -c`` and ``python -m`` find this folder under the bare name. vLLM treats any
# error as "not installed", and then uses its own copy of those kernels.
if __name__ == "triton_kernels":
    raise ImportError(
        "this triton_kernels is a folder of minference-vllm, not OpenAI's package: import it as "
        "minference_vllm.triton_kernels",
        name=__name__,
        path=__file__,
    )
