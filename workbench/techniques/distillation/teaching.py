"""What all kinds of distillation share: one training with a teacher, and a look at what a layer reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.surgery import clone, weighted_layers
from workbench.technique import setting
from workbench.techniques.repair import finetune
from workbench.training import evaluating
from workbench.weights import finite_weight

LEARNING_RATE = 4e-3
EXAMPLES = 2  # images to see shapes with


def temperature_setting():
    """Declare the setting `temperature`, which has an effect where `soft_weight` lets the teacher's answers count."""
    words = "Softens the teacher's answers, where they count."
    return setting(4.0, low=1.0, high=20.0, step=0.5, help=words, applies=lambda values: values["soft_weight"] > 0)


def teach(student: nn.Module, model: nn.Module, data, technique, watch=None) -> nn.Module:
    """Train `student` in place by the technique's objective, with `model` as teacher, and return it in eval mode.

    Raises ValueError without training images, or where student and teacher do not answer with as many classes.
    """
    name = type(technique).__name__
    if not hasattr(data, "train"):
        raise ValueError(f"{name} trains a student: pass a data set from load_data.")
    for layer, weighted in weighted_layers(model):
        finite_weight(layer, weighted.weight.detach())
    teacher, example = clone(model).float(), data.example(EXAMPLES)
    ours, theirs = _answer(student, example, name, "student"), _answer(teacher, example, name, "teacher")
    if ours != theirs:
        raise ValueError(f"{name}: the student answers with shape {ours}, the teacher with {theirs}; they must agree.")
    trained, objective = technique.objective(student, teacher, example)
    options = {"learning_rate": LEARNING_RATE, "seed": technique.seed, "validations": 4, "objective": objective}
    try:
        finetune(trained, data, technique.epochs, watch, **options)
    finally:
        for reader in Reader.of(student):
            reader.remove()
    return student.eval()


def _answer(model: nn.Module, example: Tensor, name: str, who: str) -> tuple[int, ...]:
    """Return the shape of what a model answers."""
    try:
        with evaluating(model):
            return tuple(model(example).shape)
    except RuntimeError as error:
        shape = tuple(example.shape[1:])
        raise ValueError(f"{name}: the {who} cannot answer images of shape {shape} ({error}).") from error


class Reader:
    """Keeps what one layer of a model was last given, gradients included."""

    def __init__(self, model: nn.Module, name: str):
        self.value: Tensor | None = None
        self._handle = model.get_submodule(name).register_forward_pre_hook(self)

    def __call__(self, layer: nn.Module, args: tuple) -> None:
        self.value = args[0]

    def remove(self) -> None:
        self._handle.remove()

    @staticmethod
    def of(model: nn.Module) -> list[Reader]:
        """Return the readers that sit on a model's layers."""
        hooks = (hook for layer in model.modules() for hook in layer._forward_pre_hooks.values())
        return [hook for hook in hooks if isinstance(hook, Reader)]


def layers_that_run(model: nn.Module, example: Tensor) -> list[str]:
    """Return the names of the linear and convolution layers in the order in which they run on `example`."""
    ran: dict[str, None] = {}
    handles = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: ran.setdefault(name))
        for name, layer in weighted_layers(model)
    ]
    try:
        with evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return list(ran)


def hint_layer(model: nn.Module, example: Tensor, depth: float) -> str:
    """Return the name of the layer whose input is the hint: at depth 1 the last that runs, never the first.

    Raises ValueError for a model in which fewer than two linear or convolution layers run.
    """
    names = layers_that_run(model, example)
    if len(names) < 2:
        kind = type(model).__name__
        raise ValueError(f"There is no layer to take a hint from in {kind}: it runs {len(names)} weighted layers.")
    return names[max(1, round(depth * (len(names) - 1)))]


def read(model: nn.Module, reader: Reader, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the answers of a model (B, classes) and what the reader's layer was given on the way, both float32."""
    answers = model(images).float()
    return answers, reader.value.float()


def read_alone(model: nn.Module, reader: Reader, images: Tensor) -> tuple[Tensor, Tensor]:
    """Do as `read` does, without gradients: for a teacher."""
    with torch.no_grad():
        return read(model, reader, images)
