"""Channel groups: the sets of layers, and places in them, that must be cut together."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from workbench.surgery.channels.cut import cut_channels
from workbench.surgery.channels.follow import ChannelFollower, Slot
from workbench.surgery.channels.names import ChannelNames
from workbench.surgery.channels.tracing import TracingError, trace
from workbench.surgery.layers import clone, weighted_layers


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    role: "out" (the layer makes these channels), "in" (it reads them) or "both" (it passes them on: norms,
    depthwise convolutions). `tensors`: (name, dimension) pairs to cut. `index`: int64 (channels, places), the places
    along those dimensions that belong to each channel of the group.
    """

    layer: str
    role: str
    tensors: tuple[tuple[str, int], ...]
    index: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that stand in the same layers; any of them can be removed, each from all members at once."""

    members: tuple[Member, ...]

    def __len__(self) -> int:
        return len(self.members[0].index)

    @property
    def width(self) -> int:
        """How many output channels of one layer go with each channel of the group (more than one: grouped layers)."""
        return min((m.index.shape[1] for m in self.members if m.role == "out"), default=1)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that make these channels."""
        return tuple(m.layer for m in self.members if m.role == "out")


@dataclass(frozen=True)
class ChannelTrace:
    """All groups of a model, and the layers that keep their output channels, with the reason."""

    groups: tuple[ChannelGroup, ...]
    skipped: dict[str, str] = field(default_factory=dict)


def channel_groups(model: nn.Module, example) -> list[ChannelGroup]:
    """Return the groups of channels that can be removed together; see `trace_channels`."""
    return list(trace_channels(model, example).groups)


def trace_channels(model: nn.Module, example) -> ChannelTrace:
    """Find which channels of `model` depend on each other; the model is left as it is.

    `example`: one batch, or a tuple of them for several inputs; only the shapes matter. Groups are proven by cutting
    every one of them in a copy and running it. Raises TracingError if the model's forward cannot be followed.
    """
    inputs = _inputs_like(model, example)
    copy = clone(model)
    graph = trace(copy)
    names = ChannelNames()
    follower = ChannelFollower(graph, names)
    try:
        with torch.no_grad():
            follower.run(*inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        reason = str(error).split("\n")[0]
        raise TracingError(
            f"{type(model).__name__} does not run on an example of shape {shapes}: {reason}. "
            "Pass an example batch of the shape that the model takes."
        ) from error
    groups, broken = _prove(model, _collect(follower.slots, names), inputs)
    return ChannelTrace(tuple(groups), {**_skipped(copy, follower.slots, names), **broken})


def _inputs_like(model: nn.Module, example) -> tuple[Tensor, ...]:
    """Return the first items of each example batch, on the model's device and in its precision."""
    inputs = example if isinstance(example, (tuple, list)) else (example,)
    first = next(model.parameters(), torch.empty(0))
    return tuple(x[:2].to(first.device, first.dtype if x.is_floating_point() else x.dtype) for x in inputs)


def _collect(slots: list[Slot], names: ChannelNames) -> list[ChannelGroup]:
    """Gather the places of every free channel, and put channels that stand in the same layers into one group."""
    places = defaultdict(lambda: defaultdict(list))  # channel -> slot number -> places
    for number, slot in enumerate(slots):
        for place, channel in enumerate(names.roots(slot.names).tolist()):
            if channel not in names.reasons:
                places[channel][number].append(place)
    alike = defaultdict(list)
    for found in places.values():
        alike[tuple((number, len(where)) for number, where in found.items())].append(found)
    groups = (_group(slots, channels) for channels in alike.values())
    return [group for group in groups if any(m.role != "in" for m in group.members) and len(group) > 1]


def _group(slots: list[Slot], channels: list[dict[int, list[int]]]) -> ChannelGroup:
    members = []
    for number in channels[0]:
        index = torch.tensor(np.array([found[number] for found in channels]), dtype=torch.int64)
        members.append(Member(slots[number].layer, slots[number].role, slots[number].tensors, index))
    return ChannelGroup(tuple(members))


def _skipped(model: nn.Module, slots: list[Slot], names: ChannelNames) -> dict[str, str]:
    """Return why each weighted layer that keeps some of its outputs does so."""
    made = {slot.layer: slot.names for slot in slots if slot.role != "in"}
    reasons = {}
    for name, _ in weighted_layers(model):
        if name not in made:
            reasons[name] = "it stands inside a part of the model that is taken as one piece, or is never called"
            continue
        kept = (names.reason(channel) for channel in made[name].tolist())
        reasons[name] = next(filter(None, kept), None)
    return {name: reason for name, reason in reasons.items() if reason}


def _prove(model: nn.Module, groups: list[ChannelGroup], inputs) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Cut every group by half and run the model; keep the groups that survive, with the error of those that do not."""
    if _failure(model, groups, inputs) is None:
        return groups, {}
    sound, broken = [], {}
    for group in groups:
        failure = _failure(model, [*sound, group], inputs)
        if failure is None:
            sound.append(group)
        else:
            broken.update(
                {layer: f"the model does not run with fewer of its channels ({failure})" for layer in group.layers}
            )
    return sound, broken


def _failure(model: nn.Module, groups: list[ChannelGroup], inputs) -> str | None:
    """Return the error met when half of the channels of each group are gone, or None."""
    copy = clone(model)
    keeps = [torch.arange(len(group)) < max(1, len(group) // 2) for group in groups]
    try:
        cut_channels(copy, zip(groups, keeps, strict=True))
        with torch.no_grad():
            copy(*inputs)
    except Exception as error:
        return str(error).strip().split("\n")[0]
    return None
