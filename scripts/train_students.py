"""Train the students that the distillation slider shows at once, and for each its control without a teacher.

Both get the same first weights, images and epochs. Weights are stored in half precision, and the accuracy in their
record is counted after that rounding. What is already there for this teacher is kept: run it again to go on.

    python scripts/train_students.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from safetensors import safe_open
from tqdm import tqdm

import workbench as wb
from workbench.models import fingerprint, load_weights, save_weights

TEACHER = "glyphs-cnn"


def is_there(technique: wb.Distillation, teacher) -> bool:
    """True when a student of exactly this teacher and these settings is shipped already."""
    path = technique.shipped_path(teacher)
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        note = {key: json.loads(value) for key, value in file.metadata().items()}
    return note["teacher"] == fingerprint(teacher) and note["settings"] == technique.values()


def train(technique: wb.Distillation, teacher, data) -> None:
    """Train one student and store it with its record."""
    with tqdm(desc=f"width {technique.width}, soft weight {technique.soft_weight}", unit="step") as bar:

        def watch(step):
            bar.total, bar.n = step.steps, step.step
            bar.set_postfix_str(f"loss {step.loss:.3f}" + (f", {step.accuracy.percent:.1f} %" if step.accuracy else ""))

        student = technique.compress(teacher, data, watch)
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder) / "half.safetensors"
        save_weights(student.half(), rounded, {})
        counted = wb.evaluate(load_weights(technique.untrained(teacher), rounded), data.val)
    note = {"teacher": fingerprint(teacher), "settings": technique.values(), "data": data.name}
    note["validation"] = [counted.correct, counted.total]
    save_weights(student, technique.shipped_path(teacher), note)
    print(f"{technique}: {counted}")


def main() -> None:
    teacher, data = wb.load_model(TEACHER), wb.load_data(wb.MODELS[TEACHER].data)
    widths = wb.Distillation.settings()[0].positions()
    for technique in [wb.Distillation(width=w, **control) for w in widths for control in ({}, {"soft_weight": 0.0})]:
        if not is_there(technique, teacher):
            train(technique, teacher, data)


if __name__ == "__main__":
    main()
