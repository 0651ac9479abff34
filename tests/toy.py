"""A small model on small images that a machine can tell apart, for tests of the panel: made in a second."""

from dataclasses import dataclass

import torch
from torch import nn

from workbench.data import Data, Split
from workbench.surgery import clone
from workbench.technique import Technique, setting

CLASSES = 8
torch.set_num_threads(1)  # threads that wait for one another crawl when the machine has other work too


def images(count, seed):
    """Noisy images (count, 1, 16, 16), uint8: each class is a bright square at its own place."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    noise = torch.randint(0, 200, (count, 1, 16, 16), generator=generator)
    for label in range(CLASSES):
        row, column = 4 * (label // 4) + 2, 4 * (label % 4)
        noise[label::CLASSES, 0, row : row + 4, column : column + 4] += 45
    return Split(noise.clamp(0, 255).to(torch.uint8), labels, (0.4,), (0.25,))


def data(val=1200, test=600):
    names = tuple("ABCDEFGH"[:CLASSES])
    return Data("toy", "Toy squares", images(512, 0), images(val, 1), images(test, 2), names)


def model():
    """A trained network with two convolutions and two linear layers, about 70,000 parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 100),
        nn.ReLU(),
        nn.Linear(100, CLASSES),
    )
    batches = list(images(1024, 3).batches(128))
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(24):
        x, labels = batches[step % len(batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return net.eval()


@dataclass(frozen=True)
class Picky(Technique):
    """Refuses two values at once."""

    one: int = setting(1, low=0, high=4, step=1, neutral=0)
    two: int = setting(4, low=0, high=4, step=1)

    def __post_init__(self):
        if self.one > self.two:
            raise ValueError(f"Picky: one is {self.one}, more than two, which is {self.two}; lower it.")

    def compress(self, model, data=None, watch=None):
        """Return a copy."""
        return clone(model)
