"""AdaRound: learn for each weight whether to round it up or down.

Idea: the nearest level is not the best one. What counts is a layer's output, in which errors of weights add up or
cancel. AdaRound makes each weight's choice between the level below and the one above a soft number from 0 to 1,
learns it so that the outputs on calibration images change least, and pushes it to 0 or 1 on the way.

Settings: `weight_bits`. `granularity` "channel" or "group", with `group_size` weights to a scale. `iterations` of Adam
for each layer.

When it helps: 2 to 4 bits where there are a few images without labels but no time to train.

When it does not: at 8 bits the nearest level is as good. It takes seconds, not milliseconds, and each layer is
learned alone and without labels, where quantization-aware training changes all of them together. Activations stay in
fp32: add Quantization(weight_bits=32) behind it. No kernel here computes with fewer than 8 bits, so the file shrinks
and the time does not. Grouped convolutions, and layers whose weight is coded already, are rounded to nearest. The
inputs are those of the full network, and its activation functions are left out of the objective.

Source: Nagel et al., 2020, arXiv:2004.10568.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from workbench.technique import setting
from workbench.techniques.moments import moment_root
from workbench.techniques.quantization.layerwise import LayerwiseRounding
from workbench.weights import FakeQuantize

ZETA, GAMMA = 1.1, -0.1  # how far the sigmoid is stretched, so that it reaches 0 and 1
SHARPNESS = (20.0, 2.0)  # of the push to 0 or 1: flat in the middle at first, everywhere at the end
WARM_UP = 0.2  # the part of the iterations without a push
PUSH = 30.0
LEARNING_RATE = 0.1


def adaround(weight: Tensor, root: Tensor, quantizer: FakeQuantize, iterations: int = 300) -> Tensor:
    """Return `weight` (m, n) rounded to levels of `quantizer`, up or down as its outputs need; zeros stay zero.

    `root` (n, n): root·rootᵀ is the second moment of the inputs. A channel that did not gain is rounded to nearest.
    Source: Nagel et al., 2020, arXiv:2004.10568, equations 21 to 24.
    """
    scale = quantizer.along_weight(quantizer.scale, weight.shape).expand(weight.shape)
    below, keep = (weight / scale).floor(), weight != 0
    levels = lambda up: (below + up).clamp(quantizer.quant_min, quantizer.quant_max) * scale * keep
    errors = lambda values: ((values - weight) @ root).square().sum(1)
    nearest = quantizer(weight)
    usual = errors(nearest).clamp_min(1e-30)
    start = (weight / scale - below).clamp(0.01, 0.99)
    logits = torch.special.logit((start - GAMMA) / (ZETA - GAMMA)).requires_grad_()
    optimizer = torch.optim.Adam([logits], LEARNING_RATE)
    for step in range(iterations):
        up = _stretched(logits)
        loss = (errors(levels(up)) / usual).mean() + PUSH * _indecision(up, step / iterations)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    learned = levels((logits.detach() >= 0).float())
    return torch.where((errors(learned) < usual)[:, None], learned, nearest)


def _stretched(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _indecision(up: Tensor, progress: float) -> Tensor:
    """Return how far the choices `up` are from 0 or 1, 0 to 1 on average; none while warming up."""
    if progress < WARM_UP:
        return up.new_zeros(())
    done = (progress - WARM_UP) / (1 - WARM_UP)
    sharpness = SHARPNESS[0] + (SHARPNESS[1] - SHARPNESS[0]) * done
    return (1 - (2 * up - 1).abs().pow(sharpness)).mean()


@dataclass(frozen=True)
class AdaRound(LayerwiseRounding):
    """Learn for each weight whether to round up or down, layer by layer."""

    family: ClassVar[str] = "quantization"
    source: ClassVar[str] = "Nagel et al., 2020, arXiv:2004.10568"
    trains: ClassVar[bool] = True

    iterations: int = setting(300, low=50, high=2000, step=50, unit="steps a layer")

    @classmethod
    def title(cls):
        return cls.__name__  # one word

    def _values(self, model, name, weight, moments, quantizer):
        root = moments.derive(("root", name), lambda: moment_root(moments[name]).float())
        return adaround(weight, root, quantizer, self.iterations)
