"""The embedded letters and digits; the layout of the two files is described in data/README.md."""

from __future__ import annotations

import io
import json
import lzma
from functools import lru_cache

import numpy as np
import torch

from workbench.data.splits import Data, DataError, make_data
from workbench.paths import shipped


@lru_cache(maxsize=4)
def load_glyphs(size: int | None) -> Data:
    """The glyphs, split by typeface family; `sources` are the families."""
    index, levels = shipped("data", "glyphs.json"), shipped("data", "glyphs.npy.xz")
    try:
        families = json.loads(index.read_text(encoding="utf-8"))
        stack = np.load(io.BytesIO(lzma.decompress(levels.read_bytes())), allow_pickle=False)
    except (OSError, ValueError, lzma.LZMAError, EOFError) as error:
        raise DataError(
            f"The embedded glyphs in {index.parent} are damaged ({error}); install workbench again."
        ) from error
    classes, rows = families["classes"], families["families"]
    images = torch.from_numpy(stack * np.uint8(17))  # (families, classes, 28, 28), levels 0..15 -> 0..255
    parts = {}
    for key in ("train", "val", "test"):
        mine = torch.tensor([i for i, row in enumerate(rows) if row["split"] == key])
        labels = torch.arange(len(classes)).repeat(len(mine))
        parts[key] = (images[mine].flatten(0, 1).unsqueeze(1), labels, mine.repeat_interleave(len(classes)))
    return make_data("glyphs", "Glyphs", classes, parts, size, [row["name"] for row in rows])
