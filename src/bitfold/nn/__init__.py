"""Layers whose weights are QTensors: `QWeight` stands where a tensor stood, `QLinear` and `QEmbedding` use it."""

from bitfold.nn.layers import QEmbedding, QLinear, attach, set_tensor
from bitfold.nn.weight import QWeight

__all__ = ["QEmbedding", "QLinear", "QWeight", "attach", "set_tensor"]
