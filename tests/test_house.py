"""The rules of the house: who may import whom, how long a file and a function may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fsu_ray"
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import those of a lower layer, and those of its own part.
LAYERS = [
    {"errors", "recipes", "records", "work"},
    {"config", "gate"},
    {"search_space"},
    {"models", "storage"},
    {"method"},
    {"retention", "recheck", "cluster"},
    {"pipeline"},
    {"search", "schedule", "dispatch"},
    {"experiments"},
    {"service"},
    {"console"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
FORBIDDEN = {
    "models": {"ray", "sqlalchemy", "alembic"},
    "method": {"ray", "sqlalchemy", "alembic"},
    "storage": {"torch", "torchvision", "ray"},
    "cluster": {"sqlalchemy"},
    "pipeline": {"torch", "ray", "sqlalchemy"},
}


def part(file: Path) -> str:
    """The layer's word for a file: its folder or its own name."""
    inside = file.relative_to(PACKAGE)
    return inside.parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The dotted names that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def level(name: str) -> int:
    """The number of the layer that `name` is in."""
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_down_only(file: Path) -> None:
    """No file imports a layer above it or a sibling part, or a library that its part must not know."""
    own = part(file)
    for name in imported(file):
        assert name.split(".")[0] != "tests", f"{file} imports {name}"
        assert name.split(".")[0] not in FORBIDDEN.get(own, set()), f"{file} imports {name}"
        if own == "__init__" or not name.startswith("fsu_ray."):
            continue
        other = name.split(".")[1]
        known = any(other in layer for layer in LAYERS)
        if other == own or not known:
            continue
        below = level(other) < level(own)
        first = own in LAYERS[0] and other in LAYERS[0]
        assert below or first or (own, other) in {("demo", "console")}, f"{file} imports {name}"


def test_the_inversion_sees_no_data() -> None:
    """invert gets a classifier and no data: it cannot even import the data sets."""
    assert "fsu_ray.method.datasets" not in imported(PACKAGE / "method" / "invert.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_functions_stay_short(file: Path) -> None:
    """Functions have about 60 lines at most, and no file has a name that says nothing."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 65, f"{node.name} is too long"
    assert not re.search(r"utils|common|helpers|manager", file.stem)


def test_importing_the_package_loads_neither_ray_nor_torch() -> None:
    """`import fsu_ray` and the command line's own module stay light."""
    heavy = "[m for m in ('ray', 'torch', 'sqlalchemy') if m in sys.modules]"
    code = f"import sys, fsu_ray, fsu_ray.service, fsu_ray.cli; print({heavy})"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("file", [*sorted((PACKAGE / "cli").glob("*.py")), PACKAGE / "demo.py"], ids=lambda f: f.name)
def test_commands_call_the_service_alone(file: Path) -> None:
    """Commands take types and constants from below the service, and no function that does the work."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
    below = {"storage", "pipeline", "retention", "recheck", "schedule", "dispatch", "method", "cluster", "search"}
    for node in nodes:
        if node.module.startswith("fsu_ray.") and node.module.split(".")[1] in below and file.name != "demo.py":
            assert all(alias.name[0].isupper() for alias in node.names), f"{file} imports {ast.unparse(node)}"
    assert not re.search(r"\.(ledger|artifacts)\.", re.sub(r"fsu_ray\.cli\.artifacts", "", file.read_text()))


def test_one_place_calls_cuda() -> None:
    """Devices come from Ray or from one line; nothing calls .cuda()."""
    assert not [f for f in FILES if ".cuda()" in f.read_text()]


def test_ci_runs_the_command_of_the_readme() -> None:
    """The second command of the README stands in .ci/run to the letter."""
    commands = re.findall(r"^```sh\n(python3 -m venv [^\n]*)\n```", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
