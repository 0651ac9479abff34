"""Serve a folder of notebooks with Voilà at a printed address."""

from __future__ import annotations

import os
import socket
from pathlib import Path

JUPYTER = Path(__file__).with_name("jupyter")  # templates and the configuration, laid out as Jupyter looks for them
DEFAULT_PORT = 8866


def environment() -> dict[str, str]:
    """Return the variables with which Voilà finds our templates and configuration, also in a Jupyter server."""
    templates = [str(JUPYTER), *filter(None, [os.environ.get("JUPYTER_PATH")])]
    return {
        "JUPYTER_PATH": os.pathsep.join(templates),
        "JUPYTER_CONFIG_PATH": str(JUPYTER),
        "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one left in the home folder
    }


def free_port(host: str, first: int = DEFAULT_PORT, tries: int = 50) -> int:
    """Return the first port from `first` on that nobody listens at; raise OSError when all are taken."""
    for port in range(first, first + tries):
        if is_free(host, port):
            return port
    raise OSError(f"Ports {first} to {first + tries - 1} on {host} are taken; name another with --port.")


def is_free(host: str, port: int) -> bool:
    """True when a server can listen at this port now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def serve(folder: Path, *, host: str = "127.0.0.1", port: int | None = None, browser: bool = True) -> None:
    """Serve the notebooks of `folder` until interrupted; raise OSError when the port is taken."""
    if port is not None and not is_free(host, port):
        raise OSError(f"Port {port} on {host} is taken; choose another with --port, or leave it out.")
    os.environ.update(environment())
    app = _application()
    argv = [str(folder), f"--Voila.ip={host}", f"--port={port or free_port(host)}"]
    app.launch_instance([*argv, *([] if browser else ["--no-browser"])], config_file_paths=[str(JUPYTER)])


def _application() -> type:
    """Return Voilà's application, made to say where it serves in one line."""
    from tornado.ioloop import IOLoop
    from voila.app import Voila

    class Dashboards(Voila):
        port_retries = 0

        def listen(self):
            IOLoop.current().add_callback(self.announce)  # runs on the loop's first turn: the port is open by then
            super().listen()

        def announce(self):
            print(f"The dashboards are at {self.display_url}  (Ctrl-C stops them)", flush=True)

    return Dashboards
