"""Kinds of head patterns, pattern files, and the choice of a model's file. Does not import torch."""
