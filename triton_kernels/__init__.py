"""Triton kernels with their launchers.

Installed as ``minference_vllm.triton_kernels``: the bare name belongs to OpenAI's MoE kernels, which vLLM looks for.
"""
