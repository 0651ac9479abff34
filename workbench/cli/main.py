"""Read the command line, run one command, and turn what goes wrong into one sentence."""

from __future__ import annotations

import argparse
import os
import sys

from workbench import __doc__ as about
from workbench import __version__
from workbench.cli import examining, modelling, serving

FAILED, MISUSED, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence and a hint, not the whole usage."""

    def error(self, message):
        self.exit(MISUSED, f"{self.prog}: {message}\nSee `{self.prog} --help`.\n")


def parser(argv: list[str]) -> Parser:
    """Return the parser; the settings of the technique named in `argv` are among its flags."""
    top = Parser(prog="workbench", description=about.splitlines()[0])
    top.add_argument("--version", action="version", version=f"workbench {__version__}")
    top.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serving.add_commands(commands)
    modelling.add_commands(commands, argv)
    examining.add_commands(commands)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; return 0, 1 when it failed, 2 when it was called wrongly, 130 when it was interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser(argv).parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: `workbench … | head`
        return FAILED
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if args.traceback:
            raise
        print(f"workbench {args.command}: {error}", file=sys.stderr)
        return FAILED
    return 0
