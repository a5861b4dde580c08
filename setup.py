"""Packaging of minference-vllm; the metadata lives in pyproject.toml."""

from setuptools import setup

setup()
