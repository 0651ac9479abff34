"""Where the files live that the package ships: data sets, trained weights, records, notebooks."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(*parts: str) -> Path:
    """Return the path of a shipped file: beside the package in a checkout, inside it in an installed wheel."""
    checkout = _PACKAGE.parent
    root = checkout if (checkout / "pyproject.toml").is_file() else _PACKAGE / "_shipped"
    return root.joinpath(*parts)
