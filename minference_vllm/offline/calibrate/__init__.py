"""Offline search for the pattern of every head of a model: ``minference-vllm calibrate``.

``search`` measures candidates on one chunk of one layer and chooses among them; ``recorder`` runs it inside the
engine's processes while a prompt is read; ``run`` starts the engine and writes the pattern file.
"""
