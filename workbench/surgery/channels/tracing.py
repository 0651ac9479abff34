"""Trace a model with torch.fx, remembering for every operation the line of the model that it came from."""

from __future__ import annotations

import linecache
import os
import sys
import threading
import traceback

import torch
from torch import fx, nn

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(__file__) + os.sep


class TracingError(ValueError):
    """The model's forward cannot be followed; the message names the line where tracing stops."""


class LineTracer(fx.Tracer):
    """Take every layer whose forward is PyTorch's own as one operation, and note the line of each operation.

    While it traces, torch.fx replaces `nn.Module.__call__` in the whole process. Models that other threads run in the
    meantime are passed on untouched.
    """

    def trace(self, root, concrete_args=None):
        self._thread = threading.get_ident()
        return super().trace(root, concrete_args)

    def call_module(self, m, forward, args, kwargs):
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for PyTorch's layers, also subclassed or with parametrizations; False for containers and own code."""
        return type(m).forward.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)

    def create_node(self, *args, **kwargs):
        node = super().create_node(*args, **kwargs)
        node.meta["line"] = _calling_line()
        return node


def trace(model: nn.Module) -> fx.GraphModule:
    """Return `model` as a graph of operations; raises TracingError naming the line where that is impossible."""
    try:
        graph = LineTracer().trace(model)
    except Exception as error:
        raise TracingError(_explain(model, error)) from error
    return fx.GraphModule(model, graph)


def where(node: fx.Node) -> str:
    """Describe an operation in words: its name, and the line of the model if that is known."""
    line = node.meta.get("line")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{name} at {line}" if line else str(name)


def _is_model_code(path: str) -> bool:
    return not (path.startswith((_TORCH, _HERE, "<frozen")) or path.startswith("<eval_with_key>"))


def _show(path: str, number: int) -> str:
    source = linecache.getline(path, number).strip()
    return f"{os.path.basename(path)}, line {number}" + (f": `{source}`" if source else "")


def _calling_line() -> str | None:
    """Return the innermost line on the stack inside a forward that is neither PyTorch's nor ours."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "self" not in frame.f_locals and path.startswith(_HERE):
            return None
        if _is_model_code(path):
            return _show(path, frame.f_lineno)
        frame = frame.f_back
    return None


def _explain(model: nn.Module, error: Exception) -> str:
    """Say where tracing stopped and what to do about it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_model_code(f.filename)]
    place = f"at {_show(frames[-1].filename, frames[-1].lineno)}" if frames else "in its forward"
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return (
        f"The channels of {type(model).__name__} cannot be followed: tracing stops {place} ({reason}). "
        "A forward can be traced when its steps do not depend on the values of tensors; "
        "move that line out of forward, or use a technique that keeps the layers' shapes."
    )
