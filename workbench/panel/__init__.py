"""`panel(technique, model, data)`: sliders that show at once what compression does to bytes, accuracy, milliseconds."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import nn

from workbench.panel.board import Panel
from workbench.technique import Technique


def panel(technique: type[Technique] | Technique, model: nn.Module, data: Any, **options) -> Panel:
    """Return the panel of `technique` on `model`; `options` as for `Panel`."""
    return Panel(technique, model, data, **options)


class _Callable(ModuleType):
    # `wb.panel` is this module once any part of it was imported, and the function otherwise: both can be called.
    def __call__(self, *args, **options) -> Panel:
        return panel(*args, **options)


sys.modules[__name__].__class__ = _Callable

__all__ = ["Panel", "panel"]
