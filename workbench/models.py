"""The models of the workbench: how each is built, and its trained weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.paths import shipped


class ModelError(RuntimeError):
    """A model's name or its weights cannot be used; the message says what to do."""


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a shipped model without loading it; `epochs` is how long `workbench train` trains it."""

    title: str
    data: str
    classes: int
    epochs: int
    source: str


MODELS = {
    "glyphs-cnn": ModelInfo("Glyphs CNN", "glyphs", 47, 18, "VGG-like; Simonyan and Zisserman, 2015, arXiv:1409.1556"),
    "lenet-300-100": ModelInfo("LeNet-300-100", "mnist", 10, 40, "LeCun et al., 1998, doi:10.1109/5.726791"),
    "lenet-5": ModelInfo("LeNet-5 (Caffe)", "mnist", 10, 20, "Jia et al., 2014, arXiv:1408.5093"),
}

GLYPHS_CHANNELS = ((32, 2), (64, 1), (128, 1), (128, 2), (128, 1), (128, 1))  # outputs, stride


def _scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return convolution, batch normalization, ReLU: (N, inputs, H, W) -> (N, outputs, H/stride, W/stride)."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class GlyphsCNN(nn.Module):
    """Six 3×3 convolutions, global average pooling and one linear layer: (N, 1, 28, 28) -> (N, classes)."""

    def __init__(self, width: float = 1.0, classes: int = 47):
        super().__init__()
        blocks, inputs = [], 1
        for channels, stride in GLYPHS_CHANNELS:
            outputs = _scaled(channels, width)
            blocks.append(_convolution(inputs, outputs, stride))
            inputs = outputs
        self.features = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def lenet_300_100(width: float = 1.0, classes: int = 10) -> nn.Sequential:
    """Two hidden layers of 300 and 100 units, 266,610 parameters: (N, 1, 28, 28) -> (N, classes)."""
    first, second = _scaled(300, width), _scaled(100, width)
    hidden = [nn.Linear(784, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(second, classes))


def lenet_5(width: float = 1.0, classes: int = 10) -> nn.Sequential:
    """LeNet-5 as Caffe has it, 431,080 parameters: (N, 1, 28, 28) -> (N, classes)."""
    first, second, hidden = _scaled(20, width), _scaled(50, width), _scaled(500, width)
    convolutions = [nn.Conv2d(1, first, 5), nn.MaxPool2d(2), nn.Conv2d(first, second, 5), nn.MaxPool2d(2)]
    head = [nn.Flatten(), nn.Linear(second * 16, hidden), nn.ReLU(), nn.Linear(hidden, classes)]
    return nn.Sequential(*convolutions, *head)


_BUILDERS = {"glyphs-cnn": GlyphsCNN, "lenet-300-100": lenet_300_100, "lenet-5": lenet_5}


def _known(name: str) -> str:
    if name not in MODELS:
        raise ModelError(f"There is no model called {name!r}; the workbench has {', '.join(MODELS)}.")
    return name


def build(name: str, width: float = 1.0, classes: int | None = None, seed: int | None = None) -> nn.Module:
    """Return an untrained model; `width` scales every hidden layer, `seed` makes its first weights repeatable.

    The model remembers in `.architecture` how it was built, so that a file of it can be loaded without its code.
    """
    classes = classes or MODELS[_known(name)].classes
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        model = _BUILDERS[name](width, classes)
    model.architecture = {"name": name, "width": width, "classes": classes}
    return model


def weights_path(name: str, suffix: str = ""):
    """Return where the trained weights of a model lie, or of one of its students (`suffix` as in "width-0.25")."""
    return shipped("data", "weights", f"{name}{'-' + suffix if suffix else ''}.safetensors")


def load_weights(model: nn.Module, path) -> nn.Module:
    """Fill `model` with the weights in a safetensors file and return it in eval mode; floats may be stored in half."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise ModelError(f"There are no weights at {path}; train them with `workbench train`.")
    state = model.state_dict()
    stored = {key: value.to(state[key].dtype) for key, value in load_file(path).items() if key in state}
    model.load_state_dict(stored)
    return model.eval()


def save_weights(model: nn.Module, path, note: dict) -> None:
    """Write the weights as safetensors, with `note` as metadata, whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, part, metadata={key: json.dumps(value) for key, value in note.items()})
    part.chmod(0o644)  # safetensors leaves it readable by its owner alone
    part.replace(path)


def load_model(name: str) -> nn.Module:
    """Return a trained model in eval mode; raises ModelError for an unknown name or missing weights."""
    return load_weights(build(_known(name)), weights_path(name))


def fingerprint(model: nn.Module) -> str:
    """Return sixteen hexadecimal digits that are the same for equal names and values of all tensors."""
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
