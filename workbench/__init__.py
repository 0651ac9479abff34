"""Make neural networks smaller and faster, and see what it really did: bytes, accuracy, milliseconds.

Names are imported on first use, so that `import workbench` and `workbench --help` stay quick.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOME = {
    "workbench.technique": ("Pipeline", "Setting", "StageReport", "Technique", "setting"),
    "workbench.data": ("DATA_SETS", "Data", "DataError", "Split", "load_data"),
    "workbench.models": ("MODELS", "build", "load_model"),
    "workbench.training": ("Accuracy", "Step", "evaluate", "evaluations", "fit"),
    "workbench.techniques": (
        "TECHNIQUES",
        "AWQ",
        "AdaRound",
        "BFloat16",
        "CPDecomposition",
        "ChannelPruning",
        "DepthwiseSeparable",
        "Distillation",
        "DistillationFeatures",
        "DistillationRelational",
        "EntropyAwareTraining",
        "FineTune",
        "Float16",
        "Float8",
        "GPTQ",
        "GradualPruning",
        "KEEP_SIZE",
        "LayerDropping",
        "LoRA",
        "LowRank",
        "MagnitudePruning",
        "MixedPrecision",
        "MovementPruning",
        "NormalFloat4",
        "PointwiseConvolution",
        "Quantization",
        "QuantizationAwareTraining",
        "SelfDistillation",
        "SemiStructuredPruning",
        "Tucker",
        "WandaPruning",
        "WeightClustering",
        "WeightDecayPruning",
    ),
    "workbench.artifact": ("ArtifactError", "Ledger", "encode", "ledger", "load", "save"),
    "workbench.invariants": ("Invariants", "broken"),
    "workbench.runtimes": ("RUNTIMES",),
    "workbench.export": ("export_onnx", "export_openvino"),
    "workbench.profiler": ("Profile", "profile"),
    "workbench.records": ("Record", "pareto", "read_records", "sweep"),
    "workbench.doctor": ("doctor",),
    "workbench.panel": ("panel",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"workbench has no {name!r}; it has: {', '.join(__all__)}.")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return [*globals(), *__all__]
