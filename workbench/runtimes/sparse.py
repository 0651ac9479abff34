"""Layers whose weights are 2:4 sparse, on the sparse tensor cores of an NVIDIA GPU.

Of every four neighbouring weights at least two are zero: `torch.sparse.to_sparse_semi_structured` stores the others
with their places, and cuSPARSELt multiplies half as much. Mishra et al., 2021, arXiv:2104.08378.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.runtimes.base import Kernel, Runtime, RuntimeFailed
from workbench.runtimes.cuda import AMPERE, Cuda, PreparedCuda
from workbench.surgery import replace_layer, weighted_layers

MULTIPLE = 16  # of rows and columns: cuSPARSELt takes only such weights in half precision
SPARSE_KERNEL = "2:4 sparse"
HOLDERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # torch's own modules that do not read their layers' weights


def is_two_four(weight: Tensor) -> bool:
    """Return True where every four neighbours of a row of `weight` (rows, columns) hold at most two that are not 0."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all())


def sparse_refusals(model: nn.Module) -> dict[str, str]:
    """Return why a layer that multiplies has no sparse kernel, "" where it has one, by its name; weights are plain."""
    read = {
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if type(module).__module__.startswith("torch.nn.") and not isinstance(module, HOLDERS)
        for child, _ in module.named_children()
    }
    found = {name: _refusal(layer) for name, layer in weighted_layers(model)}
    known = dict.fromkeys(found.keys() & read, "read by the module around it")
    return found | known | dict.fromkeys(found.keys() & {""}, "the whole model, with no module around it")


def _refusal(layer: nn.Module) -> str:
    if layer._forward_pre_hooks or layer._forward_hooks:
        return "rounding their inputs or otherwise hooked"
    if type(layer) is not nn.Linear and not _is_pointwise(layer):
        return "neither linear nor a plain 1×1 convolution"
    weight = layer.weight.detach().flatten(1)
    if not is_two_four(weight):
        return "not 2:4 sparse"
    if weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE:
        return f"of a width that is no multiple of {MULTIPLE}"
    return ""


def _is_pointwise(layer: nn.Module) -> bool:
    plain = type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1
    return plain and layer.padding in ((0, 0), "valid", "same")


def require_sparse(refusals: dict[str, str]) -> None:
    """Raise RuntimeFailed that counts the reasons, unless at least one layer has a sparse kernel."""
    if "" in refusals.values():
        return
    reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(refusals.values()).most_common())
    has = f"its layers that multiply are {reasons}" if reasons else "it has none that multiplies"
    raise RuntimeFailed(
        f"No layer of this model can run on a 2:4 sparse kernel: {has}. SemiStructuredPruning makes weights 2:4 "
        "sparse; or run it on cuda half."
    )


def packed(weight: Tensor) -> Tensor:
    """Return a 2:4 sparse weight on the GPU, half precision (rows, columns), as its kernel reads it."""
    from torch.sparse import to_sparse_semi_structured

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that torch's interface to it is a prototype
        return to_sparse_semi_structured(weight)


class SparseLayer(nn.Module):
    """A linear layer or 1×1 convolution multiplied by a sparse kernel; `pack` turns its dense weight into the kernel's.

    The weight is kept out of sight of `parameters` and shared by copies: torch can neither move nor cut a packed one.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, pack: Callable[[Tensor], Tensor] = packed):
        super().__init__()
        weight, bias = layer.weight.detach().flatten(1).contiguous(), layer.bias
        held = pack(weight)
        self.kind, self.inputs = type(layer).__name__, weight.shape[1]
        self.stride = layer.stride if isinstance(layer, nn.Conv2d) else None
        parts = [part for name in ("packed", "meta") if (part := getattr(held, name, None)) is not None]
        self.weight_bytes = sum(part.nbytes for part in parts or [held]) + (0 if bias is None else bias.nbytes)
        self._multiply = lambda x: F.linear(x.contiguous(), held, bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride is None:
            return self._multiply(x)
        down, across = self.stride
        return self._multiply(x[..., ::down, ::across].movedim(-3, -1)).movedim(-1, -3)


class PreparedSparse(PreparedCuda):
    """A torch model on the GPU whose 2:4 sparse layers run on sparse kernels, the others as in `cuda half`."""

    def __init__(self, runtime: Cuda, model: nn.Module, example: Tensor, threads: int):
        super().__init__(runtime, model, example, threads)
        refusals = sparse_refusals(self.model)
        require_sparse(refusals)
        with torch.inference_mode():
            self.kernels = sparsified(self.model, refusals)
        count = sum(not why_not for why_not in refusals.values())
        self.tell(f"{count} of {len(refusals)} layers run a 2:4 sparse kernel")


def sparsified(
    model: nn.Module, refusals: dict[str, str], pack: Callable[[Tensor], Tensor] = packed
) -> tuple[Kernel, ...]:
    """Replace the layers that are not refused, in place, and return the kernel of each layer."""
    for name, layer in weighted_layers(model):
        if not refusals[name]:
            replace_layer(model, name, SparseLayer(layer, pack))
    return tuple(Kernel(name, "fp16", "dense" if why_not else SPARSE_KERNEL) for name, why_not in refusals.items())


class CudaSparse(Cuda):
    """torch in half precision on an NVIDIA GPU, with sparse kernels for the layers whose weights are 2:4 sparse."""

    prepared = PreparedSparse

    def __init__(self, name: str, dense: Cuda):
        super().__init__(name, torch.float16, needs=AMPERE)
        self.dense = dense

    def available(self):
        here, why_not = super().available()
        library = getattr(torch.backends, "cusparselt", None)
        if here and (library is None or not library.is_available()):
            return False, "this torch was built without cuSPARSELt, which has the sparse kernels"
        return here, why_not

    def for_baseline(self) -> Runtime:
        """Return the same precision on dense kernels: a model that nobody pruned has no 2:4 sparse layer."""
        return self.dense.flushing() if self.flush_l2 else self.dense
