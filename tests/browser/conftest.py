"""A real Chromium, and real servers that it visits. Screenshots go to $WORKBENCH_SCREENSHOTS or a temporary folder."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
HOW_TO_GET_ONE = "No Chromium here; install it (Debian: sudo apt install chromium) or put it on the PATH."
START_SECONDS = 120  # a cold import of torch on a busy machine takes long; this only bounds a hang


def chromium_path():
    """Return the path of a Chromium-like browser, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium. Without one the tests are skipped; with CI=true they fail, so that CI never goes blind."""
    path = chromium_path()
    if path is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(HOW_TO_GET_ONE)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """What a page asked for and complained about while it was open."""

    def __init__(self, page):
        self.requests, self.errors = [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))

    @property
    def strangers(self):
        """Requests to anything but this machine."""
        here = re.compile(r"(blob:)?(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|about:")
        return [url for url in self.requests if not here.match(url)]


@pytest.fixture
def page(browser):
    """A fresh page, 1280 × 900, with `page.visit` recording its requests and errors."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.visit = Visit(page)
    yield page
    context.close()


def wait_for_answer(address):
    """Ask until the server answers; JupyterLab names its address a moment before it listens."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            return urllib.request.urlopen(address, timeout=START_SECONDS).close()
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@contextmanager
def serving(*command, says, cwd=ROOT, env=None):
    """Run a server until the block ends; yield the address that it prints in a line matching `says`."""
    started = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines, found, ready = [], [], threading.Event()

    def read():
        for line in started.stdout:
            lines.append(line)
            if not found and (match := re.search(says, line)):
                found.append(match.group(1))
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        ready.wait(START_SECONDS)
        assert found, f"The server named no address: {''.join(lines)}"
        wait_for_answer(found[0])
        yield found[0]
    finally:
        started.terminate()
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()


@pytest.fixture(scope="session")
def dashboards():
    """The address of the shipped notebooks, served as dashboards."""
    with serving("-m", "workbench", "dashboard", "--no-browser", says=r"(http://127\.0\.0\.1:\d+/)") as address:
        yield address


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory):
    """The folder where tests leave what they saw."""
    folder = Path(os.environ.get("WORKBENCH_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
