"""Topology: put cheaper kinds of layers where costly ones were."""

from workbench.techniques.topology.depthwise import DepthwiseSeparable
from workbench.techniques.topology.pointwise import PointwiseConvolution

__all__ = ["DepthwiseSeparable", "PointwiseConvolution"]
