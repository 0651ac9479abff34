"""Real MNIST for the tests that need it: in WORKBENCH_DATA, or in a copy kept beside the checkout, else they skip."""

import os
from pathlib import Path

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if "WORKBENCH_DATA" not in os.environ and (BESIDE / "MNIST").is_dir():
    os.environ["WORKBENCH_DATA"] = str(BESIDE)
