"""Pictures: one head's attention, the pattern map of a model, density and recall of its layers.

Needs matplotlib (the ``plot`` extra).
"""

from minference_vllm.offline.plot.head import HeadMap, draw_head, head_map
from minference_vllm.offline.plot.layers import draw_layers
from minference_vllm.offline.plot.pattern_map import draw_pattern_map

__all__ = ["HeadMap", "draw_head", "draw_layers", "draw_pattern_map", "head_map"]
