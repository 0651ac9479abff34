"""Which channels of a model belong together, and how to remove them.

    trace = trace_channels(model, example)
    for group in trace.groups: ...            # layers that must be cut together
    trace.skipped["head"]                     # why a layer keeps all its channels
    cut_channels(copy, [(group, keep), ...])  # smaller tensors, same code

The model is traced with `torch.fx`, and the names of channels are followed from operation to operation: a residual
sum joins two channels into one, a concatenation lays them side by side, flattening repeats each. Whatever cannot be
followed keeps all its channels, with the reason and the line of the model.

Source: Fang et al., 2023 (DepGraph), arXiv:2301.12900.
"""

from workbench.surgery.channels.cut import cut_channels
from workbench.surgery.channels.groups import ChannelGroup, ChannelTrace, Member, channel_groups, trace_channels
from workbench.surgery.channels.tracing import TracingError

__all__ = ["ChannelGroup", "ChannelTrace", "Member", "TracingError", "channel_groups", "cut_channels", "trace_channels"]
