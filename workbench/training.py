"""Train a model, and count how often it is right: `fit` yields steps, `evaluations` better and better accuracies."""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.data import Data, Split
from workbench.surgery import weighted_layers
from workbench.weights import finite_weight

Z_95 = 1.959963984540054
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model, images, labels) -> the loss of a batch


@dataclass(frozen=True)
class Accuracy:
    """Images classified correctly out of all that were shown."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The fraction that is right, 0 to 1."""
        return self.correct / self.total if self.total else math.nan

    @property
    def percent(self) -> float:
        return 100 * self.value

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the fraction (Wilson, 1927, doi:10.1080/01621459.1927.10502953)."""
        if not self.total:
            return 0.0, 1.0
        n, p, z = self.total, self.value, Z_95
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.percent:.1f} % ({100 * low:.1f}–{100 * high:.1f} %) of {self.total:,} images"


@contextmanager
def evaluating(model: nn.Module):
    """Put the model in eval mode without gradients, and back as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(was_training)


def predictions(model: nn.Module, split: Split, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (predicted, true) class numbers, int64 (B,) each, batch by batch in the order of the split."""
    like = next(model.parameters(), torch.empty(0))  # images come in the precision of the model, and where it is
    for images, labels in split.batches(batch_size):
        with evaluating(model):
            images = images.to(like.device, like.dtype).contiguous(memory_format=torch.channels_last)
            yield model(images).argmax(1).cpu(), labels


def evaluations(model: nn.Module, split: Split, batch_size: int = 256) -> Iterator[Accuracy]:
    """Yield the accuracy after each batch; the last one is exact for the whole split."""
    correct = total = 0
    for predicted, labels in predictions(model, split, batch_size):
        correct += int((predicted == labels).sum())
        total += len(labels)
        yield Accuracy(correct, total)


def evaluate(model: nn.Module, split: Split, batch_size: int = 256) -> Accuracy:
    """Return the accuracy of `model` on every image of `split`."""
    accuracy = Accuracy(0, 0)
    for accuracy in evaluations(model, split, batch_size):  # noqa: B007
        pass
    return accuracy


@dataclass(frozen=True)
class Step:
    """One training step: its number of all, the mean loss since the last one, and validation accuracy when counted."""

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: Accuracy | None
    seconds: float


@dataclass
class _State:
    """What a training needs to go on after an interruption."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    keeps_best: bool = True
    steps: int = 0
    penalty: Callable[[int, int], Tensor] | None = None
    each_step: Callable[[int, int], bool | None] | None = None
    epoch: int = 0
    best: Accuracy | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def tell_step(self) -> None:
        """Call `each_step`, and forget the best weights if it says that the model has become another one."""
        if self.each_step and self.each_step(self.schedule.last_epoch + 1, self.steps):
            self.best, self.best_weights = None, {}

    def keep_if_best(self, accuracy: Accuracy) -> None:
        if self.keeps_best and (self.best is None or accuracy.value >= self.best.value):
            self.best = accuracy
            self.best_weights = copy.deepcopy(self.model.state_dict())

    def restore_best(self) -> None:
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)
        self.model.eval()

    def save(self, path: Path) -> None:
        from safetensors.torch import save_file

        moments = self.optimizer.state_dict()["state"]
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best_weights.items()}
        tensors |= {f"optimizer.{i}.{k}": v for i, slots in moments.items() for k, v in slots.items()}
        note = {"epoch": self.epoch, "best": [self.best.correct, self.best.total] if self.best else None}
        part = path.with_suffix(".part")
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, part, {"note": json.dumps(note)})
        part.replace(path)

    def load(self, path: Path, steps_per_epoch: int) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            note = json.loads(file.metadata()["note"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.model.load_state_dict(_below("model.", tensors))
        self.best_weights = _below("best.", tensors)
        self.best = Accuracy(*note["best"]) if note["best"] else None
        self.epoch = note["epoch"]
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in _below("optimizer.", tensors).items():
            index, slot = key.split(".")
            moments.setdefault(int(index), {})[slot] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps, which the checkpoint holds
            for _ in range(self.epoch * steps_per_epoch):
                self.schedule.step()


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def jitter(images: Tensor, generator: torch.Generator, pixels: float = 2.0) -> Tensor:
    """Turn, scale, shear and shift each image (N, C, H, W) a little, at random; colour images are mirrored too."""
    n, channels, _, width = images.shape
    spread = torch.rand(n, 6, generator=generator) * 2 - 1
    turn, shear = 0.17 * spread[:, 0], 0.17 * spread[:, 1]
    grow = 1 + 0.14 * spread[:, 2:4]
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = turn.cos() * grow[:, 0], shear - turn.sin()
    matrix[:, 1, 0], matrix[:, 1, 1] = turn.sin(), turn.cos() * grow[:, 1]
    matrix[:, :, 2] = spread[:, 4:] * pixels * 2 / width
    if channels == 3:
        matrix[:, 0] *= torch.where(torch.rand(n, 1, generator=generator) < 0.5, -1.0, 1.0)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def has_fast_bfloat16() -> bool:
    """True when this processor multiplies bfloat16 matrices in hardware (AMX), so that autocast trains faster.

    AVX512-BF16 alone is not enough: on small convolutions its casts cost more than its products save.
    """
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, soft_weight: float
) -> Tensor:
    """Return the mean loss of a student that learns from labels and from a teacher's softened answers.

    (1 - soft_weight) · cross entropy + soft_weight · T² · KL(teacher at T ‖ student at T); logits are (N, classes).
    Source: Hinton, Vinyals and Dean, 2015, arXiv:1503.02531.
    """
    hard = F.cross_entropy(student, labels)
    soft = F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.log_softmax(teacher / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - soft_weight) * hard + soft_weight * temperature**2 * soft


def soft_objective(teacher: nn.Module, temperature: float, soft_weight: float) -> Objective:
    """Return the loss of a student that learns from `teacher` too; see `distillation_loss`."""
    teacher.eval()

    def objective(model, images, labels):
        with torch.no_grad():
            answers = teacher(images).float()
        return distillation_loss(model(images).float(), answers, labels, temperature, soft_weight)

    return objective


def _label_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images).float(), labels)


def check_trainable(model: nn.Module, data: Data) -> None:
    """Raise ValueError, saying what is wrong, where `model` cannot learn to answer the labels of `data`."""
    kind = type(model).__name__
    if len(data.train) == 0:
        raise ValueError(f"The data set {data.name!r} has no training images: pass one that has some.")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"{kind} has no parameters to train: there is nothing to learn.")
    for name, layer in weighted_layers(model):
        finite_weight(name, layer.weight.detach())
    answers, most = answer_shape(model, data.example(1)), int(data.train.labels.max())
    if len(answers) != 1 or answers[0] <= most:
        raise ValueError(
            f"{kind} answers an image with shape {answers}, and {data.name!r} has labels up to {most}: the model needs "
            f"one score for each of {len(data.classes)} classes."
        )


def answer_shape(model: nn.Module, images: Tensor) -> tuple[int, ...]:
    """Return the shape of what `model` answers to each of `images`; raises ValueError if it cannot answer them."""
    try:
        with evaluating(model):
            return tuple(model(images).shape[1:])
    except RuntimeError as error:
        kind, shape = type(model).__name__, tuple(images.shape[1:])
        reason = str(error).split("\n")[0].rstrip(".")
        raise ValueError(f"{kind} cannot answer images of shape {shape}: {reason}.") from error


def fit(
    model: nn.Module, data: Data, *,
    epochs: int = 12, batch_size: int = 128, learning_rate: float = 4e-3, weight_decay: float = 0.02,
    seed: int = 0, augment: bool = True, validations: int = 1, keep: str = "best", checkpoint: Path | None = None,
    teacher: nn.Module | None = None, temperature: float = 4.0, soft_weight: float = 0.9,
    objective: Objective | None = None, penalty: Callable[[int, int], Tensor] | None = None,
    each_step: Callable[[int, int], bool | None] | None = None, parameters: list[dict] | None = None,
) -> Iterator[Step]:  # fmt: skip
    """Train `model` in place (AdamW, one cycle) and yield a `Step` each few batches.

    Validation accuracy is counted `validations` times an epoch. When the iterator ends or is closed, the model holds
    the best weights so far, in eval mode. With `checkpoint`, each epoch is saved there and a later call goes on from
    it. With `teacher`, the loss is `distillation_loss`; `objective` is any other loss, of a model and a batch. The same
    seed gives the same result on the same machine.
    `each_step(number, steps)` is called in every step, number 1 first, when the gradients are there and the weights
    have not moved yet; it may change the model, and returning True makes `fit` forget what was best before.
    Without validation images the last weights stay. Raises ValueError as `check_trainable` does.
    `parameters`: groups as torch's optimizers take them, each with its own "lr". `penalty(step, steps)` is added to
    the loss of each step. `keep="last"` leaves the last weights, not the best, where accuracy is not all that counts.
    """
    check_trainable(model, data)
    if objective is None:
        objective = _label_loss if teacher is None else soft_objective(teacher, temperature, soft_weight)
    plan = _Plan(epochs, math.ceil(len(data.train) / batch_size), batch_size, seed, augment, validations, objective)
    groups = parameters if parameters is not None else model.parameters()
    optimizer = torch.optim.AdamW(groups, learning_rate, weight_decay=weight_decay)
    keeps_best = keep == "best" and len(data.val) > 0
    state = _State(model, optimizer, _one_cycle(optimizer, plan.steps), keeps_best, plan.steps, penalty, each_step)
    if checkpoint and checkpoint.is_file():
        state.load(checkpoint, plan.per_epoch)
    try:
        yield from _epochs(state, data, plan, checkpoint)
    finally:
        state.restore_best()


@dataclass(frozen=True)
class _Plan:
    """What a training does in each of its epochs, which have `per_epoch` steps."""

    epochs: int
    per_epoch: int
    batch_size: int
    seed: int
    augment: bool
    validations: int
    objective: Objective

    @property
    def steps(self) -> int:
        return self.epochs * self.per_epoch


def _one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that rises to each group's own rate in a quarter of the steps, and falls to nothing."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    steps = max(5, steps)  # torch divides by zero where a quarter of the steps is exactly one
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.25)


def _epochs(state: _State, data: Data, plan: _Plan, checkpoint: Path | None) -> Iterator[Step]:
    """Train through the epochs that are left, and save each."""
    while state.epoch < plan.epochs:
        yield from _epoch(state, data, plan)
        state.epoch += 1
        if checkpoint:
            state.save(checkpoint)


def _epoch(state: _State, data: Data, plan: _Plan) -> Iterator[Step]:
    """Train through all images once, yielding about twenty steps and `plan.validations` accuracies."""
    seed, per_epoch = plan.seed * 100_003 + state.epoch, plan.per_epoch
    generator = torch.Generator().manual_seed(seed)
    report, validate = max(1, per_epoch // 20), max(1, per_epoch // plan.validations)
    started, total, counted = time.perf_counter(), 0.0, 0
    for number, (images, labels) in enumerate(data.train.batches(plan.batch_size, seed=seed), 1):
        images = jitter(images, generator) if plan.augment else images
        total += _update(state, images.contiguous(memory_format=torch.channels_last), labels, plan.objective)
        counted += 1
        last = number == per_epoch
        accuracy = None
        if last or (number % validate == 0 and per_epoch - number >= validate // 2):
            accuracy = evaluate(state.model, data.val)
            state.keep_if_best(accuracy)
        if accuracy or number % report == 0:
            seconds = time.perf_counter() - started
            yield Step(state.epoch * per_epoch + number, plan.steps, state.epoch, total / counted, accuracy, seconds)
            total, counted = 0.0, 0


def _update(state: _State, images: Tensor, labels: Tensor, objective: Objective) -> float:
    """Take one optimizer step and return the loss."""
    state.model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16()):
        loss = objective(state.model, images, labels)
    if state.penalty is not None:
        loss = loss + state.penalty(state.schedule.last_epoch, state.schedule.total_steps)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.tell_step()
    state.optimizer.step()
    state.schedule.step()
    return loss.item()
