"""Causal depthwise convolution. It has no kernel of its own: PyTorch computes it on every device.

The mixer's kernels, `kernels/gates.py`, contain it.
"""

from m2_plugin.ops.reference.short_conv import short_conv

__all__ = ["short_conv"]
