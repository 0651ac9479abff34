"""Operations on the structure of a model: copy it, replace its layers, follow its channels."""

from workbench.surgery.channels import ChannelTrace, TracingError, channel_groups, cut_channels, trace_channels
from workbench.surgery.layers import (
    Parallel,
    clone,
    identity,
    layer_at,
    layers_to_compress,
    model_class,
    remembered,
    replace_layer,
    weighted_layers,
)

__all__ = [
    "ChannelTrace",
    "Parallel",
    "TracingError",
    "channel_groups",
    "clone",
    "cut_channels",
    "identity",
    "layer_at",
    "layers_to_compress",
    "model_class",
    "remembered",
    "replace_layer",
    "trace_channels",
    "weighted_layers",
]
