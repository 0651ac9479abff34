"""`panel(technique, model, data)`: sliders that show at once what compression does to bytes, accuracy, milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

from workbench.panel.board import Offer, Panel
from workbench.panel.maps import MapPanel
from workbench.panel.pipeline import PipelinePanel
from workbench.panel.profiler import ProfilerPanel
from workbench.technique import Pipeline


def panel(technique: Offer | Sequence[Offer], model: nn.Module, data: Any, **options) -> Panel:
    """Return the panel of a technique, of several to choose from, or of a pipeline's stages on `model`.

    `options` as for `Panel`, and for a pipeline as for `PipelinePanel`.
    """
    if isinstance(technique, Pipeline):
        return PipelinePanel(technique.stages, model, data, **options)
    return Panel(technique, model, data, **options)


class _Callable(ModuleType):
    # `wb.panel` is this module once any part of it was imported, and the function otherwise: both can be called.
    def __call__(self, *args, **options) -> Panel:
        return panel(*args, **options)


sys.modules[__name__].__class__ = _Callable

__all__ = ["MapPanel", "Panel", "PipelinePanel", "ProfilerPanel", "panel"]
