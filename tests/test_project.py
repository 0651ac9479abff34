"""What holds for the project as a whole: layers, thin notebooks, one list of names, a wheel that is complete."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import workbench

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "workbench"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# The way of the data; a module imports only from modules that stand before it. `paths` is known to all.
LAYERS = (
    "paths surgery weights data models training artifact results invariants technique techniques "
    "runtimes export subjects profiler records plots reports panel dashboard doctor cli"
).split()
ONLY_IN = {
    "plotly": {"plots", "panel"},
    "ipywidgets": {"panel"},
    "anywidget": {"panel"},
    "openvino": {"runtimes", "export"},
    "onnx": {"runtimes", "export"},
    "onnxruntime": {"runtimes", "export"},
    "voila": {"dashboard"},
    "jupyterlab": {"cli"},
}


def modules():
    """Yield (path, its layer, its syntax tree) for each module of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        yield path, layer, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree):
    """Yield (name imported, line, True when it is inside a function) for each import of a module."""
    inside = {
        child for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, node in inside
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, node.lineno, node in inside
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"line {node.lineno}: relative import; name the module from `workbench` on.")


def test_imports_point_only_upward():
    wrong = []
    for path, layer, tree in modules():
        if layer in ("__init__", "__main__"):
            continue
        assert layer in LAYERS, f"{path.name} stands in no layer; add it to LAYERS where the data passes it."
        for name, line, _ in imports(tree):
            head, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if head == "workbench" and target and LAYERS.index(target) > LAYERS.index(layer):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports workbench.{target} from below")
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_stay_in_their_layers():
    wrong = []
    for path, layer, tree in modules():
        for name, line, inside in imports(tree):
            head = name.split(".")[0]
            if layer not in ONLY_IN.get(head, {layer}):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {head}, which belongs to {ONLY_IN[head]}")
            if head == "torchvision" and not inside:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports torchvision for everyone; do it in the function")
    assert not wrong, "\n".join(wrong)


def test_every_library_imported_is_declared():
    declared = re.findall(r'"([A-Za-z0-9_-]+)[>=<]', (ROOT / "pyproject.toml").read_text())
    optional = {"onnx", "onnxruntime"}
    known = {name.lower() for name in declared} | optional | set(sys.stdlib_module_names) | {"workbench", "PIL"}
    comes_with = {
        "tornado",
        "psutil",
        "IPython",
        "traitlets",
        "comm",
        "jupyter_server",
    }  # of voila, ipykernel, ipywidgets
    found = {name.split(".")[0] for _, _, tree in modules() for name, _, _ in imports(tree)}
    assert found - known - comes_with == set()


def test_importing_the_package_is_quick():
    code = "import sys, workbench; print({'torch', 'plotly', 'ipywidgets', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_every_public_name_is_there():
    assert [name for name in workbench.__all__ if getattr(workbench, name, None) is None] == []
    with pytest.raises(AttributeError, match="has no 'lowrank'"):
        workbench.lowrank  # noqa: B018


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_thin(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for number, cell in enumerate(code, 1):
        source = "".join(cell["source"])
        assert not cell["outputs"] and cell["execution_count"] is None, f"code cell {number} has outputs: make format"
        assert not re.search(r"^\s*(def|class|async def) ", source, re.MULTILINE), (
            f"code cell {number} defines something"
        )
        assert len(source.splitlines()) <= 10, f"code cell {number} is longer than ten lines"
    asserts = sum("assert " in "".join(cell["source"]) for cell in code)
    assert asserts >= 2, f"{asserts} code cells assert something; without, a run proves only that nothing raised."


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_lead_to_files_that_exist(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#?\s]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


def offered(cell):
    """Return the techniques that a cell names, where it makes a panel of the notebook's family."""
    names = re.findall(r"wb\.([A-Z]\w+)", cell) if "wb.panel(" in cell and "Pipeline" not in cell else []
    return [getattr(workbench, name) for name in names]


@pytest.mark.parametrize("path", NOTEBOOKS[2:7], ids=lambda path: path.stem)
def test_every_control_of_a_panel_is_explained(path):
    """Under `Controls.` each setting is named as the panel labels it; of Quantization in its own notebook alone."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    legend = " ".join(" ".join(s.split()) for s in sources if "**Controls.**" in s)
    kinds = {kind for s in sources for kind in offered(s)}
    kinds -= set() if "quantization" in path.stem else {workbench.Quantization}
    missing = {f"{kind.__name__}: {s.label}" for kind in kinds for s in kind.settings() if f"*{s.label}*" not in legend}
    assert kinds and not missing


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(folder), str(ROOT)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("workbench-*.whl"))


def tracked(folder):
    """Return the files of a folder that are in git, or all of them outside a checkout."""
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True).stdout.split()
    return listed or [str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.is_file()]


def test_wheel_carries_data_notebooks_and_pages(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = [f"workbench/_shipped/{name}" for folder in ("data", "notebooks") for name in tracked(folder)]
    assert [name for name in shipped if name not in names] == []
    assert "workbench/dashboard/jupyter/voila/templates/workbench/index.html.j2" in names
    assert not [name for name in names if ".ipynb_checkpoints" in name or name.endswith((".pyc", ".part"))]


def test_wheel_works_away_from_the_checkout(wheel, tmp_path):
    """Unpacked elsewhere, the package finds its own data and notebooks, and its command answers."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import workbench.paths as p; here = p.shipped('notebooks');"
        "print(here, len(list(here.glob('*.ipynb'))), p.shipped('data').is_dir(), p.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    folder, count, has_data, module = done.stdout.split()
    assert module.startswith(str(tmp_path)) and folder.startswith(str(tmp_path))
    assert int(count) == len(NOTEBOOKS) and has_data == "True"
    version = subprocess.run(
        [sys.executable, "-m", "workbench", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert version.stdout.strip() == f"workbench {workbench.__version__}"


def test_versions_agree():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{workbench.__version__}"' in project
    assert f"## [{workbench.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_names_only_commands_that_exist():
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {name for name in re.findall(r"make ([a-z]+)", readme)} <= targets
    commands = "dashboard lab train compress profile sweep doctor export".split()
    assert set(re.findall(r"^workbench ([a-z]+)", readme, re.MULTILINE)) <= set(commands)
    files = re.findall(r"\]\((?!https?:)([^)#]+)\)", readme)
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_binder_builds_in_principle():
    """repo2docker reads binder/ and writes a Dockerfile from it, without Docker."""
    pytest.importorskip(
        "repo2docker", reason="jupyter-repo2docker is not installed; `pip install -e '.[test]'` adds it."
    )
    command = [sys.executable, "-m", "repo2docker", "--no-build", "--debug", str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    dockerfile = done.stdout + done.stderr
    assert "binder/requirements.txt" in dockerfile and "binder/start" in dockerfile and "postBuild" in dockerfile


def test_binder_pins_versions_that_the_package_accepts():
    from packaging.requirements import Requirement

    lines = (ROOT / "binder" / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    dependencies = re.search(
        r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL
    )
    wanted = re.findall(r'"([^"]+)"', dependencies.group(1))
    ranges = {Requirement(text).name: Requirement(text).specifier for text in wanted}
    assert {pin.name for pin in pins} >= {"torch", "torchvision"}
    for pin in pins:
        (version,) = pin.specifier
        assert version.operator == "==", f"{pin} is not exact"
        assert pin.name not in ranges or ranges[pin.name].contains(version.version), f"{pin} is outside the range"
    assert all(str(pin).endswith("+cpu") for pin in pins if pin.name.startswith("torch"))
