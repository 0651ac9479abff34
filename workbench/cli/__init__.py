"""The command `workbench`: what the notebooks do, from a terminal.

Torch and the servers are imported inside the commands, so that `workbench --help` answers at once.
"""

from workbench.cli.main import main

__all__ = ["main"]
