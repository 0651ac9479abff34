"""Names for channels, some of which turn out to be the same channel: a union-find with reasons."""

from __future__ import annotations

import numpy as np


class ChannelNames:
    """Every channel gets a number; `join` says that two numbers mean one channel, `pin` that it must stay."""

    def __init__(self):
        self.parent: list[int] = []
        self.reasons: dict[int, str] = {}

    def fresh(self, count: int) -> np.ndarray:
        """Return `count` new names."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def find(self, name: int) -> int:
        """Return the name that stands for all names joined with this one."""
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def roots(self, names: np.ndarray) -> np.ndarray:
        """Return `find` of each name, same shape."""
        return np.array([self.find(name) for name in names.ravel().tolist()], dtype=np.int64).reshape(names.shape)

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Make the two name arrays mean the same channels, place by place; a pin on one holds both."""
        for a, b in zip(left.ravel().tolist(), right.ravel().tolist(), strict=True):
            a, b = self.find(a), self.find(b)
            if a == b:
                continue
            self.parent[b] = a
            if b in self.reasons:
                self.reasons.setdefault(a, self.reasons.pop(b))

    def pin(self, names: np.ndarray, reason: str) -> None:
        """Keep these channels, for this reason; an earlier reason stays."""
        for name in names.ravel().tolist():
            self.reasons.setdefault(self.find(name), reason)

    def reason(self, name: int) -> str | None:
        """Return why the channel must stay, or None if it may go."""
        return self.reasons.get(self.find(name))
