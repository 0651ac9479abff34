"""Each notebook runs top to bottom in a fresh kernel under nbval, on one core, without a network."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 60  # the promise of the notebooks, for each of them, on one core
NOWHERE = "http://127.0.0.1:9"  # the discard port: whatever asks for the network fails at once


def one_core():
    """Keep the child on one processor, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, record_property):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env"]
    proxies = {name: NOWHERE for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    environment = {**os.environ, **proxies, "no_proxy": "", "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        [*command, f"--nbval-cell-timeout={SECONDS}", str(path)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=one_core if os.name == "posix" else None,
    )
    seconds = time.perf_counter() - started
    record_property("seconds", round(seconds, 1))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert seconds <= SECONDS, f"{path.name} took {seconds:.0f} s on one core; it may take {SECONDS}."
