"""`workbench dashboard` and `workbench lab`: the notebooks as pages, and as notebooks."""

from __future__ import annotations

import shutil
from pathlib import Path

from workbench.paths import shipped

LAB_COPY = "workbench-notebooks"


def add_commands(commands) -> None:
    """Declare both commands on an argparse group of subcommands."""
    dashboard = commands.add_parser("dashboard", help="serve the notebooks as pages, code hidden")
    dashboard.set_defaults(run=run_dashboard)
    lab = commands.add_parser("lab", help="open the notebooks in JupyterLab")
    lab.set_defaults(run=run_lab)
    for parser in (dashboard, lab):
        parser.add_argument("--port", type=int, help="port to serve at (default: the first free one)")
        parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 lets other machines in")
        parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
        parser.add_argument(
            "--notebooks", type=Path, metavar="FOLDER", help="serve this folder instead of the shipped one"
        )


def run_dashboard(args) -> None:
    """Serve the dashboards until interrupted."""
    from workbench.dashboard import serve

    serve(_folder(args), host=args.host, port=args.port, browser=not args.no_browser)


def run_lab(args) -> None:
    """Open JupyterLab on the notebooks: in place in a checkout, on a copy when they come from an installed package."""
    from jupyterlab.labapp import LabApp

    folder = _folder(args)
    if not args.notebooks and not (folder.parent / "pyproject.toml").is_file():
        folder = writable_copy(folder, Path.cwd() / LAB_COPY)
    argv = [
        f"--ServerApp.root_dir={folder}",
        f"--ServerApp.ip={args.host}",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    if args.port is not None:
        argv += [f"--ServerApp.port={args.port}", "--ServerApp.port_retries=0"]
    LabApp.launch_instance([*argv, *(["--no-browser"] if args.no_browser else [])])


def writable_copy(source: Path, target: Path) -> Path:
    """Copy the notebooks that `target` lacks and return it; what is there already is the learner's own work."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(p for p in source.rglob("*") if p.is_file() and ".ipynb_checkpoints" not in p.parts):
        place = target / path.relative_to(source)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    print(f"Your copy of the notebooks is in {target}", flush=True)
    return target


def _folder(args) -> Path:
    folder = args.notebooks or shipped("notebooks")
    if not folder.is_dir():
        raise OSError(
            f"There is no folder of notebooks at {folder}; install the package again, or name one with --notebooks."
        )
    return folder.resolve()
