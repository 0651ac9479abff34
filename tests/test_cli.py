"""The command line: quick, and clear when it is used wrongly."""

import subprocess
import sys


def run(*argv, **kwargs):
    return subprocess.run([sys.executable, "-m", "workbench", *argv], capture_output=True, text=True, **kwargs)


def test_help_names_every_command_without_importing_torch():
    code = "import sys; from workbench.cli.main import parser; parser([]).format_help(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
    done = run("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("dashboard", "lab"))
